"""Models run over rows end to end in one sequence: attention stays inside a row, positions start again with each.

Flash attention takes the rows' bounds itself. For torch's attention, transformers would make a mask of all tokens x all
tokens, which costs more than the padding saves: here it runs row by row instead, without a mask.
"""

from __future__ import annotations

from typing import Any

import torch

from spearrl.errors import ConfigError

ATTENTION = "spearrl_rows"  # its name among transformers' attention functions
PROBE_LENGTHS = (7, 4, 9)  # of the rows on which packed and padded passes are compared
# Largest relative difference of their outputs in float32 and bfloat16. Rows that see each other are off by a tenth and
# more in a trained model.
EXACT, ROUNDED = 1e-3, 0.03
HINT = "set learner.packing=false"


def packed_arguments(model: Any, lengths: tuple[int, ...], device: torch.device | str) -> dict[str, Any]:
    """What a packed pass passes to the model besides token ids; nothing where `lengths` is empty (a padded pass)."""
    if not lengths:
        return {}
    bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = {"position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(device)}
    if model.config._attn_implementation == ATTENTION:
        # transformers takes a mask of four axes for a finished one and makes none; bounds on the host cost no wait in
        # every layer.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        return {**positions, "cu_seq_lens_q": bounds, "attention_mask": mask}
    bounds, longest = bounds.to(device), max(lengths)
    ends = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return positions | ends


def attend_by_rows(model: Any) -> None:
    """Give a model that uses torch's attention one for packed passes; whoever else shares the model goes on as before.

    Raises:
        ConfigError: its layers do not attend to all tokens before.
    """
    if model.config._attn_implementation != "sdpa":
        return
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", not kinds):
        kinds.add("sliding_attention")
    if others := ", ".join(sorted(kinds - {"full_attention"})):
        text = f"{type(model).__name__} has layers that do not attend to all tokens before ({others})"
        raise ConfigError(text, where="learner.packing", hint=HINT)
    AttentionInterface.register(ATTENTION, lambda *inputs, **options: _attend(inputs, options))
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
    ids = [(5 * torch.arange(n, device=device) + 3 * row + 1) % 16 for row, n in enumerate(PROBE_LENGTHS)]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    source = torch.cat(
        [row * max(PROBE_LENGTHS) + torch.arange(n, device=device) for row, n in enumerate(PROBE_LENGTHS)]
    )
    target, every = torch.zeros_like(source), torch.arange(len(source), device=device)
    errors = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
    policy.eval()
    with torch.no_grad():
        expected = policy(padded, source, target)[2].float()
        try:
            hidden = policy(torch.cat(ids).unsqueeze(0), every, target, PROBE_LENGTHS)[2].float()
        except errors as error:
            text = f"{name} takes no packed rows: {type(error).__name__}: {error}"
            raise ConfigError(text, where="learner.packing", hint=HINT) from error
    difference = float((hidden - expected).norm() / expected.norm())
    full_precision = next(policy.parameters()).dtype.itemsize > 2 and not policy.bf16
    if not difference <= (EXACT if full_precision else ROUNDED):
        text = f"{name}: packed rows see each other (its outputs are off by {difference:.1%})"
        raise ConfigError(text, where="learner.packing", hint=HINT)


def _attend(inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[torch.Tensor, None]:
    """transformers' attention function. Inputs are the module, query, key and value [1, heads, L, d], and the mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    bounds = options.pop("cu_seq_lens_q", None)
    if bounds is None:
        return sdpa_attention_forward(*inputs, **options)
    lengths, options["attention_mask"] = bounds.diff().tolist(), None
    rows = zip(*(tensor.split(lengths, dim=2) for tensor in inputs[1:4]), strict=True)
    return torch.cat([sdpa_attention_forward(inputs[0], *row, **options)[0] for row in rows], dim=1), None
