"""Where games come from: packed splits, the original json_2.1.1 tree, one game file, or the generator."""

from __future__ import annotations

import json
import lzma
import random
import re
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from spearrl.envs.alfworld.game import Game, compile_game, parse_problem
from spearrl.envs.alfworld.generate import KINDS, household
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


class Games:
    """Read-only and shared by all slots. A split is listed at its first use, a game compiled at its first reset."""

    name = "the generated households"

    def __init__(self) -> None:
        self._splits: dict[str, tuple[Task, ...]] = {}
        self._listed: set[tuple[str, str]] = set()
        self._compiled = lru_cache(maxsize=CACHED)(self._compile)

    def tasks(self, split: str) -> tuple[Task, ...]:
        """The tasks of one of SPLITS."""
        if split not in self._splits:
            self._splits[split] = tuple({task.id: task for task in self._list(split)}.values())
            self._listed.update((split, task.id) for task in self._splits[split])
        return self._splits[split]

    def game(self, task: Task) -> Game:
        """The compiled game of a task. Raises ConfigError for one that is not there."""
        if task.split in SPLITS:
            self.tasks(task.split)
        if (task.split, task.id) not in self._listed:
            reason = f"no game {task.id!r} in {self.name}"
            raise ConfigError(reason, where="env alfworld", hint="take tasks from tasks(split)")
        return self._compiled(task.split, task.id)

    def source(self, task: Task) -> dict[str, Any]:
        """What the original engine needs: `pddl_problem` and `task_desc`, or a `file`."""
        reason = "the original engine cannot play generated households"
        raise ConfigError(reason, where="env.options.backend", hint=f"set {WHERE}")

    def _list(self, split: str) -> Iterator[Task]:
        raise NotImplementedError

    def _compile(self, split: str, name: str) -> Game:
        raise NotImplementedError


class PackedGames(Games):
    """`<split>.jsonl.xz` (or .jsonl), one game a line: read once, kept compressed."""

    def __init__(self, folder: Path):
        super().__init__()
        self.name, self._folder = str(folder), folder
        self._packed: dict[str, tuple[str, bytes]] = {}

    def source(self, task: Task) -> dict[str, Any]:
        self.game(task)
        where, packed = self._packed[task.id]
        return _record(zlib.decompress(packed), where, ("pddl_problem", "task_desc"))

    def _list(self, split: str) -> Iterator[Task]:
        files = [self._folder / f"{split}{suffix}" for suffix in (".jsonl.xz", ".jsonl")]
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            raise ConfigError(f"no {split}.jsonl.xz in {self._folder}", where=WHERE, hint=HINT)
        try:
            with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    where, end = f"{path}:{number}", line.find(b'"pddl_problem"')
                    # the long rest of the line is parsed when the game is played
                    head = _record(line[:end].rstrip(b", ") + b"}" if end > 1 else line, where, ("id", "task_type"))
                    self._packed[head["id"]] = (where, zlib.compress(line, 1))
                    yield Task(head["id"], split, {"stratum": head["task_type"]})
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise _unreadable(path, error) from error

    def _compile(self, split: str, name: str) -> Game:
        where, packed = self._packed[name]
        record = _record(zlib.decompress(packed), where, ("pddl_problem", "task_desc"))
        facts, goal = parse_problem(record["pddl_problem"], where)
        return compile_game(facts, goal, where, record["task_desc"])


class TreeGames(Games):
    """The original's <split>/<task>/<trial>/game.tw-pddl, or one such file.

    The filter is the original's: no "movable", no "Sliced", and solvable.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.name, self._path = str(path), path
        self._files: dict[str, Path] = {}

    def source(self, task: Task) -> dict[str, Any]:
        self.game(task)
        return {"file": str(self._files[task.id])}

    def _list(self, split: str) -> Iterator[Task]:
        if self._path.is_file():
            name = f"{split}/{self._path.parent.name}"
            self._files[name] = self._path
            goal = self._compiled(split, name).goal
            kinds = (kind for kind, (sort, state, *_) in KINDS.items() if (sort, state) == (goal.kind, goal.state))
            yield Task(name, split, {"stratum": next(kinds, self._path.parent.parent.name.partition("-")[0])})
            return
        for path in sorted((self._path / split).glob("*/*/game.tw-pddl")):
            kind, trial = path.parent.parent.name, path.parent.name
            if "movable" not in kind and "Sliced" not in kind and SOLVABLE.search(_read(path)):
                self._files[f"{split}/{kind}/{trial}"] = path
                yield Task(f"{split}/{kind}/{trial}", split, {"stratum": kind.partition("-")[0]})

    def _compile(self, split: str, name: str) -> Game:
        path = self._files[name]
        record = _record(_read(path).encode(), str(path), ("pddl_problem", "grammar"))
        facts, goal = parse_problem(record["pddl_problem"], str(path))
        task = TASK_LINE.search(record["grammar"])
        if task is None:
            reason = 'its grammar has no "Your task is to: …"'
            raise ConfigError(reason, where=str(path), hint="give an unchanged game.tw-pddl file")
        return compile_game(facts, goal, str(path), task[1], old="put {o} in/on {r}" in record["grammar"])


class Households(Games):
    """Generated games, the six kinds in turn. valid_seen shares its rooms with train, valid_unseen does not."""

    def __init__(self, seed: int, size: str, train: int, valid: int):
        super().__init__()
        self._seed, self._size, self._counts = seed, size, {"train": train, "valid_seen": valid, "valid_unseen": valid}

    def _list(self, split: str) -> Iterator[Task]:
        kinds = tuple(KINDS)
        for i in range(self._counts[split]):
            kind = kinds[i % len(kinds)]
            yield Task(f"{split}/{kind}-{i}", split, {"stratum": kind})

    def _compile(self, split: str, name: str) -> Game:
        kind, _, number = name.rpartition("/")[2].rpartition("-")
        layout = LAYOUTS[split][int(number) // len(KINDS) % len(LAYOUTS[split])]
        draw = random.Random(derive(self._seed, "household", name))
        facts, goal, text = household(kind, layout, self._size, draw, self._seed)
        return compile_game(facts, goal, name, text)


generated_games = lru_cache(maxsize=8)(Households)


@lru_cache(maxsize=8)
def open_games(data: str) -> Games:
    """The games below a path, once per process. Raises ConfigError where there are none."""
    path = Path(data).expanduser()
    if path.is_file() or any((path / split).is_dir() for split in SPLITS):
        return TreeGames(path)
    if any((path / f"{split}{suffix}").is_file() for split in SPLITS for suffix in (".jsonl.xz", ".jsonl")):
        return PackedGames(path)
    raise ConfigError(f"no ALFWorld games in {path}", where=WHERE, hint=HINT)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"cannot be read: {error}", where=str(path), hint="copy the file again")


def _record(text: bytes, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object with text under `keys`."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"not a game: {error}", where=where, hint=HINT) from error
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
        raise ConfigError(f"not a game: it needs {', '.join(keys)}", where=where, hint=HINT)
    return record
