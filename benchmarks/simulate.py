"""Schedules of rollout and learner on 8 to 1024 GPUs, simulated from measured episodes: idle shares, staleness, advice.

    python -m benchmarks.simulate [RUN] [--quantiles 0:60 50:300 90:900 100:4000] [--gpus 8 64 1024] [--json FILE]

RUN is a run directory, whose trajectory files give tokens and turns of episodes; without one, quantiles of an episode's
reply tokens. docs/scaling.md states what is assumed. The same arguments print the same table.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

STALENESS = (1, 2, 4)  # rollout.max_staleness of the asynchronous schedules
EXTRA = (0.125, 0.25, 0.5)  # groups begun beyond those that a step needs
SHARES = (0.25, 0.5, 0.75)  # of the GPUs that learn, in asynchronous schedules
FAIR = 0.95  # mean length of what is kept over that of all, below which over-issuing is not advised


@dataclass(frozen=True)
class Episode:
    """Seconds it holds a sequence of an engine, and reply tokens."""

    seconds: float
    tokens: float


@dataclass(frozen=True)
class Machine:
    """
    Args:
        slots: sequences of one engine GPU.
        train_s: seconds one GPU learns for a reply token, its share of the prompt included.
        sync_s: for which generation stands still for new weights.
    """

    slots: int
    train_s: float
    sync_s: float


@dataclass(frozen=True)
class Outcome:
    """Of a schedule: seconds of a step; idle shares of the time that GPUs are given to each side; versions between the
    weights a group began with and the learner's; mean length of trained episodes over that of all.
    """

    step_s: float
    rollout_idle: float
    learner_idle: float
    staleness: float
    staleness_max: int
    length: float


Draw = Callable[[], list[Episode]]  # the episodes of a group


def over_issued(draw: Draw, machine: Machine, *, gpus: int, groups: int, extra: float, steps: int) -> Outcome:
    """All GPUs sample, then all learn. A step begins (1 + extra) x groups and ends when `groups` have finished.

    extra=0 is the synchronous schedule.
    """
    total = busy = room = learning = kept = kept_count = every = every_count = 0.0
    for _ in range(steps):
        drawn = [draw() for _ in range(round(groups * (1 + extra)))]
        free, spans, ends = [0.0] * (gpus * machine.slots), [], []
        for group in drawn:
            begins = []
            for episode in group:
                begin = heapq.heappop(free)
                heapq.heappush(free, begin + episode.seconds)
                begins.append(begin)
            spans += [(begin, begin + e.seconds) for begin, e in zip(begins, group, strict=True)]
            ends.append(max(begin + e.seconds for begin, e in zip(begins, group, strict=True)))
        order = sorted(range(len(drawn)), key=lambda i: (ends[i], i))[:groups]
        rollout = ends[order[-1]]
        trained = [episode.tokens for i in order for episode in drawn[i]]
        update = sum(trained) * machine.train_s / gpus
        busy += sum(min(end, rollout) - begin for begin, end in spans if begin < rollout)
        room += rollout * gpus * machine.slots
        total, learning = total + rollout + update + machine.sync_s, learning + update
        kept, kept_count = kept + sum(trained), kept_count + len(trained)
        every, every_count = every + sum(e.tokens for g in drawn for e in g), every_count + sum(map(len, drawn))
    learner_idle = machine.sync_s * steps / (learning + machine.sync_s * steps)
    return Outcome(total / steps, 1 - busy / room, learner_idle, 0.0, 0, (kept / kept_count) / (every / every_count))


class Asynchronous:
    """Engines and learner have GPUs of their own; groups are begun and taken by the rule of rollout.max_staleness:
    at step t those up to step t + max_staleness are under way, and the oldest finished ones are taken, unless that left
    more old ones behind than later steps can take in time.
    """

    def __init__(self, draw: Draw, machine: Machine, *, engines: int, learners: int, groups: int, max_staleness: int):
        self.draw, self.machine, self.learners, self.groups = draw, machine, learners, groups
        self.max_staleness, self.slots = max_staleness, engines * machine.slots
        self.now = self.busy = 0.0
        self.version = self.next = 0
        self.open: Counter[int] = Counter()  # groups not taken, by the version they began with
        self.ended: Counter[int] = Counter()  # those of them that have ended
        self.queue: deque[tuple[int, Episode]] = deque()
        self.running: list[tuple[float, int]] = []  # (end, group)
        self.begun: dict[int, list[int]] = {}  # group: [version, episodes that still play]
        self.tokens: dict[int, float] = {}

    def play(self, steps: int, warm_up: int) -> Outcome:
        """Means over `steps` steps after the warm-up."""
        ages, learning, start, busy = [], 0.0, 0.0, 0.0
        for step in range(1, warm_up + steps + 1):
            if step == warm_up + 1:
                start, busy, learning, ages = self.now, self.busy, 0.0, []
            while self.next < (step + self.max_staleness) * self.groups:
                self._begin()
            while (taken := self._finished()) is None:
                self._advance(self.running[0][0])
            versions = [self.begun.pop(number)[0] for number in taken]
            self.open, self.ended = self.open - Counter(versions), self.ended - Counter(versions)
            ages += [self.version - version for version in versions]
            update = sum(self.tokens.pop(number) for number in taken) * self.machine.train_s / self.learners
            self._advance(self.now + update)
            learning += update
            self._pause(self.machine.sync_s)
            self.version += 1
        took = self.now - start
        # What is still running counts by the time it has run, on both ends of the window alike.
        idle = 1 - (self.busy - busy) / (took * self.slots)
        return Outcome(took / steps, idle, 1 - learning / took, sum(ages) / len(ages), max(ages), 1.0)

    def _begin(self) -> None:
        episodes = self.draw()
        self.begun[self.next] = [self.version, len(episodes)]
        self.open[self.version] += 1
        self.tokens[self.next] = sum(episode.tokens for episode in episodes)
        self.queue += [(self.next, episode) for episode in episodes]
        self.next += 1
        self._fill()

    def _fill(self) -> None:
        while self.queue and len(self.running) < self.slots:
            number, episode = self.queue.popleft()
            heapq.heappush(self.running, (self.now + episode.seconds, number))

    def _advance(self, until: float) -> None:
        """Let the engines work until then."""
        while self.running and self.running[0][0] <= until:
            end, number = heapq.heappop(self.running)
            self.busy += (end - self.now) * (len(self.running) + 1)
            self.now = end
            self.begun[number][1] -= 1
            self.ended[self.begun[number][0]] += not self.begun[number][1]
            self._fill()
        self.busy += (until - self.now) * len(self.running)
        self.now = until

    def _pause(self, seconds: float) -> None:
        """Generation stands still while weights arrive."""
        self.running = [(end + seconds, number) for end, number in self.running]
        self.now += seconds

    def _finished(self) -> list[int] | None:
        """The oldest groups that ended, as many as a step takes; None while that is against the rule."""
        if sum(self.ended.values()) < self.groups:
            return None
        wanted, left = self.groups, 0
        for version in sorted(self.open):
            taken = min(wanted, self.ended[version])
            wanted, left = wanted - taken, left + self.open[version] - taken
            if left > self.groups * (version + self.max_staleness - self.version):
                return None
        return [number for number, (_, playing) in self.begun.items() if not playing][: self.groups]


def episodes_of(run: Path) -> list[tuple[int, int]]:
    """(reply tokens, turns) of every episode in a run's trajectory files of training steps."""
    files = sorted((run / "trajectories").glob("step-*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    if not lines:
        raise SystemExit(f"{run}: no trajectories/step-*.jsonl; a run writes them with run.trajectories_every above 0")
    return [(sum(turn["tokens"] for turn in line["turns"]), len(line["turns"])) for line in lines if line["turns"]]


def quantile(points: Sequence[tuple[float, float]], share: float) -> float:
    """Between given quantiles (percent, value), linear."""
    for (low, first), (high, second) in zip(points[:-1], points[1:], strict=True):
        if share * 100 <= high:
            return first + (second - first) * (share * 100 - low) / (high - low)
    return points[-1][1]


def table(options: argparse.Namespace, draw_one: Callable[[random.Random], Episode]) -> list[dict[str, object]]:
    """Every schedule on every number of GPUs, from the same episodes."""
    rows = []
    machine = Machine(options.slots, options.train_ms / 1e3, options.sync_s)
    for gpus in options.gpus:
        groups = max(1, round(gpus * options.groups_per_gpu))

        def outcome(name: str, play: Callable[[Draw], Outcome], gpus: int = gpus) -> None:
            source = random.Random(f"{options.seed} {gpus}")
            rows.append(
                {
                    "gpus": gpus,
                    "schedule": name,
                    **asdict(play(lambda: [draw_one(source) for _ in range(options.group_size)])),
                }
            )

        common = {"gpus": gpus, "groups": groups, "steps": options.steps}
        for extra in (0.0, *EXTRA):
            name = f"over-issued by {extra:.0%}" if extra else "synchronous"
            outcome(name, lambda draw, e=extra, c=common: over_issued(draw, machine, extra=e, **c))
        for learners in sorted({min(gpus - 1, max(1, round(gpus * share))) for share in SHARES}):
            for k in STALENESS:
                split = {"engines": gpus - learners, "learners": learners, "groups": groups, "max_staleness": k}
                name = f"max_staleness={k}, {learners} learn"
                outcome(name, lambda draw, s=split: Asynchronous(draw, machine, **s).play(options.steps, STALENESS[-1]))
    return rows


def advice(rows: list[dict[str, object]]) -> str:
    """The fastest schedule, and the least stale one that takes at most 5 % longer."""
    fair = [row for row in rows if row["length"] >= FAIR]
    best = min(row["step_s"] for row in fair)
    good = min((row for row in fair if row["step_s"] <= 1.05 * best), key=lambda r: (r["staleness"], r["step_s"]))
    synchronous = rows[0]["step_s"]
    return f"{good['gpus']} GPUs: {good['schedule']}, {synchronous / good['step_s']:.2f} x the synchronous schedule"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="run directory")
    parser.add_argument("--quantiles", nargs="+", default=["0:60", "50:300", "90:900", "99:2500", "100:4000"])
    parser.add_argument("--turns", type=float, default=6.0, help="turns of an episode, with --quantiles")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 1024])
    parser.add_argument("--groups-per-gpu", type=float, default=4.0)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--slots", type=int, default=32, help="sequences that an engine GPU decodes at a time")
    parser.add_argument("--token-ms", type=float, default=15.0, help="of one decoding pass")
    parser.add_argument("--env-ms", type=float, default=50.0, help="of one environment step")
    parser.add_argument("--train-ms", type=float, default=0.4, help="one GPU's, for a reply token")
    parser.add_argument("--sync-s", type=float, default=2.0, help="generation stands still for new weights")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    measured = episodes_of(options.run) if options.run else None
    points = [tuple(map(float, point.split(":"))) for point in options.quantiles]

    def draw_one(source: random.Random) -> Episode:
        tokens, turns = source.choice(measured) if measured else (quantile(points, source.random()), options.turns)
        return Episode(tokens * options.token_ms / 1e3 + turns * options.env_ms / 1e3, tokens)

    rows = table(options, draw_one)
    print("| GPUs | schedule | step s | rollout idle | learner idle | staleness mean | largest | length kept |")
    print("|---" * 8 + "|")
    for row in rows:
        idle = f"{row['rollout_idle']:.0%} | {row['learner_idle']:.0%} | {row['staleness']:.2f}"
        print(f"| {row['gpus']} | {row['schedule']} | {row['step_s']:.1f} | {idle} | {row['staleness_max']} | ", end="")
        print(f"{row['length']:.2f} |")
    for gpus in options.gpus:
        print(advice([row for row in rows if row["gpus"] == gpus]))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
