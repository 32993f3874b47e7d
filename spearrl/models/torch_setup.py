"""How torch is set up in a process: threads, determinism, seed, device, memory."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from spearrl.config import RunConfig
from spearrl.errors import ConfigError
from spearrl.models.hub import is_hub_name, made_here
from spearrl.seeds import derive

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEEP_BYTES = -1, -3, 1 << 30  # glibc malloc.h


def prepare_torch(config: RunConfig, *, share: int = 1) -> str:
    """Set threads, determinism and seed as the config says; returns the device, "cpu" or "cuda".

    Args:
        share: number of processes of this machine among which the threads are divided.
    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    # A launcher of processes gives each its OMP_NUM_THREADS, already divided.
    own = 0 if config.run.threads else _own_threads()
    torch.set_num_threads(own or max(1, threads_of(config) // share))
    ask_for_determinism(config.run.deterministic)
    if _is_small(config.model.path):
        _keep_freed_memory()
    torch.manual_seed(derive(config.run.seed, "torch") % 2**31)
    device = config.run.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            'run.device="cuda" but torch sees no GPU', hint='use run.device="auto", or install a CUDA build of torch'
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # accelerate imports DeepSpeed whenever a model is saved; not told, DeepSpeed would choose a device for good,
        # and say so on standard output.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return device


def threads_of(config: RunConfig) -> int:
    """CPU threads a run may use: run.threads, else OMP_NUM_THREADS, else all cores."""
    return config.run.threads or _own_threads() or os.cpu_count() or 1


def _own_threads() -> int:
    variable = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(variable) if variable.isdecimal() else 0


def ask_for_determinism(deterministic: bool) -> None:
    """Have torch choose deterministic kernels in this process, where it has them."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Nothing here reads memory it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _is_small(model: str) -> bool:
    """Whether its weights are few beside what is kept: around a large model's buffers, gaps would take gigabytes."""
    folder = Path(model) if Path(model).is_dir() else made_here(model)
    files = [] if is_hub_name(model) else list(folder.glob("*.safetensors"))
    return model == "tiny" or 0 < sum(file.stat().st_size for file in files) < KEEP_BYTES // 8


def _keep_freed_memory() -> None:
    """Tell glibc not to hand large buffers back after every use: page faults cost a tiny model a third of its time."""
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):  # musl has none
            library.mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
            library.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
