"""Loading and saving any causal language model, and its tokenizer, as a plain transformers directory.

A model loaded here, and its tokenizer, have the attribute `vision`: how the model takes images, or None. A tokenizer
loaded here has `declared_stops`: what the directory's files call eos.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from spearrl.errors import ConfigError
from spearrl.models.hub import directory_of
from spearrl.models.stops import declared_stops
from spearrl.models.vision import KINDS, load_vision, model_kind, vision_of

LOG = logging.getLogger(__name__)
ORDINARY_TEXT = "The shop sells tea, bread and a blue chair; what did she buy for ten dollars, and why?"


def load_model(path: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model, in evaluation mode.

    Args:
        path: a directory, or a name (`hub`).
    Raises:
        ConfigError: there is none, or weights are missing or of another shape.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    path = str(directory_of(path))
    LOG.info("loading the weights of %s", path)
    transformers_logging.disable_progress_bar()
    kind: Any = AutoModelForImageTextToText if model_kind(path) in KINDS else AutoModelForCausalLM
    options = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        model, loading = kind.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:  # transformers raises whatever a wrong file makes it
        hint = "give a transformers model directory"
        if any(Path(path).glob("*.bin")):
            hint = "its weights are pickles, which are never loaded: save the model again as safetensors"
        raise ConfigError(f"no causal language model can be loaded: {error}", where=path, hint=hint) from error
    missing = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if missing:  # transformers fills these with random numbers
        text = f"{len(missing)} weights are missing or misshapen, {missing[0]} among them"
        raise ConfigError(text, where=path, hint="save the model again, all files of it")
    model.vision = load_vision(path)
    return model.eval()


def copy_of(model: Any, dtype: torch.dtype) -> Any:
    """A frozen copy with its parameters in another type; buffers (rotary frequencies) keep theirs."""
    converted = {
        id(parameter): torch.nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, converted).eval()


def model_config(path: str) -> Any:
    """transformers' configuration of a model, given by directory or name. Raises ConfigError where there is none."""
    from transformers import AutoConfig

    return _read(AutoConfig, path, "configuration", "the directory needs config.json")


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model, given by directory or name. Raises ConfigError where there is none."""
    from transformers import AutoTokenizer

    tokenizer = _read(AutoTokenizer, path, "tokenizer", "the directory needs tokenizer.json")
    folder = str(directory_of(path, weights=False))
    tokenizer.vision, tokenizer.declared_stops = load_vision(folder), declared_stops(folder)
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of vocabulary and chat template: what token ids mean, and how conversations are written."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def check_vocabulary(tokenizer: Any, rows: int, used: Iterable[int], where: str) -> None:
    """Refuse a tokenizer with ids that the model, of `rows` embeddings, does not have. Raises ConfigError.

    Special tokens count only where they are in `used`, ids of a conversation: tokenizer classes add some that no text
    of the model holds.
    """
    special, used = set(tokenizer.all_special_ids), set(used)
    vocabulary = tokenizer.get_vocab().items()
    beyond = [
        (index, token) for token, index in vocabulary if index >= rows and (index in used or index not in special)
    ]
    if beyond:
        index, token = min(beyond)
        text = f"{len(beyond)} tokens lie beyond the model's vocabulary of {rows}: {token!r} has id {index}"
        hint = "give the tokenizer that belongs to the model, or enlarge the model with resize_token_embeddings"
        raise ConfigError(text, where=where, hint=hint)


def _read(kind: Any, path: str, what: str, hint: str) -> Any:
    path = str(directory_of(path, weights=False))
    try:
        return kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever a wrong file makes them
        raise ConfigError(f"no {what} can be loaded: {error}", where=path, hint=hint) from error


def text_ids(tokenizer: Any) -> list[int]:
    """Tokens of ordinary text, on which log-probabilities can be compared: elsewhere a model's rounding is larger."""
    return list(tokenizer.encode(ORDINARY_TEXT, add_special_tokens=False))


def save_model(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json and the chat template."""
    save_weights(model, folder)
    tokenizer.save_pretrained(folder)


def save_weights(model: Any, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write config.json and model.safetensors, of a vision model also preprocessor_config.json.

    Args:
        weights: written instead of the model's own, under the directory's names.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # A vision model's have the names of its parameters, whatever those of the first release were.
    vision = vision_of(model)
    model.save_pretrained(folder, state_dict=weights, save_original_format=weights is None and vision is None)
    if vision is not None:
        vision.save(folder)
