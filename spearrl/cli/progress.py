"""What a run prints while it goes: one line a step, fixed columns, on stderr."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from typing import Any

from spearrl.config.tables import table

COLUMNS: list[dict[str, Any]] = table(__file__, "progress.toml")["column"]
HEADER_EVERY = 20


class Progress:
    """Prints events as they come. `report` is what Trainer and cold start call."""

    def __init__(self) -> None:
        self._lines = 0
        self._first: float | None = None
        self._first_step = 0

    def report(self, kind: str, values: dict[str, Any]) -> None:
        handler = getattr(self, f"_{kind}", None)
        if handler is not None:
            handler(values)

    def _expert(self, v: dict[str, Any]) -> None:
        _say(
            f"expert: {v['episodes']} episodes, {100 * v['success']:.1f}% succeed, {v['tokens']} tokens, {v['dropped']} too long"
        )

    def _conversations(self, v: dict[str, Any]) -> None:
        _say(f"{v['episodes']} conversations, {v['tokens']} tokens, {v['dropped']} too long")

    def _sft(self, v: dict[str, Any]) -> None:
        _say(
            f"cold start {v['update']:>4}/{v['updates']}  loss {v['loss']:.3f}  {v['tokens_per_s'] / 1000:.1f}k tok/s  {v['seconds']:.0f}s"
        )

    def _eval(self, v: dict[str, Any]) -> None:
        extra = "".join(f"  {k} {100 * x:.1f}%" for k, x in v.items() if k.startswith("success "))
        lost = f"  {v['errors']} episodes lost to faults" if v["errors"] else ""
        score = f"  task score {v['task_score']:.3f}" if "task_score" in v else ""
        _say(
            f"eval at step {v['step']}: success {100 * v['success']:.1f}% [{100 * v['low']:.1f}, {100 * v['high']:.1f}] on {v['tasks']} tasks"
            f"{score}  turns {v['turns']:.1f}{extra}{lost}  (panel {v['panel']}, {v['seconds']:.1f}s)"
        )

    def _checkpoint(self, v: dict[str, Any]) -> None:
        _say(f"saved {v['path']}")

    def _warning(self, v: dict[str, Any]) -> None:
        _say(f"  ! {v['text']}")

    def _resume(self, v: dict[str, Any]) -> None:
        _say(
            f"resumed from {v['from']}: weights, optimiser, {v['replay_stored']} stored rows, {v['baselines']} baselines, task order (derived from the seed)"
        )

    def _step(self, v: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._first_step = now - v["time/step"], v["step"] - 1
        if self._lines % HEADER_EVERY == 0:
            _say("".join(column["name"].rjust(column["width"]) for column in COLUMNS))
        self._lines += 1
        left = (now - self._first) / (v["step"] - self._first_step) * (v["steps"] - v["step"])
        learn = v.get("time/prepare", 0.0) + v.get("time/update", 0.0)
        shown = defaultdict(float, v, learn=learn, left=_duration(left))
        _say("".join(column["show"].format_map(shown).rjust(column["width"]) for column in COLUMNS))


def explain_columns() -> str:
    """The meaning of every column of the progress line."""
    return "\n".join(f"{column['name']:>8}  {column['meaning']}" for column in COLUMNS)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes >= 60 else f"{minutes}m{rest:02d}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
