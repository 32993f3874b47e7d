"""Low-rank adapters (arXiv 2106.09685) inside a model: W x + (alpha / rank) B A x, A and B trained, W frozen.

They are put into the model's own layers, so whoever shares the model (the local engine) samples with them, and the model without them is the
one training began with: the reference of KL divergences takes no memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spearrl.config import LoraSection
from spearrl.errors import CheckpointError, ConfigError
from spearrl.models.vision import vision_of
from spearrl.models.weights import Stored, copy_weights, read_weights

FOLDER = "adapter"  # of a checkpoint, in peft's format
NAME = "default"  # of the adapter inside peft
TOWER = r"(.*\.)?visual\..*"  # gets no adapters: vLLM would not sample with them


@dataclass(frozen=True)
class Source:
    """Where a weight of a model directory (or of an adapter directory) comes from."""

    name: str
    parameter: torch.nn.Parameter
    adapter: Any = None  # the layer whose adapters are added to it

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What has to be whole in this process before `tensor` is asked for."""
        return [
            self.parameter,
            *((self.adapter.lora_A[NAME].weight, self.adapter.lora_B[NAME].weight) if self.adapter is not None else ()),
        ]

    def tensor(self) -> torch.Tensor:
        """The weight, with the adapters added in float32 or wider; nothing in the model changes."""
        weight = self.parameter.detach()
        if self.adapter is None:
            return weight
        _, a, b = (p.detach().to(torch.promote_types(weight.dtype, torch.float32)) for p in self.parameters)
        return torch.addmm(weight.to(a.dtype), b, a, alpha=self.adapter.scaling[NAME]).to(weight.dtype)


def add_adapters(model: Any, settings: LoraSection, seed: int) -> None:
    """Put adapters into `model`, in place, and freeze everything else. They change nothing until they are trained (B is 0).

    Args:
        seed: of the initial A.
    Raises:
        ConfigError: peft is not installed, or a target is no linear layer of this model.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        hint = "pip install 'spearrl[lora]', or set learner.lora.rank=0"
        raise ConfigError(
            f"learner.lora.rank={settings.rank} needs peft, which cannot be imported: {error}",
            where="learner.lora",
            hint=hint,
        ) from error
    targets = _targets(model, settings.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        spared = TOWER if vision_of(model) is not None else None
        inject_adapter_in_model(
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                target_modules=targets,
                task_type="CAUSAL_LM",
                exclude_modules=spared,
            ),
            model,
            NAME,
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Inside, `model` is the one training began with."""
    layers = _layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def sources(model: torch.nn.Module) -> list[Source]:
    """Every weight of the model directory once (tied ones under their first name), adapters merged; of a model without adapters, its parameters."""
    layers, found = _layers(model), []
    for name, parameter in model.named_parameters():
        owner, _, part = name.partition(".base_layer.")
        if part and owner in layers:
            found.append(Source(f"{owner}.{part}", parameter, layers[owner] if part == "weight" else None))
        elif name.partition(".lora_")[0] not in layers:
            found.append(Source(name, parameter))
    return found


def adapter_sources(model: torch.nn.Module) -> list[Source]:
    """Every weight of the adapters, under its name in peft's files."""
    pairs = [
        (path, part, getattr(layer, part)[NAME].weight)
        for path, layer in _layers(model).items()
        for part in ("lora_A", "lora_B")
    ]
    return [Source(f"base_model.model.{path}.{part}.weight", weight) for path, part, weight in pairs]


def adapter_config(model: Any) -> dict[str, Any]:
    """What peft's adapter_config.json says of this model's adapters; its base is the directory the model was loaded from."""
    settings = {
        **model.peft_config[NAME].to_dict(),
        "inference_mode": True,
        "base_model_name_or_path": model.name_or_path or None,
    }
    return json.loads(json.dumps(settings, default=sorted))


def save_adapters(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    """Write tensors (`adapter_sources`) and `adapter_config` as a directory of peft's format."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def load_adapters(model: torch.nn.Module, folder: Path) -> None:
    """Restore the adapters of a checkpoint into a model that has the base they were trained on.

    Raises:
        CheckpointError: there are none, they belong to other settings, or the model is not their base.
    """
    copy_weights(
        {source.name: source.parameter for source in adapter_sources(model)},
        read_weights(folder / FOLDER, "adapter_model*"),
        folder,
    )
    check_base(merged_ends(model), folder)


def merged_ends(model: torch.nn.Module) -> list[Source]:
    """The first and the last weight that has adapters: what `check_base` looks at."""
    adapted = [source for source in sources(model) if source.adapter is not None]
    return [adapted[0], adapted[-1]]


def check_base(merged: list[Source], folder: Path) -> None:
    """Compare weights with the merged ones of a checkpoint: on another base, its own merged weights say, adapters would train something else unseen.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    stored = Stored(folder, "model", "the merged weights")
    for source in merged:
        found, wanted, weight = (
            t.detach().float().cpu() for t in (source.tensor(), stored.read(source.name), source.parameter)
        )
        beyond_rounding = (found - wanted).abs() - 2 * torch.finfo(source.parameter.dtype).eps * wanted.abs()
        if not float(beyond_rounding.max()) <= float((found - weight).abs().max()) / 4:
            hint = "begin with the model directory that the run began with"
            raise CheckpointError(
                f"the adapters were trained on another model ({source.name} differs)", where=str(folder), hint=hint
            )


def _layers(model: torch.nn.Module) -> dict[str, Any]:
    """Layers that hold adapters, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def _targets(model: Any, wanted: str) -> list[str]:
    """Last names of the layers that get adapters. Raises ConfigError for one that is no linear layer, or the head."""
    head = model.get_output_embeddings()
    found = {
        path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    }
    linear = {path.rpartition(".")[2] for path in found if not re.fullmatch(TOWER, path)}
    names = [name.strip() for name in wanted.split(",") if name.strip()] or sorted(linear)
    unknown = [name for name in names if name not in linear]
    if unknown or not names:
        listed = ", ".join(sorted(linear)) or "none"
        text = f"no linear layer of {type(model).__name__} is called {', '.join(unknown) or 'anything'}; there are {listed}"
        raise ConfigError(
            text,
            where="learner.lora.targets",
            hint="name some of these (the head gets no adapter), or leave it empty for all of them",
        )
    return names
