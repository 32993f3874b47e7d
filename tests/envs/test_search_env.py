"""The search environment on its embedded world: questions, replies, results, prompts, anchors, rewards, expert."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spearrl.batching.anchors import anchor_id
from spearrl.config import load_config
from spearrl.envs import make
from spearrl.envs.search import Search
from spearrl.envs.search.answers import exact, f1, normalise
from spearrl.envs.search.facts import LINKS, open_world
from spearrl.envs.text.analyzer import analyze
from spearrl.errors import ConfigError, ContractError
from spearrl.types import Action, Message, Outcome, Reply, Task

COMPACT = {"observation": "compact", "reply": "plain"}


def play(environment: Search, task: Task, seed: int = 0) -> tuple[Outcome, list[str]]:
    """An expert episode of at most 6 turns: its last outcome, and every text shown and said (chat style)."""
    observation, said = environment.reset(task, seed), []
    for turn in range(6):
        reply = environment.format(environment.expert())
        said += [environment.messages(observation, turn)[0].text, reply]
        outcome = environment.step(environment.parse(Reply(reply, (), "stop")))
        observation = outcome.observation
        if outcome.terminated:
            break
    return outcome, said


# the embedded world


@pytest.mark.parametrize("options", [{}, COMPACT])
def test_the_expert_answers_every_question_with_a_search_a_hop(options):
    environment = Search(**options)
    for split in ("train", "val"):
        tasks = environment.tasks(split)
        strata = Counter(task.data["stratum"] for task in tasks)
        assert set(strata) == {"1 hop", "2 hops", "3 hops"} and len(set(strata.values())) == 1, strata
        for task in tasks[:400]:
            outcome, said = play(environment, task)
            assert (outcome.reward, outcome.info) == (10.0, {"success": True, "em": 1.0, "f1": 1.0}), said
            assert len(said) // 2 <= int(task.data["stratum"][0]) + 1 <= environment.max_turns


def test_hops_cannot_be_skipped_as_a_rule():
    """One search for all that the question says finds the answer only by chance."""
    environment = Search()
    known = Counter()
    for task in environment.tasks("val"):
        environment.reset(task, 0)
        shown = environment.step(Action(f"search {task.data['question']}")).observation.text
        known[task.data["stratum"]] += task.data["answers"][0] in shown
    assert known["1 hop"] > 0.9 * 120 and known["2 hops"] < 0.15 * 120 and known["3 hops"] < 0.15 * 120, known


def test_the_world_is_sound():
    world = open_world(600, 0)
    for (thing, link), other in world.facts.items():
        assert thing != other and (link != "capital" or world.facts[other, "country"] == thing)
    things = {thing for thing, _ in world.facts}
    assert len(things) == 600 == len(world.corpus.documents)
    # stemming keeps all names apart
    assert len({tuple(analyze(thing)) for thing in things}) == 600 and not {
        w for thing in things for w in analyze(thing)
    } & {s for w in LINKS for s in analyze(w)}
    subjects = {split: {task.data["chain"][0] for task in world.tasks[split]} for split in ("train", "val")}
    assert not subjects["train"] & subjects["val"] and len(subjects["val"]) == 60
    for task in world.tasks["val"]:
        way = world.way(task.data["chain"])
        assert len(set(way)) == len(way) and way[-1] == task.data["answers"][0] and way[0] in task.data["question"]


def test_worlds_are_seeded_and_shared():
    first, same, other = Search(seed=1, size=100), Search(seed=1, size=100), Search(seed=2, size=100)
    assert first._world is same._world and first.spawn()._retriever is first._retriever
    assert [t.id for t in first.tasks("train")] != [t.id for t in other.tasks("train")]
    assert open_world.__wrapped__(100, 1).tasks == first._world.tasks


def test_the_expert_gets_worse_with_noise():
    environment, won = Search(**COMPACT), []
    for noise in (0.0, 0.3, 0.6, 1.0):
        environment.expert_noise = noise
        won.append(
            sum(play(environment, task, i)[0].info["success"] for i, task in enumerate(environment.tasks("val")[:200]))
            / 200
        )
    assert won[0] == 1.0 > won[1] > won[2] > won[3] and won[1] > 0.5 and won[3] < 0.2, won
    assert play(environment, environment.tasks("val")[1], 5)[1] == play(environment, environment.tasks("val")[1], 5)[1]


def test_options_and_splits_are_checked():
    with pytest.raises(ConfigError, match="set data"):
        Search(corpus="x.jsonl")
    with pytest.raises(ConfigError, match="not both"):
        Search(data="x.jsonl", retriever_url="http://localhost:1", corpus="y.jsonl")
    for wrong in ({"retriever_url": "file:///etc/passwd", "data": "x"}, {"topk": 0}, {"size": 1}, {"colour": "red"}):
        with pytest.raises(ConfigError, match=f"env.options.{next(iter(wrong))}"):
            make("search", **wrong)
    with pytest.raises(ConfigError, match="no questions of the split 'dev'"):
        Search().tasks("dev")
    with pytest.raises(ConfigError, match="take tasks from"):
        Search().reset(Task("x", "train"), 0)
    with pytest.raises(ContractError, match="reset"):
        Search().step(Action("search x"))


# replies

THINK = "<think>so</think>"


@pytest.mark.parametrize(
    ("reply", "text", "valid"),
    [
        (f"{THINK}<search> blue whale </search>", "search blue whale", True),
        (f"{THINK}\n<answer>Beijing</answer>\n", "answer Beijing", True),
        (f"{THINK}<SEARCH>Blue\nwhale</Search>", "search Blue whale", True),
        ("<search>blue whale</search>", "search blue whale", False),  # without thought
        (f"{THINK}<search>a</search><answer>b</answer>", "search a", False),
        (f"{THINK}<search>a</search><search>b</search>", "search a", False),
        (f"{THINK}<answer>b</answer><search>a</search>", "answer b", False),
        (f"{THINK}<search>a<answer>b</answer>", "answer b", False),
        (f"{THINK}<search></search>", "search ", False),
        (f"{THINK}<search>鲸</search>", "search 鲸", False),
        (f"{THINK}<search>a</answer>", "", False),
        (f"{THINK}search a", "", False),
        ("search a", "", False),
        ("", "", False),
    ],
)
def test_a_reply_is_one_search_or_one_answer(reply, text, valid):
    action = Search().parse(Reply(reply, (), "stop"))
    assert (action.text, action.valid, action.tool_calls) == (text, valid, int(valid and text.startswith("search")))


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("search blue whale", "search blue whale"),
        (" Answer  Beijing ", "Answer  Beijing"),
        ("find whale", None),
        ("search", None),
        ("search a\nb", None),
    ],
)
def test_plain_replies(reply, text):
    action = Search(**COMPACT).parse(Reply(reply, (), "stop"))
    assert (action.text, action.valid, action.tool_calls) == (text or "", bool(text), int(text == "search blue whale"))


@pytest.mark.parametrize("options", [{}, {"reply": "plain"}])
@pytest.mark.parametrize("text", ["search blue whale", "answer in 1912, of course"])
def test_format_is_the_inverse_of_parse(options, text):
    environment = Search(**options)
    action = environment.parse(Reply(environment.format(text), (), "stop"))
    assert (action.text, action.valid) == (text, True) and environment.format("what?") == "what?"


# answers and rewards


def test_answers_are_compared_as_squad_does():
    assert normalise("The  Quick, Brown-Fox! (an A)") == "quick brownfox"
    assert (
        exact("the Beatles.", ["Queen", "Beatles"]) and not exact("Beatles band", ["Beatles"]) and not exact("", ["x"])
    )
    assert f1("the big apple city", ["Big Apple", "x"]) == pytest.approx(2 * 2 / (3 + 2)) and f1("x", ["y"]) == 0.0
    assert f1("a b b", ["b b c"]) == pytest.approx(2 * 2 / (2 + 3))  # "a" is an article
    assert f1("the", ["an"]) == 0.0 and not exact("the", ["an"])


@given(st.text(max_size=30), st.text(max_size=30))
def test_f1_is_symmetric_and_one_for_equals(one, other):
    assert f1(one, [other]) == pytest.approx(f1(other, [one])) and 0.0 <= f1(one, [other]) <= 1.0
    assert f1(one, [one]) == 1.0 and exact(one, [other, one])
    assert not exact(one, [other]) or f1(one, [other]) == 1.0


@pytest.mark.parametrize(("reward", "paid"), [("em", 0.0), ("f1", 10.0 * 2 / 3)])
def test_what_pays(reward, paid):
    environment = Search(reward=reward)
    task = Task("x", "train", {"question": "Who?", "answers": ["Someone else", "Charles Babbage"]})
    environment.reset(task, 0)
    outcome = environment.step(Action("answer Babbage"))
    assert (outcome.reward, outcome.terminated) == (pytest.approx(paid), True)
    assert outcome.info == {"success": False, "em": 0.0, "f1": pytest.approx(2 / 3)}
    environment.reset(task, 0)
    assert environment.step(Action("answer charles babbage!")).info == {"success": True, "em": 1.0, "f1": 1.0}
    again = environment.step(Action("answer Charles Babbage"))
    assert (again.reward, again.terminated) == (0.0, True)


# prompts


def turns_of(environment: Search, task: Task, count: int):
    observation, history = environment.reset(task, 0), []
    for _ in range(count):
        action = Action(environment.expert())
        history.append((observation, action))
        observation = environment.step(action).observation
    return history, observation


def three_hops(environment: Search) -> Task:
    return next(task for task in environment.tasks("val") if task.data["stratum"] == "3 hops")


def test_window_shows_question_and_history():
    environment = Search()
    task = three_hops(environment)
    history, observation = turns_of(environment, task, 2)
    first = environment.window([], history[0][0], task)[0].text
    assert (
        task.data["question"] in first
        and "<think>" in first
        and "Step" not in first
        and environment.messages(history[0][0], 0) == [Message("user", first)]
    )
    text = environment.window(history, observation, task)[0].text
    name = task.data["chain"][0]
    assert (
        "taken 2 step(s)" in text
        and f'Step 1: <search>{name}</search>\n<information>Doc 1 (Title: "{name}") {name} is a ' in text
    )
    assert observation.text in text and text.index(history[1][0].text) < text.index(observation.text)
    assert environment.messages(observation, 2) == [Message("user", observation.text)]
    short = Search(history_length=1).window(history, observation, task)[0].text
    assert "Step 2: " in short and "Step 1: " not in short and history[1][0].text not in short
    assert "<information>" not in Search(history_length=0).window(history, observation, task)[0].text.replace(
        "<information> </information>", ""
    )


def test_compact_texts_are_words_alone():
    environment = Search(**COMPACT)
    task = three_hops(environment)
    history, observation = turns_of(environment, task, 2)
    name = task.data["chain"][0].lower()
    window = environment.window(history, observation, task)[0].text.split("\n")
    assert (
        window[0] == environment.messages(history[0][0], 0)[0].text
        and window[0].endswith(name)
        and window[1] == f"> search {name}"
    )
    assert re.fullmatch(rf"found\n {name} \w+ \w+ \w+ \w+ \w+ \w+ \w+(\n [\w ]+){{0,2}}", history[1][0].text)
    assert environment.step(Action("nonsense")).observation.text == "invalid"
    assert environment.step(Action("search nonsense")).observation.text == "nothing"


def test_results_are_cut_and_nothing_is_said_to_be_found():
    environment = Search(max_chars=100, topk=10)
    environment.reset(environment.tasks("val")[0], 0)
    assert len(environment.step(Action("search company founder")).observation.text) == 100 + len(
        "<information></information>"
    )
    assert environment.step(Action("search xyzzy")).observation.text == "<information>Nothing was found.</information>"
    told = environment.step(Action("xyzzy")).observation.text
    assert "<search>" in told and "<answer>" in told


def test_siblings_that_know_the_same_share_an_anchor():
    environment = Search(topk=1)
    task = three_hops(environment)
    one, other, _, _ = environment._world.way(task.data["chain"])
    start = environment.reset(task, 0).anchor
    first = [environment.step(Action(f"search {name}")).observation.anchor for name in (one, other, one)]
    environment.reset(task, 1)
    second = [environment.step(Action(f"search {name}")).observation.anchor for name in (other, "xyzzy", one)]
    ids = [anchor_id(anchor) for anchor in (start, *first, *second)]
    assert ids[2] == ids[3] == ids[6] and ids[4] == ids[5] and len(set(ids)) == 4


# training


def test_the_embedded_default_is_tiny_search():
    config = load_config(None, [], env="search")
    assert (config.run.started_from, config.env.options["observation"], config.env.max_turns) == (
        "tiny-search",
        "compact",
        6,
    )
