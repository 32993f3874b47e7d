"""One rank of a DeepSpeed learner: its share of the model, and the commands it runs together with the other ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spearrl.batching import Batch, Rows
from spearrl.config import LearnerSection
from spearrl.learner.critic import ValueHead
from spearrl.learner.deepspeed.zero import Moments, engine_settings, gathered, load_sharded, prepare
from spearrl.learner.lora import (
    Source,
    adapter_sources,
    add_adapters,
    check_base,
    merged_ends,
    sources,
    without_adapters,
)
from spearrl.learner.minibatch import Share, Tally
from spearrl.learner.optimizer import STATE, load_counters, load_optimizer, make_optimizer
from spearrl.learner.packed import check_packing
from spearrl.learner.partition import micro_batches
from spearrl.learner.passes import Passes
from spearrl.learner.policy import Policy, check_head, use_bf16
from spearrl.losses import Objective
from spearrl.models import ask_for_determinism
from spearrl.models.weights import Stored

COMMANDS = ("predict", "step", "weights", "state", "probe", "load", "release")


class Worker:
    """Runs commands by name; the first one, "build", makes the shard the others work on."""

    def __init__(self) -> None:
        self.shard: Any = None

    def __call__(self, name: str, common: Any, part: Any) -> Any:
        if name == "build":
            self.shard = Shard(
                common,
                part,
                torch.device("cuda", torch.cuda.current_device())
                if common["device"] == "cuda"
                else torch.device("cpu"),
            )
            return None
        if name not in COMMANDS:
            raise ValueError(f"no command {name!r}")
        return getattr(self.shard, name)(common, part)


class Shard:
    """Engine, reference and critic of one rank.

    Args:
        build: settings as JSON; model and reference directories, temperature, seed, optimiser, whether to be deterministic.
        part: the critic's weights, where there is a critic.
    """

    def __init__(self, build: dict[str, Any], part: dict[str, Any], device: torch.device):
        deepspeed = prepare(device)
        ask_for_determinism(build["deterministic"])
        self.settings = settings = LearnerSection.model_validate(build["settings"])
        self.device, self.ranks = device, dist.get_world_size()
        bf16 = use_bf16(settings.precision, device)
        self.native = (
            bf16 and settings.zero_stage >= 2
        )  # weights in bf16; where every rank has all of them they stay float32, under autocast
        config = engine_settings(settings, device, bf16=self.native)
        options = {"temperature": build["temperature"], "bf16": bf16 and not self.native}
        self.model = load_sharded(build["model"], config)
        if settings.lora.rank:
            add_adapters(self.model, settings.lora, build["seed"])
        policy = Policy(self.model.to(device), settings, **options)
        optimizer = make_optimizer(self.model.named_parameters(), settings, kind=build["optimizer"])
        self.engine, *_ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.moments = Moments(self.engine)
        self.reference = self._reference(deepspeed, build["reference"], config, options) if build["reference"] else None
        self.critic = _critic(part["critic"], device) if part["critic"] else None
        self.critic_optimizer = (
            None if self.critic is None else make_optimizer((), settings, critic=self.critic, kind=build["optimizer"])
        )
        self.passes = Passes(
            self.engine,
            device,
            critic=self.critic,
            backward=self._backward,
            packed=settings.packing,
            vision=policy.vision,
        )
        self.left, self.finite = 0, True
        check_head(self.engine, type(self.model).__name__, device)
        if settings.packing:
            check_packing(self.engine, type(self.model).__name__, device)

    def predict(self, common: dict[str, Any], part: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities (or values) of this rank's rows."""
        rows, pieces = self._rows(part["rows"], common["passes"])
        if common["reference"] and self.settings.lora.rank:
            with without_adapters(self.model):
                return self.passes.predict(rows, pieces)
        return self.passes.predict(
            rows, pieces, values=common["values"], policy=self.reference if common["reference"] else None
        )

    def step(self, common: dict[str, Any], part: list[dict[str, Any]]) -> dict[str, Any]:
        """One optimiser step: this rank's losses and metrics, the gradient's norm, and whether the step was made."""
        self.left, self.finite = sum(share["passes"] for share in common["shares"]), True
        self.engine.train(self.settings.gradient_checkpointing)
        tally, losses = Tally(), []
        for told, given in zip(common["shares"], part, strict=True):
            rows, pieces = self._rows(given["rows"], told["passes"])
            objectives = [(Objective.from_dict(fields), factor) for fields, factor in told["objectives"]]
            share = Share(
                Batch(rows, **given["tensors"]),
                objectives,
                told["seed"],
                told["current"],
                tuple(told["divisors"]),
                told["rows"],
            )
            chosen = {int(place): selection.to(self.device) for place, selection in given["chosen"].items()}
            losses.append(self.passes.backward(share, pieces, tally, chosen=chosen))
        self.engine.eval()
        norm = self._apply(common["lr"])
        return {"losses": losses, "tally": tally.state(), "norm": norm}

    def weights(self, common: dict[str, Any], part: None) -> list[torch.Tensor] | None:
        """Weights of the model directory (or of the adapters) by place, whole, on rank 0."""
        chosen = [self.sources(common["adapters"])[place] for place in common["places"]]
        with gathered([parameter for source in chosen for parameter in source.parameters]):
            return [source.tensor().cpu().clone() for source in chosen] if dist.get_rank() == 0 else None

    def sources(self, adapters: bool) -> list[Source]:
        return adapter_sources(self.model) if adapters else sources(self.model)

    def trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def state(self, common: dict[str, Any], part: None) -> list[torch.Tensor] | None:
        """Optimiser state `key` of trained parameters by place, whole, on rank 0."""
        trained = self.trained()
        self.moments.link()
        found = [self.moments.read(trained[place][1], common["key"]).cpu() for place in common["places"]]
        return found if dist.get_rank() == 0 else None

    def probe(self, common: list[int], part: None) -> list[float]:
        return Policy.probe(self.engine, common, self.device)

    def release(self, common: None, part: None) -> None:
        torch.cuda.empty_cache()

    def load(self, common: dict[str, Any], part: None) -> int:
        """Restore what the front end saved; the number of optimiser steps made."""
        folder = Path(common["folder"])
        weights, moments = (
            Stored(folder, common["weights"], "the weights' file"),
            Stored(folder, STATE, "optimiser state"),
        )
        steps, begun = load_counters(folder), f"{self.trained()[0][0]}/exp_avg" in moments.files
        self.moments.begin(steps) if begun else self.moments.inner.state.clear()
        for name, parameter in self.trained():
            self.moments.write(parameter, "master", weights.read(name))
            for key in ("exp_avg", "exp_avg_sq") if begun else ():
                self.moments.write(parameter, key, moments.read(f"{name}/{key}"))
        if self.settings.lora.rank:
            ends = merged_ends(self.model)
            with gathered([parameter for source in ends for parameter in source.parameters]):
                check_base(ends, folder)
        if self.critic is not None and self.critic_optimizer is not None:
            self.critic.load(folder)
            load_optimizer(
                folder, self.critic_optimizer, self.critic_names(), known=[name for name, _ in self.trained()]
            )
        return steps

    def critic_names(self) -> dict[torch.Tensor, str]:
        return (
            {}
            if self.critic is None
            else {parameter: name for name, parameter in self.critic.named_parameters(prefix="value_head")}
        )

    def _rows(self, state: dict[str, Any], passes: int) -> tuple[Rows, list[torch.Tensor]]:
        """A rank's rows and those of each pass; ranks with less to do add passes without a row."""
        rows = Rows.from_state(state)
        pieces = micro_batches(rows.lengths, self.settings.micro_batch_tokens, packed=self.settings.packing)
        return rows, pieces + [torch.zeros(0, dtype=torch.int64)] * (passes - len(pieces))

    def _backward(self, loss: torch.Tensor) -> None:
        """DeepSpeed averages gradients over ranks; these are parts of one sum."""
        self.left -= 1
        self.finite &= math.isfinite(float(loss.detach()))
        self.engine.set_gradient_accumulation_boundary(self.left == 0)
        self.engine.backward(loss * self.ranks)

    def _apply(self, rate: float) -> float | None:
        """Clip, and step unless a number on any rank is not finite; the policy's gradient norm, None where the step was left out."""
        critic = [] if self.critic is None else list(self.critic.parameters())
        for gradient in _gradients(critic):
            dist.all_reduce(gradient)
            gradient.div_(self.ranks)
        size = torch.nn.utils.get_total_norm(_gradients(critic))
        own = list(self.engine.module.parameters()) if self.settings.zero_stage == 0 else []
        norm = torch.nn.utils.get_total_norm(_gradients(own))
        flag = torch.tensor(
            float(self.finite and math.isfinite(float(size)) and math.isfinite(float(norm))), device=self.device
        )
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        finite = bool(flag)
        if self.settings.zero_stage == 0:
            torch.nn.utils.clip_grads_with_norm_(own, self.settings.grad_clip, norm)
        elif not finite:
            self.moments.poison()
        if finite or self.settings.zero_stage:
            _set_rate(self.engine.optimizer, rate)
            self.engine.step()
        if self.settings.zero_stage:
            finite &= self.engine.was_step_applied()
        if self.critic_optimizer is not None and finite:
            torch.nn.utils.clip_grads_with_norm_(critic, self.settings.grad_clip, size)
            _set_rate(self.critic_optimizer, rate)
            self.critic_optimizer.step()
        self.engine.zero_grad()
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad()
        return (
            (float(norm) if self.settings.zero_stage == 0 else float(self.engine.get_global_grad_norm()))
            if finite
            else None
        )

    def _reference(self, deepspeed: Any, path: str, config: dict[str, Any], options: dict[str, Any]) -> Any:
        policy = Policy(load_sharded(path, config).to(self.device).requires_grad_(False), self.settings, **options)
        if self.settings.zero_stage < 3:
            return policy
        zero = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
        return deepspeed.initialize(
            model=policy, config={**config, "zero_optimization": zero}, dist_init_required=False
        )[0]


def _critic(state: dict[str, torch.Tensor], device: torch.device) -> ValueHead:
    critic = ValueHead(state["inner.weight"].shape[1], 0).to(state["inner.weight"].dtype)
    critic.load_state_dict(state)
    return critic.to(device)


def _gradients(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _set_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
