"""How a local engine with a model of its own takes new weights."""

from __future__ import annotations

from typing import Any

import torch

from spearrl.errors import EngineError
from spearrl.models.weights import WeightLoader
from spearrl.rollout.local import LocalEngine
from spearrl.sync.buckets import digest, model_digest, read_bucket


class LocalWeights:
    """The receiver of a LocalEngine that shares its parameters with nobody. Calls may come from any thread."""

    transports: tuple[str, ...] = ("shared_memory",)
    shards = 1

    def __init__(self, engine: LocalEngine, name: str = "engine"):
        self.engine, self.name = engine, name
        self._loader = WeightLoader(engine.model)
        self._digest = False

    def pause(self, timeout_s: float) -> None:
        self.engine.pause()
        if not self.engine.passing.acquire(timeout=timeout_s):
            raise EngineError(f"the pass under way did not end within {timeout_s:g} s", where=self.name)
        self.engine.passing.release()

    def begin(self, plan: dict[str, Any], timeout_s: float) -> None:
        self._digest = bool(plan.get("digest"))
        self._loader.begin()

    def take(self, bucket: dict[str, Any], timeout_s: float) -> dict[str, int]:
        tensors = read_bucket(bucket["path"])
        for name, tensor in tensors.items():
            if not self._loader.fits(name, tensor.shape):
                text = f"weight {name} {tuple(tensor.shape)} does not belong to its model"
                raise EngineError(text, where=self.name, hint="sync the same architecture")
        with self.engine.passing:
            self._loader.take(tensors)
        return {name: digest(tensor) for name, tensor in tensors.items()}

    def finish(self, version: int, timeout_s: float) -> list[int]:
        if missing := list(self._loader.missing):
            text = f"{len(missing)} weights did not come, {missing[0]} among them"
            raise EngineError(text, where=self.name, hint="send every parameter of the model")
        self.engine.publish(version)
        return [model_digest(self.engine.model)] if self._digest else []

    def probe(self, token_ids: list[int], timeout_s: float) -> list[float]:
        ids = torch.tensor(token_ids, device=self.engine.device)
        with self.engine.passing, self.engine.forward.evaluating():
            logits = self.engine.model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), -1).gather(-1, ids[1:, None])[:, 0].tolist()

    def resume(self, timeout_s: float) -> None:
        self.engine.resume()

    def sleep(self) -> None:
        """A local engine keeps its memory."""

    def wake(self) -> None:
        """It never slept."""
