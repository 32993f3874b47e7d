"""A run small enough for tests: the Fetch toy, a one-layer model, a few steps."""

from __future__ import annotations

import hashlib
from pathlib import Path

from spearrl.config import RunConfig, load_config

SETTINGS = (
    "env.name=tests.support.toy_envs:Fetch",
    "model.tiny.layers=2",
    "model.tiny.hidden_size=64",
    "model.tiny.heads=2",
    "model.tiny.feed_forward=128",
    "model.tiny.vocab_size=400",
    "rollout.groups_per_step=4",
    "rollout.group_size=4",
    "rollout.max_reply_tokens=8",
    "rollout.context_tokens=128",
    "rollout.slots=16",
    "learner.lr=1e-3",
    "learner.precision=fp32",
    "sft.enabled=true",
    "sft.episodes=300",
    "sft.epochs=4",
    "sft.batch_episodes=8",
    "sft.noise=0.3",
    "sft.lr=5e-3",
    "sft.warmup_steps=10",
    "eval.tasks=12",
    "eval.every=2",
    "run.steps=4",
    "run.checkpoint_every=2",
    "run.threads=1",
    "run.tensorboard=false",
    "algo.sil.capacity=2",
    "algo.sil.gamma.steps=2",
    "algo.sil.reward_scale=10",
    "algo.intrinsic.mu.steps=4",
)

# Of a cold start whose success does not matter.
QUICK_START = ("sft.episodes=60", "sft.epochs=1")


def small_config(folder: Path, *changes: str, algo: str = "grpo+spear", name: str = "small") -> RunConfig:
    """The small run below `folder`, with changes as section.key=value."""
    return load_config(
        None, [*SETTINGS, f"run.output_dir={folder}", f"run.name={name}", *changes], algo=algo, preset="tiny"
    )


def fingerprint(model) -> str:
    """sha256 over every parameter's bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
