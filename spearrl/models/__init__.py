"""Models: loading and saving any causal language model, building tiny ones, pictures, and the chat format."""

from spearrl.models.loading import (
    _train_tokenizer,
    ask_for_determinism,
    build_tiny,
    load_model,
    load_tokenizer,
    prepare_torch,
    save_model,
    save_weights,
)

__all__ = [
    "_train_tokenizer",
    "ask_for_determinism",
    "build_tiny",
    "load_model",
    "load_tokenizer",
    "prepare_torch",
    "save_model",
    "save_weights",
]
