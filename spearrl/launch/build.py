"""Builds what plays episodes from a config: environment, pool, engine, collector; in the trainer's process and in workers alike."""

from __future__ import annotations

from pathlib import Path

import torch

from spearrl import envs
from spearrl.config import RunConfig
from spearrl.envs import Environment
from spearrl.envs.pool import Pool, open_pool
from spearrl.errors import ConfigError
from spearrl.models import load_model
from spearrl.models.chat import ChatEncoder
from spearrl.rollout.collector import Collector
from spearrl.rollout.local import LocalEngine
from spearrl.rollout.local.receiver import LocalWeights
from spearrl.rollout.protocol import Engine
from spearrl.rollout.vllm import VLLMEngine
from spearrl.rollout.vllm.arguments import engine_arguments
from spearrl.seeds import derive
from spearrl.sync.receivers import Receiver


def make_environment(config: RunConfig) -> Environment:
    """The configured environment, with the run's turn limit."""
    environment = envs.make(config.env.name, **config.env.options)
    if config.env.max_turns:
        environment.max_turns = config.env.max_turns
    return environment


def make_pool(config: RunConfig, environment: Environment, *, episode_seed: int | None = None) -> Pool:
    """Where the environment steps. `episode_seed`: the environment's seed in every episode, as of `Pool`."""
    settings = config.rollout
    return open_pool(
        environment,
        style=config.env.style,
        workers=settings.env_workers,
        deadline_s=settings.env_deadline_s,
        restarts=settings.env_restarts,
        deterministic=config.run.deterministic,
        episode_seed=episode_seed,
    )


def make_engine(config: RunConfig, model: torch.nn.Module | str, *, device: str, index: int = 0) -> Engine:
    """The configured engine.

    Args:
        model: a model to share parameters with (local engine only), or a model directory to load.
        index: of the worker it belongs to; chooses its server where there are several.
    Raises:
        ConfigError, EngineError: the engine does not start.
    """
    settings, servers = config.rollout, config.vllm.addresses
    if settings.engine == "local":
        module = load_model(model).to(device) if isinstance(model, str) else model
        return LocalEngine(
            module,
            slots=settings.slots,
            cache_mib=settings.cache_mib,
            context_tokens=settings.context_tokens,
            device=device,
        )
    if not isinstance(model, str):
        raise ConfigError(
            "vLLM loads its model from a directory", where="rollout.engine", hint="give the model's directory"
        )
    if servers:
        from spearrl.rollout.vllm.server import RemoteEngine

        return RemoteEngine(servers[index % len(servers)], model, config.vllm, settings)
    colocated = config.placement.mode == "colocated" or (config.placement.mode == "auto" and not settings.max_staleness)
    wanted = config.sync.transport if config.sync.transport != "auto" else "ipc" if colocated else "nccl"
    return VLLMEngine(
        model,
        config.vllm,
        settings,
        device=device,
        precision=config.learner.precision,
        seed=derive(config.run.seed, "engine", index),
        lora_rank=config.learner.lora.rank,
        transfer_backend=wanted if device == "cuda" and wanted != "shared_memory" else None,
        sleep=device == "cuda" and colocated and not settings.max_staleness,
        threads=torch.get_num_threads() if config.run.threads else 0,  # this process's share of run.threads
    )


def engine_dtype(config: RunConfig, folder: str | Path) -> torch.dtype:
    """The type engines hold a model directory's weights in; float32 for servers of the user's own, which say nothing of theirs."""
    if config.rollout.engine == "local" or config.vllm.servers:
        return torch.float32
    return getattr(
        torch,
        str(
            engine_arguments(folder, config.vllm, config.rollout, device="cpu", precision=config.learner.precision)[
                "dtype"
            ]
        ),
        torch.float32,
    )


def receiver_of(engine: Engine) -> Receiver:
    """What takes the weights of an engine that does not share them with the learner."""
    if isinstance(engine, LocalEngine):
        return LocalWeights(engine)
    receiver: Receiver = engine.receiver  # type: ignore[attr-defined]
    return receiver


def make_collector(
    config: RunConfig, engine: Engine, encoder: ChatEncoder, pool: Pool, *, sampling: tuple[float, float]
) -> Collector:
    """A collector over `engine`; `sampling`: temperature and top_p."""
    settings, environment = config.rollout, pool.environment
    return Collector(
        engine,
        encoder,
        environment,
        style=config.env.style,
        max_turns=environment.max_turns,
        max_reply_tokens=settings.max_reply_tokens,
        max_response_tokens=settings.max_response_tokens,
        context_tokens=settings.context_tokens,
        temperature=sampling[0],
        top_p=sampling[1],
        reply_deadline_s=settings.reply_deadline_s,
        pool=pool,
    )
