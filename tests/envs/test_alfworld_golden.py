"""ALFWorld's real games: recorded episodes of the true engine, every split, the expert, both grammars, its files."""

from __future__ import annotations

import importlib.util
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from spearrl.envs import make
from spearrl.envs.alfworld import ALFWorld
from spearrl.envs.alfworld.generate import ABLE, HOLDS, ROOMS
from spearrl.errors import ConfigError
from spearrl.types import Action, Task
from tests.support.shared_data import golden_lines, read_lines, shared

COUNTS = {  # docs of the benchmark: games, and games a task type
    "train": (3553, [790, 308, 650, 459, 533, 813]),
    "valid_seen": (140, [35, 13, 27, 16, 25, 24]),
    "valid_unseen": (134, [24, 18, 31, 23, 21, 17]),
}


@pytest.fixture(scope="module")
def data() -> str:
    return str(shared("data/alfworld"))


@pytest.fixture(scope="module")
def transcripts() -> list[dict[str, Any]]:
    return [json.loads(line) for line in golden_lines("alfworld_transcripts.jsonl")]


def task_of(name: str) -> Task:
    return Task(name, name.partition("/")[0])


def expert_steps(environment: ALFWorld, task: Task) -> int:
    """Steps in which the expert wins; a failing assertion where it does not."""
    environment.reset(task, 0)
    for number in range(1, environment.max_turns + 1):
        outcome = environment.step(Action(environment.expert()))
        if outcome.terminated:
            assert outcome.reward == 10.0 and outcome.info["success"] is True
            return number
    raise AssertionError(f"the expert does not win {task.id}")


def test_every_recorded_step_is_the_engines(data, transcripts):
    environment, steps = make("alfworld", data=data), 0
    for transcript in transcripts:
        for episode in transcript["episodes"]:
            first = environment.reset(task_of(transcript["id"]), 0)
            assert (first.text, list(first.admissible)) == (episode["initial_obs"], episode["initial_admissible"]), (
                transcript["id"]
            )
            for step in episode["steps"]:
                outcome = environment.step(Action(step["action"]))
                shown = outcome.observation
                assert shown.text == step["obs"], (transcript["id"], step["action"])
                assert list(shown.admissible) == step["admissible"], (transcript["id"], step["action"])
                assert (outcome.reward, outcome.terminated) == (10.0 * step["won"], step["done"]), (
                    transcript["id"],
                    step["action"],
                )
                assert shown.anchor == step["obs"] and step["score"] == int(step["won"])
                steps += 1
    assert (len(transcripts), steps) == (115, 2703)


def test_the_experts_plans_are_as_short_as_the_planners(data, transcripts):
    environment = make("alfworld", data=data)
    assert [expert_steps(environment, task_of(t["id"])) for t in transcripts] == [
        len(t["expert_plan"]) for t in transcripts
    ]


@pytest.mark.parametrize(("split", "every"), [("train", 25), ("valid_seen", 1), ("valid_unseen", 1)])
def test_splits_are_the_benchmarks_and_the_expert_wins(data, split, every):
    environment = make("alfworld", data=data)
    tasks = environment.tasks(split)
    types = Counter(task.data["stratum"] for task in tasks)
    order = ["pick_and_place_simple", "look_at_obj_in_light"]
    order += [f"pick_{way}_then_place_in_recep" for way in ("clean", "heat", "cool")] + ["pick_two_obj_and_place"]
    assert (len(tasks), [types[name] for name in order]) == COUNTS[split]
    assert all(task.id.startswith(f"{split}/{task.data['stratum']}-") for task in tasks)
    assert max(expert_steps(environment, task) for task in tasks[::every]) <= 12


def test_the_old_grammar_puts_and_names_places(data):
    environment = make("alfworld", data=data, grammar="2.1.1")
    task = next(t for t in environment.tasks("valid_unseen") if t.data["stratum"] == "pick_and_place_simple")
    first = environment.reset(task, 0)
    assert "help" not in first.admissible and "put mug 1 in/on desk 2" in environment.messages(first, 0)[0].text
    texts = []
    while command := environment.expert():
        texts.append(environment.step(Action(command)).observation.text)
    assert (
        texts[0].startswith("You arrive at loc ")
        and texts[-1].startswith("You put the ")
        and " in/on the " in texts[-1]
    )


def write_tree(folder: Path, record: dict[str, Any], grammar: str) -> Path:
    """A game in the original's layout, as ALFWorld stores it."""
    path = folder.joinpath(*record["id"].split("/"), "game.tw-pddl")
    path.parent.mkdir(parents=True)
    text = grammar.replace("UNKNOWN GOAL", record["task_desc"])
    path.write_text(
        json.dumps(
            {
                "pddl_domain": "",
                "grammar": text,
                "pddl_problem": record["pddl_problem"],
                "solvable": True,
                "walkthrough": [],
            }
        )
    )
    return path


