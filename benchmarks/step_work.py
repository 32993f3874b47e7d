"""The work of benchmarks/step.py, the same for every side: model directory, prompts, reward, how a side is measured.

Imports torch, transformers and tokenizers only, since the peers' environment has no more in common with ours.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

VOCABULARY = 2048
PAD, EOS = "<|pad|>", "<|endoftext|>"
PHASES = ("rollout", "old", "update")


@dataclass(frozen=True)
class Work:
    """One training step.

    Args:
        prompts: different ones, all of them played in every step.
        prompt_tokens: of each. completions: of each prompt, `completion_tokens` each: nothing ends one sooner.
        hidden_size, layers: of the Qwen2 model.
    """

    prompts: int = 16
    prompt_tokens: int = 256
    completions: int = 8
    completion_tokens: int = 32
    hidden_size: int = 256
    layers: int = 4
    lr: float = 1e-6
    seed: int = 0

    @property
    def rows(self) -> int:
        return self.prompts * self.completions

    def texts(self) -> list[str]:
        """The prompts: words that are one token each, with the space before them."""
        draw = random.Random(self.seed)
        return [
            "".join(" " + "".join(draw.choices(ascii_lowercase, k=2)) for _ in range(self.prompt_tokens))
            for _ in range(self.prompts)
        ]


def reward(text: str) -> float:
    """Share of a completion's characters with an even code."""
    return sum(ord(character) % 2 == 0 for character in text) / max(1, len(text))


def write_model(folder: Path, work: Work) -> None:
    """A Qwen2 model with random weights in fp32, and a tokenizer with a token a word.

    The end-of-sequence token's id is the first that the model cannot say, so that every completion has full length.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(work.seed)
    heads = work.hidden_size // 64
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=work.hidden_size,
        intermediate_size=work.hidden_size * 43 // 16,
        num_hidden_layers=work.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=VOCABULARY - 1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    check_prompts(tokenizer, work)


def make_tokenizer() -> Any:
    """Byte pairs: bytes, words of two letters with and without the space before them, some of three.

    transformers reads a Qwen2 model's tokenizer as a Qwen2Tokenizer whatever its files say, which keeps these only.
    """
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = [(first, second) for first in ascii_lowercase for second in ascii_lowercase]
    merges = [*pairs, *(("\u0120", first + second) for first, second in pairs)]
    merges += [(first + second, third) for (first, second), third in itertools.product(pairs, ascii_lowercase)]
    merges = merges[: VOCABULARY - 1 - len(vocabulary)]
    for first, second in merges:
        vocabulary[first + second] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(vocab={**vocabulary, PAD: VOCABULARY - 1, EOS: VOCABULARY}, merges=merges, pad_token=PAD)
    wanted = {PAD: VOCABULARY - 1, EOS: VOCABULARY}
    if tokenizer.convert_tokens_to_ids([*wanted]) != [*wanted.values()]:
        raise SystemExit(f"the tokenizer numbers {[*wanted]} otherwise")
    return tokenizer


def check_prompts(tokenizer: Any, work: Work) -> str:
    """A digest of the prompts' ids, after what would make the work smaller than it seems was looked for."""
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in work.texts()]
    different = len({token for row in rows for token in row})
    expected = len({word for text in work.texts() for word in text.split()})
    if (
        any(len(row) != work.prompt_tokens for row in rows)
        or different != expected
        or len(set(map(tuple, rows))) < len(rows)
    ):
        raise SystemExit(f"the tokenizer lost words: {different} different tokens for {expected} different words")
    return digest_of(sorted(rows))


def digest_of(rows: Sequence[Sequence[int]]) -> str:
    """Of token ids."""
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()[:16]


def memory_mib(field: str) -> float:
    """VmHWM or VmRSS of this process in MiB."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return next(
        int(line.split()[1]) / 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field + ":")
    )


@dataclass
class Step:
    """What one step of a side took and computed.

    Args:
        seconds: by phase (PHASES), and "step" for all of it. cpu: the same in processor seconds of all threads.
        computed: tokens that went through the model's embedding, by phase.
        prompts: digest of the prompts' ids. prompt_tokens, completion_tokens: of all rows. trained: tokens with a
            weight in the loss. updates: optimiser steps.
    """

    seconds: dict[str, float]
    cpu: dict[str, float]
    computed: dict[str, int]
    prompts: str = ""
    prompt_tokens: int = 0
    unique_prompt_tokens: int = 0
    completion_tokens: int = 0
    trained: int = 0
    updates: int = 0
    reward: float = 0.0
    grad_norm: float = 0.0
    entropy: float = 0.0


class Meter:
    """Seconds and tokens by phase of one step at a time; phases do not nest: an inner one interrupts the outer."""

    def __init__(self, model: Any):
        self._phase = ""
        self.begin()
        model.get_input_embeddings().register_forward_hook(self._count)

    def begin(self) -> None:
        names = (*PHASES, "step")
        self.step = Step(dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), dict.fromkeys(PHASES, 0))
        self._start = self._last = self._now()

    def end(self) -> Step:
        now = self._now()
        self.step.seconds["step"], self.step.cpu["step"] = (b - a for a, b in zip(self._start, now, strict=True))
        return self.step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, name: str) -> str:
        now, outer = self._now(), self._phase
        if outer:
            self.step.seconds[outer] += now[0] - self._last[0]
            self.step.cpu[outer] += now[1] - self._last[1]
        self._phase, self._last = name, now
        return outer

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def _count(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self._phase:
            self.step.computed[self._phase] += inputs[0].numel()


class Turns:
    """A side's end of the conversation with benchmarks/step.py: a line "step" on stdin for every step it may make.

    Steps of the sides alternate that way, so that all of them meet the same machine.
    """

    def __init__(self, after_imports_mib: float):
        self._out, self._after_imports = os.fdopen(os.dup(1), "w"), after_imports_mib
        os.dup2(2, 1)  # what libraries print does not reach the protocol

    def wait(self) -> bool:
        """Whether there is a further step to make; called before each."""
        return sys.stdin.readline().strip() == "step"

    def report(self, step: Step | None = None) -> None:
        """Hand over a finished step; None: ready for the first."""
        memory = {"peak_mib": memory_mib("VmHWM"), "after_imports_mib": self._after_imports}
        print(json.dumps({"step": None if step is None else asdict(step), **memory}), file=self._out, flush=True)
