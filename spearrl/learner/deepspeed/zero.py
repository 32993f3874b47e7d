"""DeepSpeed as one process uses it: engines over sharded models, and the parameters and optimiser state behind them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from spearrl.config.sections import LearnerSection
from spearrl.errors import CheckpointError, ConfigError
from spearrl.models import load_model
from spearrl.models.weights import whole_shape

BUCKET = 50_000_000  # numbers per collective
PERSISTENT = 100_000  # ZeRO-3 keeps smaller parameters whole on a GPU


def require() -> None:
    """Raise ConfigError where DeepSpeed, or what transformers loads sharded models with, is not installed."""
    for name in ("deepspeed", "accelerate"):
        if find_spec(name) is None:
            text = f"learner.backend=deepspeed needs {name}, which is not installed"
            hint = "pip install 'spearrl[deepspeed]', or use learner.backend=local"
            raise ConfigError(text, where="learner.backend", hint=hint)


def prepare(device: torch.device) -> Any:
    """The deepspeed module, quiet, and on a CPU without the operation that it would compile for a minute."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed still calls collectives by names that torch has given up.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def engine_settings(settings: LearnerSection, device: torch.device, *, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    Each optimiser step says itself how many passes it has. DeepSpeed clips gradients where it shards them.
    """
    stage, cuda = settings.zero_stage, device.type == "cuda"
    zero = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, "overlap_comm": cuda}
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = BUCKET
        zero["stage3_param_persistence_threshold"] = PERSISTENT if cuda else 0
    offload: dict[str, Any] = {"device": "cpu", "pin_memory": cuda}
    parts = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.grad_clip if stage else 0.0,
        "zero_optimization": zero | {part: dict(offload) for part in parts[settings.offload]},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        **({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),
    }


def load_sharded(path: str, config: dict[str, Any]) -> Any:
    """A model directory in this process. Raises ConfigError as `load_model`.

    With ZeRO-3 its files are mapped, and no process holds more than its share.
    """
    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    if config["zero_optimization"]["stage"] < 3:
        return load_model(path, dtype=dtype)
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(config)  # while this object lives, transformers shards what it loads
    model = load_model(path, dtype=dtype)
    del alive
    # Elsewhere transformers remembers only those that the directory's names needed (5.17): it saves by them.
    model._weight_conversions = [one for one in getattr(model, "_weight_conversions", ()) if one.was_used()]
    return model


@contextmanager
def gathered(parameters: Sequence[torch.Tensor], *, write: bool = False) -> Iterator[None]:
    """Inside, these parameters are whole on every rank; `write`: what rank 0 makes of them is kept on all."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


def numel(parameter: torch.Tensor) -> int:
    """Numbers in the whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class Moments:
    """AdamW's state and the float32 weights of an engine, a whole parameter at a time."""

    def __init__(self, engine: Any):
        self.engine, self.sharded = engine, engine.zero_optimization_stage() > 0
        self.inner = engine.optimizer.optimizer if self.sharded else engine.optimizer

    @property
    def begun(self) -> bool:
        """Whether a step was made, so that there is any state."""
        return bool(self.inner.state)

    def read(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """State "exp_avg" or "exp_avg_sq", or "master", the float32 weight. All ranks take part."""
        if not self.sharded:
            return parameter.detach() if key == "master" else self.inner.state[parameter][key]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        master = key == "master"
        full = safe_get_full_fp32_param(parameter) if master else safe_get_full_optimizer_state(parameter, key)
        return full.view(whole_shape(parameter))

    def write(self, parameter: torch.nn.Parameter, key: str, value: torch.Tensor) -> None:
        """The inverse of `read`, with the same value on every rank. Raises CheckpointError for another shape."""
        shape = whole_shape(parameter)
        if tuple(value.shape) != shape:
            text = f"a stored {key} is {list(value.shape)}; the parameter is {list(shape)}"
            raise CheckpointError(text, hint="load it with the model it was saved with")
        if not self.sharded:
            (parameter.data if key == "master" else self.inner.state[parameter][key]).copy_(value)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(self.engine.device)
        if key == "master":
            safe_set_full_fp32_param(parameter, value.float())
            with gathered([parameter], write=True):
                parameter.data.copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def begin(self, steps: int) -> None:
        """Make the state that AdamW makes at its first step, as after `steps` of them."""
        optimizer = self.engine.optimizer
        if not self.sharded:
            flat = [p for group in self.inner.param_groups for p in group["params"]]
        elif self.engine.zero_optimization_stage() == 3:
            flat = optimizer.fp32_partitioned_groups_flat
        else:
            flat = optimizer.single_partition_of_fp32_groups
        for tensor in flat:
            # State that is there stays in its tensors: DeepSpeed refers to them by parameter.
            moments = self.inner.state[tensor] or {key: torch.zeros_like(tensor) for key in ("exp_avg", "exp_avg_sq")}
            self.inner.state[tensor] = {**moments, "step": torch.tensor(float(steps), device=tensor.device)}
        self.link()

    def link(self) -> None:
        """Let DeepSpeed find the state by parameter.

        By itself (0.19.8) it does so after its first group's first step, when the other groups have no state yet.
        """
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def poison(self) -> None:
        """Make the gradient not finite, so that every rank leaves this step out.

        This is how a step is taken back after the backward pass.
        """
        from deepspeed.utils import safe_set_full_grad

        parameter = next(p for p in self.engine.module.parameters() if p.requires_grad)
        safe_set_full_grad(parameter, torch.full(whole_shape(parameter), torch.nan, device=self.engine.device))
