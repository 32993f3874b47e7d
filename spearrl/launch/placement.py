"""Who gets which GPU: learner ranks and engines, in turns on one set of GPUs or each with their own.

Arithmetic only; nothing is started here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from spearrl.config import RunConfig
from spearrl.errors import ConfigError
from spearrl.launch.devices import Gpu, Machine, visible

GIB = 1 << 30
LEARNER_SHARE = 0.5  # of the GPUs, where engines have their own and no setting says otherwise
KEPT = 3 * GIB  # CUDA context, communication buffers and a bucket of weights, per process
STEP = 0.05  # vllm.memory_fraction is rounded down to a multiple


@dataclass(frozen=True)
class Placement:
    """Who gets what. GPUs are numbered over all machines, `per_machine` on each.

    It alone decides whether engines and learner share GPUs and whether engines sleep; engines and workers are told.

    Args:
        config: the settings, with what was worked out.
        derived: dotted key -> value of the settings that were worked out.
        learner: the GPU of each learner rank; () on processors.
        engines: the GPUs of each engine, in the order of rollout workers; () on processors and for engines elsewhere.
        colocated: engines and learner share GPUs.
        resident: bytes of weights, gradients and optimiser state per learner rank, estimated; 0: unknown.
        notes: advice from estimates.
    """

    config: RunConfig
    derived: Mapping[str, Any] = field(default_factory=dict)
    gpu: Gpu = Gpu()
    per_machine: int = 0
    learner: tuple[int, ...] = ()
    engines: tuple[tuple[int, ...], ...] = ()
    colocated: bool = False
    resident: int = 0
    notes: tuple[str, ...] = ()

    @property
    def sleeps(self) -> bool:
        """Engines give their memory back while the learner works."""
        rollout = self.config.rollout
        return self.colocated and bool(self.engines) and rollout.engine == "vllm" and rollout.max_staleness == 0

    @property
    def engine_bytes(self) -> float:
        """Of each of its GPUs, what an engine of ours may take."""
        return self.config.vllm.memory_fraction * self.gpu.memory

    def rank_environment(self, rank: int) -> dict[str, str]:
        """Variables that show a learner rank its GPU; {} on processors."""
        return visible([self.learner[rank] % self.per_machine]) if self.learner else {}

    def worker_environment(self, worker: int) -> dict[str, str]:
        """Variables that show a rollout worker its GPUs; {} on processors."""
        return visible([gpu % self.per_machine for gpu in self.engines[worker]]) if self.engines else {}


def place(config: RunConfig, machine: Machine, *, derive: Collection[str] = (), parameters: int = 0) -> Placement:
    """Who gets what; settings in `derive` are worked out, all others stay as they are.

    Args:
        derive: dotted keys that nobody set.
        parameters: of the model; 0: unknown, and taken as small.
    Raises:
        ConfigError: the settings ask for GPUs that are not there or that cannot be dealt out.
    """
    total = _total(config, machine)
    derived, notes = _parts(config, machine, total, derive)
    config = config.with_settings(derived)
    if total == 0:
        return Placement(config, derived, notes=tuple(notes))
    per_machine, gpu = min(total, len(machine.gpus)), machine.gpus[0]
    colocated = _colocated(config, total, per_machine)
    learner, engines, workers = _deal(config, machine, total, derive, colocated=colocated)
    for key, value in (("learner.processes", len(learner)), ("rollout.workers", workers)):
        if key in derive and config.with_settings({key: value}) != config:
            derived[key] = value
    config = config.with_settings(derived)
    resident = resident_bytes(config, parameters)
    placement = Placement(config, derived, gpu, per_machine, learner, engines, colocated, resident)
    if colocated and engines and config.rollout.engine == "vllm" and "vllm.memory_fraction" in derive:
        if gpu.memory:
            derived["vllm.memory_fraction"] = _fraction(placement)
        else:
            notes.append(
                "vllm.memory_fraction is worked out where the run starts: the memory of these GPUs is unknown here"
            )
    if idle := sorted(set(range(total)) - {*learner, *(gpu for group in engines for gpu in group)}):
        notes.append(f"{span(idle)} {'has' if len(idle) == 1 else 'have'} nothing to do")
    placement = replace(placement, config=config.with_settings(derived))
    return replace(placement, notes=(*notes, *_fit(placement, parameters)))


def resident_bytes(config: RunConfig, parameters: int, *, stage: int | None = None) -> int:
    """Bytes a learner rank keeps between steps, as ZeRO shards them.

    A parameter takes 2 + 2 for weight and gradient, 12 for fp32 weight and AdamW.
    """
    learner = config.learner
    ranks = learner.processes if learner.backend == "deepspeed" else 1
    stage = (learner.zero_stage if learner.backend == "deepspeed" else 0) if stage is None else stage
    shards = [ranks if stage >= least else 1 for least in (3, 2, 1)]  # of weights, gradients, optimiser state
    sizes = {"none": (2, 2, 12), "optimizer": (2, 2, 0), "all": (0, 0, 0)}[learner.offload]
    if learner.lora.rank:
        sizes = (sizes[0], 0, 0)
    return round(parameters * sum(size / shard for size, shard in zip(sizes, shards, strict=True)))


def _total(config: RunConfig, machine: Machine) -> int:
    """GPUs of the run. Raises ConfigError where more are asked for than there are."""
    gpus, here = config.placement.gpus, len(machine.gpus)
    machines = max(1, machine.ranks // max(1, machine.local_ranks))
    if config.run.device == "cpu":
        if gpus:
            raise ConfigError(
                f'placement.gpus={gpus}, but run.device="cpu"', hint='use run.device="auto", or leave --gpus out'
            )
        return 0
    if not gpus:  # a model built from scratch is too small to share out unless somebody asks
        return min(here, 1) if config.model.path == "tiny" and not machine.ranks else here * machines
    if here == 0:
        hint = "leave --gpus out, or install a CUDA build of torch"
        raise ConfigError(f"placement.gpus={gpus}, but torch sees no GPU on this machine", hint=hint)
    if gpus > here and gpus % here:
        text = f"placement.gpus={gpus} is not whole machines of {here} GPUs, as this one has"
        raise ConfigError(text, hint=f"use --gpus {gpus // here * here}")
    if gpus > here and machine.present and machines == 1 and config.rollout.launcher != "ray":
        hint = (
            f"use --gpus {here}; for {gpus // here} machines start Ray and torchrun as docs/scaling.md shows, "
            "with rollout.launcher=ray"
        )
        raise ConfigError(f"placement.gpus={gpus}, but this machine has {here}", hint=hint)
    return gpus


def _parts(
    config: RunConfig, machine: Machine, total: int, derive: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Which engine, learner and launcher, where nobody chose, and notes. Raises ConfigError: one is not installed."""
    derived: dict[str, Any] = {}
    notes: list[str] = []
    large = config.model.path != "tiny" or config.placement.gpus > 0
    if (total and large or config.vllm.servers) and "rollout.engine" in derive and config.rollout.engine == "local":
        if "vllm" in machine.extras or config.vllm.servers:
            derived["rollout.engine"] = "vllm"
        else:
            notes.append(
                "vllm is not installed: torch's own engine samples, many times slower (pip install 'spearrl[vllm]')"
            )
    if len(config.vllm.addresses) > 1 and "rollout.workers" in derive:
        derived["rollout.workers"] = len(config.vllm.addresses)  # a worker speaks to one server
    if (total > 1 or machine.ranks) and "learner.backend" in derive and config.learner.backend == "local":
        if "deepspeed" not in machine.extras:
            text = f"{machine.ranks or total} learner processes need DeepSpeed, which is not installed"
            raise ConfigError(text, hint="pip install 'spearrl[deepspeed]', or use --gpus 1")
        derived["learner.backend"] = "deepspeed"
    elif machine.ranks and config.learner.backend == "local":
        hint = "use learner.backend=deepspeed, or start spearrl without the launcher"
        raise ConfigError(f"a launcher started {machine.ranks} ranks, but learner.backend=local works alone", hint=hint)
    if machine.ranks and config.learner.processes != machine.ranks:
        if "learner.processes" not in derive:
            text = f"learner.processes={config.learner.processes}, but a launcher started {machine.ranks} ranks"
            raise ConfigError(text, hint=f"use learner.processes={machine.ranks}, or leave it out")
        derived["learner.processes"] = machine.ranks
    if total > len(machine.gpus) and not config.vllm.servers and config.rollout.launcher == "processes":
        if "rollout.launcher" not in derive or "ray" not in machine.extras:
            machines = total // len(machine.gpus)
            raise ConfigError(
                f"{total} GPUs are on {machines} machines; rollout.launcher=processes starts workers on this one",
                hint="use rollout.launcher=ray (pip install 'spearrl[ray]'), with Ray running on every machine "
                "(docs/scaling.md)",
            )
        derived["rollout.launcher"] = "ray"
    return derived, notes


