"""The WebShop environment on its generated catalogue: splits, actions, pages, prompts, expert, files, hostile input."""

from __future__ import annotations

import json
import random
import re

import pytest

from spearrl.envs import make
from spearrl.envs.text import records
from spearrl.envs.webshop import WebShop, catalogue
from spearrl.envs.webshop.compact import plain_words, short_instruction
from spearrl.envs.webshop.env import LONGEST
from spearrl.envs.webshop.generate import COLORS, FAMILIES, SIZES, STYLES, generate
from spearrl.envs.webshop.nouns import LEXICON
from spearrl.envs.webshop.reward import purchase_reward
from spearrl.errors import ConfigError, ContractError
from spearrl.types import Action, Message, Observation, Outcome, Reply


def compact(**options) -> WebShop:
    return WebShop(observation="compact", reply="plain", **options)


def play(environment: WebShop, task, seed: int = 0) -> tuple[Outcome, list[str]]:
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


def tokens(text: str) -> list[str]:
    """Roughly a byte-level tokenizer's words: with the space before them."""
    return re.findall(r" ?[^\W\d_]+| ?\d+| ?[^\s\w]+|\n", text)


# splits and goals


def test_splits_are_the_first_500_goals_and_the_rest():
    environment = WebShop()
    val, train = environment.tasks("val"), environment.tasks("train")
    assert [t.id for t in val] == [f"goal-{i}" for i in range(500)] and train[0].id == "goal-500"
    assert 5500 < len(val) + len(train) < 6700 and len(val) + len(train) == len(environment._shop.goals)
    assert WebShop(num_products=24, val_goals=3).tasks("train")[0].id == "goal-3"
    with pytest.raises(ConfigError, match="train, val"):
        environment.tasks("test")
    with pytest.raises(ConfigError, match="val_goals"):
        WebShop(val_goals=10**6).tasks("train")


def test_every_generated_goal_can_be_won_and_needs_all_of_it():
    shop, tagger = WebShop()._shop, LEXICON
    products = {product["asin"]: product for product in shop.catalogue.products}
    for goal in shop.goals:
        product, price = products[goal["asin"]], shop.prices[goal["asin"]]
        assert purchase_reward(product, goal, price, goal["goal_options"], tagger)["task_score"] == 1.0
        for missing in goal["goal_options"]:
            others = {k: v for k, v in goal["goal_options"].items() if k != missing}
            assert purchase_reward(product, goal, price, others, tagger)["task_score"] < 1.0
            wrong = next(v for v in product["options"][missing] if v != goal["goal_options"][missing])
            assert purchase_reward(product, goal, price, others | {missing: wrong}, tagger)["task_score"] < 1.0


def test_generation_is_seeded_and_keeps_its_shape():
    assert generate(60, 1) == generate(60, 1) != generate(60, 2)
    vocabulary = {
        *COLORS,
        *SIZES,
        *STYLES,
        *(w for nouns, adjectives in FAMILIES.values() for w in (*nouns, *adjectives)),
    }
    assert all(a == b or a not in b for a in vocabulary for b in vocabulary), (
        "the reward looks attributes up as substrings"
    )
    products = WebShop()._shop.catalogue.products
    assert len(products) == 480 and all(len(p["Attributes"]) == 3 and p["pricing"][0] % 10 == 0 for p in products)
    assert {(len(p["options"]["color"]), len(p["options"]["size"])) for p in products} == {(4, 3)}


def test_seed_fixes_prices_goals_and_episodes():
    first, same, other = (compact(seed=seed)._shop for seed in (3, 3, 4))
    assert first is same and first.goals[0] != other.goals[0]
    environment = compact()
    environment.expert_noise = 0.5
    runs = [play(environment, environment.tasks("val")[5], seed)[1] for seed in (1, 1, 2, 3, 4)]
    assert runs[0] == runs[1] and len({tuple(run) for run in runs}) > 1


# actions and pages


