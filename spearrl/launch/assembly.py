"""Builds the parts a config names and wires them: environment, encoder, learner, engine or workers, bridge, collectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from spearrl.algorithm import needs_critic
from spearrl.config import PlacementSection, RunConfig
from spearrl.envs import Environment
from spearrl.errors import ConfigError
from spearrl.evaluation import EvalResult, choose_panel, run_panel
from spearrl.launch.build import engine_dtype, make_collector, make_engine, make_environment, make_pool, receiver_of
from spearrl.launch.devices import detect
from spearrl.launch.placement import Placement, place
from spearrl.learner import Learner, LocalLearner, ValueHead
from spearrl.learner.deepspeed.zero import require
from spearrl.learner.policy import use_bf16
from spearrl.models import load_model, prepare_torch
from spearrl.rollout import ChatEncoder, Engine, Player
from spearrl.rollout.vllm.arguments import installed_version
from spearrl.rollout.workers.fleet import Fleet
from spearrl.seeds import derive
from spearrl.start.origin import Origin, Report, silent
from spearrl.sync import Bridge, InProcess, Publisher, probe_prompt
from spearrl.sync.receivers import Receiver
from spearrl.sync.sleep import put_to_sleep, wake_up
from spearrl.types import Group

START = "start"  # folder of a run directory: the weights that workers load before the bridge brings newer ones


@dataclass
class Players:
    """What plays episodes: an engine of this process, or a fleet of workers; and who of them takes weights."""

    collector: Player
    evaluator: Player
    receivers: Iterable[Receiver]  # asked anew at every sync: workers come and go
    engine: Engine | None = None
    fleet: Fleet | None = None


@dataclass
class Parts:
    """What a trainer works with."""

    environment: Environment
    tokenizer: Any
    encoder: ChatEncoder
    learner: Learner
    players: Players
    bridge: Publisher
    placement: Placement
    report: Report = silent
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def collector(self) -> Player:
        return self.players.collector

    @property
    def evaluator(self) -> Player:
        return self.players.evaluator

    @property
    def engine(self) -> Any:
        """The engine of this process; None where workers have theirs."""
        return self.players.engine

    @property
    def model(self) -> Any:
        """The trained model, where it is whole in this process."""
        return self.learner.model  # type: ignore[attr-defined]

    def hand_over(self) -> None:
        """The learner's turn: in a colocated run engines give their memory back, until the next `publish`."""
        if self.placement.sleeps:
            slept = put_to_sleep(
                list(self.players.receivers), self.placement.engines, expected=self.placement.engine_bytes
            )
            for text in slept.warnings:
                self.report("warning", {"text": text})

    def publish(self, version: int) -> dict[str, float]:
        """Bring the learner's weights to everything that samples, verified; what it took. Raises EngineError, WorkerError."""
        if self.players.fleet is not None:
            self.players.fleet.announce(version)
        if self.placement.sleeps:
            self.learner.release()
            wake_up(list(self.players.receivers))
        return self.bridge.publish(version)

    def close(self) -> None:
        """Close environments, engines and learner processes."""
        self.stack.close()


def assemble(
    config: RunConfig,
    origin: Origin,
    environment: Environment,
    device: str,
    *,
    reference: Path | None = None,
    run_folder: Path,
    report: Report = silent,
) -> Parts:
    """Wire the parts around a model.

    Args:
        reference: directory of the frozen model, where the algorithm needs one.
        run_folder: the run directory: logs of workers, weights they start with.
    """
    placement = place(config, detect())
    encoder = ChatEncoder(origin.tokenizer)
    encoder.verify()
    with ExitStack() as stack:
        if (
            config.rollout.workers
            or (config.rollout.engine == "vllm" and not config.vllm.servers)
            or config.learner.backend != "local"
        ):
            origin.settle(run_folder / START)
        learner = make_learner(config, origin, device, placement, reference=reference)
        stack.callback(learner.close)
        if placement.colocated:  # a cold start's memory; an engine takes its share as it starts
            learner.release()
        shared = (
            learner.model
            if config.rollout.engine == "local" and isinstance(learner, LocalLearner) and not config.rollout.workers
            else None
        )
        bridge: (
            Publisher  # made after the workers that it sends to, which ask for weights only when episodes are played
        )
        players = make_players(
            config,
            origin,
            environment,
            device,
            encoder=encoder,
            model=shared,
            placement=placement,
            run_folder=run_folder,
            stack=stack,
            on_start=lambda receiver: bridge.catch_up(receiver),
            report=lambda text: report("warning", {"text": text}),
        )
        if shared is not None and players.engine is not None:
            bridge = InProcess(players.engine)
        else:
            bridge = _bridge(config, origin, learner, players, device=device, run_folder=run_folder, report=report)
        stack.callback(bridge.close)
        return Parts(
            environment, origin.tokenizer, encoder, learner, players, bridge, placement, report, stack.pop_all()
        )


def _bridge(
    config: RunConfig,
    origin: Origin,
    learner: Learner,
    players: Players,
    *,
    device: str,
    run_folder: Path,
    report: Report,
) -> Bridge:
    """What brings a learner's weights to engines with models of their own."""
    held = engine_dtype(config, origin.folder)
    exact = held == torch.float32 and not use_bf16(config.learner.precision, torch.device(device))
    return Bridge(
        learner,
        players.receivers,
        settings=config.sync,
        probe_ids=probe_prompt(len(origin.tokenizer), config.run.seed),
        run_folder=run_folder,
        dtype=None if held == torch.float32 else held,
        float32=exact,
        adapters=learner.export_adapter if config.learner.lora.rank and config.rollout.engine == "vllm" else None,
        report=lambda text: report("warning", {"text": text}),
    )


