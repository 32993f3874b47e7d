"""Weights as a model directory names them, and tensors on disk as safetensors.

transformers may hold weights in another form than it stores (fused experts, other names). What is saved and what is
sent to engines has the form of the directory, by transformers' own conversion; so has what is read back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spearrl.errors import CheckpointError, ConfigError
from spearrl.models.vision import vision_of

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

    def copy_to(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Copy every tensor into the parameter of its name, in place. Raises as `check`, and copies nothing then."""
        self.check({name: parameter.shape for name, parameter in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.read(name))

    def check(self, shapes: Mapping[str, Sequence[int]], ignored: Iterable[str] = ()) -> None:
        """Raises CheckpointError where names or shapes are others.

        Args:
            ignored: names that may be stored besides (the second name of a tied weight).
        """
        missing, unknown = shapes.keys() - self.files.keys(), self.files.keys() - shapes.keys() - set(ignored)
        wrong = [
            name
            for name, shape in shapes.items()
            if name in self.files and self.files[name].get_slice(name).get_shape() != list(shape)
        ]
        if missing or unknown or wrong:
            differences = f"missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}, other shape {wrong[:3]}"
            hint = "load the checkpoint with the model it was saved with"
            raise CheckpointError(f"weights of another model: {differences}", where=str(self.folder), hint=hint)


@dataclass(frozen=True)
class Portion:
    """Tensors that a model directory stores independently of others: mostly one, as it is.

    Args:
        own: their names in the model.
        stored: names in the directory, with shapes.
        model: converts them; None: they are the same tensors.
    """

    own: tuple[str, ...]
    stored: Mapping[str, tuple[int, ...]]
    model: Any = None

    def to_stored(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The directory's tensors of the model's; they may share memory."""
        if self.model is None:
            return list(tensors)
        from transformers.core_model_loading import revert_weight_conversion

        made = revert_weight_conversion(self.model, dict(zip(self.own, tensors, strict=True)))
        return [made[name] for name in self.stored]

    def to_own(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The model's tensors of the directory's: the inverse."""
        if self.model is None:
            return list(tensors)
        made = _converted(self.model, dict(zip(self.stored, tensors, strict=True)))
        return [made[name] for name in self.own]


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Also of a parameter that ZeRO-3 sharded."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def own_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters (tied ones once) and stored buffers by their names in the model."""
    stored = model.state_dict().keys()
    return {**dict(model.named_parameters()), **{name: b for name, b in model.named_buffers() if name in stored}}


def portions(model: Any, own: Mapping[str, torch.Tensor]) -> list[Portion]:
    """How a directory of `model` stores its tensors, in their order.

    Args:
        own: by the names that they have in a model without adapters; shapes matter only.
    Raises:
        ConfigError: transformers cannot read back what it would write.
    """
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {name: whole_shape(tensor) for name, tensor in own.items()}
    blank = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    whole = revert_weight_conversion(model, blank)
    if vision_of(model) is not None or all(whole.get(name) is tensor for name, tensor in blank.items()):
        return [Portion((name,), {name: shape}) for name, shape in shapes.items()]
    made: list[Portion] = []
    for name, tensor in blank.items():
        names: tuple[str, ...] = (name,)
        stored = revert_weight_conversion(model, {name: tensor})
        if joined := [portion for portion in made if portion.stored.keys() & stored.keys()]:  # fused in the directory
            names = (*(other for portion in joined for other in portion.own), name)
            made = [portion for portion in made if portion not in joined]
            stored = revert_weight_conversion(model, {other: blank[other] for other in names})
        same = len(stored) == 1 and next(iter(stored.values())) is tensor
        made.append(Portion(names, {key: tuple(t.shape) for key, t in stored.items()}, None if same else model))
    for portion in made:
        back = _converted(model, {name: torch.empty(shape, device="meta") for name, shape in portion.stored.items()})
        if {name: tuple(t.shape) for name, t in back.items()} != {name: shapes[name] for name in portion.own}:
            text = f"transformers does not read back {portion.own[0]} of {type(model).__name__} as it writes it"
            raise ConfigError(text, where="model.path", hint="take another model")
    return made


def _converted(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `from_pretrained` makes of a portion's tensors. transformers offers that for whole models only."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    conversions = getattr(model, "_weight_conversions", None)  # of the directory that the model was loaded from
    if conversions is None:  # made here: as revert_weight_conversion chooses then
        known = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [one for one in known if not isinstance(one, PrefixChange)]
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    made: dict[str, Any] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters)
        fresh = deepcopy(by_pattern[pattern]) if pattern else WeightRenaming(name, target)
        made.setdefault(target, fresh).add_tensor(target, name, pattern or name, tensors[name])
    results: dict[str, Any] = {}
    for target, conversion in made.items():
        results |= conversion.convert(target, model=model, config=model.config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in results.items()}


class WeightLoader:
    """Copies tensors of a model directory into a model, in place, as they come.

    Args:
        model: whole in this process, without adapters.
    """

    def __init__(self, model: torch.nn.Module):
        self.own = own_tensors(model)
        self.portions = portions(model, self.own)
        self._portion_of = {name: portion for portion in self.portions for name in portion.stored}
        self._pending: dict[str, torch.Tensor] = {}
        self.begin()

    def begin(self) -> None:
        """Nothing has come yet."""
        self._pending = {}
        self.missing = dict.fromkeys(self._portion_of)  # names that have not come

    def fits(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the directory has a tensor of this name and shape."""
        return name in self._portion_of and self._portion_of[name].stored[name] == tuple(shape)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors that fit into the model. What waits for others of its portion is kept as a copy."""
        for name, tensor in tensors.items():
            portion, self._pending[name] = self._portion_of[name], tensor
            self.missing.pop(name, None)
            if portion.stored.keys() <= self._pending.keys():
                parts = portion.to_own([self._pending.pop(part) for part in portion.stored])
                for target, whole in zip(portion.own, parts, strict=True):
                    self.own[target].copy_(whole)
        self._pending |= {name: self._pending[name].clone() for name in tensors.keys() & self._pending.keys()}


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copy the weights of a model directory into `model`, in place.

    Raises:
        CheckpointError: they are missing or another model's; nothing was copied.
    """
    stored, loader = TensorFiles(folder, "model", "the model's weights"), WeightLoader(model)
    shapes = {name: shape for portion in loader.portions for name, shape in portion.stored.items()}
    stored.check(shapes, ignored=model.state_dict())
    for portion in loader.portions:
        loader.take({name: stored.read(name) for name in portion.stored})


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
