"""Mutation run of self-imitation: bugs that replay in language-model trainers really had, or nearly, put in one at a time; the tests must notice each.

    python -m benchmarks.mutants [--only WORD …] [--jobs 2]

Works on copies in a temporary folder. Prints each bug with the test that noticed it; exits with 1 if one survived. docs/mutants.md has a run.
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


BUILD, SHAPE, CREDIT, MEMORY = "batching/build.py", "algorithm/rewards.py", "algorithm/credit.py", "algorithm/memory.py"
REPLAY, BASELINE, ADMISSION = "buffers/replay.py", "buffers/baseline.py", "buffers/admission.py"
TRAINER, PLAN, MINIBATCH = "trainer.py", "learner/partition.py", "learner/minibatch.py"
FILL, CHOSEN = '_fill(tokens["action_mask"], ((0, shown), (1, sampled)))', "chosen = torch.isin(rows.trajectory,"
DRAWN, DUE = "rows.select(drawn), rows.turns_of(drawn), logprobs[drawn]", "replay = self.memory.due(step) if gamma > 0 else None"
FACTOR = "(gamma if objective.on_replay else 1.0)"
RETEST, USABLE = "if self.keep_zero else means > 0", "if step - entry.step <= self.max_age]"
GOOD = "good = self._unit_means(rows, unit, advantages.double()) > 0"
RECALIBRATED = "return recalibrated_advantages(entry.rewards, level) / self.reward_scale"

MUTANTS = (
    Mutant(
        "mask",
        BUILD,
        FILL,
        FILL.replace("(0, shown)", "(int(known > 0), shown)"),
        "observations of later turns count as actions",
    ),
    Mutant(
        "mask",
        BUILD,
        FILL,
        FILL.replace("(0, shown), (1, sampled)", "(0, shown + 1), (1, sampled - 1)"),
        "mask one place late",
    ),
    Mutant(
        "mask",
        BUILD,
        FILL,
        FILL.replace("(0, shown), (1, sampled)", "(0, shown), (1, sampled - 1), (0, 1)"),
        "the reply's last token does not train",
    ),
    Mutant("mask", SHAPE, "rows.mask_turns(~flagged)", "rows.mask_turns(flagged | ~flagged)", "filtered turns train"),
    Mutant("mask", SHAPE, "rows.mask_turns(~flagged)", "rows.mask_turns(flagged)", "only filtered turns train"),
    Mutant(
        "mask",
        REPLAY,
        DRAWN,
        DRAWN.replace("rows.select", "rows.with_action_mask(rows.turn_index >= 0).select"),
        "the filters' mask is lost in the buffer",
    ),
    Mutant(
        "mask",
        "batching/forward_inputs.py",
        "row * length + position - 1",
        "row * length + (position - 2).clamp(min=0)",
        "predictions taken one place early",
    ),
    Mutant(
        "group ids",
        MEMORY,
        CHOSEN,
        CHOSEN.replace("= ", "= (rows.group == rows.group[0]) & "),
        "only the first group's rows are buffered",
    ),
    Mutant(
        "group ids",
        MEMORY,
        CHOSEN,
        CHOSEN.replace("= ", "= (rows.group == rows.group[-1]) & "),
        "only the last group's rows are buffered",
    ),
    Mutant("group ids", BUILD, '"group_ids": trajectory.group', '"group_ids": 0', "the whole step is one group"),
    Mutant(
        "group ids",
        BUILD,
        '"group_ids": trajectory.group',
        '"group_ids": trajectory.sibling',
        "groups across tasks: ids of siblings",
    ),
    Mutant(
        "group ids",
        CREDIT,
        "grpo_advantages(rewards, turns.group_ids, norm",
        "grpo_advantages(rewards, torch.arange(len(rewards)) // 8, norm",
        "groups by position",
    ),
    Mutant(
        "group ids",
        SHAPE,
        'if algo.groups.blocks == "consecutive" else',
        "if True else",
        "baselines by position, wrong where a group lost a sibling",
    ),
    Mutant(
        "group ids",
        "rollout/episodes.py",
        "first_group_id=self.groups_played",
        "first_group_id=0",
        "ids begin again every step, so the buffer joins strangers",
    ),
    Mutant(
        "group ids",
        MEMORY,
        "for group in torch.unique(group_of):",
        "for group in torch.unique(group_of)[:1]:",
        "only the first group has a baseline",
    ),
    Mutant(
        "group ids",
        "batching/rows.py",
        "getattr(self, name)[index] for name in ROWS",
        "getattr(self, name)[: len(index)] for name in ROWS",
        "selected rows keep others' labels",
    ),
    Mutant(
        "old_logprobs",
        TRAINER,
        DUE,
        DUE + "\n        if replay is not None:\n            replay.old_logprobs = learner.logprobs(replay.rows)",
        "computed anew at replay: ratio 1",
    ),
    Mutant(
        "old_logprobs",
        TRAINER,
        "credit, on_policy.old_logprobs)",
        "credit, on_policy.rollout_logprobs)",
        "the engine's are stored in their place",
    ),
    Mutant(
        "old_logprobs",
        TRAINER,
        "credit, on_policy.old_logprobs)",
        "credit, learner.logprobs(shaped.rows))",
        "stored after the update",
    ),
    Mutant(
        "old_logprobs",
        TRAINER,
        "old_logprobs = learner.logprobs(rows)",
        "old_logprobs = rows.pad(rows.rollout_logprobs)",
        "the engine's are used for the policy too",
    ),
    Mutant(
        "old_logprobs",
        REPLAY,
        DRAWN,
        DRAWN.replace("[drawn]", "[: int(drawn.sum())]"),
        "drawn rows get the log-probabilities of the first ones",
    ),
    Mutant(
        "old_logprobs",
        "learner/policy.py",
        "temperature=self.temperature, chunk",
        "temperature=1.0, chunk",
        "computed without the sampling temperature",
    ),
    Mutant(
        "old_logprobs",
        "losses/surrogates.py",
        "torch.where(mask, logprobs - old_logprobs, 0.0)",
        "torch.where(mask, logprobs - logprobs.detach(), 0.0)",
        "the ratio leaves them out",
    ),
    Mutant("filter", REPLAY, GOOD, GOOD + " - 1e-9", "advantages of 0 are stored"),
    Mutant(
        "filter",
        REPLAY,
        GOOD,
        GOOD.replace("advantages", "rewards"),
        "positive rewards are stored, not positive advantages",
    ),
    Mutant("filter", REPLAY, GOOD, GOOD.replace("> 0", "> -1e9"), "everything is stored"),
    Mutant(
        "filter",
        REPLAY,
        "trained = rows.trained_turns()",
        "trained = rows.trained_turns() | True",
        "filtered turns count in a trajectory's mean",
    ),
    Mutant(
        "filter", REPLAY, RETEST, RETEST.replace("means > 0", "means == means"), "no second test after recalibration"
    ),
    Mutant("filter", REPLAY, RETEST, RETEST.replace(">", ">="), "ties with the baseline are replayed"),
    Mutant(
        "filter",
        REPLAY,
        "int((rewards > level).sum())",
        "int((rewards >= level).sum())",
        "ties with the baseline count towards a flush",
    ),
    Mutant("filter", REPLAY, USABLE, USABLE.replace("<=", "<"), "trajectories leave a step early"),
    Mutant("filter", REPLAY, USABLE, "]", "trajectories never grow too old"),
    Mutant(
        "filter",
        REPLAY,
        "self._entries = self._usable(step), []",
        "self._entries = self._usable(step), self._entries",
        "a flush does not empty the buffer",
    ),
    Mutant("filter", REPLAY, "else count, self.capacity)", "else count, count)", "no capacity"),
    Mutant("filter", REPLAY, "> self.fill_factor * self.capacity", "> self.capacity", "fill factor left out"),
    Mutant(
        "filter",
        REPLAY,
        "> self.fill_factor * self.capacity",
        ">= self.fill_factor * self.capacity",
        "a flush when just full, not overfull",
    ),
    Mutant("filter", ADMISSION, " and trajectory.faults == 0", "", "trajectories with a fault are imitated"),
    Mutant(
        "filter",
        TRAINER,
        DUE,
        "self.memory.remember(step, kept, shaped, credit, on_policy.old_logprobs)\n        " + DUE,
        "replayed in their own step",
    ),
    Mutant("gamma", MINIBATCH, FACTOR, "(gamma * gamma if objective.on_replay else 1.0)", "squared"),
    Mutant("gamma", MINIBATCH, FACTOR, "(1.0 if gamma else 0.0)", "left out"),
    Mutant("gamma", MINIBATCH, FACTOR, "gamma", "on the policy's loss as well"),
    Mutant("gamma", MINIBATCH, FACTOR, "(1.0 if objective.on_replay else gamma)", "on the policy's loss instead"),
    Mutant("gamma", TRAINER, "self.curriculum.gamma(step)", "self.curriculum.gamma(step + 1)", "of the next step"),
    Mutant("gamma", TRAINER, "self.curriculum.gamma(step)", "self.curriculum.gamma(step - 1)", "of the step before"),
    Mutant(
        "gamma", "algorithm/curriculum.py", "steps, rising=True)", "steps, rising=False)", "falls instead of rising"
    ),
    Mutant("gamma", "algorithm/curriculum.py", 'self._schedules["gamma"].peak * self', "self", "peak left out"),
    Mutant("gamma", PLAN, "    if not joint:", "    if True:", "joint: a step of its own all the same"),
    Mutant(
        "gamma",
        PLAN,
        "return steps + [[share] for share in replayed]",
        "return [[share] for share in replayed] + steps",
        "replay before the policy's steps",
    ),
    Mutant("recalibration", REPLAY, RECALIBRATED, "return entry.advantages", "skipped: old advantages are replayed"),
    Mutant(
        "recalibration",
        REPLAY,
        RECALIBRATED,
        "return entry.rewards / self.reward_scale",
        "no baseline: raw rewards are replayed",
    ),
    Mutant(
        "recalibration",
        REPLAY,
        RECALIBRATED,
        RECALIBRATED.replace(" / self.reward_scale", ""),
        "not divided by the reward scale",
    ),
    Mutant(
        "recalibration",
        BASELINE,
        "return value_at(ordered, (len(ordered) - 1) * q / 100) if",
        "return float(ordered.mean()) if",
        "mean instead of median",
    ),
    Mutant(
        "recalibration",
        BASELINE,
        "*values]).sort().values",
        "*values])",
        "the middle one in time, not in size",
    ),
    Mutant(
        "recalibration",
        BASELINE,
        "else entry.stds for entry in self._entries]",
        "else entry.stds for entry in self._entries[-1:]]",
        "median of the last step alone",
    ),
    Mutant(
        "recalibration",
        TRAINER,
        DUE,
        "self.memory.baseline.add(step, *algorithm.memory.baselines(shaped))\n        " + DUE,
        "this step's baselines go in before the flush",
    ),
    Mutant(
        "recalibration",
        MEMORY,
        "shaped.rewards[turns], credit",
        "rows.turns.rewards[turns], credit",
        "a turn's own reward is stored, not the episode's",
    ),
    Mutant(
        "recalibration",
        MEMORY,
        "shaped.rewards[turns], credit",
        "(shaped.rewards - shaped.bonuses)[turns], credit",
        "rewards are stored without the bonus, baselines with it",
    ),
    Mutant(
        "recalibration",
        MEMORY,
        "owner, shaped.rewards.double()",
        "owner, (shaped.rewards - shaped.bonuses).double()",
        "baselines without the bonus",
    ),
    Mutant("recalibration", MEMORY, "rewards = total / size", "rewards = total", "baselines weigh long episodes more"),
    Mutant("recalibration", MEMORY, "if self.settings.keep_step_part and", "if False and", "GiGPO's step part is lost"),
    Mutant(
        "recalibration",
        MEMORY,
        "if self.settings.keep_step_part and",
        "if",
        "GiGPO's step part is kept where it is not wanted",
    ),
    Mutant(
        "recalibration",
        "losses/objective.py",
        'batch.advantages.clamp(min=0) if self.kind == "sil" else',
        "",
        "turns worse than the baseline are pushed away",
    ),
)


def occurrences(mutant: Mutant, root: Path = ROOT) -> int:
    """How often a mutant's text is in its file."""
    return (root / "spearrl" / mutant.file).read_text().count(mutant.old)


