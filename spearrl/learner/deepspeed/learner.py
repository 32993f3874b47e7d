"""The learner on many processes: plans and sums on rank 0, forward and backward passes on every rank.

Weights are sharded by DeepSpeed (ZeRO, arXiv 1910.02054). What a step is made of does not depend on the number of
ranks: mini-batches, the tokens of covariance rules and denominators are those of all rows, made here as the local
learner makes them; ranks get rows with about as many tokens each, and run equally many passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spearrl.batching import Rows, sequences, tree_shares
from spearrl.config.sections import LearnerSection
from spearrl.errors import CheckpointError
from spearrl.learner.critic import ValueHead
from spearrl.learner.deepspeed.ranks import Ranks
from spearrl.learner.deepspeed.shard import CommandRunner, Shard
from spearrl.learner.deepspeed.zero import numel, require
from spearrl.learner.loss_inputs import Share, Tally
from spearrl.learner.minibatches import deal
from spearrl.learner.old_logprobs import OldLogprobs
from spearrl.learner.optimizer import MASTER, STATE, named_state, save_counters
from spearrl.learner.protocol import Learner
from spearrl.models.vision import vision_of
from spearrl.models.weights import write_tensors
from spearrl.sync.buckets import grouped

BUCKET_BYTES = 512 << 20  # gathered at a time


class DeepSpeedLearner(Learner):
    """Front end of `settings.processes` ranks, of which this process is rank 0. One at a time in a process; close it.

    Args:
        folder: model directory, readable by every rank.
        device: "cpu" or "cuda".
        reference: model directory of the frozen model that KL divergences are measured from.
        critic: the value head to begin with.
        seed: of the adapters' initial weights.
        environments: environment variables of each rank that is started here.
        _optimizer, _ranks: for tests: "sgd", and ranks that are there already.
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
        super().__init__(settings, total_steps=total_steps, decay="linear", joint=joint)
        self.has_reference, self.has_critic = reference is not None or settings.lora.rank > 0, critic is not None
        self.ranks = _ranks or Ranks(
            CommandRunner(), settings.processes, device=device, timeout_s=settings.timeout_s, environments=environments
        )
        build = {
            "settings": settings.model_dump(mode="json"),
            "model": str(folder),
            "reference": str(reference) if reference else None,
            "device": device,
            "temperature": temperature,
            "seed": seed,
            "optimizer": _optimizer,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        part = {"critic": critic.state_dict() if critic is not None else None}
        self.ranks.call("build", build, [part] * self.ranks.size)
        self.why_padded = self.shard.passes.why_padded

    @property
    def shard(self) -> Shard:
        """This process's own."""
        return self.ranks.execute.shard  # type: ignore[attr-defined]

    @property
    def model(self) -> Any:
        """This rank's part of the model: its config, and with ZeRO below 3 its weights."""
        return self.shard.model

    def probe(self, token_ids: Sequence[int], dtype: torch.dtype | None = None) -> list[float]:
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        return self.ranks.call("probe", {"token_ids": list(token_ids), "dtype": name})[0]

    def export(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.model.config.save_pretrained(folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        if (vision := vision_of(self.model)) is not None:
            vision.save(folder)
        write_tensors(folder, "model", self.full_parameters(), index=True)

    def load(self, folder: str | Path) -> None:
        """Restore what a learner of this model saved, whatever its number of processes and ZeRO stage."""
        folder = Path(folder)
        master = any(folder.glob(f"{MASTER}*.safetensors"))
        if not master and (self.settings.lora.rank or not any(folder.glob("model*.safetensors"))):
            hint = "give a checkpoint that this learner saved"
            raise CheckpointError("no weights to go on from", where=str(folder), hint=hint)
        self.steps = self.ranks.call("load", {"folder": str(folder), "weights": MASTER if master else "model"})[0]

    def release(self) -> None:
        self.ranks.call("release")

    def close(self) -> None:
        self.ranks.close()

    def _save_training(self, folder: Path) -> None:
        """State is whole, so that any number of ranks can go on from it.

        Where the weights are bf16, or adapters, the float32 ones that AdamW keeps lie beside it.
        """
        if self.shard.native or self.settings.lora.rank:
            write_tensors(folder, MASTER, self._state("master"))
        write_tensors(folder, STATE, self._moments())
        if self.shard.critic is not None:
            self.shard.critic.save(folder)
        save_counters(folder, self.steps)

    def _moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        shard = self.shard
        if shard.critic is not None and shard.critic_optimizer is not None:
            yield from named_state(shard.critic_optimizer, shard.critic.names())
        if shard.moments.begun:
            yield from ((f"{name}/step", torch.tensor(float(self.steps))) for name, _ in shard.trained())
            for key in ("exp_avg", "exp_avg_sq"):
                yield from ((f"{name}/{key}", tensor) for name, tensor in self._state(key))

    def _state(self, key: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Optimiser state `key` of every trained parameter, under its name; gathered in buckets."""
        names, parameters = zip(*self.shard.trained(), strict=True)
        yield from self._gather("state", names, [4 * numel(p) for p in parameters], {"key": key})

    def _weights(self, *, adapters: bool) -> Iterator[tuple[str, torch.Tensor]]:
        exports = self.shard.exported[adapters]
        sizes = [sum(numel(p) * p.element_size() for p in export.parameters) for export in exports]
        names = [list(export.portion.stored) for export in exports]
        for stored, tensors in self._gather("weights", names, sizes, {"adapters": adapters}):
            yield from zip(stored, tensors, strict=True)

    def _gather(
        self, command: str, names: Sequence[Any], sizes: Sequence[int], arguments: dict[str, Any]
    ) -> Iterator[tuple[Any, Any]]:
        """(name, tensor) of everything that a command gives by index, in buckets of at most BUCKET_BYTES.

        Args:
            sizes: bytes of each.
        """
        for indices in grouped(range(len(sizes)), sizes.__getitem__, BUCKET_BYTES):
            tensors = self.ranks.call(command, {**arguments, "indices": indices})[0]
            yield from zip((names[index] for index in indices), tensors, strict=True)

    def _predict(self, rows: Rows, *, reference: bool, values: bool) -> torch.Tensor:
        dealt, passes = self._deal(rows)
        parts = [{"rows": rows.select(index).state_dict()} for index in dealt]
        answers = self.ranks.call("predict", {"passes": passes, "reference": reference, "values": values}, parts)
        predictions = torch.zeros(len(rows), rows.width, dtype=answers[0].dtype)
        for index, answer in zip(dealt, answers, strict=True):
            predictions[index, : answer.shape[1]] = answer
        return predictions

    def _one_pass(self, rows: Rows) -> bool:
        """Never: a rank sees its own rows."""
        return False

    def _step(self, shares: list[Share], tally: Tally, old: OldLogprobs) -> bool:
        common: list[dict[str, Any]] = []  # of each share, what every rank is sent
        dealt_shares: list[list[torch.Tensor]] = []
        parts: list[list[dict[str, Any]]] = [[] for _ in range(self.ranks.size)]
        for share in shares:
            dealt, passes = self._deal(share.batch.rows)
            dealt_shares.append(dealt)
            fields = ("seed", "current", "denominators", "rows")
            common.append({name: getattr(share, name) for name in fields} | {"passes": passes})
            common[-1]["objectives"] = [(asdict(objective), factor) for objective, factor in share.objectives]
            covariance = self._covariance_tokens(share)
            for part, index in zip(parts, dealt, strict=True):
                batch = share.batch.select(index)
                own = {str(i): tokens[index][:, : batch.rows.width] for i, tokens in covariance.items()}
                part.append({"rows": batch.rows.state_dict(), "tensors": batch.tensors(), "covariance": own})
        answers = self.ranks.call("step", {"shares": common, "lr": self._rate(self.steps)}, parts)
        for answer in answers:
            tally.merge(answer["tally"])
        for number, share in enumerate(shares):
            if share.current and share.index is not None:
                for index, answer in zip(dealt_shares[number], answers, strict=True):
                    old.record(share.index[index], answer["logprobs"][number])
            losses = zip(*(answer["losses"][number] for answer in answers), strict=True)
            share.total([sum(parts_of_loss) for parts_of_loss in losses], tally)
        norm = answers[0]["norm"]
        if norm is not None:
            tally.add(shares[0].objectives[0][0].prefix, {"grad_norm": norm}, 1.0)
        return norm is not None

    def _covariance_tokens(self, share: Share) -> dict[int, torch.Tensor]:
        """Of this share's rows, chosen among all of the mini-batch at current log-probabilities."""
        if share.whole is None:
            return dict(share.covariance or {})
        others = share.whole[0].rows.select(share.others)
        found = self.logprobs(others) if len(others) else torch.zeros(0, others.width)
        return share.covariance_of_whole(self.logprobs(share.batch.rows), found)

    def _deal(self, rows: Rows) -> tuple[list[torch.Tensor], int]:
        """Rows of each rank, and the passes that every rank makes: as many as the one that needs most."""
        tree = self.shard.passes.tree
        dealt = tree_shares(sequences(rows), self.ranks.size) if tree else deal(rows.lengths, self.ranks.size)
        return dealt, max(len(self.shard.passes.pieces(rows.select(index))) for index in dealt)
