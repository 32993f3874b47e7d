"""Weights in bounded portions, and the files they travel in."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Generator, Iterable
from pathlib import Path

import torch

SHARED_MEMORY = Path("/dev/shm")
PORTIONS = 2  # buckets in sync.bucket_mib: one is written while another is read


def buckets(
    parameters: Iterable[tuple[str, torch.Tensor]], limit: int, dtype: torch.dtype | None = None
) -> Generator[dict[str, torch.Tensor], None, None]:
    """Parameters in groups of at most `limit` bytes (a larger tensor goes alone), in their order; floating ones as `dtype`."""
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    try:
        for name, parameter in parameters:
            tensor = cast(parameter, dtype)
            if bucket and size + tensor.nbytes > limit:
                yield bucket
                bucket, size = {}, 0
            bucket[name] = tensor
            size += tensor.nbytes
        if bucket:
            yield bucket
    finally:
        if isinstance(parameters, Generator):  # a sharded learner holds gathered weights until its generator ends
            parameters.close()


def cast(parameter: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Detached, and as `dtype` where it is a floating type."""
    return parameter.detach().to(dtype) if dtype is not None and parameter.is_floating_point() else parameter.detach()


def bucket_folder(run_folder: Path, limit: int) -> Path:
    """An empty folder for bucket files: in shared memory where `limit` bytes fit, else in the run's directory.

    Its name is the run's, so that what a killed run left behind is removed when the run goes on.
    """
    name = "spearrl-" + hashlib.blake2b(str(run_folder.resolve()).encode(), digest_size=8).hexdigest()
    roomy = (
        SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK) and shutil.disk_usage(SHARED_MEMORY).free >= limit
    )
    for base in (SHARED_MEMORY, run_folder):
        shutil.rmtree(base / name, ignore_errors=True)
    folder = (SHARED_MEMORY if roomy else run_folder) / name
    folder.mkdir(mode=0o700, parents=True)
    return folder
