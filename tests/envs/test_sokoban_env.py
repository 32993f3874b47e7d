"""The Sokoban environment: solvable levels, disjoint splits, rules, rewards, prompts, pictures, expert, GiGPO."""

from __future__ import annotations

import io
import random
from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spearrl.batching import anchor_id
from spearrl.envs import make
from spearrl.envs.sokoban import Sokoban, picture
from spearrl.envs.sokoban.expert import solve
from spearrl.envs.sokoban.level import MOVES, Level, reverse_play
from spearrl.errors import ConfigError
from spearrl.types import Action, Image, Reply, Text

ROOMS = [
    {},
    {"boxes": 2},
    {"rows": 5, "columns": 7, "walls": 0},
    {"boxes": 3, "rows": 8, "columns": 8, "walls": 8, "longest_solution": 40},
]


def compact(**options) -> Sokoban:
    return Sokoban(observation="compact", reply="plain", **options)


def level_of(*rows: str) -> Level:
    """A level from its symbols."""
    text = "".join(rows)
    where = {symbol: frozenset(i for i, character in enumerate(text) if character == symbol) for symbol in "#_OXP√S"}
    (player,) = where["P"] | where["S"]
    return Level(
        len(rows), len(rows[0]), where["#"], where["O"] | where["√"] | where["S"], (player, where["X"] | where["√"])
    )


def brute_force(level: Level) -> int | None:
    """Moves of a shortest solution, by breadth-first search over every state."""
    queue, reached = deque([(level.start, 0)]), {level.start}
    while queue:
        state, steps = queue.popleft()
        if level.solved(state):
            return steps
        fresh = {level.move(state, name) for name in MOVES} - reached
        reached |= fresh
        queue += [(there, steps + 1) for there in fresh]
    return None


def play(environment: Sokoban, task, moves=None) -> tuple[float, bool, int]:
    """Reward, success and turns of an episode: the expert's, or of `moves`."""
    environment.reset(task, 0)
    total, turn = 0.0, 0
    for turn in range(1, environment.max_turns + 1):
        text = environment.expert() if moves is None else moves[turn - 1]
        outcome = environment.step(environment.parse(Reply(environment.format(text), (), "stop")))
        total += outcome.reward
        if outcome.terminated:
            break
    return total, outcome.info["success"], turn


# levels


@pytest.mark.parametrize("options", ROOMS, ids=str)
def test_the_expert_solves_every_level_and_its_way_is_shortest(options):
    environment = Sokoban(**options)
    environment.max_turns = max(15, options.get("longest_solution", 0))
    boxes = options.get("boxes", 1)
    for split, count in (("train", 150), ("val", 50)) if boxes < 3 else (("train", 15), ("val", 5)):
        for task in environment.tasks(split)[:count]:
            level = environment._levels(split, task.id)
            reward, success, turns = play(environment, task)
            assert success and turns <= environment.options.longest_solution
            assert reward == pytest.approx(10 + boxes - 0.1 * turns)
            assert len(level.targets) == len(level.start[1]) == boxes and not level.targets & level.start[1]
            assert boxes > 1 or turns == brute_force(level)


def test_solutions_are_shortest_with_two_boxes_and_found_where_there_is_one():
    draw, unsolvable = random.Random(1), 0
    for _ in range(60):
        level = reverse_play(draw, (5, 6), boxes=2, walls=1, pulls=6)
        if level is None:
            continue
        assert len(solve(level, level.start)) == brute_force(level)
        state = level.start
        for _ in range(8):  # anywhere, dead ends too
            state = level.move(state, draw.choice(list(MOVES)))
        plan, length = solve(level, state), brute_force(Level(5, 6, level.walls, level.targets, state))
        unsolvable += length is None
        assert len(plan) == (length or 0)
    assert unsolvable > 3
    level = level_of("######", "#X___#", "#_P_O#", "######")
    assert solve(level, level.start) == {}  # a box in a corner
    level = level_of("######", "#P_XO#", "######")
    assert list(solve(level, level.start).values()) == ["right", "right"] and solve(level, level.start, most=1) == {}


def test_splits_share_no_level_not_even_turned_or_mirrored():
    environment = compact()
    levels_of = {
        split: [environment._levels(split, task.id) for task in environment.tasks(split)[:200]]
        for split in ("train", "val")
    }
    digests = {split: {level.digest for level in levels} for split, levels in levels_of.items()}
    assert not digests["train"] & digests["val"] and len(digests["train"]) > 150
    rows = ["#####", "#P__#", "#_XO#", "#___#", "#####"]
    level, other = level_of(*rows), level_of("#####", "#P__#", "#X_O#", "#___#", "#####")
    copies = [
        level_of(*rows[::-1]),
        level_of(*(row[::-1] for row in rows)),
        level_of(*("".join(column) for column in zip(*rows, strict=True))),
    ]
    assert {copy.digest for copy in copies} == {level.digest} and other.digest != level.digest


