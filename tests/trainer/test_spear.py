"""Self-imitation through the trainer: what a run really did, call by call, against numbers made by hand.

They are made from the run's trajectories alone. `python -m benchmarks.mutants` shows which bugs these tests notice
(docs/mutants.md).
"""

from __future__ import annotations

import copy
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pytest
import torch

from spearrl.batching import Batch
from tests.support import sil_by_hand as by_hand
from tests.support.recording import Recording, Step, record
from tests.support.short_runs import from_model
from tests.support.sil_by_hand import Buffer, Played, Row

COMMON = (
    "env.name=tests.support.recording:Graded",
    "rollout.temperature=1.3",
    "rollout.groups_per_step=6",
    "learner.mini_batches=1",
    "learner.grad_clip=1e6",
    "algo.sil.capacity=8",
    "algo.sil.fill_factor=0.4",
    "algo.sil.gamma.peak=0.6",
    "algo.sil.gamma.steps=5",
    "algo.intrinsic.mu.steps=6",
    "algo.filters.overlong=true",
    "algo.filters.void_turn=true",
    "run.steps=6",
)
RUNS = {
    "chat": ("grpo+sil+intrinsic", ()),
    "drbot": ("grpo+drbot+sil+intrinsic", ("learner.mini_batches=2", "algo.sil.capacity=4")),
    "windowed": ("grpo+sil+intrinsic", ("env.style=windowed", "algo.groups.normalize_std=true")),
    "gigpo": (
        "gigpo+sil+intrinsic",
        (
            "env.style=windowed",
            "algo.sil.gamma.kind=linear",
            "algo.filters.void_turn=false",
            "algo.invalid_penalty=8",
            "algo.groups.normalize_std=true",
        ),
    ),
    "gigpo-episode": (
        "gigpo+sil",
        (
            "env.name=tests.support.recording:Costly",
            "algo.sil.keep_step_part=false",
            "algo.filters.void_turn=false",
            "algo.invalid_penalty=14",
        ),
    ),
    "joint": ("grpo+sil+intrinsic", ("algo.sil.update=joint", "algo.intrinsic.mu.kind=linear")),
    "ties": (
        "grpo+sil",
        ("run.seed=5", "algo.invalid_penalty=0", "algo.sil.fill_factor=1", "algo.sil.gamma.kind=constant"),
    ),
    "aged": ("grpo+sil+intrinsic", ("algo.sil.max_age=1", "algo.sil.capacity=3", "algo.sil.fill_factor=2")),
}
Turns = Mapping[int, float]  # advantage of a turn, by id() of it


@dataclass
class Expected:
    """A recorded step, and what should have happened in it."""

    step: Step
    groups: list[list[Played]]
    due: bool
    better: dict[int, Played]  # what may be drawn, by trajectory
    refused: list[Played]  # stored, but not better than the baseline
    replay_worth: Turns
    level: float
    buffer: Buffer  # afterwards

    @property
    def members(self) -> list[Played]:
        return [p for group in self.groups for p in group]

    @property
    def drawn(self) -> list[Played]:
        ids = [] if self.step.replay is None else sorted(set(self.step.replay.rows.trajectory.tolist()))
        return [self.better[i] for i in ids]


@dataclass
class Followed:
    """A recorded run, followed by hand."""

    recording: Recording
    steps: list[Expected]

    def __post_init__(self) -> None:
        self._models: dict[int, torch.nn.Module] = {}
        self.config = self.recording.config

    def old_logprobs(self, row: Row) -> torch.Tensor:
        """By the weights of the step that played the row."""
        number = row.played.step
        if number not in self._models:
            self._models[number] = copy.deepcopy(self.recording.model)
            self._models[number].load_state_dict(self.recording.steps[number - 1].weights)
        with torch.no_grad():
            return by_hand.logprobs(self._models[number], row.ids, self.config.rollout.temperature)

    def rows(self, played: Iterable[Played]) -> list[Row]:
        return [row for p in played for row in by_hand.rows_of(self.config, p)]


def follow(recording: Recording) -> Followed:
    config, buffer, steps = recording.config, Buffer(recording.config), []
    for step in recording.steps:
        groups, due = by_hand.credited(config, step.number, step.groups), buffer.due(step.number)
        better, level = buffer.better(step.number) if buffer.means else [], buffer.level() if buffer.means else 0.0
        worth = {id(turn): a for p in better for turn, a in zip(p.turns, buffer.advantages(p), strict=True)}
        refused = [p for p in buffer.usable(step.number) if p not in better]
        buffer.pass_on(step.number, groups, flushed=due)
        steps.append(
            Expected(step, groups, due, {p.trajectory.id: p for p in better}, refused, worth, level, copy.copy(buffer))
        )
        steps[-1].buffer.means = list(buffer.means)
    return Followed(recording, steps)


