"""What a run prints on stderr: one line a step, in fixed columns, and in a long silence what is being done."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from spearrl.cli.terminal import say


class Column(NamedTuple):
    """A column of the progress line. `template` takes the step's metrics; "-" where one of them was not logged."""

    name: str
    width: int
    template: str
    meaning: str

    def text(self, metrics: Mapping[str, Any]) -> str:
        """The column's cell."""
        try:
            return self.template.format_map(metrics).rjust(self.width)
        except KeyError:
            return "-".rjust(self.width)


COLUMNS = (
    Column("step", 8, "{step}/{steps}", "step / steps"),
    Column("succ", 6, "{rollout/success:.0%}", "share of episodes that succeeded, sampled at rollout.temperature"),
    Column("reward", 7, "{rollout/reward:.2f}", "mean episode reward as the environment paid it"),
    Column("turns", 6, "{rollout/turns:.1f}", "turns per episode"),
    Column("len", 5, "{rollout/reply_tokens:.1f}", "tokens per reply"),
    Column("ent", 6, "{policy/entropy:.3f}", "entropy of the policy at the sampled tokens, nats"),
    Column("clip", 6, "{policy/clip_fraction:.1%}", "share of tokens whose probability ratio was clipped"),
    Column("grad", 6, "{policy/grad_norm:.2f}", "gradient norm before clipping"),
    Column("gamma", 6, "{gamma:.2f}", "weight of self-imitation"),
    Column("mu", 6, "{mu:.2f}", "weight of the intrinsic reward"),
    Column("buf", 6, "{replay/stored:.0f}", "units in the replay buffer"),
    Column("replay", 7, "{replay/rows:.0f}", "rows replayed in this step"),
    Column("tok/s", 7, "{time/tokens_per_s:.0f}", "sampled tokens per second of the whole step"),
    Column("roll", 8, "{time/rollout:.2f}s", "seconds of rollout"),
    Column("learn", 8, "{learn:.2f}s", "seconds of old log-probabilities, advantages and update"),
    Column("eta", 7, "{eta}", "time left"),
)
HEADER_EVERY = 20
SILENCE_S, TICK_S = 8.0, 0.5  # a silence longer than the first is broken


class SilenceBreaker(logging.Handler):
    """Breaks silences: prints what is being done, which the package's modules say as log records of level INFO.

    A record's text is made when it is printed, so that its arguments may be objects that change.
    """

    printed = 0.0  # when anything was last printed

    def __init__(self, text: str):
        super().__init__(logging.INFO)
        self._ended = threading.Event()
        self.emit(logging.LogRecord(__name__, logging.INFO, __file__, 0, text, (), None))

    def emit(self, record: logging.LogRecord) -> None:
        self._record, self._since = record, time.monotonic()

    def watch(self) -> None:
        """Print until `end`."""
        while not self._ended.wait(TICK_S):
            if time.monotonic() - SilenceBreaker.printed >= SILENCE_S:
                _say(f"{self._record.getMessage()} ({time.monotonic() - self._since:.0f} s)")

    def end(self) -> None:
        """Have `watch` return."""
        self._ended.set()


@contextmanager
def watched(text: str) -> Iterator[None]:
    """Inside, no silence is long. `text`: what is done first; printed at once."""
    doing, logger = SilenceBreaker(text), logging.getLogger("spearrl")
    thread = threading.Thread(target=doing.watch, daemon=True)
    level = logger.level
    _say(text)
    logger.addHandler(doing)
    logger.setLevel(logging.INFO)
    thread.start()
    try:
        yield
    finally:
        doing.end()
        thread.join()
        logger.removeHandler(doing)
        logger.setLevel(level)


