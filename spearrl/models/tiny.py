"""Tiny models and their tokenizers, built from scratch: what the embedded default trains on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from spearrl.config.sections import TinySection
from spearrl.models.vision import Vision, make_processor

END, PAD = "<|end|>", "<|pad|>"
SPECIAL = (PAD, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", END)
# Three control tokens a turn: the role, the end, and the role that answers.
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")  # control tokens of Qwen2-VL
CONTENT_PARTS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)
# Of the tiny vision model: a token stands for 28 x 28 pixels, an image for 64 tokens at most.
PATCH, MERGE, MOST_PIXELS = 14, 2, 224 * 224
VOCABULARY_MULTIPLE = 8  # vocabulary sizes are padded to a multiple of this
CONTEXT = 32_768
# Initial weights have deviation 0.7 / sqrt(width): at transformers' fixed 0.02 a narrow model needs three times the
# updates to learn to copy.
INIT_GAIN = 0.7


def build_tiny(corpus: Iterable[str], tiny: TinySection, seed: int) -> tuple[Any, Any]:
    """A small model with fresh weights and its tokenizer; the same for the same arguments.

    Args:
        corpus: texts that the tokenizer is trained on.
        tiny: sizes. The architecture is Qwen3's, or Qwen2.5-VL's with `tiny.vision`.
        seed: of the initial weights.
    Returns:
        (model, tokenizer).
    """
    tokenizer = train_tokenizer(corpus, tiny.vocab_size, VISION if tiny.vision else ())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        model = _fresh_vision_model(tiny, tokenizer) if tiny.vision else _fresh_model(tiny, tokenizer)
    if tiny.vision:
        processor = make_processor(patch=PATCH, merge=MERGE, most_pixels=MOST_PIXELS)
        model.vision = tokenizer.vision = Vision(processor, model.config)
    return model.eval(), tokenizer


def train_tokenizer(corpus: Iterable[str], vocab_size: int, more: tuple[str, ...] = ()) -> Any:
    """A byte-level BPE tokenizer: lossless, and a frequent word becomes one token together with the space before it.

    Args:
        more: control tokens besides those of the roles.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = sorted(pre_tokenizers.ByteLevel.alphabet()), [*SPECIAL, *more]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[token for token in special if token not in (PAD, END)],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE.replace("{{ m['content'] }}", CONTENT_PARTS) if more else TEMPLATE
    return fast


def _shape(tiny: TinySection) -> dict[str, Any]:
    """Settings that language model and vision tower share."""
    deviation = INIT_GAIN / tiny.hidden_size**0.5
    return {
        "hidden_size": tiny.hidden_size,
        "intermediate_size": tiny.feed_forward,
        "initializer_range": deviation,
    }


def _text_shape(tiny: TinySection, tokenizer: Any) -> dict[str, Any]:
    """Settings of the language model."""
    return _shape(tiny) | {
        "vocab_size": -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.heads,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _fresh_model(tiny: TinySection, tokenizer: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = _text_shape(tiny, tokenizer) | {"head_dim": tiny.hidden_size // tiny.heads}
    return Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))


def _fresh_vision_model(tiny: TinySection, tokenizer: Any) -> Any:
    """A vision tower of two layers (attention within windows, then over the whole image) before the language model."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    half = tiny.hidden_size // tiny.heads // 2  # rotary frequencies: 3 in 8 follow rows, as many columns, the rest time
    side = half * 3 // 8
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * side, side, side]}
    tower = {
        "depth": 2,
        "num_heads": tiny.heads,
        "out_hidden_size": tiny.hidden_size,
        "fullatt_block_indexes": [1],
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = Qwen2_5_VLConfig(
        text_config=_text_shape(tiny, tokenizer) | {"rope_parameters": rope},
        vision_config=_shape(tiny) | tower,
        tie_word_embeddings=True,
        **dict(zip(names, tokenizer.convert_tokens_to_ids(list(VISION)), strict=True)),
    )
    return Qwen2_5_VLForConditionalGeneration(config)