@pytest.fixture(scope="module")
def followed(model, tmp_path_factory) -> Callable[[str], Followed]:
    """The run of a name; each is played once."""
    folder, runs = tmp_path_factory.mktemp("spear"), {}

    def of(name: str) -> Followed:
        if name not in runs:
            algo, changes = RUNS[name]
            runs[name] = follow(record(from_model(model, folder, *COMMON, *changes, algo=algo, name=name)))
        return runs[name]

    return of


@pytest.fixture(scope="module", params=RUNS)
def run(request, followed) -> Followed:
    """Each run in turn; pytest puts all tests of one before the next."""
    return followed(request.param)


def assert_batch(run: Followed, batch: Batch, played: Iterable[Played], worth: Turns) -> None:
    """The batch holds these trajectories' rows, with their own tokens, mask, group, advantages, log-probabilities."""
    waiting: dict[tuple, list[Row]] = defaultdict(list)
    for row in run.rows(played):
        waiting[row.played.trajectory.id, row.ids].append(row)
    rows, offsets = batch.rows, batch.rows.offsets.tolist()
    assert len(rows) == sum(map(len, waiting.values()))
    assert len(set(rows.uid.tolist())) == len(rows)
    for number in range(len(rows)):
        ids = tuple(rows.token_ids[offsets[number] : offsets[number + 1]].tolist())
        same = waiting[int(rows.trajectory[number]), ids]
        assert same, "a row of none of these trajectories, or one too many"
        row = same.pop(0)
        tokens = row.tokens()
        positions = [position for position, _, _ in tokens]
        assert int(rows.group[number]) == row.played.trajectory.group
        assert batch.action_mask[number].nonzero().flatten().tolist() == positions
        advantages = torch.zeros(rows.width, dtype=torch.float64)
        advantages[positions] = torch.tensor([worth[id(turn)] for _, turn, _ in tokens], dtype=torch.float64)
        torch.testing.assert_close(batch.advantages[number].double(), advantages, rtol=1e-5, atol=1e-5)
        old = batch.old_logprobs[number][positions]
        if advantages.any() or not old.isnan().all():  # a row whose advantages are all 0 may have no pass
            torch.testing.assert_close(old, run.old_logprobs(row)[positions], rtol=0, atol=2e-4)
        assert batch.rollout_logprobs[number][positions].tolist() == pytest.approx([p for _, _, p in tokens])


def test_what_the_policy_trains_on(run):
    """Every group's sampled tokens alone, advantages of each group by itself, log-probabilities before the update."""
    assert len(run.steps) == 6
    for expected in run.steps:
        worth = {id(turn): turn.advantage for p in expected.members for turn in p.turns}
        assert_batch(run, expected.step.on_policy, expected.members, worth)


def test_what_is_replayed(run):
    """Due or not; who is drawn; their mask, log-probabilities of the step that played them, recalibrated advantages."""
    used: Counter[int] = Counter()
    for expected in run.steps:
        replay = expected.step.replay
        assert (replay is not None) == expected.due, f"step {expected.step.number}"
        if replay is None:
            continue
        drawn = set(replay.rows.trajectory.tolist())
        assert drawn <= set(expected.better)
        assert len(drawn) == min(run.config.algo.sil.capacity, len(expected.better))
        assert_batch(run, replay, expected.drawn, expected.replay_worth)
        assert all(p.step < expected.step.number for p in expected.drawn)
        used.update(drawn)
    assert used and max(used.values()) == 1


def test_what_is_remembered(run):
    """After each step: the winners of all its groups, sound and not too old, and the median of all groups' means."""
    for expected in run.steps:
        assert expected.step.stored == sorted(p.trajectory.id for p in expected.buffer.stored)
        assert expected.step.level == pytest.approx(expected.buffer.level())


def test_gamma_follows_its_schedule(run):
    assert [e.step.gamma for e in run.steps] == pytest.approx(
        [by_hand.gamma(run.config, number) for number in range(1, 7)]
    )


def test_optimiser_steps(run):
    """Alternating: on-policy steps, then replay steps. Joint: both in each. Every row that can have a gradient once."""
    parts, joint = run.config.learner.mini_batches, run.config.algo.sil.update == "joint"
    for expected in run.steps:
        kinds = [sorted({kind for kind, _ in done.losses}) for done in expected.step.passes]
        worth = {"policy": expected.step.on_policy.advantages != 0}
        if expected.due:
            worth["sil"] = expected.step.replay.advantages > 0
        signal = {kind: bool(tokens.any()) for kind, tokens in worth.items()}
        if joint:
            assert kinds == ([[kind for kind in signal if signal[kind]]] if any(signal.values()) else [])
        else:
            steps = kinds.count(["policy"])
            assert signal["policy"] <= steps <= parts
            assert kinds == [["policy"]] * steps + [["sil"]] * kinds.count(["sil"])
            assert (["sil"] in kinds) == signal.get("sil", False)
        for kind, batch in (("policy", expected.step.on_policy), ("sil", expected.step.replay)):
            trained = sorted(
                uid for done in expected.step.passes for k, uids in done.losses if k == kind for uid in uids
            )
            able = [] if batch is None else batch.rows.uid[(worth[kind] & batch.action_mask).any(1)].tolist()
            assert trained == sorted(able)