def test_actions_follow_the_original():
    environment = WebShop()
    first = environment.reset(environment.tasks("val")[0], 0)
    assert first.text.startswith("WebShop [SEP] Instruction: [SEP] Find me ") and first.admissible == (
        "search[<your query>]",
        "click[search]",
    )
    for impossible in (
        "click[search]",
        "click[buy now]",
        "look around",
        "",
        "click[]",
        "Search[lamp]x",
        "search",
        "click[back to search]",
    ):
        outcome = environment.step(Action(impossible))
        assert outcome.observation == first and (outcome.reward, outcome.terminated) == (0.0, False)
    results = environment.step(Action("search[Round LAMP]")).observation
    assert (
        "Page 1 (Total results: 50)" in results.text
        and "click[next >]" in results.admissible
        and len(results.admissible) == 12
    )
    second = environment.step(Action("click[Next >]")).observation
    assert "click[< prev]" in second.admissible
    item = environment.step(Action(second.admissible[3])).observation
    color = item.admissible[6]
    chosen = environment.step(Action(color)).observation
    assert chosen.text == item.text  # the original's plain text shows no sign of it
    details = environment.step(Action("click[description]")).observation
    assert details.admissible == ("click[back to search]", "click[< prev]")
    assert environment.step(Action("click[< prev]")).observation == item
    assert environment.step(Action("click[< prev]")).observation == second
    assert "Page 1" in environment.step(Action("search[rug]")).observation.text  # from any page


def test_text_rich_marks_what_was_clicked():
    environment = WebShop(observation="text_rich")
    environment.reset(environment.tasks("val")[0], 0)
    results = environment.step(Action("search[lamp]")).observation
    item = environment.step(Action(results.admissible[2])).observation
    option = item.admissible[6][6:-1]
    chosen = environment.step(Action(f"click[{option}]")).observation.text
    assert (
        chosen.startswith(f"You have clicked {option}.\nInstruction:")
        and f"  [clicked button] {option} [clicked button_]" in chosen
    )
    assert "\n[clicked button] G" in environment.step(Action("click[< prev]")).observation.text


def test_buying_ends_the_episode():
    environment = WebShop()
    task = environment.tasks("val")[0]
    environment.reset(task, 0)
    results = environment.step(Action("search[lamp]")).observation
    environment.step(Action(results.admissible[2]))
    outcome = environment.step(Action("click[buy now]"))
    assert outcome.terminated and outcome.info["success"] is False and outcome.reward == 0
    assert set(outcome.info) == {
        "success",
        "task_score",
        "score_before_type",
        "r_type",
        "r_attributes",
        "r_options",
        "r_price",
        "tagger",
    }
    assert environment.expert() is None and outcome.observation.admissible == ()
    again = environment.step(Action("search[lamp]"))
    assert again.terminated and again.reward == 0 and again.info["task_score"] == 0
    won, _ = play(environment, task)
    assert won.reward == 10.0 and won.info["success"] is True and won.info["task_score"] == 1.0


def test_the_attributes_page_is_an_option():
    environment = WebShop(show_attrs=True)
    environment.reset(environment.tasks("val")[0], 0)
    results = environment.step(Action("search[lamp]")).observation
    item = environment.step(Action(results.admissible[2])).observation
    assert "click[attributes]" in item.admissible and "[SEP] Attributes [SEP] Buy Now" in item.text
    assert environment.step(Action("click[attributes]")).observation.text.endswith("home [SEP] lamp [SEP] home › lamp")


def test_slots_share_what_is_read_only_and_nothing_else():
    environment = compact()
    slot, task = environment.spawn(), environment.tasks("val")[0]
    assert slot._shop is environment._shop and slot._renderer is environment._renderer
    environment.reset(task, 0)
    before = environment.step(Action("search[lamp]")).observation
    with pytest.raises(ContractError, match="reset"):
        slot.step(Action("search[rug]"))
    slot.reset(task, 0)
    slot.step(Action("search[rug]"))
    assert environment.step(Action("click[nothing]")).observation.info["page"] == before.info["page"]


# replies and prompts


@pytest.mark.parametrize("reply", ["tagged", "plain"])
@pytest.mark.parametrize(
    "text", ["search[soft lamp]", "click[buy now]", "click[< prev]", "click[1]", "click[adult (l)|child (6 | 8) ys]"]
)
def test_format_is_the_inverse_of_parse(reply, text):
    environment = WebShop(reply=reply)
    action = environment.parse(Reply(environment.format(text), (), "stop"))
    assert action.text == text and action.valid
    assert action.tool_calls == 1
    for odd in ("search[a [b] c]", "look", "click[]"):
        assert environment.parse(Reply(environment.format(odd), (), "stop")).text == odd


@pytest.mark.parametrize(
    "text", ["", "search", "search[]", "click[ ]", "buy[x]", "search[a]\nb", "I will search[a]", "click[a"]
)
def test_plain_replies_must_be_an_action_and_nothing_else(text):
    action = WebShop(reply="plain").parse(Reply(text, (), "stop"))
    assert not action.valid and action.tool_calls == 0