def _width(config: RunConfig) -> int:
    """GPUs of one engine."""
    return config.vllm.tensor_parallel if config.rollout.engine == "vllm" else 1


def _colocated(config: RunConfig, total: int, per_machine: int) -> bool:
    """Whether engines and learner share GPUs. Raises ConfigError where the GPUs do not allow what is asked for."""
    mode, servers = config.placement.mode, config.vllm.servers
    if mode == "auto":
        return total <= per_machine and (total == 1 or config.rollout.max_staleness == 0)
    if mode == "disaggregated" and total == 1 and not servers:
        text = "placement.mode=disaggregated needs a GPU for the learner and one for an engine; there is 1"
        raise ConfigError(text, hint="use placement.mode=colocated")
    if mode == "colocated" and total > per_machine and not servers:
        raise ConfigError(
            f"placement.mode=colocated on {total // per_machine} machines: a GPU's own transports reach engines of one "
            "machine only",
            hint="use placement.mode=disaggregated: NCCL crosses machines (docs/scaling.md)",
        )
    return mode == "colocated"


def _deal(
    config: RunConfig, machine: Machine, total: int, derive: Collection[str], *, colocated: bool
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], int]:
    """The GPU of each rank, the GPUs of each engine, and rollout.workers (0: the engine is in the trainer's process).

    Raises:
        ConfigError: they do not fit.
    """
    rollout, width, per_machine = config.rollout, _width(config), min(total, len(machine.gpus))
    free_to_choose = "rollout.workers" in derive
    learner = _ranks(_rank_count(config, machine, total, derive, colocated=colocated), machine, per_machine)
    if config.vllm.servers:
        return learner, (), rollout.workers
    if not colocated and not free_to_choose and rollout.workers == 0:
        hint = "leave rollout.workers out, or use placement.mode=colocated"
        raise ConfigError("rollout.workers=0 keeps the engine in the learner's process", hint=hint)
    groups = _groups([gpu for gpu in range(total) if colocated or gpu not in learner], width, per_machine)
    if colocated and free_to_choose and total % width:
        hint = f"use --gpus {max(1, total // width) * width}, or {_widths(total)}"
        raise ConfigError(f"{total} GPUs do not divide by vllm.tensor_parallel={width}", hint=hint)
    workers = rollout.workers
    if free_to_choose:
        workers = len(groups) if total > 1 else min(1, rollout.max_staleness)
    engines = max(1, workers)
    if engines > len(groups) or learner[-1] >= total:
        hint = "leave learner.processes and rollout.workers out: they are worked out from --gpus"
        if machine.ranks and free_to_choose:
            ranks = max(1, per_machine // 2)
            hint = f"let the launcher start fewer ranks: --nproc_per_node {ranks} leaves GPUs for engines"
        parts = f"{_count(len(learner), 'learner process')} and {_count(engines, 'engine')} of {_count(width, 'GPU')}"
        mode = "colocated" if colocated else "disaggregated"
        raise ConfigError(f"{parts} do not fit {mode} on {_count(total, 'GPU')}", hint=hint)
    return learner, tuple(groups[:engines]), workers


def _rank_count(config: RunConfig, machine: Machine, total: int, derive: Collection[str], *, colocated: bool) -> int:
    """Learner ranks: as many as a launcher started or somebody set, else what fits."""
    width = _width(config)
    if config.learner.backend == "local":
        return 1
    if machine.ranks or "learner.processes" not in derive:
        return config.learner.processes
    if colocated or config.vllm.servers:
        return total
    if "rollout.workers" not in derive:
        return max(1, total - config.rollout.workers * width)
    fitting = [ranks for ranks in range(1, total) if (total - ranks) % width == 0]
    if not fitting:
        text = f"{total} GPUs leave none for the learner beside an engine of vllm.tensor_parallel={width}"
        raise ConfigError(text, hint=f"use {_widths(total - 1)}")
    return max([ranks for ranks in fitting if ranks <= total * LEARNER_SHARE] or fitting[:1])


def _ranks(count: int, machine: Machine, per_machine: int) -> tuple[int, ...]:
    """The GPU of each rank.

    Raises:
        ConfigError: a machine has too few GPUs, or nobody starts the ranks of another machine.
    """
    here = machine.local_ranks or per_machine
    if machine.ranks and here > per_machine:
        text = f"a launcher started {here} ranks on a machine of {per_machine} GPUs"
        raise ConfigError(text, hint=f"use --nproc_per_node {per_machine} at most")
    if machine.present and count > per_machine and not machine.ranks and machine.gpus:
        machines = -(-count // per_machine)
        hint = f"use learner.processes={per_machine} at most, or torchrun --nnodes {machines} (docs/scaling.md)"
        raise ConfigError(f"learner.processes={count}, but this machine has {per_machine} GPUs", hint=hint)
    return tuple(rank // here * per_machine + rank % here for rank in range(count))


def _groups(gpus: Collection[int], width: int, per_machine: int) -> list[tuple[int, ...]]:
    """GPUs by `width`, no group over two machines."""
    machines: dict[int, list[int]] = {}
    for gpu in sorted(gpus):
        machines.setdefault(gpu // per_machine, []).append(gpu)
    return [tuple(own[i : i + width]) for own in machines.values() for i in range(0, len(own) - width + 1, width)]


def _widths(total: int) -> str:
    fitting = [str(n) for n in range(1, total + 1) if total % n == 0]
    return f"vllm.tensor_parallel={' or '.join(fitting[:4])}"


def _fraction(placement: Placement) -> float:
    """vllm.memory_fraction beside what the learner keeps on the same GPU."""
    memory, most = placement.gpu.memory, placement.config.vllm.memory_fraction
    share = max(0, memory - placement.resident - KEPT) / memory
    if not placement.sleeps:  # awake together: the rest is for the learner's activations
        share *= 0.5
    return round(max(STEP, min(most, share // STEP * STEP)), 2)


def _fit(placement: Placement, parameters: int) -> list[str]:
    """Advice where something is too large for a GPU, or could be laid out better; nothing is changed by it."""
    config, memory, resident = placement.config, placement.gpu.memory, placement.resident
    learner, weights, room = config.learner, 2 * parameters // _width(config), placement.engine_bytes
    if not (memory and parameters):
        return []
    if config.rollout.engine == "vllm" and not config.vllm.servers and weights > 0.8 * room:
        fix = "use a larger vllm.tensor_parallel, or learner.offload=optimizer"
        return [f"an engine's weights are about {gib(weights)} of the {gib(room)} it may take of a GPU: {fix}"]
    if resident + KEPT > 0.9 * memory:
        fix = "more GPUs, or learner.offload=optimizer, leave room to work"
        return [f"the learner keeps about {gib(resident)} of {gib(memory)} a GPU: {fix}"]
    lower = next((s for s in (1, 2) if resident_bytes(config, parameters, stage=s) < 0.4 * memory), 3)
    if learner.backend == "deepspeed" and lower < learner.zero_stage and learner.processes > 1:
        size = gib(resident_bytes(config, parameters, stage=lower))
        text = f"learner.zero_stage={lower} would fit too ({size} a GPU) and sends less between GPUs"
        return [f"{text}; {learner.zero_stage} stays as set"]
    return []


def _count(number: int, what: str) -> str:
    return f"{number} {what}{('es' if what.endswith('s') else 's') * (number != 1)}"


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / GIB:.1f} GiB"


def span(gpus: Collection[int]) -> str:
    """(0, 1, 2, 8) -> "GPUs 0-2, 8"."""
    runs: list[list[int]] = []
    for gpu in sorted(gpus):
        if runs and gpu == runs[-1][-1] + 1:
            runs[-1].append(gpu)
        else:
            runs.append([gpu])
    words = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"GPU{'s' * (len(gpus) > 1)} {words}"
