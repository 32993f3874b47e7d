"""Wires the parts of a run: a learner, what plays episodes, and the bridge that brings it the learner's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from spearrl.config import RunConfig
from spearrl.config.foreign import unsandboxed
from spearrl.envs import Environment, tasks_of
from spearrl.envs.pool.slot import Slot
from spearrl.errors import ConfigError, EngineError
from spearrl.faults import strike
from spearrl.launch.devices import detect
from spearrl.launch.factories import (
    engine_dtype,
    make_collector,
    make_engine,
    make_learner,
    make_pool,
    receiver_of,
    sampling_dtype,
)
from spearrl.launch.placement import Placement, place
from spearrl.launch.worker_process import processes
from spearrl.learner import Learner
from spearrl.learner.deepspeed.zero import require
from spearrl.learner.policy import use_bf16
from spearrl.models import check_vocabulary, copy_of, load_model, text_ids
from spearrl.models.chat_format import ChatFormat
from spearrl.models.formats import describe_format, open_format
from spearrl.rollout import Player
from spearrl.rollout.vllm.arguments import installed_version
from spearrl.rollout.workers.fleet import Fleet
from spearrl.rollout.workers.link import Launcher
from spearrl.rollout.workers.messages import Start
from spearrl.seeds import derive
from spearrl.start.origin import START, Origin, Report, silent
from spearrl.sync import Bridge, InProcess, Publisher
from spearrl.sync.receivers import Receiver
from spearrl.sync.sleep import put_to_sleep, wake_up
from spearrl.types import Message

PROBE = 32  # tokens at a prompt's end that engines and learner are compared on


@dataclass
class Players:
    """What plays episodes: an engine of this process, or a fleet of workers.

    Args:
        collector, evaluator: play with the sampling of training and of evaluation.
        receivers: take the learner's weights; iterated anew at every sync, for workers come and go.
    """

    collector: Player
    evaluator: Player
    receivers: Iterable[Receiver]
    engine: Any = None
    fleet: Fleet | None = None


@dataclass
class Assembly:
    """The parts of a run, wired."""

    tokenizer: Any
    learner: Learner
    players: Players
    bridge: Publisher
    placement: Placement
    report: Report = silent
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def model(self) -> Any:
        """The trained model, where it is whole in this process."""
        return self.learner.model

    def sleep_engines(self) -> None:
        """Before the learner works: engines that share its GPUs give their memory back, until the next `publish`.

        Workers that were replaced get their weights now: while the learner works there are none to be had.
        """
        self.players.collector.poll()
        placement = self.placement
        if placement.sleeps:
            receivers = list(self.players.receivers)
            for text in put_to_sleep(receivers, placement.engines, expected=placement.engine_bytes):
                self.report("warning", {"text": text})

    def publish(self, version: int) -> dict[str, float]:
        """Bring the learner's weights to everything that samples, verified; returns what it took.

        Raises:
            EngineError, WorkerError: somebody did not get them.
        """
        strike("sync.publish", EngineError)
        if self.players.fleet is not None:
            self.players.fleet.announce(version)
        if self.placement.sleeps:
            self.learner.release()
            wake_up(list(self.players.receivers))
        return self.bridge.publish(version)

    def close(self) -> None:
        """Close environments, engines and learner processes."""
        self.stack.close()


@dataclass
class Wiring:
    """What the parts are made from, and how.

    Args:
        folder: where workers log; of a run, its directory.
        stack: closes what is made here.
    """

    config: RunConfig
    origin: Origin
    environment: Environment
    device: str
    folder: Path
    stack: ExitStack
    report: Report = silent
    placement: Placement = field(init=False)
    encoder: ChatFormat = field(init=False)

    def __post_init__(self) -> None:
        self.placement = place(self.config, detect())
        self.encoder = encoder = open_format(self.origin.tokenizer, self.config.model, self.environment.tools())
        used = (*encoder.start([Message("user", "hello")]), *encoder.reply_ids("hello"))
        check_vocabulary(self.origin.tokenizer, self.origin.vocabulary, used, self.config.model.path)

    @property
    def in_process(self) -> bool:
        """Whether torch samples in this process, from a model that a learner may share."""
        return self.config.rollout.engine == "local" and not self.config.rollout.workers

    @property
    def address(self) -> str:
        """What engines load a model by: workers may be on machines where it is not downloaded yet."""
        return self.origin.address if self.config.rollout.workers else str(self.origin.folder)

    def warn(self, text: str) -> None:
        """Report a warning."""
        self.report("warning", {"text": text})

    def players(self, model: torch.nn.Module | str, on_start: Callable[[Receiver], None] | None = None) -> Players:
        """What plays episodes.

        Args:
            model: one to share parameters with, or a directory; for workers, a directory or name.
            on_start: of the Fleet, where workers play.
        """
        config, placement = self.config, self.placement
        training, evaluation = (config.rollout.temperature, 1.0), (config.eval.temperature, config.eval.top_p)
        if config.rollout.workers:
            launcher = launcher_of(config, str(model), placement, self.folder)
            fleet = Fleet(config, launcher, on_start=on_start, report=None if self.report is silent else self.warn)
            self.stack.callback(fleet.close)
            return Players(fleet.collector(*training), fleet.collector(*evaluation), fleet, fleet=fleet)
        shared = {"colocated": placement.colocated, "sleeps": placement.sleeps}
        engine = make_engine(config, model, device=self.device, tokenizer=self.encoder.tokenizer, **shared)
        self.stack.callback(engine.close)
        pool = make_pool(config, self.environment)
        self.stack.callback(pool.close)
        collector, evaluator = (
            make_collector(config, engine, self.encoder, pool, sampling=sampling) for sampling in (training, evaluation)
        )
        return Players(collector, evaluator, [receiver_of(engine)] if isinstance(model, str) else [], engine=engine)

    def bridge(self, learner: Learner, players: Players) -> Bridge:
        """What brings a learner's weights to engines with models of their own."""
        config, dtype = self.config, engine_dtype(self.config, self.origin.folder)
        text = probe_text(config, self.environment, self.encoder, self.warn)
        bf16 = use_bf16(config.learner.precision, torch.device(self.device))
        return Bridge(
            learner,
            players.receivers,
            settings=config.sync,
            probe_ids=list(text[-PROBE:]),
            run_folder=self.folder,
            dtype=None if dtype == torch.float32 else dtype,
            float32=dtype == torch.float32 and not bf16,
            adapters=learner.export_adapter if config.learner.lora.rank and config.rollout.engine == "vllm" else None,
            report=self.warn,
        )


