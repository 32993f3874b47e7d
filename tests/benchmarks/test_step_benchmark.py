"""benchmarks/step.py: both sides are checked to do the same work, and spearrl's does it through its trainer."""

from __future__ import annotations

import pytest

from benchmarks.step import Player, check_same, measure, ratios_of
from benchmarks.step_work import Work, check_prompts, make_tokenizer, reward

SMALL = Work(prompts=2, prompt_tokens=24, completions=4, completion_tokens=8, hidden_size=64, layers=1)


def test_every_word_of_the_prompts_is_a_token_of_its_own():
    tokenizer, work = make_tokenizer(), Work()
    ids = [tokenizer.encode(text) for text in work.texts()]
    assert [len(row) for row in ids] == [256] * 16 and tokenizer.decode(ids[0]) == work.texts()[0]
    assert len({token for row in ids for token in row}) == len({word for text in work.texts() for word in text.split()})

    class Forgetful:
        def encode(self, text, add_special_tokens):
            return [0] * len(text.split())

    with pytest.raises(SystemExit, match="the tokenizer lost words: 1 different tokens"):
        check_prompts(Forgetful(), work)


def test_the_reward_is_the_share_of_even_characters():
    assert reward("") == 0 and reward("bd") == 1 and reward("abcd") == 0.5


def test_spearrl_does_all_of_the_work():
    sides = measure(["spearrl"], SMALL, steps=1, threads=1)
    side = sides["spearrl"]
    assert side["prompt_tokens"] == 2 * 4 * 24 and side["unique_prompt_tokens"] == 2 * 24
    assert side["completion_tokens"] == 2 * 4 * 8 and side["updates"] == 1 and 0 < side["reward"] < 1
    assert side["computed"]["update"] >= 2 * 24 + 2 * 4 * 8 - 2 * 4 and side["peak_mib"] > side["after_imports_mib"] > 0
    assert 0 < side["seconds"]["rollout"] + side["seconds"]["update"] <= side["seconds"]["step"]


def test_other_work_is_refused():
    good = {"prompts": "a", "prompt_tokens": 192, "unique_prompt_tokens": 48, "completion_tokens": 64, "updates": 1}
    good |= {"trained": 64, "grad_norm": 1.0, "entropy": 7.0}
    first = Player("spearrl", None, None, steps=[good])
    check_same(Player("trl", None, None, steps=[good | {"grad_norm": 1.2}]), first, SMALL)
    for changed in ({"prompts": "b"}, {"completion_tokens": 60}, {"updates": 2}, {"trained": 32}, {"grad_norm": 0.0}):
        with pytest.raises(SystemExit, match=f"trl: .*{'trained' if 'trained' in changed else [*changed][0]}"):
            check_same(Player("trl", None, None, steps=[good | changed]), first, SMALL)


def test_ratios_are_of_the_other_to_ours():
    def side(seconds, cpu, mib):
        return {"seconds": {"step": seconds}, "cpu": {"step": cpu}, "peak_mib": mib}

    ratios = ratios_of({"spearrl": side(2.0, 4.0, 500), "trl": side(12.0, 16.0, 1000)})
    assert ratios == {
        "trl / spearrl: step": 6.0,
        "trl / spearrl: processor time": 4.0,
        "trl / spearrl: peak memory": 2.0,
    }
