"""Models run over rows end to end in one sequence: attention stays inside a row, positions start again with each.

Flash attention takes the rows' bounds itself. torch's attention gets a mask of all tokens x all tokens from transformers for such a sequence,
which costs more than the padding saves: here it runs row by row instead, without a mask.
"""

from __future__ import annotations

from typing import Any

import torch

from spearrl.errors import ConfigError

ATTENTION = "spearrl_rows"  # its name among transformers' attention functions
PROBE = (7, 4, 9)  # tokens of the rows on which packed and padded passes are compared
EXACT, ROUNDED = (
    1e-3,
    0.03,
)  # relative difference of their outputs in fp32 and bf16; rows that see each other are off by a tenth and more once trained
HINT = "set learner.packing=false"


def packed_arguments(model: Any, lengths: tuple[int, ...], device: torch.device | str) -> dict[str, Any]:
    """What a packed pass gives the model besides token ids; nothing where `lengths` is empty (a padded pass)."""
    if not lengths:
        return {}
    bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = {"position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(device)}
    if model.config._attn_implementation == ATTENTION:
        # transformers takes a mask of four axes for a finished one and makes none; bounds on the host cost no wait in every layer.
        return {
            **positions,
            "cu_seq_lens_q": bounds,
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        }
    longest, bounds = max(lengths), bounds.to(device)
    return {
        **positions,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def attend_by_rows(model: Any) -> None:
    """Give a model that uses torch's attention one that packed passes can use; everyone who shares the model goes on as before.

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
    if kinds - {"full_attention"}:
        text = f"{type(model).__name__} has layers that do not attend to all tokens before ({', '.join(sorted(kinds - {'full_attention'}))})"
        raise ConfigError(text, where="learner.packing", hint=HINT)
    AttentionInterface.register(ATTENTION, lambda *inputs, **options: _attend(inputs, options))
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def check_packing(policy: Any, name: str, device: torch.device) -> None:
    """Compare a packed pass with a padded one: masks of another kind would mix rows unseen. Raises ConfigError where they differ."""
    ids = [(5 * torch.arange(n, device=device) + 3 * row + 1) % 16 for row, n in enumerate(PROBE)]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    places = torch.cat([row * max(PROBE) + torch.arange(n, device=device) for row, n in enumerate(PROBE)])
    target = torch.zeros_like(places)
    policy.eval()
    with torch.no_grad():
        wanted = policy(padded, places, target)[2].float()
        try:
            found = policy(torch.cat(ids).unsqueeze(0), torch.arange(len(places), device=device), target, PROBE)[
                2
            ].float()
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise ConfigError(
                f"{name} takes no packed rows: {type(error).__name__}: {error}", where="learner.packing", hint=HINT
            ) from error
    difference = float((found - wanted).norm() / wanted.norm())
    if not difference <= (EXACT if next(policy.parameters()).dtype.itemsize > 2 and not policy.bf16 else ROUNDED):
        raise ConfigError(
            f"{name}: packed rows see each other (its outputs are off by {difference:.1%})",
            where="learner.packing",
            hint=HINT,
        )


def _attend(inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[torch.Tensor, None]:
    """transformers' attention function: inputs are the module, query, key and value [1, heads, L, d], and the mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    bounds = options.pop("cu_seq_lens_q", None)
    if bounds is None:
        return sdpa_attention_forward(*inputs, **options)
    lengths, options["attention_mask"] = bounds.diff().tolist(), None
    rows = zip(*(tensor.split(lengths, dim=2) for tensor in inputs[1:4]), strict=True)
    return torch.cat([sdpa_attention_forward(inputs[0], *row, **options)[0] for row in rows], dim=1), None
