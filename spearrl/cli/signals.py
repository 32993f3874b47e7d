"""How signals end training: the first one after the running step, saved; the second one at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from spearrl.cli.terminal import say

if TYPE_CHECKING:
    from spearrl.trainer import Trainer

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AT_ONCE_S = 1.5  # from the second signal until the process is ended by force


class Stop:
    """Handles SIGINT, SIGTERM and SIGHUP while it is entered.

    Before there is a trainer, the first one raises KeyboardInterrupt, so that a run that never began is removed. Later
    it asks the trainer to end after the running step, saved, or leaves an evaluation out. SIGTERM and SIGHUP, which
    schedulers send before they kill, allow that `grace_s` seconds. A second signal raises KeyboardInterrupt, and ends
    the process where that does not, whatever the main thread is doing.

    Attributes:
        received: the first signal; 0: none came.
    """

    def __init__(self, grace_s: float):
        self.grace_s, self.received = grace_s, 0
        self.trainer: Trainer | None = None
        self._before: dict[int, Any] = {}
        self._twice = False

    def __enter__(self) -> Stop:
        # Python runs handlers in the main thread, between two operations; bytes of a wake-up descriptor come at once.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        for number in NUMBERS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's stays ignored
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        if self._twice:  # the interpreter's own end takes seconds on a busy machine
            os._exit(self.exit_code)

    @property
    def exit_code(self) -> int:
        """128 + the first signal, as shells say it."""
        return 128 + self.received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ignored(number):
            return
        if self.received:
            self._twice = True
            say("stopping now; the last checkpoint stays", file=sys.stderr)
            raise KeyboardInterrupt
        self.received = number
        if self.trainer is None:
            raise KeyboardInterrupt
        self.trainer.stop_requested = True
        doing = "leaving this evaluation out" if self.trainer.evaluating else "finishing this step"
        again = f"within {self.grace_s:g} s" if number != signal.SIGINT else "press Ctrl-C again to stop now"
        say(f"{doing} and saving; {again}", file=sys.stderr)
        if number != signal.SIGINT:
            threading.Thread(target=self._after_grace, daemon=True).start()
        if self.trainer.evaluating:
            raise KeyboardInterrupt

    def _ignored(self, number: int) -> bool:
        from spearrl.processes import under_launcher

        return bool(self.received) and number == signal.SIGTERM and under_launcher()  # it comes after Ctrl-C

    def _watch(self, reader: int) -> None:
        """Ends the process some time after the second signal."""
        count = 0
        while numbers := os.read(reader, 64):
            count += sum(number in NUMBERS and not self._ignored(number) for number in numbers)
            if count > 1:
                self._end()
        os.close(reader)

    def _after_grace(self) -> None:
        time.sleep(self.grace_s)
        say(f"the step was not saved within {self.grace_s:g} s; the last checkpoint stays", file=sys.stderr)
        signal.raise_signal(signal.SIGINT)
        self._end()

    def _end(self) -> None:
        time.sleep(AT_ONCE_S)
        os._exit(self.exit_code if self.received else 128 + signal.SIGINT)