def test_chat_messages_show_the_instruction_once():
    for observation in ("text", "text_rich", "compact"):
        environment = WebShop(observation=observation)
        goal = environment._shop.goals[0]
        instruction = short_instruction(goal) if observation == "compact" else goal["instruction_text"]
        _, said = play(environment, environment.tasks("val")[0])
        assert said[0].count(instruction) == 1 and not any(instruction in text for text in said[2::2]), observation
    assert "<action>" in WebShop().messages(environment.reset(environment.tasks("val")[0], 0), 0)[0].text


def test_window_is_spears_prompt():
    environment = WebShop()
    task, history = environment.tasks("val")[0], []
    observation = environment.reset(task, 0)
    for _ in range(3):
        action = Action(environment.expert())
        history.append((observation, action))
        observation = environment.step(action).observation
    first = environment.window([], history[0][0], task)[0]
    assert isinstance(first, Message) and first.role == "user" and "step" not in first.text.split("Actions")[0]
    text = environment.window(history, observation, task)[0].text
    instruction = environment._shop.goals[0]["instruction_text"]
    assert text.count(instruction) == 1 and "taken 3 step(s)" in text and "This is step 4" in text
    assert (
        "[Observation 2: ''Back to Search' [SEP] 'Page 1 (Total results: 50)'" in text and "[Observation 1:" not in text
    )
    assert f"Action 3: '{history[2][1].text}']" in text and "\n'click[buy now]',\n" in text
    assert text.index("now shows: 'Back to Search' [SEP] '< Prev' [SEP] 'color'") > text.index("Action 3")
    long = Observation("x", admissible=("click[x]",), info={"page": "y" * LONGEST})
    assert "Observation" not in environment.window([(long, Action("click[x]"))], long, task)[0].text
    assert "Observation 3" not in WebShop(history_length=0).window(history, observation, task)[0].text


def test_anchor_is_the_page_without_the_instruction():
    environment = WebShop()
    anchors = set()
    for task in environment.tasks("val")[:2]:
        environment.reset(task, 0)
        anchors.add(environment.step(Action("search[vegan]")).observation.anchor)
    assert len(anchors) == 1 and "Instruction" not in anchors.pop()


# compact


def test_compact_pages_use_the_same_words_everywhere():
    environment = compact()
    shown = set(tokens(" " + short_instruction(environment._shop.goals[0])))
    for task in environment.tasks("val")[:40]:
        outcome, said = play(environment, task)
        assert outcome.info["success"]
        for page, reply in zip(said[::2], said[1::2], strict=True):
            shown |= set(tokens(page))
            assert reply.startswith(("search[ ", "click[ ")) and reply.endswith(" ]")
            assert set(tokens(reply)) - {"search", "click", "[", " ]"} <= shown, (
                "every word of an action was shown before, spelled the same"
            )
    assert len({t.strip() for t in shown}) < 150


def test_compact_episode_is_short_and_shows_only_changes():
    environment = compact()
    lengths = []
    for task in environment.tasks("val")[:100]:
        _, said = play(environment, task)
        lengths.append(sum(len(tokens(text)) + 5 for text in said))
    assert 140 < sum(lengths) / len(lengths) < 200
    assert said[2].startswith("page 1\n 1 ") and said[2].count("\n") == 6
    assert said[4].startswith("item ") and said[4].endswith("\n buy") and said[6].startswith("chosen color: ")


def test_compact_states_are_whole_where_a_prompt_stands_alone():
    environment = compact()
    task, history = environment.tasks("val")[0], []
    observation = environment.reset(task, 0)
    for _ in range(3):
        action = Action(environment.expert())
        history.append((observation, action))
        observation = environment.step(action).observation
    text = environment.window(history, observation, task)[0].text
    assert (
        text.startswith(short_instruction(environment._shop.goals[0]))
        and "item " in text
        and text.endswith(observation.info["page"])
    )
    assert "\n chosen color: " in observation.anchor and observation.text.startswith("chosen color: ")
    wrong = environment.step(Action("click[nonsense]"))
    assert wrong.observation.text == "invalid" and wrong.observation.anchor == observation.anchor
    assert environment.step(Action(observation.admissible[6])).observation.text.startswith("chosen color: ")


def test_compact_labels_can_be_asins_and_pages_larger():
    environment = compact(compact_ids="asin", results_per_page=8, title_words=2)
    environment.reset(environment.tasks("val")[0], 0)
    results = environment.step(Action("search[lamp]")).observation
    assert len(results.admissible) == 10 and re.fullmatch(r"click\[g\d{9}\]", results.admissible[2])
    assert re.search(r"\n g\d{9} \w+ \w+ \$\d0\n", results.text)
    assert play(environment, environment.tasks("val")[0])[0].terminated
    with pytest.raises(ConfigError, match="compact"):
        make("webshop", results_per_page=5)


