"""kill -9 at random moments of saving: does every next start find a good checkpoint, and is anything lost in the end?

    python -m benchmarks.kill_saves [--kills 60] [--seed 0]

One run of the Fetch toy is killed again and again while a checkpoint is being written (its `.tmp-…` is there), and
resumed each time; then it is trained to its end and compared with a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import spearrl.trainer  # noqa: F401 (so that forked processes have it)
from benchmarks.machine import facts
from spearrl.cli.main import main as main_of_spearrl
from spearrl.faults import VARIABLE
from tests.support.small_run import SETTINGS

SETTINGS_HERE = ("eval.every=0", "eval.tasks=2", "run.checkpoint_every=1", "run.trajectories_every=0", "run.keep=2")
ENVIRONMENT = "env.name=tests.support.toy_envs:Fetch"  # to be said again: a run's directory may be a stranger's
LONGEST_S = 900.0


class Run:
    """`spearrl train` in a process of its own, forked from this one, which has the imports already.

    Args:
        words: arguments of the verb.
        fault: value of SPEARRL_FAULT.
    """

    def __init__(self, *words: str, fault: str = ""):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (read after the process has ended)
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for descriptor in (1, 2):
                os.dup2(self._log.fileno(), descriptor)
            os.environ[VARIABLE] = fault
            sys.stderr = os.fdopen(2, "w", buffering=1)
            try:
                code = main_of_spearrl(["train", *words])
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code (a signal's number is negative); None while it lives."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, limit_s: float = LONGEST_S) -> int:
        """The exit code; one that takes longer is killed."""
        end = time.monotonic() + limit_s
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        """kill -9."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def said(self) -> str:
        """What it has printed so far."""
        return os.pread(self._log.fileno(), 1 << 22, 0).decode(errors="replace")


def new(folder: Path, name: str, *changes: str) -> list[str]:
    """The arguments of a new run."""
    run = (f"run.output_dir={folder}", f"run.name={name}")
    return ["--preset", "tiny", "--algo", "grpo+sil", *SETTINGS, "sft.episodes=60", *SETTINGS_HERE, *run, *changes]


def state_of(run: Path, step: int) -> str:
    """A digest of weights, optimiser, buffers and counters after a step."""
    folder, digest = run / "checkpoints" / f"step-{step:06d}", hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("training/*")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def kill_while_saving(process: Run, checkpoints: Path, draw: random.Random) -> bool:
    """Kill it somewhere in one of its next saves; False where it ended before."""
    seen, wanted = set[str](), draw.randint(1, 3)
    while process.poll() is None:
        if any(checkpoints.glob("step-*")):  # before its first checkpoint there is no run to go on with
            seen |= {path.name for path in checkpoints.glob(f".tmp-*-{process.pid}")}
        if len(seen) >= wanted:
            time.sleep(draw.uniform(0, 0.03))
            process.kill()
            return process.wait() == -signal.SIGKILL
        time.sleep(0.0005)
    return False


def measure(kills: int, seed: int, folder: Path) -> dict[str, object]:
    """The counts of kills and of good loads, and whether both runs end alike."""
    draw, steps = random.Random(seed), 3 * kills + 4
    length = f"run.steps={steps}"
    undisturbed = Run(*new(folder, "undisturbed", length))
    if undisturbed.wait():
        raise SystemExit(undisturbed.said())
    process, run, killed, good, torn = Run(*new(folder, "killed", length)), folder / "killed", 0, 0, 0
    while killed < kills and kill_while_saving(process, run / "checkpoints", draw):
        killed += 1
        torn += bool(list((run / "checkpoints").glob(".tmp-*")))  # what the kill left half-written
        process = Run("--resume", str(run), ENVIRONMENT)
        while process.poll() is None and "resumed from" not in process.said():
            time.sleep(0.005)
        good += "resumed from" in process.said() or process.poll() == 0
    code = process.wait()
    alike = code == 0 and state_of(run, steps) == state_of(folder / "undisturbed", steps)
    result = {"kills": killed, "torn saves": torn, "good loads": good, "final state equal": alike, "steps": steps}
    return result if alike else {**result, "exit code": code, "said": process.said()[-2000:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.kills, args.seed, Path(folder))
    print(json.dumps({**result, "seconds": round(time.monotonic() - begun), "machine": facts()}, indent=1))
    return 0 if result["final state equal"] and result["good loads"] == result["kills"] else 1


if __name__ == "__main__":
    sys.exit(main())