def make_learner(
    config: RunConfig, origin: Origin, device: str, placement: Placement, *, reference: Path | None
) -> Learner:
    """The configured learner. Raises ConfigError, WorkerError."""
    settings = config.learner
    critic = ValueHead(origin.width, derive(config.run.seed, "critic")) if needs_critic(config.algo) else None
    common: dict[str, Any] = {
        "temperature": config.rollout.temperature,
        "joint": config.algo.sil.update == "joint",
        "seed": derive(config.run.seed, "adapters"),
    }
    if settings.backend == "deepspeed":
        from spearrl.learner.deepspeed import DeepSpeedLearner

        environments = [placement.rank_environment(rank) for rank in range(settings.processes)]
        return DeepSpeedLearner(
            origin.folder,
            settings,
            device=device,
            critic=critic,
            reference=reference,
            environments=environments,
            **common,
        )
    model: Any = origin.model
    frozen = None if reference is None or settings.lora.rank else load_model(str(reference))
    return LocalLearner(model, settings, device=device, reference=frozen, critic=critic, **common)


def make_players(
    config: RunConfig,
    origin: Origin,
    environment: Environment,
    device: str,
    *,
    encoder: ChatEncoder,
    stack: ExitStack,
    model: torch.nn.Module | None = None,
    placement: Placement | None = None,
    run_folder: Path | None = None,
    on_start: Callable[[Receiver], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> Players:
    """What plays episodes. `model`: one to share parameters with; `stack` closes what is made here; `on_start`, `report`: of a Fleet."""
    training, evaluation = (config.rollout.temperature, 1.0), (config.eval.temperature, config.eval.top_p)
    if config.rollout.workers:
        logs = run_folder or Path(stack.enter_context(TemporaryDirectory()))
        fleet = Fleet(config, _launcher(config, str(origin.folder), placement, logs), on_start=on_start, report=report)
        stack.callback(fleet.close)
        return Players(fleet.collector(*training), fleet.collector(*evaluation), fleet, fleet=fleet)
    engine = make_engine(config, model if model is not None else str(origin.folder), device=device)
    stack.callback(engine.close)
    pool = make_pool(config, environment)
    stack.callback(pool.close)
    collectors = [
        make_collector(config, engine, encoder, pool, sampling=sampling) for sampling in (training, evaluation)
    ]
    return Players(collectors[0], collectors[1], [] if model is not None else [receiver_of(engine)], engine=engine)


def _launcher(config: RunConfig, folder: str, placement: Placement | None, run_folder: Path) -> Any:
    environments = (
        [placement.worker_environment(index) for index in range(config.rollout.workers)]
        if placement and placement.engines
        else []
    )
    if config.rollout.launcher == "ray":
        from spearrl.launch.ray import actors

        return actors(
            config, folder, run_folder, gpus=len(placement.engines[0]) if placement and placement.engines else 0
        )
    from spearrl.launch.worker import processes

    return processes(config, folder, run_folder, environments)


def check_extras(config: RunConfig) -> None:
    """Raises ConfigError where an optional package that the settings need is missing: at once, not after a cold start."""
    if config.rollout.engine == "vllm" and not config.vllm.servers:
        installed_version()
    if config.learner.backend == "deepspeed":
        require()
    for needed, package, extra, where in (
        (config.learner.lora.rank, "peft", "lora", "learner.lora.rank"),
        (config.rollout.launcher == "ray", "ray", "ray", "rollout.launcher"),
    ):
        if needed and find_spec(package) is None:
            raise ConfigError(
                f"this setting needs {package}, which is not installed",
                where=where,
                hint=f"pip install 'spearrl[{extra}]'",
            )


def evaluate(config: RunConfig) -> EvalResult:
    """Play the configured panel with the model of `config.model.path` (a directory); nothing is trained or written."""
    result, _ = evaluate_groups(config)
    return result


def evaluate_groups(config: RunConfig) -> tuple[EvalResult, list[Group]]:
    """`evaluate`, with the played groups."""
    device, environment = prepare_torch(config), make_environment(config)
    with ExitStack() as stack:
        players = playing(config, environment, device, stack)
        return run_panel(players.evaluator, choose_panel(environment, config.eval), config)


def playing(config: RunConfig, environment: Environment, device: str, stack: ExitStack) -> Players:
    """Players of the model directory that the config names; nothing learns. Raises ConfigError where it names none."""
    if config.model.path == "tiny":
        raise ConfigError(
            'model.path="tiny" has no weights to evaluate', where="model.path", hint="give a run or a model directory"
        )
    # Nothing learns here: a run of eight GPUs is evaluated on whatever this machine has.
    alone = {
        "learner": config.learner.model_copy(update={"backend": "local", "processes": 1, "offload": "none"}),
        "placement": PlacementSection(),
    }
    config = config.model_copy(update=alone)
    origin = Origin.of(config.model.path)
    encoder = ChatEncoder(origin.tokenizer)
    encoder.verify()
    shared = origin.model.to(device) if config.rollout.engine == "local" and not config.rollout.workers else None
    return make_players(
        config,
        origin,
        environment,
        device,
        encoder=encoder,
        model=shared,
        placement=place(config, detect()),
        stack=stack,
    )
