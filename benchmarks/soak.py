"""Random faults on real runs of one machine, resumed after each end: make soak, or SOAK_MINUTES=1 make soak.

Two runs of the Fetch toy take turns. "exact" plays in one process and meets full disks, signals and kill -9: its final
state must equal that of a run that nobody disturbed. "workers" plays in a rollout worker with environment processes,
and with a second learner rank where DeepSpeed is installed; its workers, environments, engine, ranks and trainer are
hit: it must always go on from its newest checkpoint and reach its last step. Every choice follows from --seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from benchmarks.kill_saves import ENVIRONMENT, Run, new, state_of
from benchmarks.machine import facts
from spearrl.faults import STRUCK, VARIABLE
from spearrl.run.events import read_events

ENDS = {0: "done", 130: "SIGINT", 143: "SIGTERM", -9: "SIGKILL", 5: "storage", 6: "workers"}
WORKERS = ("env.name=tests.support.soak_envs:Fetch", "rollout.workers=1", "rollout.env_workers=1")
LIMITS = ("rollout.env_deadline_s=5", "rollout.reply_deadline_s=10", "rollout.worker_restarts=99")
START_S, LONGEST_S = 90.0, 240.0


@dataclass
class Side:
    """One of the two runs.

    Args:
        chunk: steps that are added to its length once it has reached its end.
        lost: steps that were made and had to be made again.
        broken: promises that were not kept, in words.
    """

    name: str
    folder: Path
    changes: tuple[str, ...]
    chunk: int
    steps: int = 0
    lost: int = 0
    starts: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    survived: int = 0
    broken: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """Its directory."""
        return self.folder / self.name

    def arguments(self) -> list[str]:
        """Of the next process."""
        if any((self.run / "checkpoints").glob("step-*")):
            environment = next((word for word in self.changes if word.startswith("env.name=")), ENVIRONMENT)
            return ["--resume", str(self.run), environment, f"run.steps={self.steps}"]
        shutil.rmtree(self.run, ignore_errors=True)  # killed before its first checkpoint
        return new(self.folder, self.name, *self.changes, f"run.steps={self.steps}", "run.checkpoint_every=2")

    def saved(self) -> int:
        """The newest step whose checkpoint was said to be complete; -1: none was."""
        return newest(self.run, "checkpoint", -1)


def newest(run: Path, kind: str, none: int) -> int:
    """The last step that an event of a kind is of."""
    return max((event["step"] for event in read_events(run)[0] if event["event"] == kind), default=none)


def planned(side: Side, draw: random.Random, worker: bool) -> tuple[str, str]:
    """(value of SPEARRL_FAULT, signal to be sent: its name or "")."""
    if side.name == "exact":
        points = ["log.write:enospc", "ckpt.mid_file:enospc", "ckpt.before_rename:enospc"]
        kills = ["ckpt.mid_file", "ckpt.before_rename", "ckpt.after_rename", "learner.backward", "env.step"]
        chosen = [f"{draw.choice(points)}@{draw.randint(2, 12)}" for _ in range(draw.randint(2, 5))]
        if draw.random() < 0.6:
            return ",".join([*chosen, f"{draw.choice(kills)}:kill9@{draw.randint(8, 40)}"]), ""
        return ",".join(chosen), draw.choice(["SIGINT", "SIGTERM", "SIGKILL"])
    points = ["env.step:raise", "env.reset:raise", "engine.generate:raise", "env.step:kill9", "learner.backward:nan"]
    points += ["env.step:hang"] * (draw.random() < 0.2) + ["rank.step:kill9"] * (worker and draw.random() < 0.3)
    chosen = [f"{draw.choice(points)}@{draw.randint(5, 60)}" for _ in range(draw.randint(3, 8))]
    return ",".join(chosen), draw.choice(["SIGKILL", "worker", "SIGTERM", "worker"])


def disturb(side: Side, draw: random.Random, ranks: bool) -> None:
    """One process of a run: started, hit, and looked at when it has ended."""
    fault, sent = planned(side, draw, ranks)
    before, first, grown = side.saved() if side.run.exists() else -1, not side.starts, logs(side.run)
    process, begun, wait_s = Run(*side.arguments(), fault=fault), time.monotonic(), draw.uniform(0.5, 8.0)
    side.starts += 1
    while process.poll() is None and time.monotonic() - begun < START_S and "step    succ" not in process.said():
        time.sleep(0.05)
    end = time.monotonic() + wait_s
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    if sent and process.poll() is None:
        side.injected[sent] += strike_from_outside(process.pid, sent)
        if sent == "worker":
            sent = ""
    while process.poll() is None and time.monotonic() - begun < LONGEST_S:
        time.sleep(0.05)
    if process.poll() is None:
        side.broken.append(f"hung after {fault} and {sent}: {process.said()[-400:]}")
        process.kill()
    code, said = process.wait(), process.said()
    text = said + logs(side.run)[len(grown) :]
    struck = re.findall(rf"{re.escape(STRUCK)} (\S+)", text)
    side.injected.update(struck)
    if code not in ENDS:
        side.broken.append(f"exit code {code} after {fault} {sent}: {said[-600:]}")
    resumed = re.search(r"resumed from \S*step-(\d+)", said)
    if not first and before >= 0:
        if resumed is None and "Nothing left" not in said and "nothing left" not in said:
            side.broken.append(f"not resumed after step {before}: {said[-400:]}")
        elif resumed is not None and int(resumed[1]) < before:
            side.broken.append(f"resumed from {int(resumed[1])}; step {before} was said to be saved")
    if side.run.exists():
        reached = newest(side.run, "step", 0)
        side.lost += max(0, reached - max(0, side.saved())) if code else 0


def strike_from_outside(pid: int, sent: str) -> int:
    """Send a signal to the trainer, or kill its rollout worker; how many were hit."""
    if sent != "worker":
        os.kill(pid, signal.Signals[sent])
        return 1
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text().rpartition(")")[2].split()[1])
            if parent == pid and "worker_process" in (file.parent / "cmdline").read_text():
                os.kill(int(file.parent.name), signal.SIGKILL)
                return 1
        except (OSError, ValueError):
            continue
    return 0


def logs(run: Path) -> str:
    """What rollout workers said."""
    return "".join(path.read_text(errors="replace") for path in sorted(run.glob("worker-*.log")))


def finish(side: Side) -> bool:
    """Train to the last step without faults; whether it gets there."""
    process = Run(*side.arguments())
    code, said = process.wait(), process.said()
    if code:
        side.broken.append(f"the last process ended with {code}: {said[-600:]}")
    return code == 0


def soak(minutes: float, seed: int, folder: Path) -> dict[str, object]:
    """Faults for so long; the counts."""
    draw, ranks = random.Random(seed), find_spec("deepspeed") is not None
    exact = Side("exact", folder, ("eval.every=0",), chunk=40)
    deepspeed = ("learner.backend=deepspeed", "learner.processes=2", "learner.zero_stage=2") if ranks else ()
    hit = Side("workers", folder, (*WORKERS, *LIMITS, *deepspeed), chunk=40)
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        for side in (exact, hit):
            reached = side.saved() if side.run.exists() else 0
            if reached >= side.steps - 4:
                side.steps += side.chunk
            disturb(side, draw, ranks and side is hit)
    finished = [finish(side) for side in (exact, hit)]
    undisturbed = Run(*new(folder, "undisturbed", *exact.changes, f"run.steps={exact.steps}"))
    code, said = undisturbed.wait(), undisturbed.said()
    equal = (
        code == 0 and finished[0] and state_of(exact.run, exact.steps) == state_of(folder / "undisturbed", exact.steps)
    )
    if not equal:
        exact.broken.append(f"the final state differs from an undisturbed run's ({said[-300:]})")
    sides = (exact, hit)
    return {
        "minutes": minutes,
        "seed": seed,
        "faults": sum(sum(side.injected.values()) for side in sides),
        "by kind": {side.name: dict(sorted(side.injected.items())) for side in sides},
        "starts": {side.name: side.starts for side in sides},
        "steps trained": {side.name: side.steps for side in sides},
        "steps made twice": {side.name: side.lost for side in sides},
        "final state of exact equal": equal,
        "learner ranks": ranks,
        "promises broken": [text for side in sides for text in side.broken],
        "machine": facts(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("SOAK_MINUTES", "20")))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.pop(VARIABLE, None)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(args.minutes, args.seed, Path(folder))
    print(json.dumps(result, indent=1))
    return 1 if result["promises broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
