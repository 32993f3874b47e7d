"""Saving while training goes on: a thread brings a checkpoint to the disk, and one that fails is tried again later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spearrl.errors import StorageError, system_name
from spearrl.run.checkpoint import seal, step_of, written

TRIES = 3  # failed checkpoints in a row that end a run


class Saver:
    """Writes a run's checkpoints, at most one at a time.

    Writing the files, which needs the weights as they are, is done at once; checksums, waiting for the disk, the final
    name and pruning are a thread's, while training goes on.

    Args:
        about: JSON values for every manifest.
        report: called with ("checkpoint", {"path": …, "step": …}) for one that is complete and ("warning", …) for one
            that failed, by the caller's thread.
        step: of the newest checkpoint; afterwards of the one under way.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        about: Mapping[str, Any],
        report: Callable[[str, dict[str, Any]], None],
        step: int | None = None,
    ):
        self.folder, self.keep, self.about, self._report = folder, keep, about, report
        self.scores: dict[int, float] = {}  # by step, success on the panel: the best checkpoint is not pruned
        self._panel: Any = None
        self.step = step
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._sealing: Future[Path] | None = None
        self._next_try: int | None = None
        self._failures = 0

    def save(self, step: int, write: Callable[[Path], None], *, next_try: int | None = None) -> None:
        """Begin a checkpoint; where one is under way, wait for it first.

        Args:
            next_try: the step that the next one is due at, if this one may fail. None: it is waited for and must not.
        Raises:
            StorageError: it must not fail, or is the third in a row.
        """
        self.settle()
        self._next_try = next_try
        try:
            temporary = written(self.folder, step, write)
        except StorageError as error:
            self._failed(error)
            return
        self.step = step
        self._sealing = self._pool.submit(seal, temporary, keep=self.keep, scores=dict(self.scores), about=self.about)
        if next_try is None:
            self.settle()

    def settle(self, *, wait: bool = True) -> None:
        """Say how the checkpoint under way ended; `wait`: for its end, too. Raises StorageError as `save`."""
        if self._sealing is None or not (wait or self._sealing.done()):
            return
        sealing, self._sealing = self._sealing, None
        try:
            path = sealing.result()
        except StorageError as error:
            self.step = None
            self._failed(error)
            return
        self._failures = 0
        self._report("checkpoint", {"path": str(path), "step": step_of(path)})

    def score(self, evaluations: Sequence[Mapping[str, Any]]) -> set[int]:
        """Take results of panels, as the event log has them; returns their steps.

        Those of another panel than the latest cannot be compared and count no longer.
        """
        for event in evaluations:
            success, panel = event.get("success"), event.get("panel")
            if isinstance(success, int | float):
                if panel != self._panel:
                    self.scores.clear()
                self._panel = panel
                self.scores[event["step"]] = float(success)
        return {event["step"] for event in evaluations}

    def close(self) -> None:
        """Wait for the checkpoint under way."""
        try:
            self.settle()
        except StorageError as error:
            self._report("warning", {"text": error.message})
        self._pool.shutdown()

    def _failed(self, error: StorageError) -> None:
        self._failures += 1
        if self._next_try is None:
            raise error
        if self._failures == TRIES:
            text = f"{TRIES} checkpoints in a row failed, the last one: {error.message}"
            raise StorageError(text, where=error.where, hint=error.hint) from error
        why = system_name(error.__cause__) or str(error.__cause__)
        text = f"checkpoint failed ({why}), next try at step {self._next_try}"
        self._report("warning", {"text": text})
