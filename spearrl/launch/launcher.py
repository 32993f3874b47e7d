"""Under torchrun or the deepspeed launcher every rank runs `spearrl train`: rank 0 trains, others serve its learner.

Ctrl-C of a terminal reaches every rank and the launcher, which then sends SIGTERM to all of them and kills what is left
after 30 seconds. So the others ignore SIGINT, and rank 0 counts the SIGTERM that follows as the same request to stop.
SIGTERM keeps its default until a rank serves: one that still waits for a trainer that failed to start ends at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

from spearrl.processes import under_launcher


def serve_rank(environ: Mapping[str, str] = os.environ) -> int | None:
    """On a rank other than 0: serve the trainer's learner until the trainer is done.

    Returns the exit code; None on rank 0 and without a launcher. Raises WorkerError where the trainer went away.
    """
    if not under_launcher(environ) or environ["RANK"] == "0":
        return None
    # Or torch tells every second that the next command has not come yet.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from spearrl.learner import serve

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return serve() or 0
