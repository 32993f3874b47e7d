"""The ALFWorld environment on generated households: games, actions, texts, prompts, anchors, expert, hostile input."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter

import pytest

from spearrl.batching.anchors import anchor_id
from spearrl.envs import make
from spearrl.envs.alfworld import ALFWorld
from spearrl.envs.alfworld.compact import opening
from spearrl.envs.alfworld.data import LAYOUTS, SPLITS
from spearrl.envs.alfworld.generate import KINDS
from spearrl.envs.alfworld.world import CHANGING, World
from spearrl.errors import ConfigError, ContractError
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task

INTRO = re.compile(
    r"-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room\. Looking quickly around you, "
    r"you see (a \w+ \d+, )+and a \w+ \d+\."
    r"\n\nYour task is to: (.*)\."
)
NAMES = r"(nothing|a \w+ \d+|(a \w+ \d+, )+and a \w+ \d+)"
TEXTS = {
    "go": r"You arrive at (\w+ \d+)\. "
    rf"(On the \1, you see {NAMES}|The \1 is closed|The \1 is open\. In it, you see {NAMES})\.",
    "open": rf"You open the (\w+ \d+)\. The \1 is open\. In it, you see {NAMES}\.",
    "close": r"You close the \w+ \d+\.",
    "take": r"You pick up the \w+ \d+ from the \w+ \d+\.",
    "move": r"You move the \w+ \d+ to the \w+ \d+\.",
    "clean": r"You clean the \w+ \d+ using the sinkbasin \d+\.",
    "heat": r"You heat the \w+ \d+ using the microwave \d+\.",
    "cool": r"You cool the \w+ \d+ using the fridge \d+\.",
    "use": r"You turn on the desklamp \d+\.",
    "slice": r"You sliced the \w+ \d+ with the \w+ \d+\.",
    "inventory": r"You are (not carrying anything|carrying: a \w+ \d+)\.",
    "look": r"You are (in the middle of a room\. Looking quickly around you, you see nothing"
    rf"|facing the \w+ \d+\. Next to it, you see {NAMES})\.",
    "examine": r"(On the|The|This is a|There's nothing special about) [a-z ]*\d+"
    rf"(\.| is closed\.|( is open\. In it|\. In it|), you see {NAMES}\.)",
    "help": r"Available commands:\n(  .*\n)+",
}


def compact(**options) -> ALFWorld:
    return ALFWorld(observation="compact", reply="plain", **options)


def play(environment: ALFWorld, task: Task, seed: int = 0) -> tuple[Outcome, list[str]]:
    """An expert episode: its last outcome, and every text shown and said (chat style)."""
    observation, said = environment.reset(task, seed), []
    for turn in range(environment.max_turns):
        reply = environment.format(environment.expert())
        said += [environment.messages(observation, turn)[0].text, reply]
        outcome = environment.step(environment.parse(Reply(reply, (), "stop")))
        observation = outcome.observation
        if outcome.terminated:
            break
    return outcome, said


def room_of(environment: ALFWorld, task: Task) -> tuple[tuple[str, ...], frozenset[int]]:
    game = environment._games.game(task)
    return game.receptacles, game.openable


# generated households


@pytest.mark.parametrize("size", ["small", "large"])
def test_every_generated_game_is_open_at_first_and_won_by_the_expert(size):
    environment = ALFWorld(size=size)
    receptacles = set()
    for split in SPLITS:
        tasks = environment.tasks(split)
        assert Counter(t.data["stratum"] for t in tasks[:198]) == dict.fromkeys(KINDS, 33)
        for task in tasks[:300]:
            game = environment._games.game(task)
            receptacles.add(len(game.receptacles))
            assert not World(game).won()
            outcome, said = play(environment, task)
            assert (outcome.reward, outcome.info["success"]) == (10.0, True) and len(said) <= 2 * 14, task.id
    low, high = (6, 10) if size == "small" else (12, 22)
    assert min(receptacles) >= low and max(receptacles) <= high and len(receptacles) >= 5


def test_households_are_seeded_and_rooms_of_valid_unseen_are_new():
    first, same, other = (ALFWorld(seed=seed, size="small", train_tasks=600) for seed in (3, 3, 4))
    tasks = first.tasks("train")
    assert first._games is same._games and [t.id for t in tasks] == [t.id for t in other.tasks("train")]
    assert [first.reset(t, 0).text for t in tasks[:20]] != [other.reset(t, 0).text for t in tasks[:20]]
    assert first.reset(tasks[7], 0) == same.reset(tasks[7], 1)
    assert LAYOUTS["train"] == LAYOUTS["valid_seen"] and not set(LAYOUTS["train"]) & set(LAYOUTS["valid_unseen"])
    large = ALFWorld(size="large", train_tasks=600)
    rooms = {split: {room_of(large, task) for task in large.tasks(split)} for split in SPLITS}
    assert rooms["valid_seen"] <= rooms["train"] and not rooms["valid_unseen"] & rooms["train"]


def test_splits_and_options_are_checked():
    environment = make("alfworld", train_tasks=7, valid_tasks=2)
    assert [len(environment.tasks(split)) for split in SPLITS] == [7, 2, 2]
    with pytest.raises(ConfigError, match="valid_unseen"):
        environment.tasks("val")
    with pytest.raises(ConfigError, match="env.options.colour"):
        make("alfworld", colour="red")
    with pytest.raises(ConfigError, match="textworld"):
        make("alfworld", backend="textworld")
    with pytest.raises(ConfigError, match="train_tasks"):
        make("alfworld", train_tasks=0)


def test_data_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="fix: env.options.data"):
            make("alfworld", data=path)
    (tmp_path / "train.jsonl").write_text('{"id": "train/x"}\n')
    environment = make("alfworld", data=tmp_path)
    with pytest.raises(ConfigError, match="not a game"):
        environment.tasks("train")
    with pytest.raises(ConfigError, match="no valid_seen"):
        environment.tasks("valid_seen")
    single = tmp_path / "game.tw-pddl"
    single.write_bytes(b'{"solvable": true, "grammar": "\xff"}')
    with pytest.raises(ConfigError, match="game.tw-pddl"):
        make("alfworld", data=single).tasks("train")


def test_the_original_engine_is_asked_for_by_name(tmp_path, monkeypatch):
    from spearrl.envs.alfworld import original

    monkeypatch.setitem(sys.modules, "textworld.envs", None)
    monkeypatch.setitem(sys.modules, "alfworld.info", None)
    with pytest.raises(ConfigError, match=r'pip install "spearrl\[alfworld\]"'):
        original.OriginalEngine({})


# actions and texts


def test_texts_follow_the_grammar_and_commands_do_what_they_say():
    environment, draw, verbs = ALFWorld(size="small"), random.Random(0), Counter()
    for task in environment.tasks("train")[:250]:
        observation = environment.reset(task, 0)
        assert INTRO.fullmatch(observation.text)
        for _ in range(25):
            rare = [
                c for c in observation.admissible if not c.startswith(("go to", "help", "look", "inventory", "examine"))
            ]
            command = draw.choice(rare if rare and draw.random() < 0.7 else observation.admissible)
            outcome = environment.step(Action(command))
            verb = command.split()[0]
            assert re.fullmatch(TEXTS[verb], outcome.observation.text), (command, outcome.observation.text)
            verbs[verb] += 1
            observation = outcome.observation
            if outcome.terminated:
                break
    assert set(verbs) == set(TEXTS) and min(verbs.values()) >= 10, verbs


def test_what_is_admissible():
    environment = ALFWorld(size="small")
    task = next(t for t in environment.tasks("train") if "heat" in t.id)
    first = environment.reset(task, 0)
    assert {"look", "inventory", "help"} <= set(first.admissible) == set(sorted(first.admissible))
    assert all(c.startswith("go to ") for c in set(first.admissible) - {"look", "inventory", "help"})
    there = environment.step(Action("go to microwave 1")).observation
    assert "go to microwave 1" not in there.admissible and {"open microwave 1", "examine microwave 1"} <= set(
        there.admissible
    )
    for impossible in (
        "go to microwave 1",
        "close microwave 1",
        "take sun 1 from sky 1",
        "",
        "Look",
        "go to  fridge 1",
        "put mug 1 in/on desk 1",
    ):
        outcome = environment.step(Action(impossible))
        assert outcome.observation == Observation("Nothing happens.", "Nothing happens.", there.admissible), impossible
        assert (outcome.reward, outcome.terminated, outcome.info) == (0.0, False, {"success": False})
    assert (
        environment.step(Action(" look ")).observation.text
        == "You are facing the microwave 1. Next to it, you see nothing."
    )
    opened = environment.step(Action("open microwave 1")).observation
    assert "close microwave 1" in opened.admissible and "open microwave 1" not in opened.admissible
    hands = None
    while hands is None:
        command = environment.expert()
        after = environment.step(Action(command)).observation
        hands = re.fullmatch(r"You pick up the (\w+ \d+) from the (\w+ \d+)\.", after.text)
    assert not any(c.startswith("take ") for c in after.admissible) and {
        f"examine {hands[1]}",
        f"move {hands[1]} to {hands[2]}",
    } <= set(after.admissible)


def test_heat_and_cold_take_turns_and_the_object_says_so():
    environment = ALFWorld(size="large", train_tasks=600)
    task = next(
        t
        for t in environment.tasks("train")
        if "heat" in t.id and re.search("apple|bread|egg|potato|tomato", environment._games.game(t).task)
    )
    environment.reset(task, 0)
    held, told = "", []
    while not held:
        match = re.match(r"You pick up the (\w+ \d+)", environment.step(Action(environment.expert())).observation.text)
        held = match[1] if match else ""
    clean = [] if held.startswith("bread") else ["go to sinkbasin 1", f"clean {held} with sinkbasin 1"]
    for command in (
        "go to fridge 1",
        f"cool {held} with fridge 1",
        "go to microwave 1",
        f"heat {held} with microwave 1",
        *clean,
    ):
        environment.step(Action(command))
        told.append(environment.step(Action(f"examine {held}")).observation.text)
    assert (
        told[0] == f"There's nothing special about {held}."
        and told[1] == f"This is a cold {held}."
        and told[3] == f"This is a hot {held}."
    )
    assert not clean or told[5] == f"This is a hot and clean {held}."
    assert environment.step(Action("inventory")).observation.text == f"You are carrying: a {held}."


def test_two_objects_must_be_in_one_receptacle():
    environment, checked = ALFWorld(size="large"), 0
    for task in environment.tasks("train")[5:600:6]:
        game = environment._games.game(task)
        targets = [r for r, kind in enumerate(game.receptacle_types) if kind == game.goal.receptacle]
        things = [o for o, kind in enumerate(game.object_types) if kind == game.goal.object]
        if len(targets) > 1:
            world = World(game)
            world.contents[targets[0]].add(things[0])
            world.contents[targets[1]].add(things[1])
            assert not world.won()
            world.contents[targets[0]].add(things[1])
            assert world.won()
            checked += 1
    assert checked > 10


def test_after_the_end_nothing_pays():
    for environment in (ALFWorld(), compact()):
        outcome, _ = play(environment, environment.tasks("valid_seen")[2])
        assert outcome.terminated and outcome.reward == 10.0 and environment.expert() is None
        again = environment.step(Action(outcome.observation.admissible[0]))
        assert (again.terminated, again.reward) == (True, 0.0) and again.observation.text in (
            "Nothing happens.",
            "invalid",
        )


def test_slots_share_the_games_and_nothing_else():
    environment = ALFWorld()
    slot, task = environment.spawn(), environment.tasks("valid_seen")[0]
    assert slot._games is environment._games
    environment.reset(task, 0)
    with pytest.raises(ContractError, match="reset"):
        slot.step(Action("look"))
    with pytest.raises(ContractError, match="reset"):
        slot.expert()
    slot.reset(task, 0)
    mine = environment.step(Action("look")).observation
    for _ in range(4):
        slot.step(Action(slot.expert()))
    assert environment.step(Action("look")).observation == mine
    slot.close()
    slot.close()
    with pytest.raises(ConfigError, match="no game"):
        slot.reset(Task("train/pick_and_place_simple-999999", "train"), 0)
    with pytest.raises(ConfigError, match="no game"):
        slot.reset(Task(task.id, "test"), 0)


# anchors


def test_siblings_that_meet_in_a_state_share_an_anchor():
    environment = ALFWorld(anchor="state", size="small")
    task = environment.tasks("train")[0]
    places = [c for c in environment.reset(task, 0).admissible if c.startswith("go to ")]
    walks = [[places[0], places[2]], [places[1], places[2]], [places[2], "inventory", "look"]]
    anchors = []
    for walk in walks:
        environment.reset(task, 0)
        anchors.append([environment.step(Action(command)).observation.anchor for command in walk][-1])
    assert len({anchor_id(anchor) for anchor in anchors}) == 1 and anchor_id(
        environment.reset(task, 0).anchor
    ) != anchor_id(anchors[0])
    texts = ALFWorld(size="small")
    texts.reset(task, 0)
    there = texts.step(Action(places[0])).observation
    assert there.anchor == there.text and "Your task" not in there.anchor


# replies and prompts


@pytest.mark.parametrize("reply", ["tagged", "plain"])
@pytest.mark.parametrize(
    "text",
    [
        "go to desk 1",
        "take mug 1 from desk 2",
        "put mug 1 in/on desk 1",
        "look",
        "inventory",
        "use desklamp 1",
        "put mug 1",
    ],
)
def test_format_is_the_inverse_of_parse(reply, text):
    environment = ALFWorld(reply=reply)
    action = environment.parse(Reply(environment.format(text), (), "stop"))
    assert (action.text, action.valid, action.tool_calls) == (text, True, 1)


@pytest.mark.parametrize(
    "text", ["", "fly to the moon", "I go to desk 1", "go to desk 1\nlook", "go " * 40, "going to desk 1"]
)
def test_plain_replies_must_be_a_command_and_nothing_else(text):
    action = ALFWorld(reply="plain").parse(Reply(text, (), "stop"))
    assert not action.valid and action.tool_calls == 0


def history_of(environment: ALFWorld, task: Task, steps: int) -> tuple[list[tuple[Observation, Action]], Observation]:
    observation, history = environment.reset(task, 0), []
    for _ in range(steps):
        action = Action(environment.expert())
        history.append((observation, action))
        observation = environment.step(action).observation
    return history, observation


def test_window_is_spears_prompt():
    environment = ALFWorld()
    task = environment.tasks("train")[2]
    history, observation = history_of(environment, task, 3)
    first = environment.window([], history[0][0], task)[0]
    assert (
        isinstance(first, Message)
        and first.role == "user"
        and "step(s)" not in first.text
        and "'help'" not in first.text
    )
    assert (
        first.text.count("Your task is to: ") == 1
        and "expert agent operating in the ALFRED Embodied Environment" in first.text
    )
    text = environment.window(history, observation, task)[0].text
    assert text.count(f"Your task is to: {environment._games.game(task).task}") == 1
    assert (
        "taken 3 step(s)" in text
        and "You are now at step 4 and your current observation is: " + observation.text in text
    )
    assert (
        f"[Observation 2: '{history[1][0].text}', Action 2: '{history[1][1].text}']" in text
        and "[Observation 1:" not in text
    )
    listed = re.search(r"are: \[(.*?)\]\.", text, re.DOTALL)[1]
    assert [part.strip("'") for part in listed.split("\n ")] == [c for c in observation.admissible if c != "help"]
    assert (
        "<think>" in text
        and "<action>" in text
        and "<think>" not in ALFWorld(reply="plain").window(history, observation, task)[0].text
    )
    without = ALFWorld(history_length=0).window(history, observation, task)[0].text
    assert "[Observation" not in without and "Your task is to: " in without and "step 4" in without


def test_chat_shows_rules_and_task_once():
    for environment in (ALFWorld(), compact()):
        task = environment.tasks("train")[4]
        game = environment._games.game(task)
        wanted = opening(game) if environment.options.observation == "compact" else f"Your task is to: {game.task}."
        _, said = play(environment, task)
        assert said[0].count(wanted) == 1 and not any(wanted in text for text in said[2::2])
        assert (
            ("<action>" in said[0]) == ("go to (receptacle)" in said[0]) == (environment.options.observation == "text")
        )


def test_no_prompt_tells_what_the_expert_knows():
    environment = ALFWorld()
    for task in environment.tasks("train")[:12]:
        environment.expert_noise = 0.0
        observation = environment.reset(task, 0)
        before = environment.window([], observation, task)
        environment.expert()
        assert environment.window([], observation, task) == before
        hidden = {name for things in environment._games.game(task).contents for name in things}
        assert not any(environment._games.game(task).objects[o] in before[0].text for o in hidden)


# compact


def test_compact_texts_use_the_same_words_everywhere_and_are_short():
    environment, vocabulary, lengths = compact(), set(), []
    environment.expert_noise = 0.2
    for number, task in enumerate(environment.tasks("train")[:300]):
        outcome, said = play(environment, task, number)
        shown = {*CHANGING, "at"}
        for page, reply in zip(said[::2], said[1::2], strict=True):
            shown |= set(page.split())
            assert set(reply.split()) <= shown and len(reply.split()) <= 5, (task.id, reply)
        vocabulary |= shown
        lengths.append(sum(len(text.split()) for text in said))
        assert outcome.info["success"] or len(said) == 100
    assert len(vocabulary) < 100 and sum(lengths) / len(lengths) < 140, (len(vocabulary), sum(lengths) / len(lengths))


def test_compact_episode_reads_as_documented():
    environment = compact()
    task = next(t for t in environment.tasks("train") if "clean" in t.id)
    first = environment.reset(task, 0)
    goal = environment._games.game(task).goal
    thing, target = goal.object.removesuffix("Type").lower(), goal.receptacle.removesuffix("Type").lower()
    assert first.text.startswith(f"put clean {thing} {target} in ") and all(
        c.startswith("go ") for c in first.admissible
    )
    assert first.anchor == "at start\n hold nothing"
    history, observation = [], first
    while command := environment.expert():
        history.append((observation, Action(command)))
        last, observation = observation, environment.step(Action(command)).observation
    assert [action.text.split()[0] for _, action in history if action.text.split()[0] not in ("go", "open")] == [
        "take",
        "clean",
        "put",
    ]
    assert re.fullmatch(rf"at {target} \d .*{thing} \d.*", observation.text) and re.search(
        rf"\n hold clean {thing} \d$", last.info["page"]
    )
    text = environment.window(history, observation, task)[0].text
    assert text.startswith(first.text) and text.endswith(observation.info["page"]) and text.count("\n> ") == 2
    assert "at start\n> " in environment.window(history[:1], history[1][0], task)[0].text
    assert environment.step(Action("nonsense")).observation.text == "invalid"


def test_compact_commands_are_distinct_and_all_work():
    environment, draw = compact(size="large"), random.Random(1)
    for task in environment.tasks("train")[:60]:
        observation = environment.reset(task, 0)
        for _ in range(30):
            assert len(set(observation.admissible)) == len(observation.admissible) > 0
            outcome = environment.step(Action(draw.choice(observation.admissible)))
            assert outcome.observation.text != "invalid"
            observation = outcome.observation
            if outcome.terminated:
                break


# expert


@pytest.mark.parametrize("observation", ["text", "compact"])
def test_the_expert_gets_worse_with_noise(observation):
    environment = ALFWorld(observation=observation, reply="plain", size="small")
    won, steps = [], []
    for noise in (0.0, 0.3, 0.6, 1.0):
        environment.expert_noise = noise
        runs = [play(environment, task, i) for i, task in enumerate(environment.tasks("valid_seen")[:120])]
        won.append(sum(outcome.info["success"] for outcome, _ in runs) / len(runs))
        steps.append(sum(len(said) / 2 for _, said in runs) / len(runs))
    assert won[0] == 1.0 and won[1] >= won[2] > won[3] and won[3] < 0.35 and steps == sorted(steps), (won, steps)
    assert (
        play(environment, environment.tasks("valid_seen")[1], 5)[1]
        == play(environment, environment.tasks("valid_seen")[1], 5)[1]
    )


def test_the_expert_recovers_from_anything():
    environment, draw = ALFWorld(size="large"), random.Random(0)
    for task in environment.tasks("train")[:90]:
        observation = environment.reset(task, 0)
        for _ in range(25):
            outcome = environment.step(Action(draw.choice(observation.admissible)))
            observation = outcome.observation
            if outcome.terminated:
                break
        for _ in range(20):
            if outcome.terminated:
                break
            outcome = environment.step(Action(environment.expert()))
        assert outcome.info["success"], task.id
