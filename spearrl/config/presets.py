"""Named starting points: dotted key -> value. A preset sets hyper-parameters; which parts are on is said by its algo.name.

"tiny" learns on a laptop's CPU in minutes. The others are cells of the paper's agent tables (arXiv 2509.22601) for Qwen2.5-1.5B-Instruct,
with the numbers of the released scripts; where release and paper differ, they follow the paper.
"""

from __future__ import annotations

# What runs where neither file, preset nor model is given, by environment: embedded, and where env.options.data points at real data.
DEFAULTS = {"webshop": ("tiny", "tiny-real"), "alfworld": ("tiny-alfworld", "tiny-alfworld-real")}
DEFAULT = "tiny"  # of every other environment

_TINY: dict[str, object] = {
    "run.steps": 60,
    "model.path": "tiny",
    "model.tiny.layers": 3,
    "model.tiny.hidden_size": 128,
    "model.tiny.heads": 4,
    "model.tiny.feed_forward": 256,
    "model.tiny.vocab_size": 4096,
    "env.name": "webshop",
    "env.style": "chat",
    "env.max_turns": 8,
    "env.options.observation": "compact",
    "env.options.reply": "plain",
    "rollout.groups_per_step": 8,
    "rollout.group_size": 8,
    "rollout.max_reply_tokens": 24,
    "rollout.context_tokens": 1024,
    "rollout.slots": 64,
    "algo.name": "grpo+spear",
    # As SPEAR has it. Divided by their deviation, the small bonuses of an all-failing group would weigh as much as a success.
    "algo.groups.normalize_std": False,
    "algo.policy.clip_low": 0.2,
    "algo.policy.clip_high": 0.28,
    "algo.policy.dual_clip": 10.0,
    "algo.policy.aggregation": "token-mean",
    # The paper's 2048 entries and T = 200 never come into play in a run this short.
    "algo.sil.unit": "trajectory",
    "algo.sil.capacity": 16,
    "algo.sil.baseline_capacity": 640,
    "algo.sil.max_age": 5,
    "algo.sil.gamma.kind": "cosine",
    "algo.sil.gamma.steps": 20,
    "algo.intrinsic.mu.kind": "cosine",
    "algo.intrinsic.mu.steps": 20,
    "learner.lr": 3e-4,
    "learner.mini_batches": 2,
    "sft.enabled": True,
    "sft.episodes": 2000,
    "sft.epochs": 4,
    "sft.batch_episodes": 8,  # many small updates: learning to copy words is a matter of updates, not of tokens
    "sft.lr": 3e-3,
    "sft.noise": 0.25,
    "eval.every": 10,
    "eval.tasks": 200,
    "eval.temperature": 0.4,
}

# What all cells of the agent tables share: 32 x 8 episodes a step, prompts made afresh every turn, so one row a turn.
_AGENT_1_5B: dict[str, object] = {
    "run.checkpoint_every": 10,
    "model.path": "Qwen/Qwen2.5-1.5B-Instruct",
    "env.style": "windowed",
    "rollout.groups_per_step": 32,
    "rollout.group_size": 8,
    "rollout.temperature": 1.0,
    "rollout.max_reply_tokens": 512,
    "rollout.cache_mib": 16384,
    "algo.policy.dual_clip": 10.0,
    "algo.policy.horizon": 512,
    "algo.policy.entropy_coef": 0.0,  # the paper's; the release's YAML has 0.001
    "algo.invalid_penalty": 0.1,
    "learner.lr": 1e-6,
    "learner.weight_decay": 0.01,
    "learner.grad_clip": 1.0,
    "learner.gradient_checkpointing": True,
    "eval.every": 5,
    "eval.tasks": 128,
    "eval.temperature": 0.4,
}
_WEBSHOP: dict[str, object] = {
    "run.steps": 350,
    "env.name": "webshop",
    "env.max_turns": 15,
    "rollout.context_tokens": 4096 + 512,  # prompt + response
    "learner.mini_batch_rows": 256,
    "learner.micro_batch_tokens": 4 * (4096 + 512),
    "eval.split": "val",
}
_ALFWORLD: dict[str, object] = {
    "run.steps": 200,
    "env.name": "alfworld",
    "env.max_turns": 50,
    "rollout.context_tokens": 2048 + 512,
    "learner.mini_batch_rows": 1024,
    "learner.micro_batch_tokens": 8 * (2048 + 512),
    "eval.split": "valid_seen",
}
# Column "base": plain GRPO.
_BASE: dict[str, object] = {
    "algo.name": "grpo",
    "algo.groups.normalize_std": True,
    "algo.policy.clip_low": 0.2,
    "algo.policy.clip_high": 0.2,
    "algo.policy.aggregation": "token-mean",
}
# Column "Dr.BoT": the bag of tricks without self-imitation. Its quality filters are inert in the release; the paper applies them.
_DRBOT: dict[str, object] = {"algo.name": "grpo+drbot"}
# Column "SPEAR": Dr.BoT + self-imitation + intrinsic reward + covariance clipping.
_SPEAR: dict[str, object] = {
    "algo.name": "grpo+drbot+spear",
    "algo.sil.unit": "row",  # the 2048 of the scripts counts turns; so many trajectories never gather within max_age
    "algo.sil.capacity": 2048,
    "algo.sil.baseline_capacity": 10240,
    "algo.sil.max_age": 5,
    "algo.sil.recalibration": "median",
    "algo.sil.normalize_std": False,
    "algo.sil.gamma.kind": "cosine",
    "algo.sil.gamma.steps": 200,  # in force in both releases, whatever the ALFWorld script's unused 100 says
    "algo.sil.gamma.peak": 1.0,
    "algo.intrinsic.mu.kind": "cosine",
    "algo.intrinsic.mu.steps": 200,
    "algo.clip_cov.ratio": 0.0002,
    "algo.clip_cov.lower": 1.0,
    "algo.clip_cov.upper": 5.0,
    "algo.clip_cov.replay_ratio": 0.02,
    "algo.clip_cov.replay_lower": 2.0,
    "algo.clip_cov.replay_upper": 60.0,
}


