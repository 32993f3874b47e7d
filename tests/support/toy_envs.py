"""Small environments for tests: learnable in seconds, with an expert, and one that breaks on demand."""

from __future__ import annotations

import random
from collections.abc import Sequence

from spearrl.envs import Environment
from spearrl.errors import ConfigError
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task

COLORS = ("red", "blue", "green", "pink", "gold", "gray")


class Fetch(Environment):
    """Two turns: `look` shows a code word for the wanted color, then `say <word>` must repeat it. Reward 10."""

    max_turns = 4

    class Options(Environment.Options):
        tasks: int = 24
        broken: int = -1  # task index whose step() raises
        nan: int = -1  # task index whose reward is NaN

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in ("train", "val"):
            raise ConfigError(f"split {split!r} is not one of train, val", where="env", hint="use train or val")
        first = 0 if split == "train" else self.options.tasks
        return [Task(f"fetch-{i}", split, {"index": i}) for i in range(first, first + self.options.tasks)]

    def reset(self, task: Task, seed: int) -> Observation:
        self._index = int(task.data["index"])
        self._draw = random.Random(derive(seed, "fetch"))
        self._color = COLORS[self._index % len(COLORS)]
        self._looked = False
        return Observation("want: look or say", admissible=self._admissible())

    def step(self, action: Action) -> Outcome:
        played_by_policy = self.expert_noise == 0  # expert episodes stay sound, so that there is a model to begin with
        if self._index == self.options.broken and played_by_policy:
            raise RuntimeError("the shelf fell down")
        if self._index == self.options.nan and played_by_policy:
            return Outcome(Observation("?"), float("nan"), False)
        if action.text == "look" and not self._looked:
            self._looked = True
            return Outcome(Observation(f"it is {self._color}", admissible=self._admissible()), 0.0, False)
        if action.text.startswith("say "):
            success = self._looked and action.text == f"say {self._color}"
            return Outcome(
                Observation("end"), 10.0 * success, True, info={"success": success, "closeness": float(success)}
            )
        return Outcome(Observation("nothing happens", admissible=self._admissible()), 0.0, False)

    def window(
        self, history: Sequence[tuple[Observation, Action]], observation: Observation, task: Task
    ) -> list[Message]:
        past = " ".join(f"{o.text} {a.text}" for o, a in history[-2:])
        return [Message("user", f"{past} now {observation.text}")]

    def parse(self, reply: Reply) -> Action:
        text = " ".join(reply.text.split())
        valid = text == "look" or text.startswith("say ")
        return Action(text, valid=valid, tool_calls=int(valid))

    def format(self, text: str) -> str:
        return f" {text}"

    def expert(self) -> str:
        if not self._looked:
            return "look"
        wrong = self._draw.random() < self.expert_noise
        return f"say {self._draw.choice(COLORS) if wrong else self._color}"

    def _admissible(self) -> tuple[str, ...]:
        return ("look", *(f"say {color}" for color in COLORS))
