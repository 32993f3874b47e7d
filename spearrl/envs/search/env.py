"""The search environment: replies, results, prompts and rewards around a retriever."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from spearrl.config.tables import table
from spearrl.envs.search.answers import exact, f1
from spearrl.envs.search.facts import FactWorld, open_world
from spearrl.envs.search.files import Document, data_files, read_questions
from spearrl.envs.search.retrieve import CorpusIndex, RetrievalServer, Unavailable, open_index
from spearrl.envs.text.analyzer import STOP_WORDS, split_words
from spearrl.envs.text.environment import TextEnvironment
from spearrl.envs.text.tagged_replies import has_reasoning
from spearrl.envs.tool_calls import after_thought, without_thought
from spearrl.errors import ConfigError
from spearrl.seeds import derive
from spearrl.types import Action, Message, Observation, Outcome, Reply, Task

TAG = re.compile(r"<(/?)(search|answer)>", re.IGNORECASE)
PLAIN_ACTION = re.compile(r"(search|answer)[ \t]+([^\n]+)", re.IGNORECASE)
REWARD = 10.0  # for a right answer
UNFINISHED = {"success": False, "em": 0.0, "f1": 0.0}
LONGEST_QUERY, COMPACT_WORDS = 500, 32  # characters, words of a document
_TEXT = table(__file__, "prompts.toml")


class Search(TextEnvironment[Task]):
    """Questions answered with a search engine, as in Search-R1 (arXiv 2503.09516): each turn a <search> or an <answer>.

    Documents and questions come from an embedded world of linked facts, from files, or the documents from a retrieval
    server. A right answer (exact match after SQuAD's normalisation) pays 10; `info` has `em` and `f1`.
    `observation="compact"` leaves out what a tiny model cannot read.
    """

    max_turns = 4
    thought = "The next step follows from what was found."

    class Options(TextEnvironment.Options):
        corpus: str | None = Field(
            None, description="Documents: a .json or .jsonl file ({title, text} or {contents}), or a folder of them."
        )
        data: str | None = Field(
            None, description="Questions: a file ({question, golden_answers} or HotpotQA's), or a folder of such files."
        )
        retriever_url: str | None = Field(
            None, pattern=r"^https?://\S+$", description="Server with Search-R1's API, in place of a corpus."
        )
        topk: int = Field(3, ge=1, description="Documents that a search returns.")
        max_chars: int = Field(2000, ge=100, description="Characters of the results of a search that are shown.")
        timeout_s: float = Field(20.0, gt=0, description="Seconds for a search of a server, its three tries together.")
        reward: Literal["em", "f1"] = Field("em", description="What pays: exact match, or the share F1.")
        reply: Literal["tagged", "plain"] = Field(
            "tagged", description="<think>…</think> with <search>…</search> or <answer>…</answer>, or `search …`."
        )
        history_length: int = Field(4, ge=0, description="Earlier turns a windowed prompt shows.")
        size: int = Field(600, ge=60, le=6000, description="Things in the embedded world, a document each.")

        @model_validator(mode="after")
        def _fit(self) -> Search.Options:
            if (self.data is None and (self.corpus or self.retriever_url)) or (self.retriever_url and self.corpus):
                raise ValueError("corpus or retriever_url, not both, go with questions: set data")
            return self

    options: Options

    def __init__(self, corpus: str | Path | None = None, data: str | Path | None = None, **options: Any):
        super().__init__(corpus=corpus, data=data, **options)
        settings = self.options
        self.execution = "thread" if settings.retriever_url else "inline"
        self._world: FactWorld | None = None if settings.data else open_world(settings.size, settings.seed)
        self._retriever: CorpusIndex | RetrievalServer
        if self._world:
            self._retriever = self._world.corpus
        elif settings.retriever_url:
            self._retriever = RetrievalServer(settings.retriever_url, settings.timeout_s)
        else:
            self._retriever = open_index(tuple(data_files(settings.corpus or settings.data or "")))

    def tasks(self, split: str) -> Sequence[Task]:
        """The questions of a split. Raises ConfigError for an unknown or empty one."""
        data = self.options.data
        tasks = self._world.tasks.get(split, ()) if self._world else read_questions(data or "", split)
        if not tasks:
            hint = 'use "train" or "val", or check env.options.data'
            raise ConfigError(f"no questions of the split {split!r}", where=self._where(), hint=hint)
        return tasks

    def reset(self, task: Task, seed: int) -> Observation:
        """Ask the question. `seed` only drives the expert's slips."""
        if "question" not in task.data or "answers" not in task.data:
            reason = f"task {task.id!r} holds no question with answers"
            raise ConfigError(reason, where=self._where(), hint="take tasks from tasks(split)")
        self._episode, self._over, self._draw = task, False, random.Random(derive(seed, "expert"))
        self._found_titles: set[str] = set()
        return self._observe(_compact_words(task.data["question"]) if self._compact else task.data["question"])

    def step(self, action: Action) -> Outcome:
        """Search, or answer and end; anything else only says what was expected.

        Raises:
            ContractError: before the first reset.
        """
        task = self._running()
        if self._over:
            return Outcome(self._observe("done"), 0.0, True, info=dict(UNFINISHED))
        match = PLAIN_ACTION.fullmatch(action.text.strip())
        kind, argument = (match[1].lower(), match[2]) if match else ("", "")
        if kind == "answer":
            self._over, gold = True, task.data["answers"]
            em = exact(argument, gold)
            info = {"success": em, "em": float(em), "f1": f1(argument, gold)}
            return Outcome(self._observe("done"), REWARD * info[self.options.reward], True, info=info)
        texts, info = _TEXT["replies"], dict(UNFINISHED)
        if kind != "search":
            text = "invalid" if self._compact else texts["invalid" if self._tagged else "invalid_plain"]
            return Outcome(self._observe(text), 0.0, False, info=info)
        try:
            documents = self._retriever.search(argument[:LONGEST_QUERY], self.options.topk)
        except Unavailable as error:
            info["fault"] = True
            text = _information(texts["unavailable"].format(reason=error))
        else:
            self._found_titles.update(document.title for document in documents)
            text = self._results(documents)
        return Outcome(self._observe(text), 0.0, False, info=info)

    def messages(self, observation: Observation, turn: int) -> list[Message]:
        """Turn 0: the rules (not in compact) and the question; later turns only what came back."""
        return [Message("user", observation.text)] if turn > 0 else self.window([], observation, self._running())

    def window(
        self, history: Sequence[tuple[Observation, Action]], observation: Observation, task: Task
    ) -> list[Message]:
        """verl-agent's prompt: the question, and the last `history_length` steps with what came back."""
        recent, question = self._recent(history), task.data["question"]
        texts = [*(earlier.text for earlier, _ in recent[1:]), observation.text]
        steps = [f"{self._tags(action.text)}\n{text}" for (_, action), text in zip(recent, texts, strict=False)]
        if self._compact:
            return [Message("user", "\n> ".join([_compact_words(question), *steps]))]
        count, shown = len(history), len(recent)
        listed = "\n".join(f"Step {number}: {step}" for number, step in enumerate(steps, count - shown + 1))
        past = [_TEXT["past"].format(count=count, shown=shown, history=listed)] if steps else []
        rules = _TEXT["tagged" if self._tagged else "plain"].values()
        return [Message("user", "\n".join([_TEXT["role"], _TEXT["task"].format(question=question), *past, *rules]))]

    def parse(self, reply: Reply) -> Action:
        """The first whole <search> or <answer>, as `search …` or `answer …`; plain: the reply itself.

        A tagged reply is valid where there is no other, with <think> and without Chinese.
        """
        if not self._tagged:
            text = after_thought(reply.text).strip()
            valid = PLAIN_ACTION.fullmatch(text) is not None
            return Action(text, tool_calls=int(text[0] in "sS")) if valid else Action("", valid=False)
        text = without_thought(reply.text)
        tags = list(TAG.finditer(text))
        for start, end in itertools.pairwise(tags):
            kind = start[2].lower()
            if not start[1] and end[1] and kind == end[2].lower():
                argument = " ".join(text[start.end() : end.start()].split())
                valid = len(tags) == 2 and bool(argument) and has_reasoning(reply.text)
                return Action(f"{kind} {argument}", valid, tool_calls=int(valid and kind == "search"))
        return Action("", valid=False)

    def format(self, text: str) -> str:
        """The reply that `parse` turns into `search …` or `answer …`."""
        tags = self._tags(text)
        return text if tags == text else f"<think>{self.thought}</think>{tags}"

    def expert(self) -> str | None:
        """The next step of one who looks things up link by link, in the embedded world.

        A slip (expert_noise) is a search for half a name, or an answer given too early. None after the end, and where
        questions come from files.
        """
        task = self._running()
        if self._over or self._world is None:
            return None
        *things, answer = self._world.way(task.data["chain"])
        unknown = next((thing for thing in things if thing not in self._found_titles), None)
        kind, argument = ("search", unknown) if unknown is not None else ("answer", answer)
        if self._draw.random() < self.expert_noise:
            kind, argument = self._draw.choice([("answer", argument), ("search", argument.split()[0])])
        return f"{kind} {argument.lower() if self._compact else argument}"

    def _observe(self, text: str) -> Observation:
        """Siblings that have found the same documents share a GiGPO anchor."""
        return Observation(text, (self._over, *sorted(self._found_titles)))

    def _results(self, documents: Sequence[Document]) -> str:
        if self._compact:
            texts = (text if text.startswith(title) else f"{title} {text}" for title, text in documents)
            return "\n ".join(["found" if documents else "nothing", *map(_compact_words, texts)])
        lines = [f'Doc {number} (Title: "{title}") {text}' for number, (title, text) in enumerate(documents, 1)]
        return _information("\n".join(lines)[: self.options.max_chars] or _TEXT["replies"]["nothing"])

    def _tags(self, text: str) -> str:
        """`search …` as the model writes it."""
        match = PLAIN_ACTION.fullmatch(text)
        return f"<{match[1]}>{match[2]}</{match[1]}>" if self._tagged and match else text


def _compact_words(text: str) -> str:
    """Lower-case words, without the commonest ones."""
    words = (word for word in split_words(text.lower()) if word not in STOP_WORDS)
    return " ".join(itertools.islice(words, COMPACT_WORDS))


def _information(text: str) -> str:
    return f"<information>{text}</information>"