def _with_gigpo(cell: dict[str, object]) -> dict[str, object]:
    """The same column of the tables with GiGPO for GRPO. Under Dr.BoT the paper divides by no deviation; the release's GiGPO scripts do."""
    return {**cell, "algo.name": str(cell["algo.name"]).replace("grpo", "gigpo"), "algo.gigpo.discount": 0.95, "algo.gigpo.step_weight": 1.0}


# Real product pages have forty times the words and twice the length: a wider model, three times the episodes (docs/results.md).
_TINY_REAL: dict[str, object] = {
    **_TINY,
    "run.steps": 40,
    "model.tiny.hidden_size": 160,
    "model.tiny.heads": 5,
    "model.tiny.feed_forward": 320,
    "sft.episodes": 6000,
    "sft.epochs": 3,
    "sft.lr": 2.5e-3,
    "sft.noise": 0.2,
    "sft.observation_weight": 0.1,
    "sft.observation_fraction": 0.25,
    "eval.every": 20,
    "eval.tasks": 500,
}

_COLUMNS = {"": _SPEAR, "-drbot": _DRBOT, "-base": _BASE}


def _cells(prefix: str, *shared: dict[str, object]) -> dict[str, dict[str, object]]:
    """An environment's cells of the tables: GRPO's three columns, then GiGPO's."""
    common = {key: value for part in shared for key, value in part.items()}
    cells = {f"{prefix}{suffix}": {**common, **column} for suffix, column in _COLUMNS.items()}
    return cells | {f"{prefix}-gigpo{suffix}": {**common, **_with_gigpo(column)} for suffix, column in _COLUMNS.items()}


# Households: six kinds of task, longer episodes than a purchase, and no page that lists what can be done.
_TINY_ALFWORLD: dict[str, object] = {
    **_TINY,
    "run.steps": 40,
    "env.name": "alfworld",
    "env.max_turns": 20,
    "env.options.observation": "compact",
    "env.options.reply": "plain",
    "algo.name": "gigpo+spear",
    "sft.episodes": 5000,
    "sft.epochs": 3,
    "sft.lr": 2.5e-3,
    "sft.noise": 0.15,
    "eval.split": "valid_seen",
    "eval.tasks": 120,
}
_TINY_ALFWORLD_REAL: dict[str, object] = {
    **_TINY_ALFWORLD,
    "model.tiny.hidden_size": 160,
    "model.tiny.heads": 5,
    "model.tiny.feed_forward": 320,
    "rollout.context_tokens": 1536,
    "eval.tasks": 140,
}

PRESETS: dict[str, dict[str, object]] = {
    "tiny": _TINY,
    "tiny-real": _TINY_REAL,
    "tiny-alfworld": _TINY_ALFWORLD,
    "tiny-alfworld-real": _TINY_ALFWORLD_REAL,
    **_cells("webshop-1.5b", _AGENT_1_5B, _WEBSHOP),
    **_cells("alfworld-1.5b", _AGENT_1_5B, _ALFWORLD),
}


def _described(prefix: str, environment: str) -> dict[str, str]:
    return {
        prefix: f"the paper's {environment} cell, Qwen2.5-1.5B-Instruct, GRPO with the bag of tricks and SPEAR",
        f"{prefix}-drbot": "the same with the bag of tricks, without SPEAR",
        f"{prefix}-base": "the same with plain GRPO",
        f"{prefix}-gigpo": f"the paper's {environment} cell, GiGPO with the bag of tricks and SPEAR",
        f"{prefix}-gigpo-drbot": "the same with the bag of tricks, without SPEAR",
        f"{prefix}-gigpo-base": "the same with plain GiGPO",
    }


DESCRIPTIONS = {
    "tiny": "WebShop, GRPO+SPEAR, a model built from scratch: minutes on a CPU",
    "tiny-real": "the same on WebShop's real 1000 products (env.options.data): about twenty minutes",
    "tiny-alfworld": "ALFWorld's generated households, GiGPO+SPEAR, a model built from scratch",
    "tiny-alfworld-real": "the same on ALFWorld's real games (env.options.data)",
    **_described("webshop-1.5b", "WebShop"),
    **_described("alfworld-1.5b", "ALFWorld"),
}
