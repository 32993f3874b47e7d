"""Engines that sleep while the learner works, and whether their memory really came back."""

from __future__ import annotations

import pytest

from spearrl.errors import WorkerLost
from spearrl.sync.sleep import GIB, put_to_sleep, wake_up

TAKEN = round(0.85 * 80 * GIB)  # by each engine
GPUS = ((0,), (1,))


class FakeEngine:
    """Holds GPU memory until it sleeps; `leak`: its share that it does not give back."""

    def __init__(self, name: str, gpu: int, memory: dict[int, int], leak: float = 0.0):
        self.name, self.gpu, self.memory, self.leak = name, gpu, memory, leak

    def sleep(self) -> None:
        self.memory[self.gpu] += round(TAKEN * (1 - self.leak))


def two_gpus() -> dict[int, int]:
    return {0: 5 * GIB, 1: 5 * GIB}


def test_sleeping_engines_must_give_their_memory_back():
    memory = two_gpus()
    sound = [FakeEngine("worker 0 (vllm)", 0, memory), FakeEngine("worker 1 (vllm)", 1, memory)]
    assert put_to_sleep(sound, GPUS, expected=TAKEN, free=memory.get) == []
    assert memory == {0: 5 * GIB + TAKEN, 1: 5 * GIB + TAKEN}, "both slept"
    memory = two_gpus()
    leaking = [FakeEngine("worker 0 (vllm)", 0, memory), FakeEngine("worker 1 (vllm)", 1, memory, leak=0.9)]
    (warning,) = put_to_sleep(leaking, GPUS, expected=TAKEN, free=memory.get)
    assert warning.startswith("worker 1 (vllm) sleeps, but GPU 1 got 6.8 GiB back of at least 40.8 GiB")
    assert "may run out of memory" in warning
    elsewhere = put_to_sleep(leaking, GPUS, expected=TAKEN, free=lambda gpu: None)  # another machine's GPUs
    assert elsewhere == []


def test_a_worker_that_died_holds_no_memory_and_stops_nothing():
    """Its fleet replaces it; the others sleep."""

    class Dead(FakeEngine):
        def sleep(self) -> None:
            raise WorkerLost("ended before it answered sleep", where=self.name)

        wake = sleep

    memory = two_gpus()
    engines = [Dead("worker 0", 0, memory), FakeEngine("worker 1", 1, memory)]
    (warning,) = put_to_sleep(engines, GPUS, expected=TAKEN, free=memory.get)
    assert "GPU 0 got 0.0 GiB back" in warning and memory[1] == 5 * GIB + TAKEN
    wake_up(engines[:1])


def test_a_failing_engine_is_not_hidden():
    class Broken(FakeEngine):
        def sleep(self) -> None:
            raise RuntimeError("worker 0 did not answer")

    with pytest.raises(RuntimeError, match="worker 0"):
        put_to_sleep([Broken("worker 0", 0, {0: 0})], GPUS[:1], expected=TAKEN, free={0: 0}.get)