def test_levels_come_from_the_seed_alone():
    first, same, other = (Sokoban(seed=seed) for seed in (3, 3, 4))
    shown = [
        [environment.reset(task, i).text for i, task in enumerate(environment.tasks("train")[:30])]
        for environment in (first, same, other)
    ]
    assert shown[0] == shown[1] != shown[2]
    slot = first.spawn()
    assert slot.reset(first.tasks("train")[5], 9) == first.reset(first.tasks("train")[5], 0)


def test_options_are_checked():
    assert [len(make("sokoban", train_tasks=7, val_tasks=2).tasks(split)) for split in ("train", "val")] == [7, 2]
    for options, match in (
        ({"size": 6}, "size"),
        ({"walls": 14}, "do not fit"),
        ({"max_turns": 20}, "use env.max_turns"),
        ({"cell": 4}, "cell"),
    ):
        with pytest.raises(ConfigError, match=match):
            make("sokoban", **options)
    with pytest.raises(ConfigError, match="test"):
        Sokoban().tasks("test")
    long = Sokoban(longest_solution=20)
    with pytest.raises(ConfigError, match="longest_solution=20 cannot be played in max_turns=15"):
        long.tasks("train")
    long.max_turns = 20
    assert long.tasks("train")
    impossible = Sokoban(boxes=3, longest_solution=1)
    with pytest.raises(ConfigError, match="longest_solution"):
        impossible.reset(impossible.tasks("train")[0], 0)


# rules and rewards


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.sampled_from([*MOVES, "still", "jump", ""]), max_size=40), st.integers(1, 3))
def test_no_move_makes_or_loses_a_box_or_goes_through_a_wall(seed, names, boxes):
    level = next(
        filter(
            None,
            (reverse_play(random.Random(f"{seed}/{n}"), (6, 7), boxes=boxes, walls=3, pulls=6) for n in range(500)),
        )
    )
    state = level.start
    for name in names:
        before, state = state, level.move(state, name)
        assert len(state[1]) == boxes and state[0] not in state[1]
        assert not level.walls & {state[0], *state[1]}
        if name not in MOVES:
            assert state == before
        moved = before[1] ^ state[1]
        if moved:  # one box, one cell on, in the direction of the player's step
            delta = level.deltas[name]
            assert state[0] == before[0] + delta and moved == {state[0], state[0] + delta} and state[0] in before[1]


def test_what_moves_pay():
    environment = compact(walls=0)
    environment.reset(environment.tasks("train")[0], 0)
    environment._episode = level_of("#######", "#PXO__#", "#_____#", "#X__O_#", "#######")
    environment._state = environment._episode.start
    paid = [environment.step(Action(name)) for name in ("up", "still", "dance", "right", "right")]
    assert [outcome.reward for outcome in paid] == pytest.approx(
        [-0.1, 0.0, 0.0, 0.9, -1.1]
    )  # a wall, nothing twice, onto the target, off it
    assert not any(outcome.terminated for outcome in paid) and paid[0].observation == paid[2].observation
    environment._episode = level_of("#######", "#_PXO_#", "#######")
    environment._state = environment._episode.start
    last = environment.step(Action("right"))
    assert last.reward == pytest.approx(10.9) and last.terminated and last.info == {"success": True}
    assert last.observation.text == " _ _ P √ _" and environment.expert() is None
    again = environment.step(Action("left"))
    assert (again.reward, again.terminated) == (0.0, True)


# texts and replies


def test_symbols_are_those_of_the_legend():
    level = level_of("######", "#S√X_#", "#_O__#", "######")
    assert level.grid(level.start) == ["######", "#S√X_#", "#_O__#", "######"]
    environment = Sokoban()
    observation = environment.reset(environment.tasks("train")[0], 0)
    assert observation.anchor == observation.text and observation.admissible == tuple(MOVES)
    rows = [row.split() for row in observation.text.splitlines()]
    assert len(rows) == 6 and all(len(row) == 6 for row in rows) and Counter(sum(rows, []))["#"] == 23
    small = compact()
    shown = small.reset(small.tasks("train")[0], 0)
    assert [row.split() for row in shown.text.splitlines()] == [row[1:-1] for row in rows[1:-1]]
    assert small.messages(shown, 0)[0].content == shown.text
    first, later = (environment.messages(observation, turn)[0].text for turn in (0, 1))
    assert (
        later == observation.text
        and first.endswith(observation.text)
        and "√ box on a target" in first
        and "<think>" in first
    )


def test_windowed_prompts_show_the_last_two_steps():
    environment = Sokoban()
    task = environment.tasks("train")[4]
    observation, history = environment.reset(task, 0), []
    (message,) = environment.window(history, observation, task)
    assert (
        observation.text in message.text
        and "step(s)" not in message.text
        and message.text.endswith("<action> </action> tags.")
    )
    for name in ("left", "up", "right"):
        action = Action(name)
        history.append((observation, action))
        observation = environment.step(action).observation
    text = environment.window(history, observation, task)[0].text
    assert (
        "taken 3 step(s). The last 2" in text
        and "Action 2: 'up'" in text
        and "Action 3: 'right'" in text
        and "Action 1" not in text
    )
    assert "now at step 4" in text and text.count(observation.text) >= 1
    small = compact()
    assert small.window(history, observation, task)[0].text.splitlines()[-1] == observation.text.splitlines()[-1]


