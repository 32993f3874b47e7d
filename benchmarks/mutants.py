"""Mutation run of self-imitation: bugs that replay in language-model trainers really had, or nearly, one at a time.

    python -m benchmarks.mutants [--only WORD …] [--jobs 2]

The tests must notice each. Works on copies in a temporary folder. Prints each bug with the test that noticed it; exits
with 1 if one survived. docs/mutants.md has a run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/trainer/test_spear.py",)
COPIED = ("spearrl", "tests", "setup.cfg", "pyproject.toml")
LIMIT = 300  # seconds for one mutant


class Mutant(NamedTuple):
    """`old` must occur once in the file."""

    kind: str
    file: str
    old: str
    new: str
    meaning: str


BUILD, REPLAY, BASELINE, TRAINER = "batching/build_rows.py", "buffers/replay.py", "buffers/baseline.py", "trainer.py"
REWARDS, CREDIT, MEMORY = "algorithm/rewards.py", "algorithm/credit.py", "algorithm/memory.py"

# What the code says → the bugs that are tried there, by what they mean. Each text occurs once in its file.
TABLE: dict[tuple[str, str, str], dict[str, str]] = {
    ("mask", BUILD, "action_mask=turn_index >= 0"): {
        "observations of later turns count as actions": (
            "action_mask=torch.tensor([(p.known > 0, True) for p in turns]).flatten()"
            ".repeat_interleave(counts.flatten())"
        ),
        "mask one place late": "action_mask=(turn_index >= 0) & (turn_index.roll(1) >= 0)",
        "the reply's last token does not train": "action_mask=(turn_index >= 0) & (turn_index.roll(-1) == turn_index)",
    },
    ("mask", REWARDS, "rows.mask_turns(~flagged)"): {
        "filtered turns train": "rows.mask_turns(flagged | ~flagged)",
        "only filtered turns train": "rows.mask_turns(flagged)",
    },
    ("mask", REPLAY, "part, turns, old_logprobs = rows.select(drawn)"): {
        "the filters' mask is lost in the buffer": (
            "part, turns, old_logprobs = rows.with_action_mask(rows.turn_index >= 0).select(drawn)"
        ),
    },
    ("mask", "batching/forward_inputs.py", "index[starts[row] + position - 1]"): {
        "predictions taken one place early": "index[starts[row] + (position - 2).clamp(min=0)]",
    },
    ("group ids", MEMORY, "admitted = torch.isin("): {
        "only the first group's rows are buffered": "admitted = (rows.group == rows.group[0]) & torch.isin(",
        "only the last group's rows are buffered": "admitted = (rows.group == rows.group[-1]) & torch.isin(",
    },
    ("group ids", BUILD, '"group_ids": [played.trajectory.group'): {
        "the whole step is one group": '"group_ids": [0',
        "groups across tasks: ids of siblings": '"group_ids": [played.trajectory.sibling',
    },
    ("group ids", CREDIT, "grpo_advantages(rewards, turns.group_ids, norm"): {
        "groups by position": "grpo_advantages(rewards, torch.arange(len(rewards)) // 8, norm",
    },
    ("group ids", REWARDS, 'if algo.groups.blocks == "consecutive"'): {
        "baselines by position, wrong where a group lost a sibling": "if True",
    },
    ("group ids", "rollout/tasks_of_step.py", "first_group_id=self.groups_played"): {
        "ids begin again every step, so the buffer joins strangers": "first_group_id=0",
    },
    ("group ids", MEMORY, "in torch.unique(group_of_trajectory)]"): {
        "only the first group has a baseline": "in torch.unique(group_of_trajectory)[:1]]",
    },
    ("group ids", "batching/rows.py", "getattr(self, name)[index] for name in ROWS"): {
        "selected rows keep others' labels": "getattr(self, name)[: len(index)] for name in ROWS",
    },
    ("old_logprobs", TRAINER, 'derive(config.run.seed, "update", step)\n'): {
        "computed anew at replay: ratio 1": (
            'derive(config.run.seed, "update", step)\n'
            "        if replay is not None:\n"
            "            replay.old_logprobs = self.parts.learner.logprobs(replay.rows)\n"
        ),
    },
    ("old_logprobs", TRAINER, "credit, result.old_logprobs)"): {
        "the engine's are stored in their place": "credit, on_policy.rollout_logprobs)",
        "stored after the update": "credit, self.parts.learner.logprobs(shaped.rows))",
    },
    ("old_logprobs", TRAINER, "old = learner.logprobs(rows) if algo.kl.reward_coef else None"): {
        "the engine's are used for the policy too": "old = rows.pad(rows.rollout_logprobs)",
    },
    ("old_logprobs", REPLAY, "logprobs[drawn]"): {
        "drawn rows get the log-probabilities of the first ones": "logprobs[: int(drawn.sum())]",
    },
    ("old_logprobs", "learner/policy.py", "temperature=self.temperature, chunk"): {
        "computed without the sampling temperature": "temperature=1.0, chunk",
    },
    ("old_logprobs", "losses/surrogates.py", "torch.where(mask, logprobs - old_logprobs, 0.0)"): {
        "the ratio leaves them out": "torch.where(mask, logprobs - logprobs.detach(), 0.0)",
    },
    ("filter", REPLAY, "good = self._unit_means(rows, unit, advantages.double()) > 0"): {
        "advantages of 0 are stored": "good = self._unit_means(rows, unit, advantages.double()) > 0 - 1e-9",
        "positive rewards are stored, not positive advantages": (
            "good = self._unit_means(rows, unit, rewards.double()) > 0"
        ),
        "everything is stored": "good = self._unit_means(rows, unit, advantages.double()) > -1e9",
    },
    ("filter", REPLAY, "trained = rows.trained_turns()"): {
        "filtered turns count in a trajectory's mean": "trained = rows.trained_turns() | True",
    },
    ("filter", REPLAY, "if self.keep_zero else means > 0"): {
        "no second test after recalibration": "if self.keep_zero else means == means",
        "ties with the baseline are replayed": "if self.keep_zero else means >= 0",
    },
    ("filter", REPLAY, "(rewards > level)"): {
        "ties with the baseline count towards a flush": "(rewards >= level)",
    },
    ("filter", REPLAY, "if step - entry.step <= self.max_age]"): {
        "trajectories leave a step early": "if step - entry.step < self.max_age]",
        "trajectories never grow too old": "]",
    },
    ("filter", REPLAY, "self._entries = self._usable(step), []"): {
        "a flush does not empty the buffer": "self._entries = self._usable(step), self._entries",
    },
    ("filter", REPLAY, "else count, self.capacity)"): {
        "no capacity": "else count, count)",
    },
    ("filter", REPLAY, "> self.fill_factor * self.capacity"): {
        "fill factor left out": "> self.capacity",
        "a flush when just full, not overfull": ">= self.fill_factor * self.capacity",
    },
    ("filter", "buffers/admission.py", " and trajectory.faults == 0"): {
        "trajectories with a fault are imitated": "",
    },
    ("filter", TRAINER, "        replay, seed = self.memory.due(step)"): {
        "replayed in their own step": (
            "        self.memory.remember(step, sound, shaped, credit, self.parts.learner.logprobs(shaped.rows))\n"
            "        replay, seed = self.memory.due(step)"
        ),
    },
    ("gamma", "learner/loss_inputs.py", "(gamma if objective.on_replay else 1.0)"): {
        "squared": "(gamma * gamma if objective.on_replay else 1.0)",
        "left out": "(1.0 if gamma else 0.0)",
        "on the policy's loss as well": "gamma",
        "on the policy's loss instead": "(1.0 if objective.on_replay else gamma)",
    },
    ("gamma", TRAINER, "self.curriculum.gamma(step)"): {
        "of the next step": "self.curriculum.gamma(step + 1)",
        "of the step before": "self.curriculum.gamma(step - 1)",
    },
    ("gamma", "algorithm/curriculum.py", "steps, rising=True)"): {
        "falls instead of rising": "steps, rising=False)",
    },
    ("gamma", "algorithm/curriculum.py", 'self._schedules["gamma"].peak * self'): {
        "peak left out": "self",
    },
    ("gamma", "learner/minibatches.py", "    if not joint:"): {
        "joint: a step of its own all the same": "    if True:",
    },
    ("gamma", "learner/minibatches.py", "return steps + [[share] for share in replayed]"): {
        "replay before the policy's steps": "return [[share] for share in replayed] + steps",
    },
    ("recalibration", REPLAY, "return recalibrated_advantages(entry.rewards, level) / self.reward_scale"): {
        "skipped: old advantages are replayed": "return entry.advantages",
        "no baseline: raw rewards are replayed": "return entry.rewards / self.reward_scale",
        "not divided by the reward scale": "return recalibrated_advantages(entry.rewards, level)",
    },
    ("recalibration", BASELINE, "return value_at(ordered, (len(ordered) - 1) * q / 100) if"): {
        "mean instead of median": "return float(ordered.mean()) if",
    },
    ("recalibration", BASELINE, "*values]).sort().values"): {
        "the middle one in time, not in size": "*values])",
    },
    ("recalibration", BASELINE, "else entry.stds for entry in self._entries]"): {
        "median of the last step alone": "else entry.stds for entry in self._entries[-1:]]",
    },
    ("recalibration", TRAINER, "        replay, seed = self.memory.due(step)"): {
        "this step's baselines go in before the flush": (
            "        self.memory.baseline.add(step, *algorithm.memory.baselines(shaped))\n"
            "        replay, seed = self.memory.due(step)"
        ),
    },
    ("recalibration", MEMORY, "rewards, advantages = shaped.rewards[turns]"): {
        "a turn's own reward is stored, not the episode's": "rewards, advantages = rows.turns.rewards[turns]",
        "rewards are stored without the bonus, baselines with it": (
            "rewards, advantages = (shaped.rewards - shaped.bonuses)[turns]"
        ),
    },
    ("recalibration", MEMORY, "shaped.rewards.double()"): {
        "baselines without the bonus": "(shaped.rewards - shaped.bonuses).double()",
    },
    ("recalibration", MEMORY, "trajectory, len(trajectories))"): {
        "baselines weigh long episodes more": "trajectory, len(trajectories)) * torch.bincount(trajectory)",
    },
    ("recalibration", MEMORY, "if self.settings.keep_step_part and"): {
        "GiGPO's step part is lost": "if False and",
        "GiGPO's step part is kept where it is not wanted": "if",
    },
    ("recalibration", "losses/objective.py", 'batch.advantages.clamp(min=0) if self.kind == "sil" else'): {
        "turns worse than the baseline are pushed away": "",
    },
}

MUTANTS = tuple(
    Mutant(kind, file, old, new, meaning) for (kind, file, old), bugs in TABLE.items() for meaning, new in bugs.items()
)


def occurrences(mutant: Mutant, root: Path = ROOT) -> int:
    """How often a mutant's text is in its file."""
    return (root / "spearrl" / mutant.file).read_text().count(mutant.old)


