"""Low-rank adapters (arXiv 2106.09685) inside a model: W x + (alpha / rank) B A x, with A and B trained and W frozen.

They are put into the model's own layers by peft, so whoever shares the model (the local engine) samples with them. The
model without them is the one training began with: the reference of KL divergences takes no memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spearrl.config.sections import LoraSection
from spearrl.errors import CheckpointError, ConfigError
from spearrl.models.vision import vision_of
from spearrl.models.weights import Portion, TensorFiles, own_tensors, portions, whole_shape, write_file

FOLDER = "adapter"  # of a checkpoint, in peft's format
NAME = "default"  # of the adapter inside peft
# Layers of fused experts are no linear layers; peft (0.21) would take their names for the fused weights.
OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
TOWER = r"(.*\.)?visual\..*"  # the vision tower gets no adapters: vLLM would not sample with them


@dataclass(frozen=True)
class Export:
    """What a directory stores together, and what it is computed from.

    Args:
        sources: parameters (or stored buffers) as in `portion.own`, each with the layer whose adapters are added to it;
            None: none are.
    """

    portion: Portion
    sources: tuple[tuple[torch.Tensor, Any], ...]

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What has to be whole in this process before `tensors` is called."""
        return [tensor for parameter, layer in self.sources for tensor in (parameter, *_factors(layer))]

    def tensors(self, *, merged: bool = True) -> list[torch.Tensor]:
        """As in `portion.stored`, with the adapters added in float32 or wider; nothing in the model changes."""
        parts = [_merged(parameter.detach(), layer if merged else None) for parameter, layer in self.sources]
        return self.portion.to_stored(parts)


def _factors(layer: Any) -> list[torch.Tensor]:
    """A and B of a layer's adapters."""
    return [] if layer is None else [layer.lora_A[NAME].weight, layer.lora_B[NAME].weight]


def _merged(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    if layer is None:
        return weight
    a, b = (p.detach().to(torch.promote_types(weight.dtype, torch.float32)) for p in _factors(layer))
    return torch.addmm(weight.to(a.dtype), b, a, alpha=layer.scaling[NAME]).to(weight.dtype)


def add_adapters(model: Any, settings: LoraSection, seed: int) -> None:
    """Put adapters into `model`, in place, and freeze everything else. B is 0: untrained ones change nothing.

    Args:
        seed: of the initial A.
    Raises:
        ConfigError: peft is not installed, or a target is no linear layer of this model.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        text = f"learner.lora.rank={settings.rank} needs peft, which cannot be imported: {error}"
        hint = "pip install 'spearrl[lora]', or set learner.lora.rank=0"
        raise ConfigError(text, where="learner.lora", hint=hint) from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=_target_names(model, settings.targets),
        task_type="CAUSAL_LM",
        exclude_modules=TOWER if vision_of(model) is not None else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        inject_adapter_in_model(config, model, NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Inside, `model` is the one training began with."""
    layers = _adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def model_weights(model: torch.nn.Module) -> list[Export]:
    """Every weight of the model directory once, tied ones under their first name, with the adapters merged."""
    layers, sources = _adapted_layers(model), dict[str, tuple[torch.Tensor, Any]]()
    for name, tensor in own_tensors(model).items():
        owner, _, part = name.partition(".base_layer.")
        if part and owner in layers:
            sources[f"{owner}.{part}"] = (tensor, layers[owner] if part == "weight" else None)
        elif name.partition(".lora_")[0] not in layers:
            sources[name] = (tensor, None)
    made = portions(model, {name: tensor for name, (tensor, _) in sources.items()})
    return [Export(portion, tuple(sources[name] for name in portion.own)) for portion in made]


def adapter_weights(model: torch.nn.Module) -> list[Export]:
    """Every weight of the adapters, under its name in peft's files; none in a model without adapters."""
    named = {
        f"base_model.model.{path}.{part}.weight": weight
        for path, layer in _adapted_layers(model).items()
        for part, weight in zip(("lora_A", "lora_B"), _factors(layer), strict=True)
    }
    return [Export(Portion((name,), {name: tuple(one.shape)}), ((one, None),)) for name, one in named.items()]


def save_adapters(folder: Path, model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Write a directory of peft's format.

    Args:
        model: holds the adapters' settings; their base is the directory it was loaded from.
        tensors: what `adapter_weights` names.
    """
    settings = model.peft_config[NAME].to_dict() | {
        "inference_mode": True,
        "base_model_name_or_path": model.name_or_path or None,
    }
    write_file(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1, default=sorted) + "\n")


def load_adapters(model: torch.nn.Module, folder: Path) -> None:
    """Restore the adapters of a checkpoint into a model that has the base they were trained on.

    Raises:
        CheckpointError: there are none, they belong to other settings, or the model is not their base.
    """
    stored = TensorFiles(folder / FOLDER, "adapter_model", "the adapters' weights")
    stored.copy_to({export.portion.own[0]: export.parameters[0] for export in adapter_weights(model)})
    check_base(merged_ends(model), folder)


def merged_ends(model: torch.nn.Module) -> list[Export]:
    """The first and the last with adapters: those that `check_base` compares."""
    merged = [export for export in model_weights(model) if any(layer is not None for _, layer in export.sources)]
    return [merged[0], merged[-1]]


def check_base(exports: Sequence[Export], folder: Path) -> None:
    """Compare merged weights with those of a checkpoint: on another base the adapters would train another model unseen.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    stored = TensorFiles(folder, "model", "the merged weights")
    for export in exports:
        tensors = zip(export.portion.stored, export.tensors(), export.tensors(merged=False), strict=True)
        for name, *pair in tensors:
            merged, base, expected = (tensor.detach().float().cpu() for tensor in (*pair, stored.read(name)))
            beyond_rounding = (merged - expected).abs() - 2 * torch.finfo(pair[0].dtype).eps * expected.abs()
            if not float(beyond_rounding.max()) <= float((merged - base).abs().max()) / 4:
                text = f"the adapters were trained on another model ({name} differs)"
                hint = "begin with the model directory that the run began with"
                raise CheckpointError(text, where=str(folder), hint=hint)


def _adapted_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Layers that hold adapters, by path."""
    modules = model.named_modules()
    return {path: layer for path, layer in modules if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")}


def _target_names(model: Any, targets: str) -> list[str]:
    """Last names of the layers that get adapters. Raises ConfigError for one that is no linear layer, or the head."""
    head = model.get_output_embeddings()
    linear = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and not re.fullmatch(TOWER, path)
    }
    if any(".experts." in name and len(whole_shape(p)) == 3 for name, p in model.named_parameters()):
        linear -= OF_EXPERTS
    names = [name.strip() for name in targets.split(",") if name.strip()] or sorted(linear)
    unknown = [name for name in names if name not in linear]
    if unknown or not names:
        missing, listed = ", ".join(unknown) or "anything", ", ".join(sorted(linear)) or "none"
        text = f"no linear layer of {type(model).__name__} is called {missing}; there are {listed}"
        hint = "name some of these (head and experts get no adapter), or leave it empty for all of them"
        raise ConfigError(text, where="learner.lora.targets", hint=hint)
    return names
