"""Trajectories → rows → batches → forward passes: the only place where masks are built and tokens shifted."""

from __future__ import annotations

from spearrl.batching.allowed_tokens import AllowedIds
from spearrl.batching.anchors import anchor_id
from spearrl.batching.batch import Batch
from spearrl.batching.build_rows import rows_from_groups
from spearrl.batching.forward_inputs import ForwardInputs, forward_inputs, sequences
from spearrl.batching.prefix_tree import PrefixTree, distinct_tokens, prefix_tree, tree_passes, tree_shares
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
    "distinct_tokens",
    "denominator",
    "forward_inputs",
    "PrefixTree",
    "prefix_tree",
    "sequences",
    "tree_passes",
    "tree_shares",
    "rows_from_groups",
]
