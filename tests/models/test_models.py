"""Tiny models and tokenizers, and loading whatever lies in a directory."""

from __future__ import annotations

import shutil
import time

import pytest
import torch

from spearrl.config.sections import TinySection
from spearrl.errors import ConfigError
from spearrl.models import build_tiny, load_model, load_tokenizer, save_model
from spearrl.models.cpu_dtype import fastest_dtype
from spearrl.rollout import ChatEncoder
from spearrl.types import Message

TINY = TinySection(layers=1, hidden_size=32, heads=2, feed_forward=48, vocab_size=360)
CORPUS = ["find a soft red lamp , under $60", "search [ red lamp ]", "click [ buy now ]"] * 5


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_building_is_deterministic_and_leaves_torchs_generator_alone():
    state = torch.random.get_rng_state()
    model, tokenizer = build_tiny(CORPUS, TINY, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    again, other_tokenizer = build_tiny(iter(CORPUS), TINY, seed=3)
    assert same(weights(model), weights(again)) and tokenizer.get_vocab() == other_tokenizer.get_vocab()
    assert not same(weights(model), weights(build_tiny(CORPUS, TINY, seed=4)[0]))
    assert model.config.vocab_size % 8 == 0 and len(tokenizer) <= model.config.vocab_size
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    logits = model(input_ids=torch.arange(16)[None]).logits
    assert 0.01 < float(logits.detach().std()) < 2.0


def test_the_tokenizer_is_lossless_and_lean():
    tokenizer = build_tiny(CORPUS, TINY, seed=0)[1]
    for text in (
        "search [ red lamp ]",
        " two  spaces\n\ttabs",
        "Ünïcode 🙂 ‹x›",
        "",
        "never-seen $1,234.56",
        "don't 's",
    ):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.tokenize("a red lamp") == ["a", "Ġred", "Ġlamp"]
    encoder = ChatEncoder(tokenizer)
    encoder.verify()
    assert not encoder.rewrites_history
    ids = encoder.start([Message("user", "a red lamp")])
    tokens = ["<|user|>", "a", "Ġred", "Ġlamp", "<|end|>", "<|assistant|>"]
    assert tokenizer.convert_ids_to_tokens(list(ids)) == tokens
    grown = encoder.extend(ids, encoder.reply_ids(" lamp"), [Message("user", "a")])
    assert tokenizer.convert_ids_to_tokens(list(grown[len(ids) :])) == [
        "Ġlamp",
        "<|end|>",
        "<|user|>",
        "a",
        "<|end|>",
        "<|assistant|>",
    ]
    assert encoder.stop_ids == (tokenizer.eos_token_id,) and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_save_and_load_a_plain_transformers_directory(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = build_tiny(CORPUS, TINY, seed=1)
    save_model(model, tokenizer, tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in tmp_path.iterdir()}
    for loaded, words in (
        (load_model(str(tmp_path)), load_tokenizer(str(tmp_path))),
        (AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)),
    ):
        assert same(weights(model), weights(loaded)) and words.get_vocab() == tokenizer.get_vocab()
        messages = [Message("user", "a red lamp <|end|>")]
        assert ChatEncoder(words).start(messages) == ChatEncoder(tokenizer).start(messages)
    assert load_model(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
def test_any_causal_model_loads(tmp_path, kind: str):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=kind == "Qwen3",
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert same(weights(model), weights(loaded)) and loaded.dtype == torch.float32 and not loaded.training


@pytest.mark.parametrize("path", ["no/such/folder", "smollm3", ""])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_names_that_are_no_directory(load, path: str):
    with pytest.raises(ConfigError, match="neither a directory on this machine nor the name of a model"):
        load(path) if path else load("\0")


def test_directories_without_a_sound_model(tmp_path):
    with pytest.raises(ConfigError, match="no causal language model"):
        load_model(str(tmp_path))
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))
    model, tokenizer = build_tiny(CORPUS, TINY, seed=1)
    whole = tmp_path / "whole"
    save_model(model, tokenizer, whole)
    cut = shutil.copytree(whole, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="no causal language model"):
        load_model(str(cut))
    from safetensors.torch import load_file, save_file

    part = shutil.copytree(whole, tmp_path / "part")
    names = load_file(part / "model.safetensors")
    name = next(n for n in names if "q_proj" in n)
    save_file({n: t for n, t in names.items() if n != name}, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="q_proj"):
        load_model(str(part))


def test_an_empty_corpus_still_gives_bytes():
    tokenizer = build_tiny([], TINY, seed=0)[1]
    assert tokenizer.decode(tokenizer.encode("any text", add_special_tokens=False)) == "any text"


@pytest.mark.parametrize(("slower", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_processors_faster_type_is_measured_not_named(monkeypatch, slower, expected):
    product = torch.nn.functional.linear

    def linear(states, weight):
        if states.dtype == slower:
            time.sleep(0.01)
        return product(states, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    threads, speed = torch.get_num_threads(), fastest_dtype([(16, 64, 64)])
    assert speed.dtype == expected and torch.get_num_threads() == threads
    faster = max(speed.float32, speed.bfloat16)
    assert min(speed.float32, speed.bfloat16) < 2e-9 * 16 * 64 * 64 / 0.01 < faster
    assert str(speed).startswith(str(expected)[6:]) and f"{speed.bfloat16:.3g} in bfloat16" in str(speed)
