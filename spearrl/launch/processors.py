"""What fits a pretrained model on processors alone: the type that is sampled in, and the size of a step.

Models of up to SMALL parameters are left alone: they sample in float32, and no size is chosen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch

from spearrl.config import RunConfig
from spearrl.launch.devices import parameters_of
from spearrl.learner.policy import use_bf16
from spearrl.models import directory_of, prepare_torch, threads_of
from spearrl.models.cpu_dtype import DtypeSpeed, fastest_dtype
from spearrl.rollout.vllm.arguments import model_dtype
from spearrl.start.origin import Report

SMALL = 30_000_000
PREFILLED = 512  # tokens of a pass over prompts, measured beside one that decodes
GROUPS, SIBLINGS = 2, 4
STEP_S = 100.0  # that a step's passes may take
USED = 0.25  # of the speed of one product: attention, norms, the head, and cores that wait for each other
CONTEXT = (1024, 2048)  # tokens of an episode, at least and at most
REPLY = 48  # tokens, at most: sampling is no faster than some 50 tokens a second and core


def with_sampling_dtype(config: RunConfig, report: Report) -> RunConfig:
    """The config with a `rollout.dtype`, or on a processor a `vllm.dtype`, for good; what was measured is reported.

    "auto" is float32 on a GPU, for small models, and where bfloat16 is not measured to be faster; with vLLM the type of
    learner.precision or of the directory, but half precision on a processor only where it is measured to be faster.
    """
    local, path = config.rollout.engine == "local", config.model.path
    setting = "rollout.dtype" if local else "vllm.dtype"
    if path == "tiny" or (config.rollout.dtype if local else config.vllm.dtype) != "auto":
        return config
    chosen = config.vllm.servers or config.sft.enabled or config.learner.precision != "auto"
    if not local and (chosen or model_dtype(directory_of(path)) not in ("bfloat16", "float16")):
        return config
    speed = _speed(config) if prepare_torch(config) == "cpu" else None
    if speed is None:
        return config
    names = ("fp32", "bf16") if local else ("float32", "bfloat16")
    report("sampling", {"text": f"sampling in {speed}; {setting}={names[0]} or {names[1]} fixes it"})
    return config.with_settings({setting: names[speed.dtype == torch.bfloat16]})


def sizes(config: RunConfig, unset: Collection[str]) -> dict[str, Any]:
    """Values for settings that nobody set, so that a step takes minutes and a few GB; none for small models.

    A token of an episode costs 8 operations a parameter: 2 for its old log-probability, 6 for the update. Episodes
    get as many tokens as that leaves, as a power of two.
    """
    speed = _speed(config)
    if speed is None:
        return {}
    rate = 1e9 * (speed.bfloat16 if use_bf16(config.learner.precision, torch.device("cpu")) else speed.float32)
    tokens = STEP_S * threads_of(config) * rate * USED / (8 * _parameters(config))
    least, most = CONTEXT
    context = min(most, max(least, 2 ** int(math.log2(max(1.0, tokens / (GROUPS * SIBLINGS))))))
    values = {
        "rollout.groups_per_step": GROUPS,
        "rollout.group_size": SIBLINGS,
        "rollout.slots": GROUPS * SIBLINGS,
        "rollout.context_tokens": context,
        "rollout.max_reply_tokens": REPLY,
        "learner.micro_batch_tokens": 1024,
        "learner.gradient_checkpointing": True,
        "sft.episodes": 200,
        "sft.epochs": 1,
        "sft.batch_episodes": 8,
        "sft.lr": 1e-4,
        "eval.every": 0,
        "eval.tasks": 32,
    }
    return {key: value for key, value in values.items() if key in unset}


def _parameters(config: RunConfig) -> int:
    return parameters_of(str(directory_of(config.model.path)))


def _speed(config: RunConfig) -> DtypeSpeed | None:
    """Of products of the model's own shapes; None for a small model."""
    if config.model.path == "tiny" or _parameters(config) <= SMALL:
        return None
    settings = json.loads((directory_of(config.model.path) / "config.json").read_text())
    settings = settings.get("text_config", settings)
    width, inner = int(settings["hidden_size"]), int(settings.get("intermediate_size") or 4 * settings["hidden_size"])
    return _measured(((GROUPS * SIBLINGS, width, inner), (PREFILLED, width, inner)))


_measured = lru_cache(fastest_dtype)