def try_out(mutant: Mutant | None, origin: Path, model: Path) -> tuple[int, str]:
    """(pytest's exit code, the first test that failed) with a mutant put in; None: the code as it is.

    For a process of its own, made by `fork`.
    """
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "output", "w+") as output:
        copy = Path(folder) / "copy"
        _copy(origin, copy)
        _work_in(copy)
        if mutant is not None:
            path = copy / "spearrl" / mutant.file
            path.write_text(path.read_text().replace(mutant.old, mutant.new))
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LIMIT)
        code, failed = _pytest(copy, model)
        return (code, failed) if code in (0, 1) else (code, Path(output.name).read_text()[-2000:])


def _too_long(*_: object) -> None:
    raise TimeoutError(f"no end within {LIMIT} s")


def _copy(origin: Path, folder: Path) -> None:
    folder.mkdir()
    for name in COPIED:
        if (origin / name).is_dir():
            shutil.copytree(origin / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin / name, folder / name)


def _work_in(folder: Path) -> None:
    """Python imports from this folder, not from the project, in this process."""
    os.chdir(folder)
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]


def _pytest(copy: Path, model: Path) -> tuple[int, str]:
    import pytest

    import spearrl
    import tests.support.short_runs

    if not Path(spearrl.__file__).is_relative_to(copy):
        return 3, f"spearrl was imported from {spearrl.__file__}, not from the copy"
    tests.support.short_runs.cold_started = lambda folder: model
    failed: list[str] = []

    class Watch:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                failed.append(report.nodeid.partition("::")[2])

    options = ["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={copy}", f"--basetemp={copy.parent / 'tmp'}"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of packages that are imported before pytest
    code = int(pytest.main([*options, *TESTS], plugins=[Watch()]))
    return code, failed[0] if failed else ""


def _cold_start(origin: Path) -> Path:
    """The model that every run begins with, made by the code as it is."""
    _work_in(origin)
    import tests.support.short_runs

    return tests.support.short_runs.cold_started(origin / "cold-start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[], help="mutants whose kind, file or meaning holds one of these words"
    )
    parser.add_argument("--jobs", type=int, default=2, help="copies tested at a time")
    args = parser.parse_args()
    mutants = [
        m for m in MUTANTS if not args.only or any(word in f"{m.kind} {m.file} {m.meaning}" for word in args.only)
    ]
    if not mutants:
        raise SystemExit("no such mutant")
    with tempfile.TemporaryDirectory() as folder:
        origin = Path(folder) / "origin"  # the code of now, whatever is edited while this runs
        _copy(ROOT, origin)
        misfits = [m for m in mutants if occurrences(m, origin) != 1]
        for mutant in misfits:
            print(f"{mutant.file}: {occurrences(mutant, origin)} times, should be once: {mutant.old}", file=sys.stderr)
        if misfits:
            raise SystemExit("the table does not fit the code")
        survived = _run(mutants, args.jobs, origin)
    raise SystemExit(1 if survived else 0)


def _run(mutants: Sequence[Mutant], jobs: int, origin: Path) -> int:
    """Print the table; how many survived."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    for name in ("torch", "transformers", "pytest"):  # imported once; nothing of spearrl may be
        importlib.import_module(name)
    start = time.monotonic()
    # A process a job: what a mutant did to a process must not meet the next one.
    with get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        model = pool.apply(_cold_start, (origin,))
        code, failed = pool.apply(try_out, (None, origin, model))
        if code:
            raise SystemExit(f"the tests fail without any mutant: {failed}")
        seconds = time.monotonic() - start
        print(f"{len(mutants)} mutants; without one, {', '.join(TESTS)} pass ({seconds:.0f} s)\n", flush=True)
        print("| class | bug | file | noticed by |\n|---|---|---|---|")
        survived, results = 0, [pool.apply_async(try_out, (mutant, origin, model)) for mutant in mutants]
        for mutant, result in zip(mutants, results, strict=True):
            code, failed = result.get(timeout=3 * LIMIT)
            if code not in (0, 1):
                raise SystemExit(f"pytest could not run ({code}) with: {mutant.meaning}\n{failed}")
            survived += code == 0
            noticed = f"`{failed}`" if code else "**nobody: survived**"
            print(f"| {mutant.kind} | {mutant.meaning} | {mutant.file} | {noticed} |", flush=True)
    print(f"\n{len(mutants) - survived} of {len(mutants)} killed in {time.monotonic() - start:.0f} s")
    return survived


if __name__ == "__main__":
    main()