def test_words_keep_a_value_that_has_none():
    assert (
        plain_words('XX-Large / 28" x 7.5') == "xx large 28 x 7.5"
        and plain_words(" ★★ ") == "★★"
        and plain_words("Men's") == "men's"
    )


# expert


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 0.97, 1.0), (0.3, 0.18, 0.36), (1.0, 0.0, 0.05)])
@pytest.mark.parametrize("observation", ["text", "compact"])
def test_expert_success_falls_with_noise(noise, low, high, observation):
    environment = WebShop(observation=observation, reply="plain")
    environment.expert_noise = noise
    won = [play(environment, task, i)[0].info["success"] for i, task in enumerate(environment.tasks("val")[:300])]
    assert low <= sum(won) / len(won) <= high


def test_expert_recovers_from_anything():
    environment, draw, won = compact(), random.Random(0), 0
    environment.max_turns = 40
    for task in environment.tasks("val")[:60]:
        observation = environment.reset(task, 0)
        for _ in range(environment.max_turns):
            stray = draw.choice(observation.admissible) if draw.random() < 0.3 else environment.expert()
            outcome = environment.step(Action(stray))
            observation = outcome.observation
            if outcome.terminated:
                break
        won += outcome.info["success"]
    assert won > 25  # strays buy unfinished baskets now and then


# files


def write_original(folder, count=60) -> None:
    products, attributes = generate(count, 0)
    (folder / "items_shuffle.json").write_text(json.dumps(products, indent=1))
    (folder / "items_ins_v2.json").write_text(json.dumps(attributes))


@pytest.mark.parametrize("chunk", [7, 1000, 1 << 20])
def test_original_files_are_streamed(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(records, "CHUNK", chunk)
    write_original(tmp_path)
    loaded = WebShop(data=str(tmp_path), val_goals=5)._shop
    assert loaded.catalogue.products == WebShop(num_products=60)._shop.catalogue.products
    assert len(WebShop(data=str(tmp_path / "items_shuffle.json"), num_products=12)._shop.catalogue.products) == 12


def test_human_instructions_come_from_their_file(tmp_path):
    write_original(tmp_path)
    asin = json.loads((tmp_path / "items_shuffle.json").read_text())[0]["asin"]
    with pytest.raises(ConfigError, match="no human goals"):
        WebShop(data=str(tmp_path), human_goals=True)
    human = {"instruction": "i want a nice thing.", "instruction_attributes": ["nice"], "instruction_options": ["red"]}
    (tmp_path / "items_human_ins.json").write_text(json.dumps({asin: [human, human | {"instruction_attributes": []}]}))
    catalogue.load.cache_clear()
    goals = WebShop(data=str(tmp_path), human_goals=True, seed=1)._shop.goals
    assert len(goals) == 1 and goals[0]["instruction_text"].startswith("i want a nice thing, and price lower than ")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "nonsense", '[{"asin": 3}]', '[{"asin": "a"}]', "[1, 2]", '[{"asin": "a"', "{}", '[{"asin": "nan"},'],
)
def test_broken_product_files_are_refused_with_a_hint(tmp_path, content):
    write_original(tmp_path)
    (tmp_path / "items_shuffle.json").write_text(content)
    with pytest.raises(ConfigError, match=r"env\.options\.data"):
        WebShop(data=str(tmp_path))


def test_missing_data_is_refused(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="fix: "):
            make("webshop", data=str(path))
    with pytest.raises(ConfigError, match="env.options.colour"):
        make("webshop", colour="red")


def test_prices_and_options_are_cleaned_as_the_original_does():
    assert catalogue._price("$19.99$1,027.50") == ([19.99, 1027.5], "$19.99 to $1027.5")
    assert catalogue._price("") == catalogue._price(None) == catalogue._price("n/a") == ([100.0], "$100.0")
    assert catalogue._options({"Color": [{"value": " Red/Blue "}], "Size": None}) == {"color": ["red | blue"]}


def test_goals_outside_the_list_are_refused():
    environment = WebShop()
    task = environment.tasks("val")[0]
    for data in ({}, {"goal": -1}, {"goal": 10**9}, {"goal": "0"}):
        with pytest.raises(ConfigError, match="goal"):
            environment.reset(type(task)("goal-x", "val", data), 0)