class Progress:
    """Prints events as they come. `report` is what Trainer and cold start call."""

    def __init__(self) -> None:
        self._lines = 0
        self._began: float | None = None
        self._first_step = 0

    def report(self, kind: str, values: dict[str, Any]) -> None:
        """Print an event; one of an unknown kind is left out."""
        handler = getattr(self, f"_{kind}", None)
        if handler is not None:
            handler(values)

    def _expert(self, v: dict[str, Any]) -> None:
        success = f"{100 * v['success']:.1f}% succeed"
        _say(f"expert: {v['episodes']} episodes, {success}, {v['tokens']} tokens, {v['dropped']} too long")

    def _conversations(self, v: dict[str, Any]) -> None:
        _say(f"{v['episodes']} conversations, {v['tokens']} tokens, {v['dropped']} too long")

    def _format(self, v: dict[str, Any]) -> None:
        _say("\n".join([v["text"], *(f"  ! {note}" for note in v["notes"])]))

    def _sampling(self, v: dict[str, Any]) -> None:
        _say(v["text"])

    _packing = _sampling

    def _sync(self, v: dict[str, Any]) -> None:
        agree = f"engine and learner agree within {v['sync/probe_gap']:.2g} nats (allowed {v['sync/probe_bound']:.2g}"
        own = f"; the learner's own rounding {v['sync/probe_rounding']:.2g}" if v["sync/probe_rounding"] else ""
        _say(f"weights synced in {v['sync/seconds']:.1f}s: {agree}{own})")

    def _sft(self, v: dict[str, Any]) -> None:
        speed = f"{v['tokens_per_s']:,.0f} tok/s  {v['seconds']:.0f}s"
        _say(f"cold start {v['update']:>4}/{v['updates']}  loss {v['loss']:.3f}  {speed}")

    def _eval(self, v: dict[str, Any]) -> None:
        success = f"{100 * v['success']:.1f}% [{100 * v['low']:.1f}, {100 * v['high']:.1f}]"
        score = f"  task score {v['task_score']:.3f}" if "task_score" in v else ""
        strata = "".join(f"  {k} {100 * x:.1f}%" for k, x in v.items() if k.startswith("success "))
        lost = f"  {v['errors']} episodes lost to faults" if v["errors"] else ""
        panel = f"(panel {v['panel']}, {v['seconds']:.1f}s)"
        _say(
            f"eval at step {v['step']}: success {success} on {v['tasks']} tasks{score}  turns {v['turns']:.1f}"
            f"{strata}{lost}  {panel}"
        )

    def _checkpoint(self, v: dict[str, Any]) -> None:
        _say(f"saved {v['path']}")

    def _warning(self, v: dict[str, Any]) -> None:
        _say(f"  ! {v['text']}")

    def _resume(self, v: dict[str, Any]) -> None:
        buffers = f"{v['replay_stored']} stored rows, {v['baselines']} baselines"
        _say(
            f"resumed from {v['from']}: weights, optimiser, {buffers}, task order (derived from the seed); {v['text']}"
        )

    def _config(self, v: dict[str, Any]) -> None:
        from spearrl.run.resume import shown

        _say(f"settings changed:\n{shown(v['changed'])}")

    def _step(self, v: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._began is None:
            self._began, self._first_step = now - v["time/step"], v["step"] - 1
        if self._lines % HEADER_EVERY == 0:
            _say("".join(column.name.rjust(column.width) for column in COLUMNS))
        self._lines += 1
        eta = (now - self._began) / (v["step"] - self._first_step) * (v["steps"] - v["step"])
        learn = v.get("time/prepare", 0.0) + v.get("time/update", 0.0)
        _say("".join(column.text({**v, "learn": learn, "eta": _duration(eta)}) for column in COLUMNS))


def explain_columns() -> str:
    """The meaning of every column of the progress line."""
    return "\n".join(f"{column.name:>8}  {column.meaning}" for column in COLUMNS)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes >= 60 else f"{minutes}m{rest:02d}"


def _say(text: str) -> None:
    printed()
    say(text, file=sys.stderr)


def printed() -> None:
    """Something was printed: the silence begins anew."""
    SilenceBreaker.printed = time.monotonic()