def try_out(mutant: Mutant | None, origin: Path, model: Path) -> tuple[int, str]:
    """(pytest's exit code, the first test that failed) with a mutant put in; None: the code as it is. For a process of its own, made by `fork`."""
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
    chosen = [
        m for m in MUTANTS if not args.only or any(word in f"{m.kind} {m.file} {m.meaning}" for word in args.only)
    ]
    if not chosen:
        raise SystemExit("no such mutant")
    with tempfile.TemporaryDirectory() as folder:
        origin = Path(folder) / "origin"  # the code of now, whatever is edited while this runs
        _copy(ROOT, origin)
        rotten = [m for m in chosen if occurrences(m, origin) != 1]
        for mutant in rotten:
            print(f"{mutant.file}: {occurrences(mutant, origin)} times, should be once: {mutant.old}", file=sys.stderr)
        if rotten:
            raise SystemExit("the table does not fit the code")
        survived = _run(chosen, args.jobs, origin)
    raise SystemExit(1 if survived else 0)


def _run(chosen: Sequence[Mutant], jobs: int, origin: Path) -> int:
    """Print the table; how many survived."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    for name in ("torch", "transformers", "pytest"):  # imported once; nothing of spearrl may be
        importlib.import_module(name)
    start = time.monotonic()
    # A process a job: what a mutant did to a process must not meet the next one.
    with get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        model = pool.apply(_cold_start, (origin,))
        code, found = pool.apply(try_out, (None, origin, model))
        if code:
            raise SystemExit(f"the tests fail without any mutant: {found}")
        print(
            f"{len(chosen)} mutants; without one, {', '.join(TESTS)} pass ({time.monotonic() - start:.0f} s)\n",
            flush=True,
        )
        print("| class | bug | file | noticed by |\n|---|---|---|---|")
        survived, waiting = 0, [pool.apply_async(try_out, (mutant, origin, model)) for mutant in chosen]
        for mutant, result in zip(chosen, waiting, strict=True):
            code, found = result.get(timeout=3 * LIMIT)
            if code not in (0, 1):
                raise SystemExit(f"pytest could not run ({code}) with: {mutant.meaning}\n{found}")
            survived += code == 0
            noticed = f"`{found}`" if code else "**nobody: survived**"
            print(f"| {mutant.kind} | {mutant.meaning} | {mutant.file} | {noticed} |", flush=True)
    print(f"\n{len(chosen) - survived} of {len(chosen)} killed in {time.monotonic() - start:.0f} s")
    return survived


if __name__ == "__main__":
    main()
