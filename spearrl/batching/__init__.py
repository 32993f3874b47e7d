"""Trajectories → rows → batches → forward passes: the only place where masks are built and tokens shifted."""

from __future__ import annotations

from spearrl.batching.allowed_tokens import AllowedIds
from spearrl.batching.anchors import anchor_id
from spearrl.batching.batch import Batch
from spearrl.batching.build_rows import rows_from_groups
from spearrl.batching.forward_inputs import ForwardInputs, forward_inputs
from spearrl.batching.rows import Rows
from spearrl.batching.turn_table import TurnTable
from spearrl.losses import denominator

__all__ = [
    "AllowedIds",
    "Batch",
    "ForwardInputs",
    "Rows",
    "TurnTable",
    "anchor_id",
    "denominator",
    "forward_inputs",
    "rows_from_groups",
]
