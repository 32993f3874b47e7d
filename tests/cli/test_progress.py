"""A long silence is broken by what is being done, and nothing is said where nobody watches."""

from __future__ import annotations

import logging
import re
import time

import pytest

from spearrl.cli import progress
from spearrl.trainer import Trainer
from tests.support.families import family_directory
from tests.support.short_runs import from_model

LOG = logging.getLogger("spearrl.some.module")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "SILENCE_S", 0.05)
    monkeypatch.setattr(progress, "TICK_S", 0.01)


def test_a_silence_is_broken_by_the_latest_word_and_its_seconds(capsys):
    with progress.watched("starting"):
        assert capsys.readouterr().err == "starting\n"
        LOG.info("pass %d of %d", 1, 3)
        LOG.info("pass %d of %d", 2, 3)
        time.sleep(0.2)
    said = capsys.readouterr().err.splitlines()
    assert said and set(said) == {"pass 2 of 3 (0 s)"}
    LOG.info("nobody hears this")
    time.sleep(0.1)
    assert capsys.readouterr().err == "" and not logging.getLogger("spearrl").handlers


def test_what_is_printed_meanwhile_is_no_silence(capsys):
    with progress.watched("starting"):
        for _ in range(20):
            progress.printed()
            time.sleep(0.01)
    assert capsys.readouterr().err == "starting\n"


def test_every_part_of_a_run_says_what_it_does(model, tmp_path, monkeypatch):
    """Cold start, rollout, evaluation, log-probabilities, update: the words a silence would be broken with."""
    said, emit = [], progress.SilenceBreaker.emit
    monkeypatch.setattr(
        progress.SilenceBreaker, "emit", lambda self, record: (said.append(record.getMessage()), emit(self, record))
    )
    config = from_model(model, tmp_path, "run.steps=1", "sft.enabled=true", "sft.episodes=8", "sft.epochs=1")
    with progress.watched("starting"), Trainer(config) as trainer:
        trainer.train()
    for words in (
        r"loading the weights of .*",
        r"expert: episode 8 of 8",
        r"cold start: update 1 of 1, loss nan",
        r"rollout: 0 of 16 episodes, 0 tokens, 0 tokens/s",
        r"eval: 0 of 2 episodes, 0 tokens, 0 tokens/s",
        r"log-probabilities: pass 1 of \d+",
        r"update: pass 1 of \d+ of an optimiser step",
    ):
        assert any(re.fullmatch(words, line) for line in said), (words, said)


def test_how_far_a_rollout_is_comes_from_the_engine_as_it_samples(model, tmp_path, monkeypatch):
    told = []
    with Trainer(from_model(model, tmp_path, "run.steps=1")) as trainer:
        monkeypatch.setattr(logging.getLogger("spearrl.rollout.collector"), "info", lambda _, it: told.append(it))
        trainer.play(1)
        ended, total, tokens = re.match(r"rollout: (\d+) of (\d+) episodes, ([\d,]+) tokens", str(told[0])).groups()
        assert (ended, total) == ("16", "16")
        assert float(tokens.replace(",", "")) == trainer.parts.players.engine.counters["sampled_tokens"] > 0


def test_a_run_of_a_model_that_cannot_be_packed_says_why(tmp_path, capsys):
    """A sliding window, through the trainer: one line, with the reason."""
    folder = family_directory("mistral", tmp_path / "model")
    Trainer(from_model(folder, tmp_path, "run.steps=1"), report=progress.Progress().report).close()
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if line.startswith("learner.packing: padded")]
    assert len(lines) == 1 and "sliding" in lines[0]
