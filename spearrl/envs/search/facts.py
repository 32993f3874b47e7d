"""A seeded world of linked facts about people, companies, cities, streams and nations that do not exist."""

from __future__ import annotations

import itertools
import random
from functools import lru_cache
from typing import Any, NamedTuple

from spearrl.config.tables import table
from spearrl.envs.search.files import Document
from spearrl.envs.search.retrieve import CorpusIndex, build_index
from spearrl.seeds import derive
from spearrl.types import Task

_TABLE = table(__file__, "facts.toml")
LINKS: dict[str, dict[str, str]] = _TABLE["links"]
HOPS = (1, 2, 3)
EACH = 2  # questions of each number of hops about one thing
HELD_OUT = 10  # one in so many things is asked about in the split val only

Chain = tuple[str, ...]  # the thing a question begins with, then links


class FactWorld(NamedTuple):
    """Read-only. `facts[thing, link]` is another thing."""

    facts: dict[tuple[str, str], str]
    corpus: CorpusIndex
    tasks: dict[str, tuple[Task, ...]]

    def way(self, chain: Chain) -> list[str]:
        """The things a question leads to, from the one it names to the answer."""
        return list(itertools.accumulate(chain[1:], lambda thing, link: self.facts[thing, link], initial=chain[0]))


@lru_cache(maxsize=4)
def open_world(size: int, seed: int) -> FactWorld:
    """`size` things, a document each, made once per process."""
    draw = random.Random(derive(seed, "search-world"))
    kind_of = _things(size, draw)
    by_kind = {kind: [thing for thing in kind_of if kind_of[thing] == kind] for kind in _TABLE["kinds"]}
    facts: dict[tuple[str, str], str] = {}
    for thing, kind in kind_of.items():
        for link in _links(kind):
            facts[thing, link] = draw.choice([other for other in by_kind[LINKS[link]["to"]] if other != thing])
    capitals = draw.sample(by_kind["city"], len(by_kind["nation"]))
    for nation, city in zip(by_kind["nation"], capitals, strict=True):  # a capital lies in its country
        facts[nation, "capital"], facts[city, "country"] = city, nation
    world = FactWorld(facts, build_index(_documents(kind_of, facts)), {})
    held_out = set(draw.sample(sorted(kind_of), max(size // HELD_OUT, 1)))
    for split in ("train", "val"):
        chains = [
            chain
            for thing in kind_of
            if (thing in held_out) == (split == "val")
            for chain in _chains(world, thing, kind_of[thing], draw)
        ]
        draw.shuffle(chains)
        world.tasks[split] = tuple(_task(world, split, chain) for chain in chains)
    return world


def _links(kind: str) -> list[str]:
    return [name for name, link in LINKS.items() if link["of"] == kind]


def _things(size: int, draw: random.Random) -> dict[str, str]:
    """Names and their kinds, in random order."""
    words = ["".join(parts).capitalize() for parts in itertools.product(_TABLE["starts"], _TABLE["vowels"])]
    first, last = ([draw.choice(_TABLE[ends]) for _ in words] for ends in ("first_ends", "last_ends"))
    pairs = draw.sample(list(itertools.product(range(len(words)), repeat=2)), size)
    names = [f"{words[a]}{first[a]} {words[b]}{last[b]}" for a, b in pairs]
    kinds = [kind for kind, share in _TABLE["kinds"].items() for _ in range(share)]
    return {name: kinds[i % len(kinds)] for i, name in enumerate(names)}


def _documents(kind_of: dict[str, str], facts: dict[tuple[str, str], str]) -> list[Document]:
    texts = {thing: f"{thing} is a {kind}." for thing, kind in kind_of.items()}
    for (thing, link), other in facts.items():
        texts[thing] += f" The {link} is {other}."
    return [Document(*item) for item in texts.items()]


def _chains(world: FactWorld, thing: str, kind: str, draw: random.Random) -> list[Chain]:
    """Questions about a thing. None leads to one place twice: a detour would make fewer searches do."""
    chains: list[Chain] = []
    ends: list[tuple[Chain, str]] = [((thing,), kind)]
    for _ in HOPS:
        ends = [((*chain, link), LINKS[link]["to"]) for chain, end in ends for link in _links(end)]
        possible = [chain for chain, _ in ends if len(set(world.way(chain))) == len(chain)]
        chains += draw.sample(possible, min(EACH, len(possible)))
    return chains


def _task(world: FactWorld, split: str, chain: Chain) -> Task:
    subject, hops = chain[0], len(chain) - 1
    for link in chain[1:-1]:
        subject = f"the {link} of {subject}"
    data: dict[str, Any] = {
        "question": LINKS[chain[-1]]["question"].format(x=subject),
        "answers": [world.way(chain)[-1]],
        "stratum": "1 hop" if hops == 1 else f"{hops} hops",
        "chain": chain,
    }
    return Task("/".join(chain).replace(" ", "-").lower(), split, data)
