"""The WebShop environment: splits, actions, rewards; pages and goals are the modules beside this one."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from spearrl.config.tables import table
from spearrl.envs.text.environment import TextEnvironment
from spearrl.envs.text.tagged_replies import PLAIN, compact_window, past_steps
from spearrl.envs.webshop import render
from spearrl.envs.webshop.compact import CompactRenderer, short_instruction
from spearrl.envs.webshop.expert import Expert
from spearrl.envs.webshop.goals import Shop, open_shop
from spearrl.envs.webshop.nouns import default_tagger
from spearrl.envs.webshop.pages import ShopSession, parse_action
from spearrl.envs.webshop.reward import purchase_reward
from spearrl.errors import ConfigError
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Outcome, Task

PLAIN_ACTION = re.compile(r"(search|click)\[\s*([^\n\[]*[^\s\[])\s*\]")
REWARD = 10.0  # for a perfect purchase
PERFECT = 1 - 1e-9
UNFINISHED = {"success": False, "task_score": 0.0}
LONGEST = 13_000  # characters; a longer windowed prompt drops its history, as verl-agent does
_TEXT = table(__file__, "prompts.toml")


class WebShop(TextEnvironment[ShopSession]):
    """WebShop (arXiv 2207.01206) without a web server: the original's pages, goals and reward.

    Products are the original's or generated. Goals 0-499 are the split `val`, the others `train`; ids are `goal-<i>`. A
    perfect purchase pays 10, anything else 0; `info` carries the original's reward as `task_score`.
    `observation="compact"` shows short pages that a tiny model can read.
    """

    max_turns = 15
    thought = "The next step follows from the page."

    class Options(TextEnvironment.Options):
        data: str | None = Field(None, description="Folder (or product file) of WebShop's data; none: generated.")
        num_products: int | None = Field(None, ge=12, description="Products used; none: all, or 480 generated ones.")
        seed: int = Field(0, ge=0, description="Fixes prices, price limits and the generated catalogue.")
        human_goals: bool = Field(False, description="Human instructions instead of synthetic ones.")
        val_goals: int = Field(500, ge=1, description="Goals of the split val; the rest is train.")
        # One more choice than the base has.
        observation: Literal["text", "text_rich", "compact"] = Field(  # type: ignore[assignment]
            "text", description="How pages are written; compact: short, for tiny models."
        )
        show_attrs: bool = Field(False, description="The original's Attributes page.")
        results_per_page: int = Field(
            0,
            ge=0,
            le=10,
            description="Products per page, below 10 only in compact; 0: 10, in compact 5 generated ones.",
        )
        title_words: int = Field(10, ge=1, description="Words of a title that compact pages show.")
        compact_ids: Literal["position", "asin"] = Field("position", description="Names of products on compact pages.")

        @model_validator(mode="after")
        def _page_size(self) -> WebShop.Options:
            if self.observation != "compact" and self.results_per_page not in (0, 10):
                raise ValueError(f'results_per_page={self.results_per_page} needs observation="compact"')
            return self

    options: Options

    def __init__(self, data: str | Path | None = None, observation: str = "text", seed: int = 0, **options: Any):
        super().__init__(data=data, observation=observation, seed=seed, **options)
        settings = self.options
        self._shop = open_shop(settings.data, settings.num_products, settings.seed, settings.human_goals)
        self._renderer = CompactRenderer(settings.title_words, settings.compact_ids)
        self._per_page = settings.results_per_page or (5 if self._compact and settings.data is None else 10)
        self._tagger = default_tagger()

    def tasks(self, split: str) -> Sequence[Task]:
        """Goals in the original's shuffled order. Raises ConfigError for an unknown or empty split."""
        self._check_split(split)
        tasks = _tasks(self._shop, self.options.val_goals, split)
        if not tasks:
            counts = f"{len(self._shop.goals)} goals, of which {self.options.val_goals} are for val"
            hint = "lower env.options.val_goals or use more products"
            raise ConfigError(f"{counts}, leave none for {split}", where=self._where(), hint=hint)
        return tasks

    def reset(self, task: Task, seed: int) -> Observation:
        """Start shopping for a task's goal. `seed` drives random results (the query <r>) and the expert's slips."""
        digits = task.id.removeprefix("goal-")
        number = task.data.get("goal", int(digits) if digits.isascii() and digits.isdigit() else None)
        if not isinstance(number, int) or not 0 <= number < len(self._shop.goals):
            reason = f"task {task.id!r} names goal {number!r}; there are {len(self._shop.goals)}"
            raise ConfigError(reason, where=self._where(), hint="take tasks from tasks(split)")
        self._goal = self._shop.goals[number]
        draw = random.Random(derive(seed, "results"))
        self._episode = ShopSession(self._shop.catalogue, draw, self._per_page, self.options.show_attrs)
        self._expert = Expert(self._goal, self._shop.prices, random.Random(derive(seed, "expert")))
        return self._show()

    def step(self, action: Action) -> Outcome:
        """Search, click, or leave the page as it is. Raises ContractError before the first reset."""
        session = self._running()
        kind, argument = parse_action(action.text)
        changed = session.play(kind, self._labels.get(argument, "") if kind == "click" else argument)
        done = session.page == "done"
        if changed and done:
            return self._buy(session)
        return Outcome(self._show(changed=changed), 0.0, done, info=dict(UNFINISHED))

    def window(
        self, history: Sequence[tuple[Observation, Action]], observation: Observation, task: Task
    ) -> list[Message]:
        """SPEAR's prompt: task, the last `history_length` steps, page, admissible actions."""
        steps = [
            (earlier.info.get("page", earlier.text), action.text if self._tagged else self.format(action.text))
            for earlier, action in self._recent(history)
        ]
        page, goal = observation.info.get("page", observation.text), self._shop.goals[task.data["goal"]]
        if self._compact:
            return [Message("user", compact_window(short_instruction(goal), steps, page))]
        words, count = _TEXT["windowed"], len(history)
        begin = [words["role"], words["task"].format(task=goal["instruction_text"])]
        choices = words["choices"].format(actions="\n".join(f"'{action}'," for action in observation.admissible or ()))
        end = [choices, words["decide"], words["reason"] if self._tagged else PLAIN]
        then = words["then"].format(step=count + 1, page=page)
        text = "\n".join([*begin, past_steps(steps, count), then, *end])
        if not steps or len(text) > LONGEST:
            text = "\n".join([*begin, words["now"].format(page=page), *end])
        return [Message("user", text)]

    def format(self, text: str) -> str:
        """A reply that `parse` turns into `text`; plain ones space the brackets, so that tokens are a page's."""
        match = None if self._tagged else PLAIN_ACTION.fullmatch(text)
        return f"{match[1]}[ {match[2]} ]" if match else super().format(text)

    def expert(self) -> str | None:
        """The scripted shopper's next action, from the true state; None after the purchase."""
        session = self._running()
        if session.page == "done":
            return None
        kind, argument = self._expert.act(session, self.expert_noise)
        if kind == "click":
            argument = next((label for label, name in self._labels.items() if name == argument), argument)
        return f"{kind}[{argument}]"

    def _rules(self) -> str:
        return str(_TEXT["rules"])

    def _action(self, text: str, valid: bool) -> Action:
        if self._tagged:
            return Action(text, valid, tool_calls=int(valid and parse_action(text)[0] in ("search", "click")))
        match = PLAIN_ACTION.fullmatch(text)
        return Action(f"{match[1]}[{match[2]}]", tool_calls=1) if match else Action(text, valid=False)

    def _buy(self, session: ShopSession) -> Outcome:
        price = self._shop.prices[session.product["asin"]]
        parts = purchase_reward(session.product, self._goal, price, session.options, self._tagger)
        info = {"success": parts["task_score"] >= PERFECT, **parts}
        observation = self._show(score=parts["task_score"])
        return Outcome(observation, REWARD if info["success"] else 0.0, True, info=info)

    def _show(self, *, changed: bool = True, score: float | None = None) -> Observation:
        session = self._running()
        if self._compact:
            text, chat, page, self._labels = self._renderer.show(session, self._goal, changed=changed)
        else:
            rich = self.options.observation == "text_rich"
            text, chat, page = render.show(session, self._goal, score, rich=rich)
            self._labels = {name: name for name in session.targets()}
        search = ("search[<your query>]",) if session.page == "index" else ()
        admissible = (*search, *(f"click[{label}]" for label in self._labels))
        return Observation(text, page, admissible, info={"chat": chat, "page": page})


@lru_cache(maxsize=16)
def _tasks(shop: Shop, val: int, split: str) -> tuple[Task, ...]:
    """Goals of a split. Those of val say whether training has their product too: small models memorise products."""
    goals = shop.goals
    if split == "train":
        return tuple(Task(f"goal-{number}", split, {"goal": number}) for number in range(val, len(goals)))
    trained = {goal["asin"] for goal in goals[val:]}
    return tuple(
        Task(f"goal-{number}", split, {"goal": number, "stratum": f"product {'' if known else 'not '}in train"})
        for number, known in enumerate(goal["asin"] in trained for goal in goals[:val])
    )
