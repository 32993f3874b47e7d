"""Models: names, loading and saving any causal language model, building tiny ones, images, and the chat format."""

from spearrl.models.hub import directory_of, is_hub_name, pinned
from spearrl.models.loading import (
    check_vocabulary,
    copy_of,
    load_model,
    load_tokenizer,
    model_config,
    save_model,
    save_weights,
    text_ids,
    tokenizer_hash,
)
from spearrl.models.tiny import build_tiny, train_tokenizer
from spearrl.models.torch_setup import ask_for_determinism, prepare_torch, threads_of

__all__ = ["ask_for_determinism", "build_tiny", "copy_of", "directory_of", "is_hub_name", "load_model"]
__all__ += ["load_tokenizer", "model_config", "pinned", "prepare_torch", "save_model", "save_weights", "text_ids"]
__all__ += ["check_vocabulary", "threads_of", "tokenizer_hash", "train_tokenizer"]
