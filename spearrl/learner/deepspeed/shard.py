"""One rank of a DeepSpeed learner: its share of the model, and the commands it runs together with the other ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spearrl.batching import Batch, Rows
from spearrl.config.sections import LearnerSection
from spearrl.faults import strike
from spearrl.learner.critic import ValueHead
from spearrl.learner.deepspeed.zero import Moments, engine_settings, gathered, load_sharded, prepare
from spearrl.learner.lora import (
    Export,
    adapter_weights,
    add_adapters,
    check_base,
    merged_ends,
    model_weights,
)
from spearrl.learner.loss_inputs import Share, Tally
from spearrl.learner.optimizer import MASTER, STATE, load_counters, load_optimizer, make_optimizer, set_rate
from spearrl.learner.passes import Passes
from spearrl.learner.policy import Policy, use_bf16
from spearrl.losses import Objective
from spearrl.models import ask_for_determinism
from spearrl.models.weights import TensorFiles

COMMANDS = ("predict", "step", "weights", "state", "probe", "load", "release")


class CommandRunner:
    """Runs commands by name; the first one, "build", makes the shard that the others work on."""

    def __init__(self) -> None:
        self.shard: Any = None

    def __call__(self, name: str, common: Any, part: Any) -> Any:
        if name == "build":
            cuda = common["device"] == "cuda"
            device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
            self.shard = Shard(common, part, device)
            return None
        if name not in COMMANDS:
            raise ValueError(f"no command {name!r}")
        return getattr(self.shard, name)(common, part)


class Shard:
    """Engine, reference and critic of one rank. A command gets what all ranks are sent, and this rank's part.

    Args:
        build: settings as JSON; model and reference directories, temperature, seed, optimiser, determinism.
        part: the critic's weights, where there is a critic.
    """

    def __init__(self, build: dict[str, Any], part: dict[str, Any], device: torch.device):
        deepspeed = prepare(device)
        ask_for_determinism(build["deterministic"])
        self.settings = settings = LearnerSection.model_validate(build["settings"])
        self.device, self.ranks = device, dist.get_world_size()
        bf16 = use_bf16(settings.precision, device)
        # Weights in bf16. Where every rank has all of them they stay float32, under autocast.
        self.native = bf16 and settings.zero_stage >= 2
        config = engine_settings(settings, device, bf16=self.native)
        options = {"temperature": build["temperature"], "bf16": bf16 and not self.native}
        self.model = load_sharded(build["model"], config)
        if settings.lora.rank:
            add_adapters(self.model, settings.lora, build["seed"])
        policy = Policy(self.model.to(device), settings, **options)
        kind, self.critic, self.critic_optimizer = build["optimizer"], None, None
        optimizer = make_optimizer(self.model.named_parameters(), settings, kind=kind)
        self.engine, *_ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.moments = Moments(self.engine)
        reference = self._reference(deepspeed, build["reference"], config, options) if build["reference"] else None
        if part["critic"]:
            self.critic = _critic(part["critic"], device)
            self.critic_optimizer = make_optimizer((), settings, critic=self.critic, kind=kind)
        options = {"reference": reference, "critic": self.critic, "backward": self._backward}
        self.passes = Passes(self.engine, self.model, settings, device, **options)
        self.passes_left, self.finite = 0, True

    def predict(self, common: dict[str, Any], part: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities (or values) of this rank's rows."""
        rows, pieces = self._rows(part["rows"], common["passes"])
        return self.passes.predict(rows, pieces, reference=common["reference"], values=common["values"])

    def step(self, common: dict[str, Any], part: list[dict[str, Any]]) -> dict[str, Any]:
        """One optimiser step: this rank's losses, metrics and log-probabilities before it, and the gradient's norm.

        The norm is None where the step was left out.
        """
        if dist.get_rank():
            strike("rank.step")
        self.passes_left, self.finite = sum(share["passes"] for share in common["shares"]), True
        self.engine.train(self.settings.gradient_checkpointing)
        tally, gradients = Tally(), []
        for fields, own in zip(common["shares"], part, strict=True):
            rows, pieces = self._rows(own["rows"], fields["passes"])
            share = Share(
                Batch(rows, **own["tensors"]),
                [(Objective.from_dict(objective), factor) for objective, factor in fields["objectives"]],
                **{name: fields[name] for name in ("seed", "denominators", "rows", "current")},
            )
            covariance = {int(index): tokens.to(self.device) for index, tokens in own["covariance"].items()}
            gradients.append(self.passes.backward(share, pieces, tally, covariance=covariance))
        self.engine.eval()
        losses, logprobs = [g.losses for g in gradients], [g.logprobs for g in gradients]
        return {"losses": losses, "logprobs": logprobs, "tally": tally.state(), "norm": self._apply(common["lr"])}

    def weights(self, common: dict[str, Any], part: None) -> list[list[torch.Tensor]] | None:
        """Tensors of the model directory (or of the adapters) by index of their `Export`, whole, on rank 0."""
        exports = [self.exported[common["adapters"]][index] for index in common["indices"]]
        with gathered([parameter for export in exports for parameter in export.parameters]):
            if dist.get_rank():
                return None
            return [[tensor.cpu().clone() for tensor in export.tensors()] for export in exports]

    def state(self, common: dict[str, Any], part: None) -> list[torch.Tensor] | None:
        """Optimiser state `key` of trained parameters by index, whole, on rank 0."""
        trained = self.trained()
        self.moments.link()
        tensors = [self.moments.read(trained[index][1], common["key"]).cpu() for index in common["indices"]]
        return tensors if dist.get_rank() == 0 else None

    def probe(self, common: dict[str, Any], part: None) -> list[float]:
        """Log-probabilities of the token ids but the first, computed in `dtype`."""
        dtype = common["dtype"] and getattr(torch, common["dtype"])
        return Policy.probe(self.engine, common["token_ids"], self.device, dtype)

    def release(self, common: None, part: None) -> None:
        """Give unused device memory back: torch keeps what activations took."""
        torch.cuda.empty_cache()

    def load(self, common: dict[str, Any], part: None) -> int:
        """Restore what the front end saved; the number of optimiser steps made."""
        folder = Path(common["folder"])
        weights = TensorFiles(folder, common["weights"], "the weights' file")
        moments = TensorFiles(folder, STATE, "optimiser state")
        steps, begun = load_counters(folder), f"{self.trained()[0][0]}/exp_avg" in moments.files
        self.moments.begin(steps) if begun else self.moments.inner.state.clear()
        for parameter, value in self._saved_weights(weights, master=common["weights"] == MASTER):
            self.moments.write(parameter, "master", value)
        for name, parameter in self.trained() if begun else ():
            for key in ("exp_avg", "exp_avg_sq"):
                self.moments.write(parameter, key, moments.read(f"{name}/{key}"))
        if self.settings.lora.rank:
            ends = merged_ends(self.model)
            with gathered([parameter for export in ends for parameter in export.parameters]):
                check_base(ends, folder)
        if self.critic is not None and self.critic_optimizer is not None:
            self.critic.load(folder)
            known = [name for name, _ in self.trained()]
            load_optimizer(folder, self.critic_optimizer, self.critic.names(), known=known)
        return steps

    @cached_property
    def exported(self) -> dict[bool, list[Export]]:
        """What the model directory (False) and that of the adapters (True) hold."""
        return {False: model_weights(self.model), True: adapter_weights(self.model)}

    def _saved_weights(self, files: TensorFiles, *, master: bool) -> Iterator[tuple[Any, torch.Tensor]]:
        """(parameter, value) of those that are trained, from a file of their own or from the model directory's."""
        if master:
            yield from ((parameter, files.read(name)) for name, parameter in self.trained())
            return
        for export in self.exported[False]:
            values = export.portion.to_own([files.read(name) for name in export.portion.stored])
            yield from (pair for pair in zip(export.parameters, values, strict=True) if pair[0].requires_grad)

    def trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        """(name, parameter) of those that are trained."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def _rows(self, state: dict[str, Any], passes: int) -> tuple[Rows, list[torch.Tensor]]:
        """A rank's rows and those of each pass; ranks with less to do add passes without a row."""
        rows = Rows.from_state(state)
        pieces = self.passes.pieces(rows)
        return rows, pieces + [torch.zeros(0, dtype=torch.int64)] * (passes - len(pieces))

    def _backward(self, loss: torch.Tensor) -> None:
        """DeepSpeed averages gradients over ranks; these are parts of one sum."""
        self.passes_left -= 1
        self.finite &= math.isfinite(float(loss.detach()))
        self.engine.set_gradient_accumulation_boundary(self.passes_left == 0)
        self.engine.backward(loss * self.ranks)

    def _apply(self, rate: float) -> float | None:
        """Clip, and step unless a number on any rank is not finite.

        Returns the norm of the policy's gradient; None where the step was left out.
        """
        sharded = self.settings.zero_stage > 0  # then DeepSpeed sums, clips and checks the policy's gradient by itself
        critic = [] if self.critic is None else list(self.critic.parameters())
        for gradient in _gradients(critic):
            dist.all_reduce(gradient)
            gradient.div_(self.ranks)
        policy = [] if sharded else list(self.engine.module.parameters())
        norms = [torch.nn.utils.get_total_norm(_gradients(parameters)) for parameters in (policy, critic)]
        finite = self.finite and all(math.isfinite(norm) for norm in norms)
        flag = torch.tensor(float(finite), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        finite = bool(flag)
        if not sharded:
            torch.nn.utils.clip_grads_with_norm_(policy, self.settings.grad_clip, norms[0])
        elif not finite:
            self.moments.poison()
        if finite or sharded:
            set_rate(self.engine.optimizer, rate)
            self.engine.step()
        if sharded:
            finite &= self.engine.was_step_applied()
        if self.critic_optimizer is not None and finite:
            torch.nn.utils.clip_grads_with_norm_(critic, self.settings.grad_clip, norms[1])
            set_rate(self.critic_optimizer, rate)
            self.critic_optimizer.step()
        self.engine.zero_grad()
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad()
        if not finite:
            return None
        return float(self.engine.get_global_grad_norm() if sharded else norms[0])

    def _reference(self, deepspeed: Any, path: str, config: dict[str, Any], options: dict[str, Any]) -> Any:
        policy = Policy(load_sharded(path, config).to(self.device).requires_grad_(False), self.settings, **options)
        if self.settings.zero_stage < 3:
            return policy
        zero = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
        config = {**config, "zero_optimization": zero}
        return deepspeed.initialize(model=policy, config=config, dist_init_required=False)[0]


def _critic(state: dict[str, torch.Tensor], device: torch.device) -> ValueHead:
    critic = ValueHead(state["inner.weight"].shape[1], 0).to(state["inner.weight"].dtype)
    critic.load_state_dict(state)
    return critic.to(device)


def _gradients(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
