"""The learner on many processes: plans and sums on rank 0, forward and backward passes on every rank, sharded by DeepSpeed (ZeRO, arXiv 1910.02054).

What a step is made of does not depend on the number of ranks: mini-batches, covariance selections and denominators are those of all rows, made
here as the local learner makes them; ranks get rows of equal length in all, and run equally many passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spearrl.batching import Rows
from spearrl.config import LearnerSection
from spearrl.errors import CheckpointError, ContractError
from spearrl.learner.critic import ValueHead
from spearrl.learner.deepspeed.ranks import Ranks
from spearrl.learner.deepspeed.shard import Shard, Worker
from spearrl.learner.deepspeed.zero import numel, require
from spearrl.learner.lora import FOLDER, adapter_config, save_adapters
from spearrl.learner.minibatch import LossInputs, Share, Tally
from spearrl.learner.optimizer import MASTER, STATE, named_state, save_counters
from spearrl.learner.partition import deal, micro_batches
from spearrl.learner.updates import Updates
from spearrl.models.vision import vision_of
from spearrl.models.weights import write_tensors

BUCKET_BYTES = 512 << 20  # gathered at a time


class DeepSpeedLearner(Updates):
    """Front end of `settings.processes` ranks, of which this process is rank 0. One at a time in a process; close it.

    Args:
        folder: model directory, readable by every rank.
        device: "cpu" or "cuda".
        reference: model directory of the frozen model that KL divergences are measured from.
        critic: the value head to begin with.
        seed: of the adapters' initial weights.
        environments: environment variables of each rank that is started here.
    Raises:
        ConfigError: DeepSpeed is missing, or the model cannot be trained. WorkerError: a rank does not come up.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: LearnerSection,
        *,
        temperature: float = 1.0,
        device: str = "cpu",
        total_steps: int | None = None,
        joint: bool = False,
        reference: str | Path | None = None,
        critic: ValueHead | None = None,
        seed: int = 0,
        environments: Sequence[Mapping[str, str]] = (),
        _optimizer: str = "adamw",
        _ranks: Ranks | None = None,
    ):
        require()
        super().__init__(settings, total_steps=total_steps, joint=joint)
        self.has_reference, self.has_critic = reference is not None or bool(settings.lora.rank), critic is not None
        self.ranks = _ranks or Ranks(
            Worker(), settings.processes, device=device, timeout_s=settings.timeout_s, environments=environments
        )
        build: dict[str, Any] = {
            "settings": settings.model_dump(mode="json"),
            "model": str(folder),
            "reference": str(reference) if reference else None,
        }
        build |= {"device": device, "temperature": temperature, "seed": seed, "optimizer": _optimizer}
        build["deterministic"] = torch.are_deterministic_algorithms_enabled()
        self.ranks.call(
            "build", build, [{"critic": critic.state_dict() if critic is not None else None}] * self.ranks.size
        )

    @property
    def shard(self) -> Shard:
        """This process's own."""
        return self.ranks.execute.shard  # type: ignore[no-any-return,attr-defined]

    @property
    def model(self) -> Any:
        """This rank's part of the model: its config, and with ZeRO below 3 its weights."""
        return self.shard.model

    def logprobs(self, rows: Rows, *, reference: bool = False) -> torch.Tensor:
        """[B, T] log-probabilities of action tokens at the temperature, 0 elsewhere; no gradient. Raises ContractError where there is no reference."""
        if reference and not self.has_reference:
            raise ContractError(
                "this learner has no reference model", where="Learner.logprobs", hint="build it with reference="
            )
        return self._predict(rows, reference=reference, values=False)

    def values(self, rows: Rows) -> torch.Tensor:
        """[B, T] the critic's value of the state before each action token, 0 elsewhere; no gradient. Raises ContractError where there is no critic."""
        if not self.has_critic:
            raise ContractError("this learner has no critic", where="Learner.values", hint="build it with critic=")
        return self._predict(rows, reference=False, values=True)

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight once (tied ones under their first name, adapters merged), as named in a model directory; gathered in buckets."""
        yield from self._weights(adapters=False)

    def adapter_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight of the adapters, as named in peft's files; none without adapters."""
        yield from self._weights(adapters=True)

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of token_ids[1:], each given the tokens before it, at temperature 1."""
        return self.ranks.call("probe", list(token_ids))[0]  # type: ignore[no-any-return]

    def export(self, folder: str | Path) -> None:
        """Write the weights as a transformers model directory."""
        folder = Path(folder)
        self.model.config.save_pretrained(folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        if (vision := vision_of(self.model)) is not None:
            vision.save(folder)
        write_tensors(folder, "model", self.full_parameters(), index=True)

    def export_adapter(self, folder: str | Path) -> None:
        """Write the adapters as a directory of peft's format."""
        save_adapters(Path(folder), dict(self.adapter_parameters()), adapter_config(self.model))

    def save(self, folder: str | Path) -> None:
        """Write weights (a model directory), optimiser state and step count, whole, so that any number of ranks can go on from them.

        Where the weights are bf16, or adapters, the float32 ones that AdamW keeps lie beside the optimiser state. All of it is safetensors and JSON.
        """
        folder = Path(folder)
        self.export(folder)
        if self.settings.lora.rank:
            self.export_adapter(folder / FOLDER)
        shard = self.shard
        if shard.native or self.settings.lora.rank:
            write_tensors(folder, MASTER, self._state("master"))
        write_tensors(folder, STATE, self._moments(shard))
        if shard.critic is not None:
            shard.critic.save(folder)
        save_counters(folder, self.steps)

    def load(self, folder: str | Path) -> None:
        """Restore what a learner of this model saved, whatever its number of processes and ZeRO stage. Raises CheckpointError where it cannot."""
        folder = Path(folder)
        master = any(folder.glob(f"{MASTER}*.safetensors"))
        if not master and (self.settings.lora.rank or not any(folder.glob("model*.safetensors"))):
            raise CheckpointError(
                "no weights to go on from", where=str(folder), hint="give a checkpoint that this learner saved"
            )
        self.steps = self.ranks.call("load", {"folder": str(folder), "weights": MASTER if master else "model"})[0]

    def release(self) -> None:
        """Have every rank give device memory that is not in use back: torch keeps what activations took."""
        self.ranks.call("release")

    def close(self) -> None:
        """End the other ranks."""
        self.ranks.close()

    def _moments(self, shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
        if shard.critic_optimizer is not None:
            yield from named_state(shard.critic_optimizer, shard.critic_names())
        if shard.moments.begun:
            yield from ((f"{name}/step", torch.tensor(float(self.steps))) for name, _ in shard.trained())
            yield from self._state("exp_avg", "exp_avg_sq")

    def _predict(self, rows: Rows, *, reference: bool, values: bool) -> torch.Tensor:
        dealt, passes = self._deal(rows)
        parts = [{"rows": rows.select(index).state_dict()} for index in dealt]
        answers = self.ranks.call("predict", {"passes": passes, "reference": reference, "values": values}, parts)
        found = torch.zeros(len(rows), rows.width, dtype=answers[0].dtype)
        for index, answer in zip(dealt, answers, strict=True):
            found[index, : answer.shape[1]] = answer
        return found

    def _step(self, shares: list[Share], tally: Tally) -> bool:
        told, parts = [], [[] for _ in range(self.ranks.size)]  # type: tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]
        for share in shares:
            dealt, passes = self._deal(share.batch.rows)
            objectives = [(asdict(objective), factor) for objective, factor in share.objectives]
            common = {
                "objectives": objectives,
                "seed": share.seed,
                "current": share.current,
                "divisors": share.denominators(),
            }
            told.append({**common, "rows": len(share.batch), "passes": passes})
            chosen = self._selections(share)
            for part, index in zip(parts, dealt, strict=True):
                batch = share.batch.select(index)
                selected = {str(place): selection[index][:, : batch.rows.width] for place, selection in chosen.items()}
                part.append({"rows": batch.rows.state_dict(), "tensors": batch.tensors(), "chosen": selected})
        answers = self.ranks.call("step", {"shares": told, "lr": self._rate(self.steps)}, parts)
        for answer in answers:
            tally.merge(answer["tally"])
        for number, share in enumerate(shares):
            share.total(
                [sum(losses) for losses in zip(*(answer["losses"][number] for answer in answers), strict=True)], tally
            )
        norm = answers[0]["norm"]
        if norm is not None:
            tally.add(shares[0].objectives[0][0].prefix, {"grad_norm": norm}, 1.0)
        return norm is not None

    def _selections(self, share: Share) -> dict[int, torch.Tensor]:
        """Tokens that covariance rules select over the whole mini-batch on current log-probabilities."""
        objectives = share.whole_scope()
        if not objectives:
            return {}
        inputs = LossInputs.of(share.batch, torch.device("cpu"))
        return share.selections(
            inputs, inputs.old_logprobs if share.current else self.logprobs(share.batch.rows), objectives
        )

    def _deal(self, rows: Rows) -> tuple[list[torch.Tensor], int]:
        """Rows of each rank, and the passes that every rank makes: as many as the one that needs most."""
        dealt = deal(rows.lengths, self.ranks.size)
        budget, packed = self.settings.micro_batch_tokens, self.settings.packing
        return dealt, max(len(micro_batches(rows.lengths[index], budget, packed=packed)) for index in dealt)

    def _weights(self, *, adapters: bool) -> Iterator[tuple[str, torch.Tensor]]:
        found = self.shard.sources(adapters)
        for places in _buckets([sum(numel(p) * p.element_size() for p in source.parameters) for source in found]):
            tensors = self.ranks.call("weights", {"adapters": adapters, "places": places})[0]
            yield from zip((found[place].name for place in places), tensors, strict=True)

    def _state(self, *keys: str) -> Iterator[tuple[str, torch.Tensor]]:
        trained = self.shard.trained()
        for key in keys:
            for places in _buckets([4 * numel(parameter) for _, parameter in trained]):
                tensors = self.ranks.call("state", {"key": key, "places": places})[0]
                yield from zip(
                    (trained[place][0] + ("" if key == "master" else f"/{key}") for place in places),
                    tensors,
                    strict=True,
                )


def _buckets(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Places in order, in pieces of at most BUCKET_BYTES (a larger one goes alone)."""
    places: list[int] = []
    total = 0
    for place, size in enumerate(sizes):
        if places and total + size > BUCKET_BYTES:
            yield places
            places, total = [], 0
        places, total = [*places, place], total + size
    if places:
        yield places
