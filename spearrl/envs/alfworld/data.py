"""Where games come from: packed splits, the original json_2.1.1 tree, one game file, or the generator."""

from __future__ import annotations

import json
import lzma
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from spearrl.envs.alfworld.game import Game, compile_game, parse_problem
from spearrl.envs.alfworld.generate import KINDS, household
from spearrl.errors import ConfigError
from spearrl.seeds import derive
from spearrl.types import Task

SPLITS = ("train", "valid_seen", "valid_unseen")
HINT = "env.options.data is a folder with train/valid_seen/valid_unseen .jsonl.xz files, ALFWorld's json_2.1.1 folder, or a game.tw-pddl file"
TASK_LINE = re.compile(r"Your task is to: (.*?)\.(?:\\n|\"|\n)")
SOLVABLE = re.compile(r'"solvable":\s*true')
CACHED = 4096  # compiled games held in memory, about 30 KB each
LAYOUTS = {"train": range(60), "valid_seen": range(60), "valid_unseen": range(60, 72)}  # generated rooms, in turn


@dataclass(frozen=True, slots=True)
class Entry:
    """A game ready to be played: `task` is the text after "Your task is to: "; `old` the grammar of the 2.1.1 files."""

    game: Game
    task: str
    old: bool = False


class Games:
    """Read-only and shared by all slots. A split is listed at its first use, a game compiled at its first reset."""

    name = "the generated households"

    def __init__(self) -> None:
        self._splits: dict[str, dict[str, Task]] = {}
        self._lists: dict[str, tuple[Task, ...]] = {}
        self._entries = lru_cache(maxsize=CACHED)(self._compile)

    def tasks(self, split: str) -> tuple[Task, ...]:
        """The tasks of one of SPLITS."""
        if split not in self._lists:
            self._splits[split] = {task.id: task for task in self._index(split)}
            self._lists[split] = tuple(self._splits[split].values())
        return self._lists[split]

    def entry(self, task: Task) -> Entry:
        """The compiled game of a task. Raises ConfigError for one that is not there."""
        if task.split in SPLITS:
            self.tasks(task.split)
        if task.id not in self._splits.get(task.split, {}):
            raise ConfigError(
                f"no game {task.id!r} in {self.name}", where="env alfworld", hint="take tasks from tasks(split)"
            )
        return self._entries(task.split, task.id)

    def source(self, task: Task) -> dict[str, Any]:
        """What the original engine needs: `pddl_problem` and `task_desc`, or a `file`."""
        raise ConfigError(
            "the original engine cannot play generated households",
            where="env.options.backend",
            hint="set env.options.data",
        )

    def _index(self, split: str) -> Iterator[Task]:
        raise NotImplementedError

    def _compile(self, split: str, name: str) -> Entry:
        raise NotImplementedError


class PackedGames(Games):
    """`<split>.jsonl.xz` (or .jsonl), one game a line: read once, kept compressed."""

    def __init__(self, folder: Path):
        super().__init__()
        self.name, self._folder = str(folder), folder
        self._packed: dict[str, tuple[str, bytes]] = {}

    def source(self, task: Task) -> dict[str, Any]:
        self.entry(task)
        where, packed = self._packed[task.id]
        return _record(zlib.decompress(packed), where, ("pddl_problem", "task_desc"))

    def _index(self, split: str) -> Iterator[Task]:
        path = next(
            (p for p in (self._folder / f"{split}.jsonl.xz", self._folder / f"{split}.jsonl") if p.is_file()), None
        )
        if path is None:
            raise ConfigError(f"no {split}.jsonl.xz in {self._folder}", where="env.options.data", hint=HINT)
        try:
            with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    end = line.find(b'"pddl_problem"')  # the long rest of the line is parsed when the game is played
                    found = _record(
                        line[:end].rstrip(b", ") + b"}" if end > 1 else line, f"{path}:{number}", ("id", "task_type")
                    )
                    self._packed[found["id"]] = (f"{path}:{number}", zlib.compress(line, 1))
                    yield Task(found["id"], split, {"stratum": found["task_type"]})
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise ConfigError(f"cannot be read: {error}", where=str(path), hint="copy the file again") from error

    def _compile(self, split: str, name: str) -> Entry:
        where, packed = self._packed[name]
        found = _record(zlib.decompress(packed), where, ("pddl_problem", "task_desc"))
        facts, goal = parse_problem(found["pddl_problem"], where)
        return Entry(compile_game(facts, goal, where), found["task_desc"])


