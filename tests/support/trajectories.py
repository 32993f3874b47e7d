"""Episodes made by hand: token ids, rewards and statuses are what a test says."""

from __future__ import annotations

from collections.abc import Sequence

from spearrl.algorithm import Shaped, shape
from spearrl.batching import rows_from_groups
from spearrl.config import AlgoSection
from spearrl.types import Action, Group, Status, Task, Trajectory, Turn

OBSERVATION = (7, 8)


def turn(
    tokens: int = 2,
    reward: float = 0.0,
    *,
    valid: bool = True,
    tools: int = 1,
    state: str = "start",
    text: str = "<action>x</action>",
) -> Turn:
    """One reply of that many tokens; prompts are filled in by `episode`."""
    action = Action("x", valid=valid, tool_calls=tools)
    return Turn(OBSERVATION, tuple(range(10, 10 + tokens)), (-1.0,) * tokens, "stop", text, state, None, action, reward)


def episode(
    number: int, group: int, turns: Sequence[Turn], status: Status = Status.FAILURE, *, style: str = "chat"
) -> Trajectory:
    """A growing chat (one row, observation tokens between the replies), or "windowed": a row per turn."""
    prompt: tuple[int, ...] = ()
    for index, played in enumerate(turns):
        played.prompt_ids = (3 + index, *OBSERVATION) if style == "windowed" else prompt + OBSERVATION
        prompt = played.prompt_ids + played.token_ids
    return Trajectory(Task(f"task-{group}", "train"), group, number, number, list(turns), status)


def grouped(*trajectories: Trajectory) -> list[Group]:
    """Groups in order of appearance."""
    groups: dict[int, Group] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group, Group(trajectory.group, trajectory.task)).trajectories.append(trajectory)
    return list(groups.values())


def shaped(groups: list[Group], algo: AlgoSection, *, mu: float = 0.0, group_size: int = 2, seed: int = 0) -> Shaped:
    return shape(rows_from_groups(groups), groups, algo, mu=mu, max_reply_tokens=512, group_size=group_size, seed=seed)