def assemble(
    config: RunConfig,
    origin: Origin,
    environment: Environment,
    device: str,
    *,
    reference: Path | str | None = None,
    run_folder: Path,
    report: Report = silent,
) -> Assembly:
    """Make the parts around a model and wire them; where one fails, those made before it are closed.

    Args:
        reference: directory or name of the frozen model, where the algorithm needs one.
        run_folder: the run directory: logs of workers, weights they start with.
    """
    with ExitStack() as stack:
        wiring = Wiring(config, origin, environment, device, run_folder, stack, report)
        if text := unsandboxed(config.env.options, True):
            wiring.warn(text)
        placement, encoder = wiring.placement, wiring.encoder
        report("format", {"text": describe_format(encoder), "notes": list(encoder.stops.notes)})
        one_process = wiring.in_process and config.learner.backend == "local"
        dtype = sampling_dtype(config)
        copied = one_process and dtype != torch.float32  # else the engine of one process samples from the learner's
        if not one_process:
            origin.settle(run_folder / START)
        own = copy_of(origin.model, dtype).to(device) if copied else None  # before the learner adds adapters
        learner = make_learner(config, origin, device, placement, reference=reference)
        stack.callback(learner.close)
        if config.learner.packing == "auto" and learner.why_padded:
            report("packing", {"text": f"learner.packing: padded, as {learner.why_padded}"})
        if placement.colocated:  # a cold start's memory; an engine takes its share as it starts
            learner.release()
        model = own or (learner.model if one_process else wiring.address)
        bridge: Publisher  # made after the workers, which ask for weights only once episodes are played
        players = wiring.players(model, on_start=lambda receiver: bridge.catch_up(receiver))
        if one_process and players.engine is not None:
            bridge = InProcess(players.engine, learner if copied else None)
        else:
            bridge = wiring.bridge(learner, players)
        stack.callback(bridge.close)
        return Assembly(origin.tokenizer, learner, players, bridge, placement, report, stack.pop_all())


