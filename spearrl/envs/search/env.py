"""The search environment: replies, results, prompts and rewards around a retriever."""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from spearrl.config.tables import table
from spearrl.envs.base import Environment
from spearrl.envs.search.answers import exact, f1
from spearrl.envs.search.facts import World, open_world
from spearrl.envs.search.files import Document, find, questions
from spearrl.envs.search.retrieve import Index, Server, Unavailable, open_index
from spearrl.envs.text.analyzer import STOP_WORDS, words
from spearrl.envs.text.tagged import has_reasoning
from spearrl.errors import ConfigError, ContractError
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task

TAG = re.compile(r"<(/?)(search|answer)>", re.IGNORECASE)
PLAIN = re.compile(r"(search|answer)[ \t]+([^\n]+)", re.IGNORECASE)
THOUGHT = "The next step follows from what was found."
REWARD = 10.0  # for a right answer
UNFINISHED = {"success": False, "em": 0.0, "f1": 0.0}
LONGEST_QUERY, COMPACT_WORDS = 500, 32  # characters, words of a document
_TEXT = table(__file__, "prompts.toml")


class Search(Environment):
    """Questions answered with a search engine, as in Search-R1 (arXiv 2503.09516): every turn one <search> or one <answer>.

    Documents and questions come from an embedded world of linked facts, from files, or the documents from a retrieval server. A right answer (exact
    match after SQuAD's normalisation) pays 10; `info` has `em` and `f1`. `observation="compact"` drops what a tiny model cannot read.
    """

    max_turns = 4

    class Options(Environment.Options):
        corpus: str | None = Field(
            None, description="Documents: a .json or .jsonl file ({title, text} or {contents}), or a folder of them."
        )
        data: str | None = Field(
            None,
            description="Questions: a file ({question, golden_answers} or HotpotQA's), or a folder with train and dev files.",
        )
        retriever_url: str | None = Field(
            None,
            pattern=r"^https?://\S+$",
            description="A retrieval server with Search-R1's API, in place of a corpus.",
        )
        topk: int = Field(3, ge=1, description="Documents that a search returns.")
        max_chars: int = Field(2000, ge=100, description="Characters of the results of a search that are shown.")
        timeout_s: float = Field(
            20.0, gt=0, description="Seconds for a search of a retrieval server, its three tries together."
        )
        reward: Literal["em", "f1"] = Field("em", description="What pays: exact match, or the share F1.")
        observation: Literal["text", "compact"] = Field(
            "text", description="How texts are written; compact: few lower-case words, for tiny models."
        )
        reply: Literal["tagged", "plain"] = Field(
            "tagged", description="<think>…</think> with <search>…</search> or <answer>…</answer>, or `search …`."
        )
        history_length: int = Field(4, ge=0, description="Earlier turns a windowed prompt shows.")
        seed: int = Field(0, ge=0, description="Fixes the embedded world.")
        size: int = Field(600, ge=60, le=6000, description="Things in the embedded world, a document each.")

        @model_validator(mode="after")
        def _fit(self) -> Search.Options:
            if (self.data is None and (self.corpus or self.retriever_url)) or (self.retriever_url and self.corpus):
                raise ValueError("corpus or retriever_url, not both, go with questions: set data")
            return self

    options: Options

    def __init__(self, corpus: str | Path | None = None, data: str | Path | None = None, **options: Any):
        super().__init__(
            corpus=None if corpus is None else str(corpus), data=None if data is None else str(data), **options
        )
        chosen = self.options
        self.execution = "thread" if chosen.retriever_url else "inline"
        self._tagged, self._compact = chosen.reply == "tagged", chosen.observation == "compact"
        self._world: World | None = None if chosen.data else open_world(chosen.size, chosen.seed)
        if self._world:
            self._retriever: Index | Server = self._world.engine
        elif chosen.retriever_url:
            self._retriever = Server(chosen.retriever_url, chosen.timeout_s)
        else:
            self._retriever = open_index(tuple(find(chosen.corpus or chosen.data or "")))
        self._task: Task | None = None

    def spawn(self) -> Search:
        """A slot that shares questions and index."""
        slot = copy.copy(self)
        slot._task = None
        return slot

    def tasks(self, split: str) -> Sequence[Task]:
        """The questions of a split. Raises ConfigError for an unknown or empty one."""
        found = (
            questions(self.options.data, split)
            if self.options.data
            else self._world.tasks.get(split, ())
            if self._world
            else ()
        )
        if not found:
            raise ConfigError(
                f"no questions of the split {split!r}",
                where="env search",
                hint='use "train" or "val", or check env.options.data',
            )
        return found

    def reset(self, task: Task, seed: int) -> Observation:
        """Ask the question. `seed` only drives the expert's slips."""
        if "question" not in task.data or "answers" not in task.data:
            raise ConfigError(
                f"task {task.id!r} holds no question with answers",
                where="env search",
                hint="take tasks from tasks(split)",
            )
        self._task, self._over, self._draw = task, False, random.Random(derive(seed, "expert"))
        self._known: set[str] = set()
        return self._observe(self._short(task.data["question"]) if self._compact else task.data["question"])

    def step(self, action: Action) -> Outcome:
        """Search, or answer and end; anything else only says what was expected. Raises ContractError before the first reset."""
        task = self._playing()
        if self._over:
            return Outcome(self._observe("done"), 0.0, True, info=dict(UNFINISHED))
        match = PLAIN.fullmatch(action.text.strip())
        kind, said = (match[1].lower(), match[2]) if match else ("", "")
        if kind == "answer":
            self._over, gold = True, task.data["answers"]
            info = {"success": exact(said, gold), "em": float(exact(said, gold)), "f1": f1(said, gold)}
            return Outcome(self._observe("done"), REWARD * info[self.options.reward], True, info=info)
        if kind != "search":
            told = "invalid" if self._compact else _TEXT["told"]["invalid" if self._tagged else "invalid_plain"]
            return Outcome(self._observe(told), 0.0, False, info=dict(UNFINISHED))
        try:
            found = self._retriever.search(said[:LONGEST_QUERY], self.options.topk)
        except Unavailable as error:
            return Outcome(
                self._observe(_information(_TEXT["told"]["unavailable"].format(reason=error))),
                0.0,
                False,
                info={**UNFINISHED, "fault": True},
            )
        self._known.update(document.title for document in found)
        return Outcome(self._observe(self._results(found)), 0.0, False, info=dict(UNFINISHED))

    def messages(self, observation: Observation, turn: int) -> list[Message]:
        """Turn 0: the rules (not in compact) and the question; later turns only what came back."""
        return [Message("user", observation.text)] if turn > 0 else self.window([], observation, self._playing())

    def window(
        self, history: Sequence[tuple[Observation, Action]], observation: Observation, task: Task
    ) -> list[Message]:
        """verl-agent's prompt: the question, and the last `history_length` steps with what came back."""
        shown = history[max(0, len(history) - self.options.history_length) :]
        seen = [*(earlier.text for earlier, _ in shown[1:]), observation.text]
        steps = [f"{self._tags(action.text)}\n{text}" for (_, action), text in zip(shown, seen, strict=False)]
        if self._compact:
            return [Message("user", "\n> ".join([self._short(task.data["question"]), *steps]))]
        told = "\n".join(f"Step {number}: {step}" for number, step in enumerate(steps, len(history) - len(shown) + 1))
        past = [_TEXT["past"].format(count=len(history), shown=len(shown), history=told)] if steps else []
        rules = _TEXT["tagged" if self._tagged else "plain"].values()
        return [
            Message(
                "user", "\n".join([_TEXT["role"], _TEXT["task"].format(question=task.data["question"]), *past, *rules])
            )
        ]

    def parse(self, reply: Reply) -> Action:
        """The first whole <search> or <answer>, as `search …` or `answer …`; valid: the only one, with <think>, without Chinese. Plain: just that."""
        if not self._tagged:
            text = reply.text.strip()
            return Action(text, tool_calls=int(text[0] in "sS")) if PLAIN.fullmatch(text) else Action("", valid=False)
        tags = list(TAG.finditer(reply.text))
        for start, end in itertools.pairwise(tags):
            if not start[1] and end[1] and start[2].lower() == end[2].lower():
                said = " ".join(reply.text[start.end() : end.start()].split())
                valid = len(tags) == 2 and bool(said) and has_reasoning(reply.text)
                return Action(
                    f"{start[2].lower()} {said}", valid, tool_calls=int(valid and start[2].lower() == "search")
                )
        return Action("", valid=False)

    def format(self, text: str) -> str:
        """The reply that `parse` turns into `search …` or `answer …`."""
        return f"<think>{THOUGHT}</think>{self._tags(text)}" if self._tagged and PLAIN.fullmatch(text) else text

    def expert(self) -> str | None:
        """The next step of one who looks things up link by link, in the embedded world; None after the end, and where questions come from files.

        A slip (expert_noise) is a search for half a name, or an answer given too early.
        """
        task = self._playing()
        if self._over or self._world is None:
            return None
        way = self._world.way(task.data["chain"])
        place = next((number for number, thing in enumerate(way[:-1]) if thing not in self._known), len(way) - 1)
        kind, said = ("answer" if place == len(way) - 1 else "search"), way[place]
        if self._draw.random() < self.expert_noise:
            kind, said = self._draw.choice([("answer", said), ("search", said.split()[0])])
        return f"{kind} {said.lower() if self._compact else said}"

    def _observe(self, text: str) -> Observation:
        """Siblings that know the same documents share a GiGPO anchor."""
        return Observation(text, (self._over, *sorted(self._known)))

    def _results(self, found: Sequence[Document]) -> str:
        if self._compact:
            shown = (text if text.startswith(title) else f"{title} {text}" for title, text in found)
            return "".join(["found" if found else "nothing", *(f"\n {self._short(text)}" for text in shown)])
        lines = [f'Doc {number} (Title: "{title}") {text}' for number, (title, text) in enumerate(found, 1)]
        return _information("\n".join(lines)[: self.options.max_chars] or _TEXT["told"]["nothing"])

    def _tags(self, text: str) -> str:
        """`search …` as the model says it."""
        match = PLAIN.fullmatch(text)
        return f"<{match[1]}>{match[2]}</{match[1]}>" if self._tagged and match else text

    @staticmethod
    def _short(text: str) -> str:
        """Lower-case words, without the commonest ones."""
        found = (word for word in words(text.lower()) if word not in STOP_WORDS)
        return " ".join(itertools.islice(found, COMPACT_WORDS))

    def _playing(self) -> Task:
        if self._task is None:
            raise ContractError(
                "step() or expert() before reset()", where="env search", hint="call reset(task, seed) first"
            )
        return self._task


def _information(text: str) -> str:
    return f"<information>{text}</information>"
