"""Tells what an event loop stands still in: a step of an environment, or a pass of an engine, that does not end."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BEAT_S = 0.5
FRAMES = 4  # innermost ones that are shown


@contextmanager
def loop_watched(step_s: float, reply_s: float | None, busy: Callable[[], str]) -> Iterator[None]:
    """Inside, told on standard error when the running event loop stands still for longer than it may.

    Nothing can be ended there: what runs on the loop runs in this process's main thread.

    Args:
        step_s, reply_s: seconds that a call of the environment, and a pass of the engine, may take.
        busy: the environment's call that runs now; "" where none does.
    """
    loop, thread, ended = asyncio.get_running_loop(), threading.get_ident(), threading.Event()
    turned = [time.monotonic()]

    def beat() -> None:
        turned[0] = time.monotonic()
        if not ended.is_set():
            loop.call_later(BEAT_S, beat)

    def watch() -> None:
        told = 0.0  # seconds that were told last: again when twice as many have gone by
        while not ended.wait(min(BEAT_S, step_s / 4)):
            late, what = time.monotonic() - turned[0], busy()
            limit = step_s if what else reply_s
            if late < BEAT_S * 2:
                told = 0.0
            elif limit is not None and late > max(limit, 2 * told):
                told = late
                print(_stuck(late, what, thread), file=sys.stderr, flush=True)

    beat()
    threading.Thread(target=watch, name="loop-watch", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _stuck(late_s: float, what: str, thread: int) -> str:
    """What to print: the call, where it is, what to do."""
    frame = sys._current_frames().get(thread)
    lines = "".join(traceback.format_stack(frame)[-FRAMES:]).rstrip() if frame is not None else "(no stack)"
    fix = "rollout.workers=1 plays in a process of its own, which is replaced after rollout.reply_deadline_s"
    if what:
        fix = 'set execution = "thread" or "process" in the environment\'s class: its step is then ended after '
        fix += "rollout.env_deadline_s and the episode counts as env_error"
    seen = f"{what or 'a pass of the engine'} has taken {late_s:.0f} s so far, and nothing else can be done meanwhile"
    return f"warning: {seen}:\n{lines}\n  fix: {fix}"
