"""Tensors on disk as safetensors: reading them one at a time, restoring weights in place, files of bounded size."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from spearrl.errors import CheckpointError

FILE_BYTES = 4 << 30


class TensorFiles:
    """The tensors of a folder's `<stem>*.safetensors`, read one at a time.

    Args:
        what: what the tensors are, for errors.
    Raises:
        CheckpointError: there are no such files, or they cannot be read.
    """

    def __init__(self, folder: Path, stem: str, what: str):
        from safetensors import SafetensorError, safe_open

        self.folder, self.what = folder, what
        self.files: dict[str, Any] = {}  # by the name of each tensor
        paths = sorted(folder.glob(f"{stem}*.safetensors"))
        try:
            for path in paths:
                file = safe_open(path, framework="pt")
                self.files |= dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{what} is damaged: {error}", where=str(folder)) from error
        if not paths:
            raise CheckpointError(f"{what} is missing: no {stem}*.safetensors", where=str(folder))

    def read(self, name: str) -> torch.Tensor:
        """A tensor. Raises CheckpointError where there is none of this name."""
        if name not in self.files:
            hint = "load the checkpoint with the model and the learner settings it was saved with"
            raise CheckpointError(f"{self.what} holds no {name}", where=str(self.folder), hint=hint)
        return self.files[name].get_tensor(name)

    def copy_to(self, parameters: Mapping[str, torch.Tensor], *, ignored: Iterable[str] = ()) -> None:
        """Copy every tensor into the parameter of its name, in place.

        Args:
            ignored: names that may be stored besides (buffers, the second name of a tied weight).
        Raises:
            CheckpointError: names or shapes differ; nothing was copied.
        """
        missing, unknown = parameters.keys() - self.files.keys(), self.files.keys() - parameters.keys() - set(ignored)
        wrong = [
            name
            for name, parameter in parameters.items()
            if name in self.files and self.files[name].get_slice(name).get_shape() != list(parameter.shape)
        ]
        if missing or unknown or wrong:
            found = f"missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}, other shape {wrong[:3]}"
            hint = "load the checkpoint with the model it was saved with"
            raise CheckpointError(f"weights of another model: {found}", where=str(self.folder), hint=hint)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.read(name))


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copy the weights of a model directory into `model`, in place.

    Raises:
        CheckpointError: they are missing or another model's; nothing was copied.
    """
    # Tied parameters are stored once; named_parameters yields each once too.
    stored = TensorFiles(folder, "model", "the model's weights")
    stored.copy_to(dict(model.named_parameters()), ignored=model.state_dict())


def write_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to one safetensors file."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, path, metadata={"format": "pt"})


def write_tensors(folder: Path, stem: str, named: Iterable[tuple[str, torch.Tensor]], *, index: bool = False) -> None:
    """Write tensors as they come, in files of at most FILE_BYTES; a larger tensor has a file to itself.

    Args:
        stem: the files are `<stem>.safetensors` or, where there are several, `<stem>-00001-of-00002.safetensors` ...
        index: also write the index by which transformers finds the tensors of several files.
    """
    pending: dict[str, torch.Tensor] = {}
    written: list[tuple[Path, list[str]]] = []

    def flush() -> None:
        path = folder / f"{stem}-part{len(written)}.safetensors"
        write_file(path, pending)
        written.append((path, list(pending)))
        pending.clear()

    size = total = 0
    for name, tensor in named:
        if pending and size + tensor.nbytes > FILE_BYTES:
            flush()
            size = 0
        pending[name] = tensor.detach().cpu().contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    count, file_of = len(written), dict[str, str]()
    for number, (path, names) in enumerate(written, 1):
        final = folder / (f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors")
        path.rename(final)
        file_of |= dict.fromkeys(names, final.name)
    if index and count > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": file_of}, indent=1)
        (folder / f"{stem}.safetensors.index.json").write_text(text + "\n")