def test_gradients(run):
    """A step's gradient: the policy's loss with factor 1, self-imitation's with γ, each a mean over its own rows."""
    model = copy.deepcopy(run.recording.model)
    for expected in (e for e in run.steps if e.due):
        on_policy = {
            row.uid: (row, [turn.advantage for _, turn, _ in row.tokens()]) for row in run.rows(expected.members)
        }
        worth = expected.replay_worth
        replay = {
            row.uid: (row, [max(0.0, worth[id(turn)]) for _, turn, _ in row.tokens()])
            for row in run.rows(expected.drawn)
        }
        terms = {"policy": (1.0, on_policy), "sil": (by_hand.gamma(run.config, expected.step.number), replay)}
        for done in expected.step.passes:
            model.load_state_dict(done.weights)
            model.zero_grad()
            for kind, (factor, rows) in terms.items():
                part = [rows[uid] for k, uids in done.mini_batches if k == kind for uid in uids]
                if part:
                    (
                        factor
                        * by_hand.surrogate(
                            model, [(row, values, run.old_logprobs(row)) for row, values in part], run.config
                        )
                    ).backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(
                    done.gradient[name], parameter.grad, rtol=2e-3, atol=1e-4 * float(parameter.grad.abs().max()) + 1e-7
                )


def test_the_step_part_matters(followed):
    """keep_step_part changes replayed advantages, and some of them are negative: they count as 0."""
    flushes = [e for e in followed("gigpo").steps if e.due]
    assert max(abs(turn.step_part) for e in flushes for p in e.drawn for turn in p.turns) > 0.1
    assert any(e.replay_worth[id(turn)] < 0 for e in flushes for p in e.drawn for turn in p.turns if turn.trained)


def test_the_runs_hold_what_they_test(followed):
    """Otherwise the tests above would prove less than they say."""
    runs = {name: followed(name) for name in RUNS}
    steps = [(run, e) for run in runs.values() for e in run.steps]
    flushes = [(run, e) for run, e in steps if e.due]
    assert all(sum(e.due for e in run.steps) >= 1 for run in runs.values()) and len(flushes) > 12
    assert any(len({p.trajectory.group for p in e.drawn}) > 2 for _, e in flushes), "several groups in one flush"
    assert any(len({p.step for p in e.drawn}) > 1 for _, e in flushes), "several steps in one flush"
    assert any(len(e.better) > run.config.algo.sil.capacity for run, e in flushes), "more than capacity"
    assert any(p.mean("reward") < e.level for _, e in flushes for p in e.refused), "below the median"
    assert any(p.mean("reward") == e.level for e in runs["ties"].steps if e.due for p in e.refused), (
        "ties with the median"
    )
    assert any(_flushed_by_ties(runs["ties"], e) for e in runs["ties"].steps), "ties that would make a flush due"
    assert any(len({len(g) for g in e.groups}) > 1 for _, e in steps), "groups that lost a sibling"
    assert any(p.trajectory.faults and p.mean("advantage") > 0 for _, e in steps for p in e.members), "faulty winners"
    assert any(not turn.trained for _, e in flushes for p in e.drawn for turn in p.turns), "masked turns in the replay"
    assert any(p.mean("advantage") == 0 for _, e in steps for p in e.members), "advantages of exactly 0"
    assert all(
        abs(e.level - statistics.fmean(e.buffer.means[: -len(e.groups)])) > 1e-3
        for _, e in flushes
        if e.step.number > 3
    ), "median and mean differ"
    assert any(_signs(e, row) == {True, False} for run, e in flushes for row in run.rows(e.drawn)), (
        "a row with turns above and below the baseline"
    )
    by_newer = [(run, row, e) for run, e in flushes for row in run.rows(e.drawn)]
    assert any(_moved(run, row, e) > 0.05 for run, row, e in by_newer), "the policy moves between storing and replay"


def _flushed_by_ties(run: Followed, expected: Expected) -> bool:
    threshold = run.config.algo.sil.fill_factor * run.config.algo.sil.capacity
    ties = sum(p.mean("reward") == expected.level for p in expected.refused)
    return len(expected.better) <= threshold < len(expected.better) + ties


def _signs(expected: Expected, row: Row) -> set[bool]:
    """Whether its turns are above the baseline. A row of none is left out whatever a loss makes of its advantages."""
    return {expected.replay_worth[id(turn)] > 0 for _, turn, _ in row.tokens() if expected.replay_worth[id(turn)]}


def _moved(run: Followed, row: Row, expected: Expected) -> float:
    """How far the current log-probabilities are from the stored ones."""
    now = copy.deepcopy(run.recording.model)
    now.load_state_dict(expected.step.weights)
    with torch.no_grad():
        current = by_hand.logprobs(now, row.ids, run.config.rollout.temperature)
    return float((current - run.old_logprobs(row)).abs().max())
