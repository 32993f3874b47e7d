"""What this run finds on its machine: GPUs, the ranks a launcher started, the extras that are installed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

EXTRAS = ("vllm", "deepspeed", "ray")
MAX_HEADER = 100 << 20  # bytes a safetensors header may have


@dataclass(frozen=True)
class Gpu:
    name: str = "GPU"
    memory: int = 0  # bytes; 0: unknown


@dataclass(frozen=True)
class Machine:
    """What a run may use.

    Args:
        gpus: of this machine; every other machine of the run has the same.
        ranks: learner processes that torchrun or the deepspeed launcher started, over all machines; 0: no launcher.
        local_ranks: those of them on this machine.
        extras: optional packages that can be imported.
        present: False for a machine that is only thought of (`spearrl config show --gpus 8`).
    """

    gpus: tuple[Gpu, ...] = ()
    ranks: int = 0
    local_ranks: int = 0
    extras: tuple[str, ...] = EXTRAS
    present: bool = True


def detect(environ: Mapping[str, str] = os.environ) -> Machine:
    """This machine, as torch and the launcher's variables describe it."""
    import torch

    count = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    gpus = tuple(Gpu(p.name, p.total_memory) for p in properties)
    ranks = int(environ.get("WORLD_SIZE", 0)) if "RANK" in environ else 0
    local = int(environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", ranks)))  # torchrun's name, deepspeed's name
    return Machine(gpus, ranks, local if ranks else 0, tuple(name for name in EXTRAS if find_spec(name)))


def imagined(gpus: int) -> Machine:
    """A machine with so many GPUs of unknown memory; more than eight are spread over machines of eight."""
    here = 8 if gpus > 8 and gpus % 8 == 0 else gpus
    return Machine((Gpu(),) * here, present=False)


def visible(gpus: Sequence[int], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variable that shows a process these GPUs only; {} without GPUs.

    Args:
        gpus: as this process numbers them.
    """
    if not gpus:
        return {}
    names = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[gpu] if names else str(gpu) for gpu in gpus)}


def parameters_of(path: str) -> int:
    """Parameters of a model directory, from the headers of its safetensors files; 0 where there are none to read."""
    return sum(_numbers(file) for file in sorted(Path(path).glob("*.safetensors"))) if Path(path).is_dir() else 0


def _numbers(file: Path) -> int:
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size)) if 0 < size <= MAX_HEADER else {}
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
