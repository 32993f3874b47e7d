"""Models run over many rows in one sequence, a prefix tree in which shared beginnings stand once.

Each token attends to its own row up to itself. transformers would make a mask of all tokens x all tokens; here
attention goes piece by piece instead, without a mask (`learner/tree_attention.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spearrl.batching import PrefixTree, prefix_tree
from spearrl.config.sections import LearnerSection
from spearrl.errors import ConfigError
from spearrl.learner.tree_attention import AttentionPlan, attend

ATTENTION = "spearrl_tree"  # its name among transformers' attention functions
# On which packed and padded passes are compared; of some, the beginning is shared. They number tokens that are spread
# over a quarter of the vocabulary: the lowest ids are often control tokens, on which rounding is far larger.
PROBE_ROWS = ((1, 6, 11, 0, 5, 10, 15), (4, 9, 14, 3), (4, 9, 14, 3, 8, 13, 2, 7, 12), (4, 9, 1, 6))
SPREAD = 64  # parts of the vocabulary, a probe token each
# Largest relative difference of their outputs where weights have float32, and where fewer bits: there, or so many times
# what rows differ by when each is computed alone. Rows that see each other are off by a tenth and more in a trained
# model.
EXACT, ROUNDED, ROUNDINGS = 1e-3, 0.03, 4
HINT = "set learner.packing=padded"


def packed_arguments(tree: PrefixTree | None, device: torch.device | str) -> dict[str, Any]:
    """What a packed pass passes to the model besides token ids; nothing without a tree (a padded pass)."""
    if tree is None:
        return {}
    positions, plan = tree.positions.unsqueeze(0).to(device), AttentionPlan.of(tree, torch.device(device))
    # transformers takes a mask of four axes for a finished one and makes none; it hands "cu_seq_lens_q" to attention.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    return {"position_ids": positions, "cu_seq_lens_q": plan, "attention_mask": mask}


def why_padded(settings: LearnerSection, attempt: Callable[[], None]) -> str:
    """What keeps rows from being packed; "" where they are.

    Args:
        attempt: raises ConfigError where the model cannot, which is an error under packing="tree" alone.
    """
    if settings.packing == "padded":
        return "learner.packing=padded"
    try:
        attempt()
    except ConfigError as error:
        if settings.packing == "tree":
            raise
        return error.message
    return ""


def attend_by_tree(model: Any, *, pictures: bool) -> None:
    """Give a model that uses torch's attention one for packed passes; whoever else shares the model goes on as before.

    Raises:
        ConfigError: its layers do not attend to all tokens before, or by another attention; or it takes pictures.
    """
    if pictures:
        raise ConfigError("rows with pictures are not packed", where="learner.packing", hint=HINT)
    if model.config._attn_implementation not in ("sdpa", ATTENTION):
        text = f"shared prefixes with attention {model.config._attn_implementation!r}; expected 'sdpa'"
        raise ConfigError(text, where="learner.packing", hint=HINT)
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", not kinds):
        kinds.add("sliding_attention")
    if others := ", ".join(sorted(kinds - {"full_attention"})):
        text = f"{type(model).__name__} has layers that do not attend to all tokens before ({others})"
        raise ConfigError(text, where="learner.packing", hint=HINT)
    AttentionInterface.register(ATTENTION, lambda *inputs, **options: attend(inputs, options))
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def check_packing(policy: Any, name: str, device: torch.device) -> None:
    """Compare a packed pass with a padded one: a model with masks of its own kind would mix rows unseen.

    Args:
        policy: a Policy, or what wraps one.
        name: of the model, for the error.
    Raises:
        ConfigError: they differ, or the model takes no packed rows.
    """
    module = getattr(policy, "module", policy)
    weight = module.scorer.weight
    step = max(1, int(getattr(weight, "ds_shape", weight.shape)[0]) // SPREAD)
    rows = [torch.tensor(row) * step for row in PROBE_ROWS]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    width, flat = padded.shape[1], torch.cat(rows)
    source = torch.cat([number * width + torch.arange(len(row)) for number, row in enumerate(rows)]).to(device)
    tree, index = prefix_tree([row.numpy() for row in rows])
    tokens = torch.zeros(tree.bounds[-1], dtype=torch.int64).index_copy(0, index, flat)
    target = torch.zeros_like(source)
    errors = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
    policy.eval()
    bf16, module.bf16 = module.bf16, False  # autocast would hide what is compared behind its rounding
    try:
        with torch.no_grad():
            expected = policy(padded, source, target)[2].float()
            try:
                hidden = policy(tokens.unsqueeze(0).to(device), index.to(device), target, tree)[2].float()
            except errors as error:
                text = f"{name} takes no packed rows: {type(error).__name__}: {error}"
                raise ConfigError(text, where="learner.packing", hint=HINT) from error
            bound = EXACT
            if weight.dtype.itemsize <= 2:
                places = [torch.arange(len(row), device=device) for row in rows]
                alone = [policy(r[None].to(device), p, p)[2].float() for r, p in zip(rows, places, strict=True)]
                bound = max(ROUNDED, ROUNDINGS * float((torch.cat(alone) - expected).norm() / expected.norm()))
    finally:
        module.bf16 = bf16
    difference = float((hidden - expected).norm() / expected.norm())
    if not difference <= bound:
        text = f"{name}: packed rows see each other (its outputs are off by {difference:.1%}"
        raise ConfigError(f"{text}, where rounding explains {bound:.1%})", where="learner.packing", hint=HINT)
