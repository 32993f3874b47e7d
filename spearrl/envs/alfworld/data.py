"""Where games come from: packed splits, the original json_2.1.1 tree, one game file, or the generator."""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from spearrl.envs.alfworld.game import Game, Source, compile_game, parse_problem
from spearrl.envs.alfworld.generate import KINDS, household
from spearrl.envs.text.records import read_records
from spearrl.errors import ConfigError
from spearrl.seeds import derive
from spearrl.types import Task

SPLITS = ("train", "valid_seen", "valid_unseen")
WHERE = "env.options.data"
HINT = (
    f"{WHERE} is a folder with train/valid_seen/valid_unseen .jsonl.xz files, ALFWorld's json_2.1.1 folder, "
    "or a game.tw-pddl file"
)
TASK_LINE = re.compile(r"Your task is to: (.*?)\.(?:\\n|\"|\n)")
SOLVABLE = re.compile(r'"solvable":\s*true')
CACHED = 4096  # compiled games held in memory, about 30 KB each
LAYOUTS = {"train": range(60), "valid_seen": range(60), "valid_unseen": range(60, 72)}  # generated rooms, in turn


Listing = Iterator[tuple[Task, Callable[[], Source]]]


class Games:
    """Read-only and shared by all slots. A split is listed at its first use, a game compiled at its first reset.

    Args:
        name: of the place they come from, for errors.
        listing: the tasks of a split, each with what loads its game.
    """

    def __init__(self, name: str, listing: Callable[[str], Listing]):
        self.name = name
        self._listed = lru_cache(lambda split: {task.id: (task, load) for task, load in listing(split)})
        self.tasks = lru_cache(lambda split: tuple(task for task, _ in self._listed(split).values()))
        self._compiled = lru_cache(maxsize=CACHED)(self._compile)

    def source(self, task: Task) -> Source:
        """What a task's game is made from. Raises ConfigError for one that is not there."""
        listed = self._listed(task.split) if task.split in SPLITS else {}
        if task.id not in listed:
            reason = f"no game {task.id!r} in {self.name}"
            raise ConfigError(reason, where="env alfworld", hint="take tasks from tasks(split)")
        return listed[task.id][1]()

    def game(self, task: Task) -> Game:
        """The compiled game of a task. Raises ConfigError for one that is not there."""
        return self._compiled(task.split, task.id)

    def _compile(self, split: str, name: str) -> Game:
        return compile_game(self.source(Task(name, split)))


def _packed_games(folder: Path, split: str) -> Listing:
    """`<split>.jsonl.xz` (or .jsonl), one game a line: read once, kept compressed."""
    path = next((file for suffix in (".jsonl.xz", ".jsonl") if (file := folder / f"{split}{suffix}").is_file()), None)
    if path is None:
        raise ConfigError(f"no {split}.jsonl.xz in {folder}", where=WHERE, hint=HINT)
    for number, record in read_records(path, layout="a game of ALFWorld on each line"):
        where = f"{path}:{number}"
        _check(record, where, "id", "task_type", "pddl_problem", "task_desc")
        game = {name: record[name] for name in ("pddl_problem", "task_desc")}
        load = partial(_unpacked, zlib.compress(json.dumps(game).encode(), 1), where)
        yield Task(record["id"], split, {"stratum": record["task_type"]}), load


def _unpacked(packed: bytes, where: str) -> Source:
    record = json.loads(zlib.decompress(packed))
    return Source(*parse_problem(record["pddl_problem"], where), record["task_desc"], where, record=record)


def _tree_games(folder: Path, split: str) -> Listing:
    """The original's <split>/<task>/<trial>/game.tw-pddl, by its filter: no "movable", no "Sliced", and solvable."""
    for path in sorted((folder / split).glob("*/*/game.tw-pddl")):
        kind, trial = path.parent.parent.name, path.parent.name
        if "movable" not in kind and "Sliced" not in kind and SOLVABLE.search(_read(path)):
            yield Task(f"{split}/{kind}/{trial}", split, {"stratum": kind.partition("-")[0]}), partial(_game_file, path)


def _single_game(path: Path, split: str) -> Listing:
    goal = _game_file(path).goal
    kinds = (kind for kind, (sort, state, *_) in KINDS.items() if (sort, state) == (goal.kind, goal.state))
    stratum = next(kinds, path.parent.parent.name.partition("-")[0])
    yield Task(f"{split}/{path.parent.name}", split, {"stratum": stratum}), partial(_game_file, path)


def _game_file(path: Path) -> Source:
    try:
        record = json.loads(_read(path))
    except ValueError as error:
        raise ConfigError(f"not a game: {error}", where=str(path), hint=HINT) from error
    _check(record, str(path), "pddl_problem", "grammar")
    task = TASK_LINE.search(record["grammar"])
    if task is None:
        reason = 'its grammar has no "Your task is to: …"'
        raise ConfigError(reason, where=str(path), hint="give an unchanged game.tw-pddl file")
    old = "put {o} in/on {r}" in record["grammar"]
    return Source(*parse_problem(record["pddl_problem"], str(path)), task[1], str(path), old, record)


@lru_cache(maxsize=8)
def generated_games(seed: int, size: str, train: int, valid: int) -> Games:
    """Generated games, the six kinds in turn. valid_seen shares its rooms with train, valid_unseen does not."""
    kinds, counts = tuple(KINDS), {"train": train, "valid_seen": valid, "valid_unseen": valid}

    def listing(split: str) -> Listing:
        for i in range(counts[split]):
            kind = kinds[i % len(kinds)]
            name, layout = f"{split}/{kind}-{i}", LAYOUTS[split][i // len(kinds) % len(LAYOUTS[split])]
            yield Task(name, split, {"stratum": kind}), partial(load, name, kind, layout)

    def load(name: str, kind: str, layout: int) -> Source:
        draw = random.Random(derive(seed, "household", name))
        return Source(*household(kind, layout, size, draw, seed), name)

    return Games("the generated households", listing)


@lru_cache(maxsize=8)
def open_games(data: str) -> Games:
    """The games below a path, once per process. Raises ConfigError where there are none."""
    path = Path(data).expanduser()
    if path.is_file():
        return Games(str(path), partial(_single_game, path))
    if any((path / split).is_dir() for split in SPLITS):
        return Games(str(path), partial(_tree_games, path))
    if any((path / f"{split}{suffix}").is_file() for split in SPLITS for suffix in (".jsonl.xz", ".jsonl")):
        return Games(str(path), partial(_packed_games, path))
    raise ConfigError(f"no ALFWorld games in {path}", where=WHERE, hint=HINT)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path), hint="copy the file again") from error


def _check(record: Any, where: str, *keys: str) -> None:
    """Raise ConfigError unless it is a JSON object with text under `keys`."""
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
        raise ConfigError(f"not a game: it needs {', '.join(keys)}", where=where, hint=HINT)
