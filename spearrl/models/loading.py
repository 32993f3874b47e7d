"""Models and tokenizers: building the tiny ones, loading and saving any causal language model as a plain transformers directory.

A model that sees (`spearrl.models.vision`), and its tokenizer, have the attribute `vision`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from spearrl.config import RunConfig, TinySection
from spearrl.errors import ConfigError
from spearrl.models.vision import KINDS, Vision, load_vision, make_processor, model_kind, vision_of
from spearrl.seeds import derive

END, PAD = "<|end|>", "<|pad|>"
SPECIAL = (PAD, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", END)
# Three control tokens a turn: the role, the end, and the role that answers.
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")  # control tokens of Qwen2-VL
PARTS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
PATCH, MERGE, MOST_PIXELS = (
    14,
    2,
    224 * 224,
)  # of the tiny model that sees: a token stands for 28 x 28 pixels, a picture for 64 tokens at most
ROUND = 8  # vocabulary sizes are padded to a multiple of this
CONTEXT = 32_768
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEEP_BYTES = -1, -3, 1 << 30  # glibc malloc.h
INIT_GAIN = 0.7  # initial weights have deviation 0.7 / sqrt(width): at transformers' fixed 0.02 a narrow model needs three times the updates to learn to copy


def prepare_torch(config: RunConfig, *, share: int = 1) -> str:
    """Threads, determinism, seed; returns the device. `share`: processes of this machine that split the threads."""
    torch.set_num_threads(max(1, (config.run.threads or os.cpu_count() or 1) // share))
    ask_for_determinism(config.run.deterministic)
    _keep_freed_memory()
    torch.manual_seed(derive(config.run.seed, "torch") % 2**31)
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            'run.device="cuda" but torch sees no GPU', hint='use run.device="auto", or install a CUDA build of torch'
        )
    device = config.run.device if config.run.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # accelerate imports DeepSpeed whenever a model is saved; not told, that would choose for good, and say so on standard output
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return device


def ask_for_determinism(wanted: bool) -> None:
    """Have torch choose deterministic kernels in this process, where it has them."""
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    # Nothing here reads memory it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _keep_freed_memory() -> None:
    """Tell glibc not to hand large buffers back after every use: page faults cost a tiny model a third of its time."""
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):  # musl has none
            library.mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
            library.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)


def build_tiny(corpus: Iterable[str], tiny: TinySection, seed: int) -> tuple[torch.nn.Module, Any]:
    """A small Qwen3-style model from scratch (Qwen2.5-VL-style with tiny.vision), and a lossless tokenizer trained on `corpus`. Deterministic in `seed`."""
    tokenizer = _train_tokenizer(corpus, tiny.vocab_size, VISION if tiny.vision else ())
    size = -(-len(tokenizer) // ROUND) * ROUND
    if not tiny.vision:
        return _fresh_model(tiny, size, tokenizer, seed), tokenizer
    model: Any = _fresh_vision_model(tiny, size, tokenizer, seed)
    model.vision = tokenizer.vision = Vision(
        make_processor(patch=PATCH, merge=MERGE, most_pixels=MOST_PIXELS), model.config
    )
    return model, tokenizer


def load_model(path: str, *, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A causal language model from a local directory, with its eyes where it has some. Raises ConfigError where there is none, or where weights are
    missing or misshapen."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    _check_directory(path)
    logging.disable_progress_bar()
    kind: Any = AutoModelForImageTextToText if model_kind(path) in KINDS else AutoModelForCausalLM
    try:
        loaded: Any = kind.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"no causal language model can be loaded: {error}", where=path, hint="give a transformers model directory"
        ) from error
    model, found = loaded
    absent = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if absent:  # transformers fills these with random numbers
        raise ConfigError(
            f"{len(absent)} weights are missing or misshapen, {absent[0]} among them",
            where=path,
            hint="save the model again, all files of it",
        )
    model.vision = load_vision(path)
    return model.eval()  # type: ignore[no-any-return]


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a local model directory. Raises ConfigError where there is none."""
    from transformers import AutoTokenizer

    _check_directory(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded: {error}", where=path, hint="the directory needs tokenizer.json"
        ) from error
    tokenizer.vision = load_vision(path)
    return tokenizer


def save_model(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json and the chat template."""
    save_weights(model, folder)
    tokenizer.save_pretrained(folder)


def save_weights(model: Any, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write config.json and model.safetensors (of one that sees also preprocessor_config.json), without a progress bar.

    Args:
        weights: other ones than the model's own.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    if (vision := vision_of(model)) is None:
        model.save_pretrained(folder, state_dict=weights)
    else:  # under the names that its parameters have, whatever those of the first release were
        model.save_pretrained(folder, state_dict=weights, save_original_format=False)
        vision.save(folder)


def _check_directory(path: str) -> None:
    if not Path(path).is_dir():
        hint = "download it first and give its folder, or use model.path=tiny"
        raise ConfigError(
            f"model {path!r} is not a directory on this machine (nothing is downloaded)", where="model.path", hint=hint
        )


def _train_tokenizer(corpus: Iterable[str], vocab_size: int, more: tuple[str, ...] = ()) -> Any:
    """Byte-level BPE: lossless, frequent words become one token together with the space before them. `more`: control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *more], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    extra = [*SPECIAL[1:-1], *more]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=extra,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE.replace("{{ m['content'] }}", PARTS) if more else TEMPLATE
    return fast


def _fresh_model(tiny: TinySection, vocab_size: int, tokenizer: Any, seed: int) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.feed_forward,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        num_key_value_heads=tiny.heads,
        head_dim=tiny.hidden_size // tiny.heads,
        max_position_embeddings=CONTEXT,
        initializer_range=INIT_GAIN / tiny.hidden_size**0.5,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        return Qwen3ForCausalLM(config).eval()


def _fresh_vision_model(tiny: TinySection, vocab_size: int, tokenizer: Any, seed: int) -> torch.nn.Module:
    """A vision tower of two layers, one within windows and one of the whole picture, before a language model of the tiny shape."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    half = tiny.hidden_size // tiny.heads // 2  # rotary frequencies: 3 in 8 follow rows, as many columns, the rest time
    side = half * 3 // 8
    shape = {
        "hidden_size": tiny.hidden_size,
        "intermediate_size": tiny.feed_forward,
        "initializer_range": INIT_GAIN / tiny.hidden_size**0.5,
    }
    text = {
        **shape,
        "vocab_size": vocab_size,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.heads,
    }
    text |= {
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [half - 2 * side, side, side],
    }
    tower = {
        **shape,
        "depth": 2,
        "num_heads": tiny.heads,
        "out_hidden_size": tiny.hidden_size,
        "fullatt_block_indexes": [1],
    }
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(VISION)), strict=True))
    tower |= {"patch_size": PATCH, "spatial_merge_size": MERGE}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=True, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        return Qwen2_5_VLForConditionalGeneration(config).eval()
