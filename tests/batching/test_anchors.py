"""GiGPO on real anchors: siblings that meet in one state of WebShop or ALFWorld are compared, others are not."""

from __future__ import annotations

import pytest
import torch

from spearrl.algorithm import assign_credit
from spearrl.config import AlgoSection
from spearrl.envs import make
from spearrl.types import Action, Group, Status, Trajectory, Turn
from tests.support.trajectories import episode, grouped, shaped

GIGPO = AlgoSection.model_validate(
    {"name": "gigpo", "groups": {"normalize_std": False}, "gigpo": {"discount": 0.5}, "invalid_penalty": 0.0}
)


def played(environment, task, group: int, sibling: int, commands: list[str], reward: float) -> Trajectory:
    """The episode of these commands; what it earns is said by the test."""
    slot = environment.spawn()
    observation = slot.reset(task, 0)
    turns = []
    for number, command in enumerate(commands):
        turns.append(
            Turn((), (10, 11), (-1.0, -1.0), "stop", command, observation.text, observation.anchor, Action(command))
        )
        outcome = slot.step(Action(command))
        observation = outcome.observation
        turns[-1].reward = reward if number == len(commands) - 1 else 0.0
    slot.close()
    return episode(100 * group + sibling, group, turns, Status.SUCCESS if reward else Status.FAILURE)


def shop():
    environment = make("webshop")
    task = environment.tasks("val")[0]
    slot = environment.spawn()
    slot.reset(task, 0)
    page = slot.step(Action("search[red shirt]")).observation
    first, second = [
        a for a in page.admissible if a not in ("click[back to search]", "click[next >]", "click[< prev]")
    ][:2]
    # One goes in, comes back to the results and goes in again; the other goes straight to the second product.
    return environment, task, ["search[red shirt]", first, "click[< prev]", second], ["search[red shirt]", second]


def household():
    environment = make("alfworld", size="small")
    task = environment.tasks("train")[0]
    slot = environment.spawn()
    places = [a for a in slot.reset(task, 0).admissible if a.startswith("go to ")]
    return environment, task, [places[0], places[1], "look"], [places[1], "look"]


@pytest.mark.parametrize("make_scene", [shop, household], ids=["webshop", "alfworld"])
def test_siblings_that_meet_in_a_state_share_a_group(make_scene):
    environment, task, long, short = make_scene()
    siblings = [
        played(environment, task, 0, 0, [*long, long[-1]], 10.0),
        played(environment, task, 0, 1, [*short, short[-1]], 0.0),
    ]
    stranger = [played(environment, task, 1, s, [*short, short[-1]], 10.0) for s in range(2)]
    groups: list[Group] = grouped(*siblings, *stranger)
    step = shaped(groups, GIGPO)
    turns = step.rows.turns
    ids = {t.id: turns.anchor_ids[turns.trajectory_ids == t.id].tolist() for g in groups for t in g.trajectories}
    winner, loser = ids[0], ids[1]
    assert winner[0] == loser[0] and winner[len(long)] == loser[len(short)], (
        "the start, and the state both reach, are the same anchor"
    )
    assert ids[100] == ids[101] == loser, "the same states in another group have the same anchors"

    credit = assign_credit(step, GIGPO, old_logprobs=torch.zeros(len(step.rows), step.rows.width))
    part = {t.id: credit.step_part[turns.trajectory_ids == t.id].tolist() for g in groups for t in g.trajectories}
    assert part[0][-1] == pytest.approx(5.0) and part[1][-1] == pytest.approx(-5.0), (
        "won 10 against lost, from the same state: ± 5 around their mean"
    )
    assert part[100] == pytest.approx([0.0] * len(part[100])), (
        "two siblings that do the same are no better than each other"
    )
