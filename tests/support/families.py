"""Tiny random models of the families in use, with the small tokenizer: directories as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spearrl.models import save_model, train_tokenizer

WORDS = "look say red blue green pink gold gray want or nothing happens it is end now show turn fine hang once exit"
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
SLIDING: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
# Name: transformers' model class without ForCausalLM, its config class, settings besides SHAPE.
LINEAR_FAMILIES = ("qwen3_5", "qwen3_5_moe")  # with layers that keep a state instead of keys and values
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaConfig", {}),
    "mistral": ("Mistral", "MistralConfig", {"sliding_window": 16}),
    "phi3": ("Phi3", "Phi3Config", {}),
    "qwen2": ("Qwen2", "Qwen2Config", {}),
    "qwen3": ("Qwen3", "Qwen3Config", {"tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3",
        "Gemma3TextConfig",
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen2_moe": ("Qwen2Moe", "Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", "Qwen3MoeConfig", EXPERTS),
    "mixtral": ("Mixtral", "MixtralConfig", {"num_local_experts": 4, "sliding_window": None}),
    "gpt_oss": ("GptOss", "GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING}),
    "glm4_moe": (
        "Glm4Moe",
        "Glm4MoeConfig",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
    ),
    "qwen3_5": ("Qwen3_5", "Qwen3_5TextConfig", LINEAR),
    "qwen3_5_moe": ("Qwen3_5Moe", "Qwen3_5MoeTextConfig", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 24}),
}


def build_family(name: str, seed: int = 0, **changes: Any) -> tuple[Any, Any]:
    """A random model of a family, in float32, and its tokenizer."""
    import transformers

    kind, config, settings = FAMILIES[name]
    tokenizer = train_tokenizer([WORDS, f" {WORDS}"] * 20, 400)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = {**SHAPE, "vocab_size": -(-len(tokenizer) // 8) * 8, **ids, **settings, **changes}
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, config)(**shape))
    return model.eval(), tokenizer


def family_directory(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A model directory of a family."""
    save_model(*build_family(name, seed, **changes), folder)
    return folder
