"""Weights in bounded portions (buckets), the files they travel in, and the digests that prove that they arrived."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from spearrl.errors import StorageError
from spearrl.processes import AT_DEATH

T = TypeVar("T")
SHARED_MEMORY = Path("/dev/shm")
PORTIONS = 2  # buckets in sync.bucket_mib: one is written while another is read
DTYPES = {  # as safetensors names them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 1 << 24  # bytes of a device tensor whose digest is computed at a time


def buckets(
    parameters: Iterable[tuple[str, torch.Tensor]], limit: int, dtype: torch.dtype | None = None
) -> Generator[dict[str, torch.Tensor], None, None]:
    """Parameters in groups of at most `limit` bytes (a larger tensor goes alone), in their order; floating ones as
    `dtype`.
    """
    pairs = ((name, cast(parameter, dtype)) for name, parameter in parameters)
    try:
        yield from map(dict, grouped(pairs, lambda pair: pair[1].nbytes, limit))
    finally:
        if isinstance(parameters, Generator):  # a sharded learner holds gathered weights until its generator ends
            parameters.close()


def grouped(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Items in order, in groups whose sizes add up to at most `limit`; a larger item is alone."""
    group: list[T] = []
    total = 0
    for item in items:
        if group and total + size(item) > limit:
            yield group
            group, total = [], 0
        group, total = [*group, item], total + size(item)
    if group:
        yield group


def cast(parameter: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Detached, and as `dtype` where it is a floating type."""
    return parameter.detach().to(dtype) if dtype is not None and parameter.is_floating_point() else parameter.detach()


def folder_name(run_folder: Path) -> str:
    """Of the folder that a run's buckets lie in."""
    return "spearrl-run-" + hashlib.blake2b(str(run_folder.resolve()).encode(), digest_size=8).hexdigest()


def bucket_folder(run_folder: Path, limit: int) -> Path:
    """An empty folder for bucket files: in shared memory where `limit` bytes fit, else in the run's directory.

    What killed runs left behind is removed: a living one holds a lock on its folder.
    """
    name = folder_name(run_folder)
    roomy = (
        SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK) and shutil.disk_usage(SHARED_MEMORY).free >= limit
    )
    for other in (*SHARED_MEMORY.glob("spearrl-run-*"), *run_folder.glob("spearrl-run-*")):
        if other.name == name or _lock(other):
            shutil.rmtree(other, ignore_errors=True)
    folder = (SHARED_MEMORY if roomy else run_folder) / name
    folder.mkdir(mode=0o700, parents=True)
    _lock(folder)
    if roomy:
        AT_DEATH.set("rm", str(folder), due=True)
    return folder


def _lock(folder: Path) -> bool:
    """Lock a folder until this process ends; False where another one has, or may not be asked."""
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def digest(tensor: torch.Tensor) -> int:
    """A number for a tensor's bytes: CRC-32 in host memory, a position-weighted sum mod 2^63 on a device (copying to
    the host would outlast the sync).
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if tensor.device.type == "cpu":
        return zlib.crc32(flat.numpy().data)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK].long() + 1
        total += (part * (2 * torch.arange(start, start + part.numel(), device=part.device) + 1)).sum()
    return int(total) % (1 << 63)


def model_digest(model: torch.nn.Module) -> int:
    """One number for all parameters a model holds: equal on replicas that hold the same weights."""
    return zlib.crc32(repr([(name, digest(parameter)) for name, parameter in model.named_parameters()]).encode())


def read_bucket(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a bucket file, mapped and not copied."""
    from safetensors.torch import load_file

    return load_file(path)


def write_bucket(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors to a bucket file (safetensors format). Raises StorageError where they do not fit.

    A file that is there is overwritten in place: fresh pages of shared memory cost more than the copy into them.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
            for part in (len(text).to_bytes(8, "little"), text, *(_bytes(tensor) for tensor in tensors.values())):
                view = memoryview(part)
                while len(view):
                    view = view[file.write(view) :]
            file.truncate()
    except OSError as error:
        reason = f"a bucket of weights could not be written: {error}"
        hint = "lower sync.bucket_mib or free memory there"
        raise StorageError(reason, where=str(path), hint=hint) from error


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
