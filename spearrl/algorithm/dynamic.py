"""Dynamic sampling (DAPO, arXiv 2503.14476 eq. 11): further tasks are played for groups that teach nothing.

A group teaches nothing where all its episodes earn the same.
"""

from __future__ import annotations

from collections.abc import Callable

from spearrl.types import Group


def mixed(group: Group) -> bool:
    """Whether the group's sound episodes differ in reward."""
    return len({t.reward for t in group.valid}) > 1


def play_rounds(
    play: Callable[[int], list[Group]], *, wanted: int, rounds: int
) -> tuple[list[Group], dict[str, float]]:
    """Mixed groups of as many rounds as it takes until there are `wanted`; the last permitted round is taken whole.

    Args:
        play: plays round 0, 1, …; the groups it returns have ids of their own.

    Returns:
        (groups, metrics of the dynamic sampling).
    """
    groups: list[Group] = []
    played = 0
    for number in range(rounds):
        latest = play(number)
        played += len(latest)
        groups += latest if number == rounds - 1 else [group for group in latest if mixed(group)]
        if len(groups) >= wanted:
            break
    return groups, {"dynamic/rounds": float(number + 1), "dynamic/groups_dropped": float(played - len(groups))}
