"""Who gets which GPU: learner ranks and engines, in turns on one set of GPUs or each with their own. Arithmetic only; nothing is started here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
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

    Args:
        config: the settings, with what was worked out.
        derived: dotted key -> value of the settings that were worked out.
        learner: the GPU of each learner rank; () on processors.
        engines: the GPUs of each engine, in the order of rollout workers; () on processors and for engines that run elsewhere.
        colocated: engines and learner share GPUs.
        resident: bytes of weights, gradients and optimiser state per learner rank, estimated; 0: unknown.
    """

    config: RunConfig
    derived: Mapping[str, Any]
    gpu: Gpu
    per_machine: int
    learner: tuple[int, ...] = ()
    engines: tuple[tuple[int, ...], ...] = ()
    colocated: bool = False
    resident: int = 0
    notes: tuple[str, ...] = ()

    @property
    def sleeps(self) -> bool:
        """Engines give their memory back while the learner works."""
        return (
            self.colocated
            and bool(self.engines)
            and self.config.rollout.engine == "vllm"
            and self.config.rollout.max_staleness == 0
        )

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


@dataclass(frozen=True)
class _Dealt:
    learner: tuple[int, ...]
    engines: tuple[tuple[int, ...], ...]
    workers: int  # 0: the one engine lives in the trainer's process
    mode: str


def place(config: RunConfig, machine: Machine, *, derive: Collection[str] = (), parameters: int = 0) -> Placement:
    """Who gets what; settings in `derive` are worked out, all others stay as they are.

    Args:
        derive: dotted keys that nobody set.
        parameters: of the model; 0: unknown, and taken as small.

    Raises ConfigError where the settings ask for GPUs that are not there or that cannot be dealt out.
    """
    total = _total(config, machine)
    derived, notes = _parts(config, machine, total, derive)
    config = with_settings(config, derived)
    if total == 0:
        return Placement(config, derived, Gpu(), 0, notes=tuple(notes))
    per_machine = min(total, len(machine.gpus))
    counts = _deal(config, machine, total, derive)
    changed: dict[str, Any] = {"learner.processes": len(counts.learner), "rollout.workers": counts.workers}
    if total > per_machine:  # "auto" alone does not tell an engine on how many machines it is one of
        changed["placement.mode"] = counts.mode
    derived |= {key: value for key, value in changed.items() if key in derive and value != _value(config, key)}
    gpu = machine.gpus[0]
    resident = resident_bytes(with_settings(config, derived), parameters)
    if (
        counts.mode == "colocated"
        and config.rollout.engine == "vllm"
        and counts.engines
        and "vllm.memory_fraction" in derive
    ):
        derived |= _fraction(config, gpu, resident, notes)
    config = with_settings(config, derived)
    used = {*counts.learner, *(gpu for group in counts.engines for gpu in group)}
    if idle := sorted(set(range(total)) - used):
        notes.append(f"{span(idle)} {'has' if len(idle) == 1 else 'have'} nothing to do")
    notes += _fit(config, gpu, resident, parameters)
    colocated = counts.mode == "colocated"
    return Placement(
        config, derived, gpu, per_machine, counts.learner, counts.engines, colocated, resident, tuple(notes)
    )


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """A copy with settings "section.key" changed."""
    changes: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        changes.setdefault(section, {})[name] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    )


def resident_bytes(config: RunConfig, parameters: int, *, stage: int | None = None) -> int:
    """Bytes a learner rank keeps between steps: 2 + 2 a parameter for weights and gradients, 12 for fp32 weights and AdamW, as ZeRO shards them."""
    learner = config.learner
    ranks = learner.processes if learner.backend == "deepspeed" else 1
    stage = (learner.zero_stage if learner.backend == "deepspeed" else 0) if stage is None else stage
    shards = [ranks if stage >= least else 1 for least in (3, 2, 1)]  # of weights, gradients, optimiser state
    kept = {"none": (2, 2, 12), "optimizer": (2, 2, 0), "all": (0, 0, 0)}[learner.offload]
    if learner.lora.rank:
        kept = (min(kept[0], 2), 0, 0)
    return round(parameters * sum(size / shard for size, shard in zip(kept, shards, strict=True)))


