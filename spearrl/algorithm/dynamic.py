"""Dynamic sampling: groups whose episodes all earn the same teach nothing, so further tasks are played (DAPO, arXiv 2503.14476 eq. 11)."""

from __future__ import annotations

from collections.abc import Callable

from spearrl.types import Group


def mixed(group: Group) -> bool:
    """Whether the group's sound episodes differ in reward."""
    return len({t.reward for t in group.valid}) > 1


def play_rounds(
    play: Callable[[int], list[Group]], *, wanted: int, rounds: int
) -> tuple[list[Group], dict[str, float]]:
    """Groups of as many rounds as it takes until `wanted` of them are mixed; only these, but the last permitted round is kept whole.

    Args:
        play: plays round 0, 1, …; the groups it returns have ids of their own.
    """
    kept: list[Group] = []
    played = 0
    for number in range(rounds):
        groups = play(number)
        played += len(groups)
        last = number == rounds - 1
        kept += groups if last else [g for g in groups if mixed(g)]
        if last or len(kept) >= wanted:
            break
    return kept, {"dynamic/rounds": float(number + 1), "dynamic/groups_dropped": float(played - len(kept))}
