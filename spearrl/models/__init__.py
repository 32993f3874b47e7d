"""Models: loading and saving any causal language model, building tiny ones, images, and the chat format."""

from spearrl.models.loading import load_model, load_tokenizer, save_model, save_weights
from spearrl.models.tiny import build_tiny, train_tokenizer
from spearrl.models.torch_setup import ask_for_determinism, prepare_torch

__all__ = [
    "ask_for_determinism",
    "build_tiny",
    "load_model",
    "load_tokenizer",
    "prepare_torch",
    "save_model",
    "save_weights",
    "train_tokenizer",
]
