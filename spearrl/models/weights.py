"""Tensors on disk: restoring a model's weights in place, and files of bounded size for what is gathered piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from spearrl.errors import CheckpointError

FILE_BYTES = 4 << 30


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copy the weights of a model directory into `model`. Raises CheckpointError where they are missing or another model's."""
    # Tied parameters are stored once; named_parameters yields each once too.
    copy_weights(dict(model.named_parameters()), read_weights(folder, "model*"), folder, known=set(model.state_dict()))


class Stored:
    """The tensors of a folder's `<stem>*.safetensors`, read one at a time.

    Raises:
        CheckpointError: there are none, or they cannot be read. `what`: how the error calls them.
    """

    def __init__(self, folder: Path, stem: str, what: str):
        from safetensors import SafetensorError, safe_open

        self.folder, self.what = folder, what
        self.files: dict[str, Any] = {}
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
        """Raises CheckpointError where there is no such tensor."""
        if name not in self.files:
            hint = "load the checkpoint with the model and the learner settings it was saved with"
            raise CheckpointError(f"{self.what} holds no {name}", where=str(self.folder), hint=hint)
        return self.files[name].get_tensor(name)  # type: ignore[no-any-return]


def write_tensors(folder: Path, stem: str, named: Iterable[tuple[str, torch.Tensor]], *, index: bool = False) -> None:
    """Write tensors as they come, in files of at most FILE_BYTES (a larger tensor has one to itself): `<stem>.safetensors`, or numbered ones.

    Args:
        index: also write the index by which transformers finds the tensors of several files.
    """
    from safetensors.torch import save_file

    (folder / stem).parent.mkdir(exist_ok=True)
    pending: dict[str, torch.Tensor] = {}
    written: list[tuple[Path, list[str]]] = []

    def flush() -> None:
        path = folder / f"{stem}-part{len(written)}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
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
    count = len(written)
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(written, 1):
        final = folder / (f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors")
        path.rename(final)
        places |= dict.fromkeys(names, final.name)
    if index and count > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1)
        (folder / f"{stem}.safetensors.index.json").write_text(text + "\n")


def read_weights(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    """Tensors of the safetensors files of that name. Raises CheckpointError where there are none."""
    from safetensors.torch import load_file

    files = sorted(folder.glob(f"{pattern}.safetensors"))
    if not files:
        raise CheckpointError(f"no {pattern}.safetensors", where=str(folder))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def copy_weights(
    own: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor], folder: Path, *, known: set[str] | None = None
) -> None:
    """Copy stored tensors into parameters of the same names, in place.

    Args:
        known: names that may be stored beside them (buffers, the second name of a tied weight).
    Raises:
        CheckpointError: names or shapes differ; nothing was copied.
    """
    missing, unknown = sorted(set(own) - set(stored)), sorted(set(stored) - set(own) - (known or set()))
    wrong = [name for name, tensor in own.items() if name in stored and stored[name].shape != tensor.shape]
    if missing or unknown or wrong:
        found = f"missing {missing[:3]}, unknown {unknown[:3]}, other shape {wrong[:3]}"
        raise CheckpointError(
            f"weights of another model: {found}",
            where=str(folder),
            hint="load the checkpoint with the model it was saved with",
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])