def players_of(config: RunConfig, environment: Environment, device: str, stack: ExitStack) -> Players:
    """Players of the model that the config names; nothing learns.

    Args:
        stack: closes what is made here.
    Raises:
        ConfigError: the config names none.
    """
    if config.model.path == "tiny":
        raise ConfigError(
            'model.path="tiny" has no weights to evaluate', where="model.path", hint="give a run or a model directory"
        )
    # Nothing learns here: a run of eight GPUs is evaluated on whatever this machine has.
    alone = {"learner.backend": "local", "learner.processes": 1, "learner.offload": "none"}
    config = config.with_settings({**alone, "placement.gpus": 0, "placement.mode": "auto"})
    origin, logs = Origin.of(config.model.path), Path(stack.enter_context(TemporaryDirectory()))
    wiring = Wiring(config, origin, environment, device, logs, stack)
    if not wiring.in_process:
        return wiring.players(wiring.address)
    return wiring.players(load_model(str(origin.folder), dtype=sampling_dtype(config)).to(device))


def check_extras(config: RunConfig, *, unsandboxed_tools: bool = False) -> None:
    """Refuse settings whose optional package is missing, or that switch the sandbox off, before a cold start.

    Raises ConfigError, and RefusedError unless `unsandboxed_tools`.
    """
    unsandboxed(config.env.options, unsandboxed_tools)
    if config.rollout.engine == "vllm" and not config.vllm.servers:
        installed_version()
    if config.learner.backend == "deepspeed":
        require()
    for needed, package, extra, where in (
        (config.learner.lora.rank, "peft", "lora", "learner.lora.rank"),
        (config.rollout.launcher == "ray", "ray", "ray", "rollout.launcher"),
    ):
        if needed and find_spec(package) is None:
            hint = f"pip install 'spearrl[{extra}]'"
            raise ConfigError(f"this setting needs {package}, which is not installed", where=where, hint=hint)


def launcher_of(config: RunConfig, model_dir: str, placement: Placement, logs: Path) -> Launcher:
    """What starts the rollout workers, each knowing what the placement decided for it."""
    start = Start(config, model_dir, colocated=placement.colocated, sleeps=placement.sleeps)
    if config.rollout.launcher == "ray":
        from spearrl.launch.ray import actors

        return actors(start, logs, gpus=len(placement.engines[0]) if placement.engines else 0)
    return processes(start, logs, [placement.worker_environment(index) for index in range(config.rollout.workers)])


def probe_text(
    config: RunConfig, environment: Environment, encoder: ChatFormat, report: Callable[[str], None]
) -> Sequence[int]:
    """Token ids of the first training task's first prompt, pictures left out; of ordinary text where it has none."""
    task = tasks_of(environment, config.rollout.train_split, setting="rollout.train_split")[0]
    slot = Slot(environment.spawn(), config.env.style)
    try:
        start = slot.start(task, derive(config.run.seed, "probe"))
    except Exception as error:  # an environment may fail now and then: episodes are issued again
        report(f"weight syncs are checked on other text than the environment's: {type(error).__name__}: {error}")
        return text_ids(encoder.tokenizer)
    finally:
        slot.close()
    return encoder.start([Message(message.role, message.text) for message in start.messages], start.tools)