def _value(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _total(config: RunConfig, machine: Machine) -> int:
    """GPUs of the run. Raises ConfigError where more are asked for than there are."""
    wanted, here = config.placement.gpus, len(machine.gpus)
    if config.run.device == "cpu":
        if wanted:
            raise ConfigError(
                f'placement.gpus={wanted}, but run.device="cpu"', hint='use run.device="auto", or leave --gpus out'
            )
        return 0
    machines = max(1, machine.ranks // max(1, machine.local_ranks))
    if not wanted:  # a model built from scratch is too small to share out unless somebody asks
        return min(here, 1) if config.model.path == "tiny" and not machine.ranks else here * machines
    if here == 0:
        raise ConfigError(
            f"placement.gpus={wanted}, but torch sees no GPU on this machine",
            hint="leave --gpus out, or install a CUDA build of torch",
        )
    if wanted > here and wanted % here:
        raise ConfigError(
            f"placement.gpus={wanted} is not whole machines of {here} GPUs, as this one has",
            hint=f"use --gpus {wanted // here * here}",
        )
    if wanted > here and machine.present and machines == 1 and config.rollout.launcher != "ray":
        hint = f"use --gpus {here}; for {wanted // here} machines start Ray and torchrun as docs/scaling.md shows, with rollout.launcher=ray"
        raise ConfigError(f"placement.gpus={wanted}, but this machine has {here}", hint=hint)
    return wanted


def _parts(
    config: RunConfig, machine: Machine, total: int, derive: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Which engine, learner and launcher, where nobody chose; and what to tell."""
    found: dict[str, Any] = {}
    notes: list[str] = []
    large = config.model.path != "tiny" or config.placement.gpus > 0
    if (total and large or config.vllm.servers) and "rollout.engine" in derive and config.rollout.engine == "local":
        if "vllm" in machine.extras or config.vllm.servers:
            found["rollout.engine"] = "vllm"
        else:
            notes.append(
                "vllm is not installed: torch's own engine samples, many times slower (pip install 'spearrl[vllm]')"
            )
    if len(config.vllm.addresses) > 1 and "rollout.workers" in derive:
        found["rollout.workers"] = len(config.vllm.addresses)  # a worker speaks to one server
    if (total > 1 or machine.ranks) and "learner.backend" in derive and config.learner.backend == "local":
        found["learner.backend"] = "deepspeed"
    backend = found.get("learner.backend", config.learner.backend)
    if machine.ranks and backend == "local":
        hint = "use learner.backend=deepspeed, or start spearrl without the launcher"
        raise ConfigError(f"a launcher started {machine.ranks} ranks, but learner.backend=local works alone", hint=hint)
    if "learner.backend" in found and "deepspeed" not in machine.extras:
        hint = "pip install 'spearrl[deepspeed]', or use --gpus 1"
        raise ConfigError(
            f"{machine.ranks or total} learner processes need DeepSpeed, which is not installed", hint=hint
        )
    if machine.ranks and config.learner.processes != machine.ranks:
        if "learner.processes" not in derive:
            hint = f"use learner.processes={machine.ranks}, or leave it out"
            raise ConfigError(
                f"learner.processes={config.learner.processes}, but a launcher started {machine.ranks} ranks", hint=hint
            )
        found["learner.processes"] = machine.ranks
    if total > len(machine.gpus) and not config.vllm.servers and config.rollout.launcher == "processes":
        if "rollout.launcher" not in derive or "ray" not in machine.extras:
            hint = "use rollout.launcher=ray (pip install 'spearrl[ray]'), with Ray running on every machine (docs/scaling.md)"
            raise ConfigError(
                f"{total} GPUs are on {total // len(machine.gpus)} machines; rollout.launcher=processes starts workers on this one",
                hint=hint,
            )
        found["rollout.launcher"] = "ray"
    return found, notes


def _width(config: RunConfig) -> int:
    """GPUs of one engine."""
    return config.vllm.tensor_parallel if config.rollout.engine == "vllm" else 1


def _deal(config: RunConfig, machine: Machine, total: int, derive: Collection[str]) -> _Dealt:
    """The GPUs of ranks and engines. Raises ConfigError where they do not fit."""
    rollout, width, per_machine = config.rollout, _width(config), min(total, len(machine.gpus))
    mode = _mode(config, total, per_machine)
    chosen = None if "rollout.workers" in derive else rollout.workers
    learner = _ranks(_rank_count(config, machine, total, derive, mode), machine, per_machine)
    if config.vllm.servers:
        return _Dealt(learner, (), rollout.workers, mode)
    if mode == "disaggregated" and chosen == 0:
        raise ConfigError(
            "rollout.workers=0 keeps the engine in the learner's process",
            hint="leave rollout.workers out, or use placement.mode=colocated",
        )
    free = [gpu for gpu in range(total) if mode == "colocated" or gpu not in learner]
    groups = _groups(free, width, per_machine)
    if mode == "colocated" and chosen is None and total % width:
        hint = f"use --gpus {max(1, total // width) * width}, or {_widths(total)}"
        raise ConfigError(f"{total} GPUs do not divide by vllm.tensor_parallel={width}", hint=hint)
    workers = chosen if chosen is not None else len(groups) if total > 1 else min(1, rollout.max_staleness)
    if max(1, workers) > len(groups) or learner[-1] >= total:
        parts = f"{_count(len(learner), 'learner process')} and {_count(max(1, workers), 'engine')} of {_count(width, 'GPU')}"
        hint = "leave learner.processes and rollout.workers out: they are worked out from --gpus"
        if machine.ranks and chosen is None:
            hint = f"let the launcher start fewer ranks: --nproc_per_node {max(1, per_machine // 2)} leaves GPUs for engines"
        raise ConfigError(f"{parts} do not fit {mode} on {_count(total, 'GPU')}", hint=hint)
    return _Dealt(learner, tuple(groups[: max(1, workers)]), workers, mode)


def _mode(config: RunConfig, total: int, per_machine: int) -> str:
    """Colocated or disaggregated. Raises ConfigError where the GPUs do not allow what is asked for."""
    mode, ahead = config.placement.mode, config.rollout.max_staleness > 0
    if mode == "auto":
        mode = "disaggregated" if total > per_machine or (total > 1 and ahead) else "colocated"
    if mode == "disaggregated" and total == 1 and not config.vllm.servers:
        raise ConfigError(
            "placement.mode=disaggregated needs a GPU for the learner and one for an engine; there is 1",
            hint="use placement.mode=colocated",
        )
    if mode == "colocated" and total > per_machine and not config.vllm.servers:
        hint = "use placement.mode=disaggregated: NCCL crosses machines (docs/scaling.md)"
        raise ConfigError(
            f"placement.mode=colocated on {total // per_machine} machines: a GPU's own transports reach engines of one machine only",
            hint=hint,
        )
    return mode


def _rank_count(config: RunConfig, machine: Machine, total: int, derive: Collection[str], mode: str) -> int:
    """Learner ranks: as many as a launcher started or somebody set, else what fits."""
    width = _width(config)
    if config.learner.backend == "local":
        return 1
    if machine.ranks or "learner.processes" not in derive:
        return config.learner.processes
    if mode == "colocated" or config.vllm.servers:
        return total
    if "rollout.workers" not in derive:
        return max(1, total - config.rollout.workers * width)
    fits = [ranks for ranks in range(1, total) if (total - ranks) % width == 0]
    if not fits:
        raise ConfigError(
            f"{total} GPUs leave none for the learner beside an engine of vllm.tensor_parallel={width}",
            hint=f"use {_widths(total - 1)}",
        )
    return max([ranks for ranks in fits if ranks <= total * LEARNER_SHARE] or fits[:1])


def _ranks(count: int, machine: Machine, per_machine: int) -> tuple[int, ...]:
    """The GPU of each rank. Raises ConfigError where a machine has too few, or nobody starts the ranks of another machine."""
    here = machine.local_ranks or per_machine
    if machine.ranks and here > per_machine:
        raise ConfigError(
            f"a launcher started {here} ranks on a machine of {per_machine} GPUs",
            hint=f"use --nproc_per_node {per_machine} at most",
        )
    if machine.present and count > per_machine and not machine.ranks and machine.gpus:
        hint = f"use learner.processes={per_machine} at most, or torchrun --nnodes {-(-count // per_machine)} (docs/scaling.md)"
        raise ConfigError(f"learner.processes={count}, but this machine has {per_machine} GPUs", hint=hint)
    return tuple(rank // here * per_machine + rank % here for rank in range(count))


def _groups(free: Collection[int], width: int, per_machine: int) -> list[tuple[int, ...]]:
    """GPUs by `width`, no group over two machines."""
    machines: dict[int, list[int]] = {}
    for gpu in sorted(free):
        machines.setdefault(gpu // per_machine, []).append(gpu)
    return [tuple(gpus[i : i + width]) for gpus in machines.values() for i in range(0, len(gpus) - width + 1, width)]


def _widths(total: int) -> str:
    fitting = [str(n) for n in range(1, total + 1) if total % n == 0]
    return f"vllm.tensor_parallel={' or '.join(fitting[:4])}"


def _fraction(config: RunConfig, gpu: Gpu, resident: int, notes: list[str]) -> dict[str, float]:
    """vllm.memory_fraction beside what the learner keeps on the same GPU."""
    if not gpu.memory:
        notes.append(
            "vllm.memory_fraction is worked out where the run starts: the memory of these GPUs is unknown here"
        )
        return {}
    room = max(0, gpu.memory - resident - KEPT)
    share = (
        room / gpu.memory * (1.0 if config.rollout.max_staleness == 0 else 0.5)
    )  # awake together: the rest is for activations
    return {"vllm.memory_fraction": round(max(STEP, min(config.vllm.memory_fraction, share // STEP * STEP)), 2)}


def _fit(config: RunConfig, gpu: Gpu, resident: int, parameters: int) -> list[str]:
    """Advice from estimates; nothing is changed by it."""
    learner, weights = config.learner, 2 * parameters // _width(config)
    if not (gpu.memory and parameters):
        return []
    if (
        config.rollout.engine == "vllm"
        and not config.vllm.servers
        and weights > 0.8 * config.vllm.memory_fraction * gpu.memory
    ):
        room = gib(round(config.vllm.memory_fraction * gpu.memory))
        fix = "use a larger vllm.tensor_parallel, or learner.offload=optimizer"
        return [f"an engine's weights are about {gib(weights)} of the {room} it may take of a GPU: {fix}"]
    if resident + KEPT > 0.9 * gpu.memory:
        return [
            f"the learner keeps about {gib(resident)} of {gib(gpu.memory)} a GPU: more GPUs, or learner.offload=optimizer, leave room to work"
        ]
    lower = next((s for s in (1, 2) if resident_bytes(config, parameters, stage=s) < 0.4 * gpu.memory), 3)
    if learner.backend == "deepspeed" and lower < learner.zero_stage and learner.processes > 1:
        bytes_then = resident_bytes(config, parameters, stage=lower)
        return [
            f"learner.zero_stage={lower} would fit too ({gib(bytes_then)} a GPU) and sends less between GPUs; {learner.zero_stage} stays as set"
        ]
    return []


def _count(number: int, what: str) -> str:
    return f"{number} {what}{('es' if what.endswith('s') else 's') * (number != 1)}"


def gib(size: int) -> str:
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
