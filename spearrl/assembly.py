"""Builds the parts a config names: environment, model, encoder, engine, learner, collectors."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from spearrl import envs
from spearrl.algorithm import needs_critic
from spearrl.config import RunConfig
from spearrl.envs import Environment
from spearrl.envs.pool import Pool, open_pool
from spearrl.errors import ConfigError
from spearrl.evaluation import EvalResult, choose_panel, run_panel, some_tasks
from spearrl.learner import LocalLearner, ValueHead
from spearrl.models import build_tiny, load_model, load_tokenizer
from spearrl.rollout import ChatEncoder, Collector, Engine, LocalEngine
from spearrl.seeds import derive
from spearrl.sft import encode, fit
from spearrl.transcripts import Transcript, play_expert, texts
from spearrl.types import Group

Report = Callable[[str, dict[str, Any]], None]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEEP_BYTES = -1, -3, 1 << 30  # glibc malloc.h
CORPUS_EPISODES = 500  # episodes whose text the tiny tokenizer is trained on, where there is no cold start


@dataclass
class Parts:
    """What a trainer or an evaluation works with. Engine and learner share the model's parameters."""

    environment: Environment
    model: torch.nn.Module
    tokenizer: Any
    encoder: ChatEncoder
    engine: Engine
    learner: LocalLearner
    collector: Collector
    evaluator: Collector

    def close(self) -> None:
        """Close every environment slot."""
        self.collector.close()
        self.evaluator.close()


def prepare_torch(config: RunConfig) -> str:
    """Threads, determinism, seed; returns the device."""
    torch.set_num_threads(config.run.threads or os.cpu_count() or 1)
    torch.use_deterministic_algorithms(config.run.deterministic, warn_only=True)
    # Nothing here reads memory it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _keep_freed_memory()
    torch.manual_seed(derive(config.run.seed, "torch") % 2**31)
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('run.device="cuda" but torch sees no GPU', hint='use run.device="auto", or install a CUDA build of torch')
    if config.run.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.run.device


def _keep_freed_memory() -> None:
    """Tell glibc not to hand large buffers back after every use: page faults cost a tiny model a third of its time."""
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):  # musl has none
            library.mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
            library.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)


def make_environment(config: RunConfig) -> Environment:
    """The configured environment, with the run's turn limit."""
    environment = envs.make(config.env.name, **config.env.options)
    if config.env.max_turns:
        environment.max_turns = config.env.max_turns
    return environment


def assemble(
    config: RunConfig, model: torch.nn.Module, tokenizer: Any, environment: Environment, device: str, *, reference: torch.nn.Module | None = None
) -> Parts:
    """Wire the parts around a model; `reference`: the frozen one, where the algorithm needs it."""
    model = model.to(device)
    encoder = ChatEncoder(tokenizer)
    encoder.verify()
    settings = config.rollout
    engine = LocalEngine(model, slots=settings.slots, cache_mib=settings.cache_mib, context_tokens=settings.context_tokens, device=device)
    pool = _pool(config, environment)
    critic = _critic(model, config) if needs_critic(config.algo) else None
    learner = LocalLearner(
        model,
        config.learner,
        temperature=settings.temperature,
        device=device,
        joint=config.algo.sil.update == "joint",
        reference=reference,
        critic=critic,
    )
    return Parts(
        environment,
        model,
        tokenizer,
        encoder,
        engine,
        learner,
        _collector(config, engine, encoder, pool, sampling=(settings.temperature, 1.0)),
        _collector(config, engine, encoder, pool, sampling=(config.eval.temperature, config.eval.top_p)),
    )


def starting_model(config: RunConfig, environment: Environment, device: str, report: Report) -> tuple[torch.nn.Module, Any]:
    """The model a run begins with: loaded or built, then cold-started where the config asks for it."""
    wanted = config.sft.enabled or config.model.path == "tiny"
    transcripts = _transcripts(config, environment) if wanted else []
    if config.model.path == "tiny":
        model, tokenizer = build_tiny(texts(transcripts), config.model.tiny, derive(config.run.seed, "model"))
    else:
        model, tokenizer = load_model(config.model.path), load_tokenizer(config.model.path)
    if config.sft.enabled:
        cold_start(config, model.to(device), tokenizer, transcripts, report=report)
    return model, tokenizer


def cold_start(config: RunConfig, model: torch.nn.Module, tokenizer: Any, transcripts: list[Transcript], *, report: Report) -> None:
    """Clone the expert's episodes into `model`, in place, on the device it is on."""
    seed = config.run.seed
    encoder = ChatEncoder(tokenizer)
    lessons = encode(transcripts, encoder, style=config.env.style, context_tokens=config.rollout.context_tokens, settings=config.sft, seed=derive(seed, "sft"))
    report(
        "expert",
        {
            "episodes": len(transcripts),
            "success": sum(t.success for t in transcripts) / len(transcripts),
            "tokens": len(lessons.rows.token_ids),
            "dropped": lessons.dropped,
        },
    )
    fit(
        model,
        lessons,
        config.sft,
        config.learner,
        seed=derive(seed, "sft"),
        device=str(next(model.parameters()).device),
        report=lambda values: report("sft", values),
    )


def evaluate(config: RunConfig) -> EvalResult:
    """Play the configured panel with the model of `config.model.path` (a directory); nothing is trained or written."""
    result, _ = evaluate_groups(config)
    return result


def evaluate_groups(config: RunConfig) -> tuple[EvalResult, list[Group]]:
    """`evaluate`, with the played groups."""
    if config.model.path == "tiny":
        raise ConfigError('model.path="tiny" has no weights to evaluate', where="model.path", hint="give a run or a model directory")
    device = prepare_torch(config)
    environment = make_environment(config)
    parts = assemble(config, load_model(config.model.path), load_tokenizer(config.model.path), environment, device)
    try:
        return run_panel(parts.evaluator, choose_panel(environment, config.eval), config)
    finally:
        parts.close()


def _critic(model: Any, config: RunConfig) -> ValueHead:
    return ValueHead(model.get_output_embeddings().weight.shape[1], derive(config.run.seed, "critic"))


def _transcripts(config: RunConfig, environment: Environment) -> list[Transcript]:
    sft = config.sft
    return play_expert(
        environment,
        some_tasks(environment, config.rollout.train_split, "rollout.train_split"),
        sft.episodes if sft.enabled else CORPUS_EPISODES,
        noise=sft.noise,
        recovery=sft.recovery,
        style=config.env.style,
        seed=derive(config.run.seed, "sft"),
    )


def _pool(config: RunConfig, environment: Environment) -> Pool:
    settings = config.rollout
    return open_pool(
        environment,
        style=config.env.style,
        workers=settings.env_workers,
        deadline_s=settings.env_deadline_s,
        restarts=settings.env_restarts,
        deterministic=config.run.deterministic,
    )


def _collector(config: RunConfig, engine: Engine, encoder: ChatEncoder, pool: Pool, *, sampling: tuple[float, float]) -> Collector:
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
        pool=pool,
    )
