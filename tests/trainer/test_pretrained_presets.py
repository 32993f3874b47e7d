"""The presets for SmolLM2-135M: each resolves, fits its episodes, and makes a step with a small model of its kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spearrl.config import advice, load_config
from spearrl.config.sections import TinySection
from spearrl.envs import instantiate, tasks_of
from spearrl.errors import ConfigError
from spearrl.models import build_tiny, save_model
from spearrl.sandbox import SandboxOptions, open_sandbox
from spearrl.start.transcripts import play_expert, texts
from spearrl.trainer import Trainer
from tests.support.short_runs import assert_sound, events

PRESETS = ("smollm2-webshop", "smollm2-alfworld", "smollm2-search", "smollm2-gsm8k")
PROBLEM = {"question": "A shop has 3 jars of 4 apples. How many?", "answer": "3*4=<<3*4=12>>12 apples.\n#### 12"}
SHORT = (
    "run.steps=1",
    "run.threads=1",
    "run.tensorboard=false",
    "rollout.dtype=bf16",
    "rollout.groups_per_step=2",
    "rollout.group_size=2",
    "sft.episodes=16",
    "eval.every=0",
    "eval.tasks=2",
)


def settings(preset: str, folder: Path) -> list[str]:
    """The data that a preset needs."""
    if preset != "smollm2-gsm8k":
        return []
    for name, count in (("gsm8k_train", 8), ("gsm8k_test", 2)):
        lines = [json.dumps(PROBLEM | {"question": f"{name} {n}: {PROBLEM['question']}"}) for n in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return [f"env.options.data={folder}"]


def small_llama(folder: Path, words: list[str]) -> Path:
    """SmolLM2's architecture in small: Llama with grouped heads and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = build_tiny(words, TinySection(vocab_size=600), 0)
    shape = {"hidden_size": 36, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, head_dim=6, **shape, **ids
    )
    save_model(LlamaForCausalLM(config), tokenizer, folder)
    return folder


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_makes_a_step_with_a_small_model_of_its_kind(preset, tmp_path):
    if preset == "smollm2-gsm8k":
        try:
            open_sandbox(SandboxOptions(packages=())).close()
        except ConfigError as reason:
            pytest.skip(f"no isolation here: {reason.message}")
    changes = settings(preset, tmp_path)
    config = load_config(None, changes, preset=preset)
    assert config.model.path == "smollm2-135m" and "spear" in config.algo.name and not advice(config)
    environment = instantiate(config.env.name, config.env.options, config.env.max_turns)
    tasks = tasks_of(environment, "train", setting="")
    played = play_expert(environment, tasks, 16, noise=config.sft.noise, recovery=0.0, style="chat", seed=0)
    model = small_llama(tmp_path / "model", list(texts(played)))
    more = [*changes, *SHORT, f"run.output_dir={tmp_path / 'runs'}", f"model.path={model}"]
    with Trainer(load_config(None, more, preset=preset)) as trainer:
        assert trainer.train() is not None
    assert_sound(trainer)
    assert events(trainer, "expert")[0]["dropped"] == 0 and len(events(trainer, "eval")) == 1