class TreeGames(Games):
    """The original's <split>/<task>/<trial>/game.tw-pddl by its own filter (no "movable", no "Sliced", solvable), or one such file."""

    def __init__(self, path: Path):
        super().__init__()
        self.name, self._path = str(path), path
        self._files: dict[str, Path] = {}

    def source(self, task: Task) -> dict[str, Any]:
        self.entry(task)
        return {"file": str(self._files[task.id])}

    def _index(self, split: str) -> Iterator[Task]:
        found = [self._path] if self._path.is_file() else sorted((self._path / split).glob("*/*/game.tw-pddl"))
        for path in found:
            kind, trial = path.parent.parent.name, path.parent.name
            if path != self._path and ("movable" in kind or "Sliced" in kind or SOLVABLE.search(_read(path)) is None):
                continue
            name = f"{split}/{trial}" if path == self._path else f"{split}/{kind}/{trial}"
            self._files[name] = path
            goal = self._entries(split, name).game.goal if path == self._path else None
            known = [
                way for way, (sort, state, *_) in KINDS.items() if goal and (sort, state) == (goal.kind, goal.state)
            ]
            yield Task(name, split, {"stratum": known[0] if known else kind.partition("-")[0]})

    def _compile(self, split: str, name: str) -> Entry:
        path = self._files[name]
        found = _record(_read(path).encode(), str(path), ("pddl_problem", "grammar"))
        facts, goal = parse_problem(found["pddl_problem"], str(path))
        task = TASK_LINE.search(found["grammar"])
        if task is None:
            raise ConfigError(
                'its grammar has no "Your task is to: …"', where=str(path), hint="give an unchanged game.tw-pddl file"
            )
        return Entry(compile_game(facts, goal, str(path)), task[1], old="put {o} in/on {r}" in found["grammar"])


class Households(Games):
    """Generated games: as many as wanted, the six kinds in turn. valid_seen shares its rooms with train; valid_unseen has other ones."""

    def __init__(self, seed: int, size: str, train: int, valid: int):
        super().__init__()
        self._seed, self._size, self._count = seed, size, {"train": train, "valid_seen": valid, "valid_unseen": valid}

    def _index(self, split: str) -> Iterator[Task]:
        kinds = tuple(KINDS)
        for i in range(self._count[split]):
            kind = kinds[i % len(kinds)]
            yield Task(f"{split}/{kind}-{i}", split, {"stratum": kind})

    def _compile(self, split: str, name: str) -> Entry:
        kind, _, number = name.rpartition("/")[2].rpartition("-")
        layouts = LAYOUTS[split]
        draw = random.Random(derive(self._seed, "household", name))
        facts, goal, text = household(
            kind, layouts[int(number) // len(KINDS) % len(layouts)], self._size, draw, self._seed
        )
        return Entry(compile_game(facts, goal, name), text)


generated_games = lru_cache(maxsize=8)(Households)


@lru_cache(maxsize=8)
def open_games(data: str) -> Games:
    """The games below a path, once per process. Raises ConfigError where there are none."""
    path = Path(data).expanduser()
    if path.is_file() or any((path / split).is_dir() for split in SPLITS):
        return TreeGames(path)
    if any((path / f"{split}{suffix}").is_file() for split in SPLITS for suffix in (".jsonl.xz", ".jsonl")):
        return PackedGames(path)
    raise ConfigError(f"no ALFWorld games in {path}", where="env.options.data", hint=HINT)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path), hint="copy the file again") from error


def _record(text: bytes, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object with text under `keys`."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"not a game: {error}", where=where, hint=HINT) from error
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in keys):
        raise ConfigError(f"not a game: it needs {', '.join(keys)}", where=where, hint=HINT)
    return found
