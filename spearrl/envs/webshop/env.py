"""The WebShop environment: splits, actions, rewards; pages and goals are the modules beside this one."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from spearrl.envs.base import Environment
from spearrl.envs.text.tagged import projected
from spearrl.envs.webshop import prompts
from spearrl.envs.webshop.compact import CompactRenderer, short_instruction
from spearrl.envs.webshop.expert import Expert
from spearrl.envs.webshop.goals import Shop, open_shop
from spearrl.envs.webshop.nouns import default_tagger
from spearrl.envs.webshop.pages import Session, parse_action
from spearrl.envs.webshop.render import Move, OriginalRenderer
from spearrl.envs.webshop.reward import purchase_reward
from spearrl.errors import ConfigError, ContractError
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task

PLAIN = re.compile(r"(search|click)\[\s*([^\n\[]*[^\s\[])\s*\]")
THOUGHT = "The next step follows from the page."
REWARD = 10.0  # for a perfect purchase
PERFECT = 1 - 1e-9
UNFINISHED = {"success": False, "task_score": 0.0}


class WebShop(Environment):
    """WebShop (arXiv 2207.01206) without a web server: the original's pages, goals and reward, on its data or a generated catalogue.

    Goals 0-499 are the split `val`, the others `train`; task ids are `goal-<i>`. A perfect purchase pays 10, anything else 0;
    `info` carries the original's reward as `task_score`. `observation="compact"` shows short pages that a tiny model can read.
    """

    max_turns = 15

    class Options(Environment.Options):
        data: str | None = Field(
            None, description="Folder (or product file) of WebShop's data; none: a generated catalogue."
        )
        num_products: int | None = Field(
            None, ge=12, description="Products used; none: all of the data, or 480 generated ones."
        )
        seed: int = Field(0, ge=0, description="Fixes prices, price limits and the generated catalogue.")
        human_goals: bool = Field(False, description="Human instructions instead of synthetic ones.")
        val_goals: int = Field(500, ge=1, description="Goals of the split val; the rest is train.")
        observation: Literal["text", "text_rich", "compact"] = Field(
            "text", description="How pages are written; compact: short, for tiny models."
        )
        reply: Literal["tagged", "plain"] = Field(
            "tagged", description="<think>…</think><action>…</action>, or the action alone."
        )
        history_length: int = Field(2, ge=0, description="Earlier turns a windowed prompt shows.")
        show_attrs: bool = Field(False, description="The original's Attributes page.")
        results_per_page: int = Field(
            0,
            ge=0,
            le=10,
            description="Products per page (fewer than 10 only in compact); 0: 10, or 5 generated ones in compact.",
        )
        title_words: int = Field(10, ge=1, description="Words of a title that compact pages show.")
        compact_ids: Literal["position", "asin"] = Field(
            "position", description="What a compact results page names products by."
        )

        @model_validator(mode="after")
        def _page_size(self) -> WebShop.Options:
            if self.observation != "compact" and self.results_per_page not in (0, 10):
                raise ValueError(f'results_per_page={self.results_per_page} needs observation="compact"')
            return self

    options: Options

    def __init__(self, data: str | Path | None = None, observation: str = "text", seed: int = 0, **options: Any):
        super().__init__(data=None if data is None else str(data), observation=observation, seed=seed, **options)
        chosen = self.options
        self._shop = open_shop(chosen.data, chosen.num_products, chosen.seed, chosen.human_goals)
        self._tagged = chosen.reply == "tagged"
        self._compact = chosen.observation == "compact"
        self._renderer: CompactRenderer | OriginalRenderer = (
            CompactRenderer(chosen.title_words, chosen.compact_ids)
            if self._compact
            else OriginalRenderer(chosen.observation == "text_rich", chosen.show_attrs)
        )
        self._per_page = chosen.results_per_page or (5 if self._compact and chosen.data is None else 10)
        self._tagger = default_tagger()
        self._session: Session | None = None

    def spawn(self) -> WebShop:
        """A slot that shares catalogue, index, goals and cached page fragments."""
        slot = copy.copy(self)
        slot._session = None
        return slot

    def tasks(self, split: str) -> Sequence[Task]:
        """Goals in the original's shuffled order. Raises ConfigError for an unknown or empty split."""
        if split not in ("train", "val"):
            raise ConfigError(
                f"split {split!r} is not one of train, val", where="env webshop", hint='use "train" or "val"'
            )
        found = _tasks(self._shop, self.options.val_goals, split)
        if not found:
            reason = (
                f"{len(self._shop.goals)} goals, of which {self.options.val_goals} are for val, leave none for {split}"
            )
            raise ConfigError(reason, where="env webshop", hint="lower env.options.val_goals or use more products")
        return found

    def reset(self, task: Task, seed: int) -> Observation:
        number = task.data.get("goal", _number(task.id))
        if not isinstance(number, int) or not 0 <= number < len(self._shop.goals):
            reason = f"task {task.id!r} names goal {number!r}; there are {len(self._shop.goals)}"
            raise ConfigError(reason, where="env webshop", hint="take tasks from tasks(split)")
        self._goal = self._shop.goals[number]
        draw = random.Random(derive(seed, "results"))
        self._session = Session(self._shop.catalogue, draw, self._per_page, self.options.show_attrs)
        self._expert = Expert(self._goal, self._shop.prices, random.Random(derive(seed, "expert")))
        return self._show(Move())

    def step(self, action: Action) -> Outcome:
        """Search, click, or leave the page as it is. Raises ContractError before the first reset."""
        session = self._playing()
        parsed = parse_action(action.text)
        kind, argument = parsed or ("", "")
        if kind == "click" and self._page.labels is not None:
            argument = self._page.labels.get(argument, "")
        changed = session.play(kind, argument)
        if changed and session.page == "done":
            return self._buy(session)
        return Outcome(self._show(Move(changed, session.chose)), 0.0, session.page == "done", info=dict(UNFINISHED))

    def messages(self, observation: Observation, turn: int) -> list[Message]:
        """Turn 0: the rules (not in compact) and the first page with the instruction; later turns only the page."""
        if turn > 0:
            return [Message("user", observation.info.get("chat", observation.text))]
        return [
            Message(
                "user", observation.text if self._compact else f"{prompts.rules(self._tagged)}\n\n{observation.text}"
            )
        ]

    def window(
        self, history: Sequence[tuple[Observation, Action]], observation: Observation, task: Task
    ) -> list[Message]:
        """SPEAR's prompt: task, the last `history_length` steps, page, admissible actions; over 13,000 characters without history."""
        shown = history[max(0, len(history) - self.options.history_length) :]
        past = [
            (seen.info.get("page", seen.text), action.text if self._tagged else self.format(action.text))
            for seen, action in shown
        ]
        page, goal = observation.info.get("page", observation.text), self._shop.goals[task.data["goal"]]
        if self._compact:
            return [Message("user", prompts.compact_window(short_instruction(goal), page, past))]
        text = prompts.windowed(
            goal["instruction_text"], page, observation.admissible or (), past, len(history), tagged=self._tagged
        )
        return [Message("user", text)]

    def parse(self, reply: Reply) -> Action:
        """Tagged: verl-agent's projection (what stands in <action>, lower-cased; valid with <think> and without Chinese). Plain: the reply itself."""
        if not self._tagged:
            lowered = reply.text.lower().strip()
            match = PLAIN.fullmatch(lowered)
            return Action(f"{match[1]}[{match[2]}]", tool_calls=1) if match else Action(lowered, valid=False)
        text, valid = projected(reply.text, 20)
        kind = (parse_action(text) or ("", ""))[0]
        return Action(text, valid, tool_calls=int(valid and kind in ("search", "click")))

    def format(self, text: str) -> str:
        """A reply that `parse` turns into `text`. Plain ones have spaces inside the brackets, so that a word there is the same token as on a page."""
        if self._tagged:
            return f"<think>{THOUGHT}</think><action>{text}</action>"
        match = PLAIN.fullmatch(text)
        return f"{match[1]}[ {match[2]} ]" if match else text

    def expert(self) -> str | None:
        """The scripted shopper's next action, from the true state; None after the purchase."""
        session = self._playing()
        if session.page == "done":
            return None
        kind, argument = self._expert.act(session, self.expert_noise)
        if kind == "click" and self._page.labels is not None:
            argument = next((label for label, name in self._page.labels.items() if name == argument), argument)
        return f"{kind}[{argument}]"

    def _buy(self, session: Session) -> Outcome:
        product = session.product or {}
        score = purchase_reward(product, self._goal, self._shop.prices[product["asin"]], session.options, self._tagger)
        info: dict[str, Any] = {
            "success": score.total >= PERFECT,
            "task_score": score.total,
            "score_before_type": score.before_type,
        }
        info |= {
            "r_type": score.r_type,
            "r_attributes": score.r_attributes,
            "r_price": score.r_price,
            "tagger": score.tagger,
        }
        if score.r_options is not None:
            info["r_options"] = score.r_options
        return Outcome(self._show(Move(score=score.total)), REWARD if info["success"] else 0.0, True, info=info)

    def _show(self, move: Move) -> Observation:
        page = self._page = self._renderer.show(self._playing(), self._goal, move)
        return Observation(page.text, page.body, page.admissible, info={"chat": page.chat, "page": page.body})

    def _playing(self) -> Session:
        if self._session is None:
            raise ContractError(
                "step() or expert() before reset()", where="env webshop", hint="call reset(task, seed) first"
            )
        return self._session


def _number(task_id: str) -> int | None:
    """The goal a task id ("goal-17") names."""
    digits = task_id.removeprefix("goal-")
    return int(digits) if digits.isascii() and digits.isdigit() else None


@lru_cache(maxsize=16)
def _tasks(shop: Shop, val: int, split: str) -> tuple[Task, ...]:
    """Goals of a split. Those of val say whether their product is also the goal of a training task: small models memorise products."""
    goals = shop.goals
    if split == "train":
        return tuple(Task(f"goal-{number}", split, {"goal": number}) for number in range(val, len(goals)))
    trained = {goal["asin"] for goal in goals[val:]}
    strata = ["product in train" if goal["asin"] in trained else "product not in train" for goal in goals[:val]]
    return tuple(
        Task(f"goal-{number}", split, {"goal": number, "stratum": stratum}) for number, stratum in enumerate(strata)
    )
