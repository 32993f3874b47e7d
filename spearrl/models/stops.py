"""Which tokens end a reply: what the chat template puts after one, and what a model directory's files declare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATE, TOKENIZER = "chat template", "tokenizer"


@dataclass(frozen=True, slots=True)
class Stops:
    """The tokens that end a reply.

    Args:
        end: what ends a turn in a conversation; None: nothing does.
        call_end: what ends one that calls a tool.
        sources: every stop token, with where it was found.
        notes: contradictions between those places, with what was chosen.
    """

    end: int | None
    call_end: int | None
    sources: dict[int, tuple[str, ...]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnEnds:
    """Ids that a chat template renders around a reply; an empty list where it refuses such a conversation.

    Args:
        last: after the last reply. call: the same, where that reply calls a tool.
        before_next: lists, each from a reply to the text of the next message.
        beginning: of the turns after a reply, up to the next reply.
    """

    last: Sequence[int]
    call: Sequence[int]
    before_next: Sequence[Sequence[int]]
    beginning: Sequence[int]


def declared_stops(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """The ids that generation_config.json and config.json of a model directory call eos_token_id, by file."""
    stops = {}
    for name in ("generation_config.json", "config.json"):
        try:
            content = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or no JSON: loading the model says so
            continue
        text = content.get("text_config") if isinstance(content, dict) else None
        parts = [part.get("eos_token_id") for part in (content, text) if isinstance(part, dict)]
        ids = [i for part in parts for i in (part if isinstance(part, list) else [part])]
        if whole := tuple(dict.fromkeys(i for i in ids if type(i) is int)):
            stops[name] = whole
    return stops


def find_stops(tokenizer: Any, ends: TurnEnds, *, own: Sequence[int] = (), source: str = TEMPLATE) -> Stops:
    """The union of what template, files and tokenizer say ends a reply.

    Left out: an id that the tokenizer does not have, and one that the template puts at the beginning of a turn only.

    Args:
        own: what the format itself calls stop tokens; then nothing is sought in `ends`. source: the format.
    """
    names = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    declared = dict(getattr(tokenizer, "declared_stops", {}))
    if tokenizer.eos_token_id is not None:
        declared[TOKENIZER] = (tokenizer.eos_token_id,)
    candidates = {i for i, name in names.items() if name.strip()} | set(tokenizer.all_special_ids)
    candidates |= {i for ids in declared.values() for i in ids}
    turn_ends = list(own) or _turn_ends(ends, candidates, names)
    sources = {i: [source] for i in turn_ends}
    notes, left_out = [], set()
    for where, ids in declared.items():
        for i in ids:
            name = names.get(i, f"token {i}")
            if not 0 <= i < len(tokenizer):
                notes.append(f"{where} names token {i} as eos, which the tokenizer does not have: left out")
            elif i in ends.beginning and i not in turn_ends and i not in ends.last:
                notes.append(f"{where} names {name} as eos, which begins a turn in the {source}: left out")
                left_out.add(i)
            else:
                sources.setdefault(i, []).append(where)
    eos = tokenizer.eos_token_id
    if turn_ends and eos is not None and eos not in turn_ends and eos not in left_out:
        turn, other = (names.get(i, f"token {i}") for i in (turn_ends[0], eos))
        notes.append(f"a turn ends with {turn}, the tokenizer's eos is {other}: both end a reply")
    end = turn_ends[0] if turn_ends else eos if eos in sources else next(iter(sources), None)
    call_end = turn_ends[1] if len(turn_ends) > 1 else end
    return Stops(end, call_end, {i: tuple(where) for i, where in sorted(sources.items())}, tuple(notes))


def _turn_ends(ends: TurnEnds, candidates: set[int], names: dict[int, str]) -> list[int]:
    """What the template ends a reply with, the usual one first; where that is nothing, what begins the next turn."""
    first = _first(ends.last, candidates)
    if not first:
        return list(dict.fromkeys(i for ids in ends.before_next for i in _first(ids, candidates)))
    after_call = [i for i in ends.call if i in candidates][-1:]
    return list(dict.fromkeys([*first, *(i for i in after_call if not names.get(i, "").startswith("</"))]))


def _first(ids: Iterable[int], candidates: set[int]) -> list[int]:
    return [i for i in ids if i in candidates][:1]
