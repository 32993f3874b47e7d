"""How alike two strings are as sets of words: token_set_ratio with the semantics of thefuzz 0.22, which the reward's thresholds refer to."""

from __future__ import annotations

import re
from functools import lru_cache

_NOT_A_WORD = re.compile(r"[\W_]+")
_REPLACED = dict.fromkeys(range(128, 256)) | {
    0x130: "i"
}  # thefuzz deletes Latin-1 letters and keeps the rest of Unicode; İ would become two


@lru_cache(maxsize=1 << 16)
def token_set_ratio(first: str | tuple[str, ...], second: str | tuple[str, ...]) -> int:
    """0 to 100; 100 when the words of one are among the words of the other, 0 when either has none.

    With s the shared words and a, b the rest, sorted and joined: the best of 100·(1 − d / (m + n)) over the pairs (s a, s b),
    (s, s a), (s, s b), where d counts insertions and deletions and m, n are the two lengths.

    A tuple stands for its Python text, so every word of an option pair counts, the option's name as well: "large" is within
    ("size", "x-large").
    """
    ours, theirs = _words(str(first)), _words(str(second))
    if not ours or not theirs:
        return 0
    shared = ours & theirs
    if shared and (ours == shared or theirs == shared):
        return 100
    a, b = " ".join(sorted(ours - theirs)), " ".join(sorted(theirs - ours))
    common = sum(map(len, shared)) + max(len(shared) - 1, 0)
    gap = 1 if shared else 0
    length_a, length_b = common + gap + len(a), common + gap + len(b)
    pairs = [(_edits(a, b), length_a + length_b)]
    if shared:
        pairs += [(gap + len(a), common + length_a), (gap + len(b), common + length_b)]
    return round(max(100.0 - 100.0 * edits / total for edits, total in pairs))


@lru_cache(maxsize=1 << 16)
def _words(text: str) -> frozenset[str]:
    return frozenset(_NOT_A_WORD.sub(" ", text.translate(_REPLACED)).lower().split())


def _edits(a: str, b: str) -> int:
    """Insertions and deletions between two strings, by a longest common subsequence kept as the bits of one integer (Hyyrö 2004)."""
    if not a or not b:
        return len(a) + len(b)
    where: dict[str, int] = {}
    for position, char in enumerate(a):
        where[char] = where.get(char, 0) | 1 << position
    full = (1 << len(a)) - 1
    state = full
    for char in b:
        matches = state & where.get(char, 0)
        state = ((state + matches) | (state - matches)) & full
    return len(a) + len(b) - 2 * (len(a) - state.bit_count())
