"""The native WebShop against episodes of the original simulator on its own 1000 products."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator

import pytest

from spearrl.envs.text.bm25 import LuceneIndex
from spearrl.envs.webshop import WebShop
from spearrl.envs.webshop.catalogue import Catalogue
from spearrl.envs.webshop.goals import draw_prices, make_goals
from spearrl.envs.webshop.pages import ShopSession
from spearrl.types import Action, Task
from tests.support.shared_data import golden_lines, read_lines, shared

FOLDER = "data/webshop"


@pytest.fixture(scope="module")
def episodes() -> list[dict]:
    return [json.loads(line) for line in golden_lines("webshop_episodes.jsonl")]


def term_vectors() -> Iterator[dict[str, int]]:
    for line in read_lines(shared(f"{FOLDER}/lucene_term_vectors_1k.tsv.gz")):
        _, *fields = line.split("\t")
        yield {term: int(count) for term, count in zip(fields[::2], fields[1::2], strict=True)}


def shop(observation: str, index: str) -> WebShop:
    """The environment as users get it ("texts"), or with an index over Lucene's own term vectors (golden)."""
    environment = WebShop(data=str(shared(FOLDER)), observation=observation)
    if index == "texts":
        return environment
    catalogue = Catalogue(environment._shop.catalogue.products)
    catalogue.__dict__["index"] = LuceneIndex(term_vectors())
    environment._shop = dataclasses.replace(environment._shop, catalogue=catalogue)
    return environment


def available(step: dict) -> tuple[str, ...]:
    search = ("search[<your query>]",) if step["available"]["has_search_bar"] else ()
    return (*search, *(f"click[{name}]" for name in step["available"]["clickables"]))


def test_goals_and_prices_are_the_originals(episodes):
    goals, prices = (environment := WebShop(data=str(shared(FOLDER))))._shop.goals, environment._shop.prices
    assert len(goals) == 6910 and len({goal["asin"] for goal in goals}) == 415
    for episode in episodes:
        for key, value in episode["goal"].items():
            assert goals[episode["goal_index"]][key] == value
        for step in episode["steps"]:
            assert not step["done"] or prices[step["bought"]] == step["price"]


@pytest.mark.parametrize("index", ["vectors", "texts"])
@pytest.mark.parametrize(("observation", "key"), [("text", "obs"), ("text_rich", "obs_rich")])
def test_episodes_show_what_the_original_shows(episodes, observation, key, index):
    environment, compared = shop(observation, index), 0
    for episode in episodes:
        first = environment.reset(Task("", "val", {"goal": episode["goal_index"]}), 7)
        assert first.text == episode["initial"][key]
        assert first.admissible == available(episode["initial"])
        for step in episode["steps"]:
            outcome = environment.step(Action(step["action"]))
            assert outcome.observation.admissible == available(step), step["action"]
            assert outcome.terminated == step["done"]
            shown = without_score(outcome.observation.text, step)
            assert step[key] is None or shown == without_score(step[key], step), step["action"]
            compared += 1
    assert compared == 245


def without_score(text: str, step: dict) -> str:
    """The golden run had no noun tagger, so where another product was bought its score is not the original's."""
    if not step["done"] or step["reward"] is not None:
        return text
    head, _, tail = text.partition("max 1.0) [SEP] ")
    return head + tail.partition(" [SEP] ")[2]


def test_rewards_are_the_originals(episodes):
    environment, perfect = shop("text", "vectors"), 0
    for episode in episodes:
        environment.reset(Task("", "val", {"goal": episode["goal_index"]}), 7)
        for step in episode["steps"]:
            outcome = environment.step(Action(step["action"]))
            if not step["done"]:
                assert outcome.reward == 0 and outcome.info["success"] is False
                continue
            info, parts = outcome.info, step["info_no_title"]
            assert info["score_before_type"] == pytest.approx(step["reward_before_r_type"], abs=1e-12)
            assert (info["r_attributes"], info["r_price"]) == (pytest.approx(parts["r_att"]), float(parts["r_price"]))
            assert info.get("r_options") == (pytest.approx(parts["r_option"]) if "r_option" in parts else None)
            if step["reward"] is not None:
                assert info["task_score"] == pytest.approx(step["reward"], abs=1e-12)
                assert info["success"] is (step["reward"] == 1.0) and outcome.reward == 10.0 * info["success"]
                perfect += info["success"]
    assert perfect > 5


def test_human_goals_of_the_small_set(episodes):
    environment = WebShop(data=str(shared(FOLDER)), human_goals=True, val_goals=10)
    assert len(environment._shop.goals) == 13 and len(environment.tasks("train")) == 3
    assert all(isinstance(goal["goal_options"], list) for goal in environment._shop.goals)
    bought = 0
    for task in environment.tasks("val"):
        environment.reset(task, 1)
        for _ in range(environment.max_turns):
            outcome = environment.step(Action(environment.expert()))
            if outcome.terminated:
                break
        bought += outcome.info["task_score"] > 0.3
    assert bought >= 5


def test_special_queries(episodes):
    products = WebShop(data=str(shared(FOLDER)))._shop.catalogue
    session = ShopSession(products, random.Random(0))
    beverages = sum(p["query"] == "beverages" for p in products.products)
    for query, count in [
        ("<c> beauty", 238),
        ("<c>", 0),
        ("<q> beverages", beverages),
        ("<r>", 50),
        ("<a> nothing like it", 0),
    ]:
        assert session.play("search", query) and len(session.results) == count


def test_expert_shops_the_real_set(episodes):
    environment = WebShop(data=str(shared(FOLDER)), observation="compact", reply="plain")
    won = 0
    for task in environment.tasks("val")[:100]:
        environment.reset(task, 3)
        for _ in range(environment.max_turns):
            outcome = environment.step(Action(environment.expert()))
            if outcome.terminated:
                break
        won += outcome.info["success"]
    assert won >= 85


def test_other_seeds_give_other_prices(episodes):
    products = WebShop(data=str(shared(FOLDER)))._shop.catalogue.products
    first, second = (draw_prices(products, random.Random(seed)) for seed in (0, 1))
    assert first != second and {a for a in first if first[a] != second[a]} == {
        p["asin"] for p in products if len(p["pricing"]) == 2
    }
    assert len(make_goals(products, second, random.Random(1), human=False)) == 6910