@pytest.mark.parametrize(
    "reply, text, valid",
    [
        ("<think>a</think><action>up</action>", "up", True),
        ("<think>a</think><action> Move LEFT now </action>", "left", True),
        ("<action>down</action>", "down", False),  # no thought: played, and invalid
        ("<think>go up</think> up", "still", False),
        ("up", "still", False),
        ("<think>a</think><action>still</action>", "still", False),
        ("<think>向</think><action>up</action>", "up", False),
        ("", "still", False),
    ],
)
def test_tagged_replies_are_read_as_verl_agent_does(reply, text, valid):
    action = Sokoban().parse(Reply(reply, (), "stop"))
    assert (action.text, action.valid, action.tool_calls) == (text, valid, int(valid))


def test_plain_replies_are_moves_and_nothing_else():
    environment = compact()
    for reply, text, valid in (
        (" Up ", "up", True),
        ("up up", "still", False),
        ("", "still", False),
        ("upwards", "still", False),
    ):
        action = environment.parse(Reply(reply, (), "stop"))
        assert (action.text, action.valid) == (text, valid)


# pictures


@pytest.mark.parametrize("pixels", [8, 14, 28])
def test_a_picture_shows_the_grid_cell_by_cell(pixels):
    from PIL import Image as Pillow

    symbols = "#_OXP√S"
    tiles = {picture.tile(symbol, pixels).tobytes(): symbol for symbol in symbols}
    assert len(tiles) == len(symbols)
    for observation_style, rim in (("text", 0), ("compact", 1)):
        environment, plain = (
            Sokoban(vision, observation=observation_style, boxes=2, cell=pixels) for vision in (True, False)
        )
        for task in environment.tasks("train")[:10]:
            shown, written = environment.reset(task, 0), plain.reset(task, 0)
            (image,) = shown.images
            opened = Pillow.open(io.BytesIO(image.data))
            assert opened.format == "PNG" and opened.mode == "RGB" and image.media_type == "image/png"
            pixels_of = np.asarray(opened)
            side = 6 - 2 * rim
            assert pixels_of.shape == (side * pixels, side * pixels, 3)
            cells = pixels_of.reshape(side, pixels, side, pixels, 3).swapaxes(1, 2)
            decoded = "\n".join(
                "".join(f" {tiles[np.ascontiguousarray(cell).tobytes()]}" for cell in row) for row in cells
            )
            assert decoded == written.text == shown.anchor and shown.text == ""


def test_prompts_with_pictures_hold_no_symbols_of_the_room():
    environment = Sokoban(vision=True)
    task = environment.tasks("train")[0]
    observation = environment.reset(task, 0)
    for messages in (
        environment.messages(observation, 0),
        environment.window([(observation, Action("up"))], observation, task),
    ):
        kinds = [type(part) for part in messages[0].content]
        assert kinds[:2] == [Text, Image] and messages[0].images == observation.images
        assert "green figure" in messages[0].text and "# #" not in messages[0].text and "√" not in messages[0].text
    assert [type(part) for part in environment.messages(observation, 1)[0].content] == [Image]
    small = compact(vision=True)
    assert small.messages(small.reset(task, 0), 0)[0].content == small.reset(task, 0).images


# expert, check-env, GiGPO


def test_the_expert_recovers_from_slips_and_never_gives_up():
    environment = compact(boxes=2)
    won = 0
    for task in environment.tasks("train")[:40]:
        slot = environment.spawn()
        slot.expert_noise = 0.3
        observation = slot.reset(task, 1)
        for _ in range(slot.max_turns):
            move = slot.expert()
            assert move in MOVES
            outcome = slot.step(Action(move))
            if outcome.terminated:
                won += 1
                break
    assert 2 < won < 38 and observation.admissible
    environment.reset(environment.tasks("train")[0], 0)
    environment._episode = level_of("#####", "#X__#", "#_PO#", "#####")
    environment._state = environment._episode.start
    assert environment.expert() in MOVES  # nothing helps any more


def test_siblings_in_the_same_room_share_an_anchor():
    environment = compact()
    task = environment.tasks("train")[0]
    first, second = (environment.spawn().reset(task, seed) for seed in (0, 1))
    environment.reset(task, 0)
    environment._episode = level_of("######", "#P___#", "#_XO_#", "######")
    environment._state = environment._episode.start
    anchors = {"": environment._show().anchor} | {
        name: environment.step(Action(name)).observation.anchor for name in ("right", "left", "down", "right")
    }
    assert anchor_id(first.anchor) == anchor_id(second.anchor)
    assert (
        anchor_id(anchors["left"]) == anchor_id(anchors[""])
        and len({anchor_id(anchor) for anchor in anchors.values()}) == 3
    )
