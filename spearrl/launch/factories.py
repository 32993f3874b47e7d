"""The parts a config names, each made alone: environment, pool, engine, collector, learner. `assembly` wires them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spearrl import envs
from spearrl.algorithm import needs_critic
from spearrl.config import RunConfig
from spearrl.envs import Environment
from spearrl.envs.pool import Pool, open_pool
from spearrl.errors import ConfigError
from spearrl.launch.placement import Placement
from spearrl.learner import Learner, LocalLearner, ValueHead
from spearrl.models import load_model, text_ids
from spearrl.models.chat_format import ChatFormat
from spearrl.rollout.collector import Collector
from spearrl.rollout.local import LocalEngine
from spearrl.rollout.local.receiver import LocalWeights
from spearrl.rollout.protocol import Engine
from spearrl.rollout.vllm import VLLMEngine
from spearrl.rollout.vllm.arguments import engine_arguments
from spearrl.seeds import derive
from spearrl.start.origin import Origin
from spearrl.sync.receivers import Receiver

# What an environment may show at once: far over what fits into the context, and far under what tokenising it costs.
TEXT_CHARS_LEAST, CHARS_PER_TOKEN = 65_536, 16


def make_environment(config: RunConfig) -> Environment:
    """The configured environment, with the run's turn limit."""
    return envs.instantiate(config.env.name, config.env.options, config.env.max_turns)


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
        text_chars=max(TEXT_CHARS_LEAST, CHARS_PER_TOKEN * settings.context_tokens),
    )


def make_engine(
    config: RunConfig,
    model: torch.nn.Module | str,
    *,
    device: str,
    tokenizer: Any = None,
    index: int = 0,
    colocated: bool = False,
    sleeps: bool = False,
) -> Engine:
    """The configured engine.

    Args:
        model: a model to share parameters with (local engine only), or a model directory to load.
        tokenizer: its text is what a local engine is checked on at the start.
        index: of the worker it belongs to; chooses its server where there are several.
        colocated, sleeps: as the run's Placement has it.
    Raises:
        ConfigError, EngineError: the engine does not start.
    """
    settings, servers = config.rollout, config.vllm.addresses
    if settings.engine == "local":
        dtype = sampling_dtype(config)
        module = load_model(model, dtype=dtype).to(device) if isinstance(model, str) else model
        return LocalEngine(
            module,
            slots=settings.slots,
            cache_mib=settings.cache_mib,
            context_tokens=settings.context_tokens,
            device=device,
            probe_ids=() if tokenizer is None else text_ids(tokenizer),
        )
    if not isinstance(model, str):
        raise ConfigError(
            "vLLM loads its model from a directory", where="rollout.engine", hint="give the model's directory"
        )
    if servers:
        from spearrl.rollout.vllm.server import RemoteEngine

        return RemoteEngine(servers[index % len(servers)], model, config.vllm, settings)
    transport = config.sync.transport
    if transport == "auto":  # NCCL has no way between two processes on one GPU
        transport = "ipc" if colocated else "nccl"
    return VLLMEngine(
        model,
        config.vllm,
        settings,
        device=device,
        precision=config.learner.precision,
        seed=derive(config.run.seed, "engine", index),
        lora_rank=config.learner.lora.rank,
        transfer_backend=transport if device == "cuda" and transport != "shared_memory" else None,
        sleep=sleeps,
        threads=torch.get_num_threads() if config.run.threads else 0,  # this process's share of run.threads
    )


def sampling_dtype(config: RunConfig) -> torch.dtype:
    """The type local engines hold their weights in; "auto" that nothing settled is float32."""
    return torch.bfloat16 if config.rollout.dtype == "bf16" else torch.float32


def engine_dtype(config: RunConfig, folder: str | Path) -> torch.dtype:
    """The type engines hold a model directory's weights in; float32 for servers of the user's own, which do not say."""
    if config.rollout.engine == "local":
        return sampling_dtype(config)
    if config.vllm.servers:
        return torch.float32
    precision = config.learner.precision
    arguments = engine_arguments(folder, config.vllm, config.rollout, device="cpu", precision=precision)
    return getattr(torch, str(arguments["dtype"]), torch.float32)


def receiver_of(engine: Engine) -> Receiver:
    """What takes the weights of an engine that does not share them with the learner."""
    if isinstance(engine, LocalEngine):
        return LocalWeights(engine)
    receiver: Receiver = engine.receiver  # type: ignore[attr-defined]
    return receiver


def make_collector(
    config: RunConfig, engine: Engine, encoder: ChatFormat, pool: Pool, *, sampling: tuple[float, float]
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


def make_learner(
    config: RunConfig, origin: Origin, device: str, placement: Placement, *, reference: Path | str | None
) -> Learner:
    """The configured learner.

    Args:
        reference: directory or name of the frozen model, where the algorithm needs one.
    Raises:
        ConfigError, WorkerError: it does not start.
    """
    settings = config.learner
    common: dict[str, Any] = {
        "device": device,
        "critic": ValueHead(origin.width, derive(config.run.seed, "critic")) if needs_critic(config.algo) else None,
        "temperature": config.rollout.temperature,
        "joint": config.algo.sil.update == "joint",
        "seed": derive(config.run.seed, "adapters"),
    }
    if settings.backend == "deepspeed":
        from spearrl.learner.deepspeed import DeepSpeedLearner

        environments = [placement.rank_environment(rank) for rank in range(settings.processes)]
        return DeepSpeedLearner(origin.address, settings, reference=reference, environments=environments, **common)
    frozen = None if reference is None or settings.lora.rank else load_model(str(reference))
    return LocalLearner(origin.model, settings, reference=frozen, **common)
