"""Training, being killed at a point and going on is the same as not having been stopped, to the bit.

One process imports everything and forks a child for each run: a child that kills itself costs no import. It is a script
of this file, started by the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from spearrl.run.checkpoint import checkpoints
from spearrl.run.events import read_events

STEPS = 5
# Where a run kills itself. It saves after steps 2, 4 and 5, evaluates at 0, 2, 4 and 5, replays from step 3 on, and
# begins an epoch with steps 3 and 5 (8 tasks, 4 a step).
KILLS = {
    "before-a-save": "sync.publish:kill9@4",  # in step 3
    "in-a-save": "ckpt.mid_file:kill9@3",  # of step 4
    "before-it-has-its-name": "ckpt.before_rename:kill9@2",  # that of step 2, beside step 3
    "after-a-save": "ckpt.after_rename:kill9@3",
    "mid-replay": "learner.backward:kill9@10",  # the last of three passes of step 4
    "in-an-evaluation": "engine.generate:kill9@166",  # after step 4
    "at-an-epochs-edge": "engine.generate:kill9@170",  # the first replies of step 5
}


def content(run: Path) -> dict[str, str]:
    """sha256 of what the last checkpoint holds: weights, optimiser, buffers, curriculum, alarms, counters."""
    last = checkpoints(run / "checkpoints")[-1]
    files = [path for path in last.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(last)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def metrics(run: Path) -> dict[str, dict]:
    """What the log says last of each step and evaluation, without times."""
    events = [event for event in read_events(run)[0] if event["event"] in ("step", "eval")]
    return {
        f"{event['event']} {event['step']}": {
            key: value
            for key, value in event.items()
            if not key.startswith("time/") and "seconds" not in key and key != "time"
        }
        for event in events
    }


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    done = subprocess.run(
        [sys.executable, "-m", "tests.run.test_exact_resume", str(model), str(folder)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    (folder / "ends.json").write_text(done.stdout)
    return folder


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_run_killed_anywhere_goes_on_as_if_it_had_not_been(runs, name):
    ends = json.loads((runs / "ends.json").read_text())
    assert ends["whole"] == [0] and ends[name] == [9, 0]  # the first child was killed, the second one resumed
    assert len(content(runs / "whole")) >= 8
    assert content(runs / name) == content(runs / "whole")
    assert metrics(runs / name) == metrics(runs / "whole")
    assert len(metrics(runs / name)) == STEPS + 4


def _child(fault: str, train) -> int:
    """Run in a forked process with a fault planned; the signal or code that it ended with."""
    if pid := os.fork():
        return abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    from spearrl.faults import VARIABLE, planned

    os.environ[VARIABLE] = fault
    planned.cache_clear()
    try:
        train()
    except BaseException:  # a forked process must not go on as its parent would
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _main(model: Path, folder: Path) -> None:
    """Run the undisturbed run, and each killed one with its resumption; prints how each child ended."""
    from spearrl.trainer import Trainer
    from tests.support.short_runs import from_model

    def begin(name: str) -> None:
        settings = (f"run.steps={STEPS}", "run.checkpoint_every=2", "eval.every=2", "env.options.tasks=8")
        with Trainer(from_model(model, folder, *settings, algo="grpo+sil", name=name)) as trainer:
            trainer.train()

    def resume(name: str) -> None:
        with Trainer.resume(folder / name, overrides=["env.name=tests.support.toy_envs:Fetch"]) as trainer:
            trainer.train()

    ends = {"whole": [_child("", lambda: begin("whole"))]}
    for name, fault in KILLS.items():
        ends[name] = [_child(fault, lambda name=name: begin(name)), _child("", lambda name=name: resume(name))]
    print(json.dumps(ends))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