def test_the_originals_files_play_the_same(data, transcripts, tmp_path):
    lines = read_lines(shared("data/alfworld/valid_unseen.jsonl.xz"))
    records = {record["id"]: record for record in map(json.loads, lines)}
    old = next(iter(json.loads(shared("data/alfworld/logic_2.1.1.json").read_text())["grammars"].values()))
    new = shared("data/alfworld/alfred.twl2").read_text()
    transcript = next(t for t in transcripts if t["id"] in records)
    path = write_tree(tmp_path / "new", records[transcript["id"]], new)
    write_tree(
        tmp_path / "new", records[transcript["id"]] | {"id": "valid_unseen/pick_two_obj_and_place-Sliced-1/trial"}, new
    )
    (tmp_path / "new" / "train").mkdir()
    tree = make("alfworld", data=tmp_path / "new")
    (task,) = tree.tasks("valid_unseen")
    assert (task.id, task.data["stratum"]) == (transcript["id"], transcript["task_type"])
    with pytest.raises(ConfigError, match="no games of the split train"):
        tree.tasks("train")
    single = make("alfworld", data=path)
    for environment in (tree, single):
        (task,) = environment.tasks("valid_unseen")
        assert environment.reset(task, 0).text == transcript["episodes"][0]["initial_obs"] and expert_steps(
            environment, task
        )
    ancient = make("alfworld", data=write_tree(tmp_path / "old", records[transcript["id"]], old))
    assert "help" not in ancient.reset(ancient.tasks("train")[0], 0).admissible
    assert (
        "help"
        in make("alfworld", data=ancient.options.data, grammar="0.4.2").reset(ancient.tasks("train")[0], 0).admissible
    )


@pytest.mark.parametrize("damage", ["no goal", "sliced", "unknown receptacle", "not json", "cut"])
def test_broken_games_are_refused_with_a_hint(data, tmp_path, damage):
    record = json.loads(read_lines(shared("data/alfworld/valid_unseen.jsonl.xz"))[0])
    problem = record["pddl_problem"]
    changes = {
        "no goal": problem[: problem.index("(:goal")],
        "unknown receptacle": problem.replace("(inReceptacle ", "(inReceptacle Nothing ", 1),
    }
    changes["sliced"] = (
        problem[: problem.index("(:goal")]
        + "(:goal (and (objectType ?o AppleType) (receptacleType ?r DeskType) (isSliced ?o)))"
    )
    line = json.dumps(record | {"pddl_problem": changes.get(damage, problem)})
    packed = lzma.compress((line if damage != "not json" else line.replace('"id"', "id")).encode())
    (tmp_path / "train.jsonl.xz").write_bytes(packed[:-40] if damage == "cut" else packed)
    environment = make("alfworld", data=tmp_path)
    with pytest.raises(ConfigError, match="fix: ") as caught:
        environment.reset(environment.tasks("train")[0], 0)
    assert "train.jsonl.xz" in caught.value.where


def test_generated_rooms_keep_to_what_alfred_allows(data):
    """Where things may stand, and what can be done with them: never more than the real games have."""
    allowed, able = set(), {}
    environment = make("alfworld", data=data)
    for task in (
        *environment.tasks("valid_seen"),
        *environment.tasks("valid_unseen"),
        *environment.tasks("train")[::40],
    ):
        game = environment._games.game(task)
        allowed |= {(r, o) for r, things in zip(game.receptacle_types, game.accepts, strict=True) for o in things}
        for name, can in zip(game.object_types, game.able, strict=True):
            able.setdefault(name.removesuffix("Type"), set()).update(can)
    assert {(f"{r}Type", f"{o}Type") for r, things in HOLDS.items() for o in things} <= allowed
    words = {
        "cleanable": "clean",
        "heatable": "hot",
        "coolable": "cool",
        "sliceable": "slice",
        "isReceptacleObject": "box",
    }
    assert all(words[predicate] in able[o] for predicate, things in ABLE.items() for o in things)
    assert all("take" in able[o] for _, _, things in ROOMS.values() for o in things)


@pytest.mark.skipif(importlib.util.find_spec("alfworld") is None, reason="the extra `alfworld` is not installed")
def test_the_original_engine_says_the_same(data, transcripts):
    import random

    chosen = [
        next(t for t in transcripts if t["task_type"] == kind) for kind in sorted({t["task_type"] for t in transcripts})
    ]
    native, original = make("alfworld", data=data), make("alfworld", data=data, backend="textworld")
    for transcript in chosen:
        task, draw = task_of(transcript["id"]), random.Random(transcript["id"])
        shown = native.reset(task, 0)
        assert original.reset(task, 0) == shown
        for _ in range(40):
            command = draw.choice(
                (*shown.admissible, *(c for c in shown.admissible if not c.startswith("go to ")), "fly away")
            )
            outcome = native.step(Action(command))
            assert original.step(Action(command)) == outcome, (task.id, command)
            shown = outcome.observation
            if outcome.terminated:
                break
    original.close()
