"""`spearrl study cost`: the counter sees every product, both algorithms get the same episodes and weights, and the sums
are right."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

from spearrl.cli.main import main
from spearrl.cli.study import table, verdicts
from spearrl.config.sections import TinySection
from spearrl.errors import ContractError
from spearrl.learner.logprobs import token_logprobs
from spearrl.models import build_tiny
from spearrl.study import Cost, CostStep, LearningCost, cost, count_flops, rollout_flops, summarise
from spearrl.trainer import Trainer
from tests.support.small_run import SETTINGS, fingerprint, small_config

FAST = ("sft.episodes=150", "sft.epochs=2", "sft.lr=5e-3")


def configs(folder: Path, *changes: str, algo: str = "grpo+spear", against: str = "grpo"):
    return small_config(folder, *FAST, *changes, algo=algo), small_config(folder, *FAST, *changes, algo=against)


def head_flops(n: int, d: int, v: int) -> int:
    """The logits of every position."""
    return 2 * n * d * v


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("skipped", [0, 4])
def test_the_counter_sees_the_products_inside_the_head(chunk: int, trained: bool, skipped: int):
    n, d, v = 12, 6, 20
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=trained)
    targets, upstream = torch.arange(n), torch.arange(n).ge(skipped).float()

    def head() -> torch.Tensor:
        return token_logprobs(hidden, weight, targets, chunk=chunk)[0]

    # A frozen head's gradient is formed in the forward pass, unless that keeps the logits; a trained head's logits are
    # computed again, unless they were kept; positions whose gradient is 0 are left out.
    used = n - skipped
    if chunk >= n:
        backward = (1 + trained) * head_flops(used, d, v)
    else:
        backward = 3 * head_flops(used, d, v) if trained else head_flops(n, d, v)
    assert count_flops(lambda: (upstream * head()).sum().backward()) == head_flops(n, d, v) + backward
    with torch.no_grad():
        assert count_flops(head) == head_flops(n, d, v)


def test_the_count_of_a_tiny_model_is_the_one_worked_out_by_hand():
    shape = TinySection(layers=2, hidden_size=32, heads=4, feed_forward=48, vocab_size=400)
    model, _ = build_tiny(["want: look or say", " look", "it is red"] * 20, shape, seed=0)
    ids = torch.randint(0, 50, (3, 10))
    tokens, vocabulary = ids.numel(), model.get_output_embeddings().weight.shape[0]

    def forward():
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return token_logprobs(states.reshape(-1, 32), model.get_output_embeddings().weight, ids.flatten())[0]

    head_size = model.config.head_dim
    wide = shape.heads * head_size
    layer = 4 * 32 * wide + 3 * 32 * shape.feed_forward  # q k v o, then gate, up, down
    product = (
        2 * ids.shape[0] * shape.heads * ids.shape[1] ** 2 * head_size
    )  # queries with keys, or weights with values
    angles = 2 * (head_size // 2) * ids.shape[1]  # of the rotary positions: frequencies times places
    once = 2 * tokens * layer * shape.layers
    with torch.no_grad():
        assert count_flops(forward) == once + 2 * product * shape.layers + angles + head_flops(tokens, 32, vocabulary)
    both = (
        3 * once
        + (2 + 5) * product * shape.layers
        + angles
        + head_flops(tokens, 32, vocabulary)
        + 2 * (2 * tokens * 32 * vocabulary)
    )
    assert count_flops(lambda: forward().sum().backward()) == both


def test_the_estimate_of_a_rollout_is_near_the_count_and_not_above_it(tmp_path):
    """Not above: a rollout that seems dearer than it is would make the extra share smaller."""
    trainer = Trainer(small_config(tmp_path, "sft.enabled=false", algo="grpo"))
    engine = trainer.parts.players.engine
    before = dict(engine.counters)
    counted = count_flops(lambda: trainer.play(1))
    tokens = {name: engine.counters[f"{name}_tokens"] - before[f"{name}_tokens"] for name in ("prefilled", "sampled")}
    trainer.close()
    assert 0.5 * counted < rollout_flops(trainer.parts.model, **tokens) <= counted


def test_both_learn_from_the_same_episodes_and_weights_in_turns(tmp_path, monkeypatch):
    learn, learnt = Trainer.learn, []

    def spy(self, step, groups, clock):
        before = fingerprint(self.parts.model)
        metrics = learn(self, step, groups, clock)
        episodes = [[(t.id, tuple(turn.token_ids)) for turn in t.turns] for g in groups for t in g.trajectories]
        learnt.append((self.run.path.name, step, episodes, before, (metrics["update/tokens"], metrics["replay/rows"])))
        return metrics

    monkeypatch.setattr(Trainer, "learn", spy)
    config, against = configs(tmp_path)
    cost(config, against, steps=3, folder=tmp_path)

    assert [name for name, step, *_ in learnt[:8]] == ["studied", "against", "against", "studied"] * 2
    by_step = {step: [call for call in learnt if call[1] == step] for step in (1, 2, 3, 4)}
    assert all(len(calls) == 4 and all(call[2] == calls[0][2] for call in calls) for calls in by_step.values())
    assert len({call[3] for call in by_step[1]}) == 1
    # The pass that counts does the same work, so its FLOPs are those of the timed one.
    work = {
        name: [call[4] for call in learnt if call[0] == name]
        for name in ("studied", "against", "count-studied", "count-against")
    }
    assert (
        work["studied"] == work["count-studied"]
        and work["against"] == work["count-against"]
        and work["studied"] != work["against"]
    )


def test_only_steps_with_a_replay_cost_more_flops(tmp_path):
    config, against = configs(tmp_path, algo="grpo+sil")
    measured = cost(config, against, steps=6, folder=tmp_path)
    assert [step.step for step in measured.steps] == [2, 3, 4, 5, 6, 7]  # the first is the warm-up
    replayed = [step for step in measured.steps if step.replayed]
    assert 0 < len(replayed) < 6
    assert all(step.studied.flops > step.against.flops > 0 for step in replayed)
    # Tokens that clipping leaves out cost the head's backward pass nothing, and the two clip their own.
    rest = [step for step in measured.steps if not step.replayed]
    assert all(step.studied.flops == pytest.approx(step.against.flops, rel=0.01) for step in rest)
    assert all(0 < s.prepare + s.update <= s.seconds for step in measured.steps for s in (step.studied, step.against))
    assert all(step.rollout_flops > 0 and step.rollout_seconds > 0 for step in measured.steps)


def test_an_algorithm_costs_no_flops_over_itself(tmp_path):
    measured = cost(*configs(tmp_path, against="grpo+spear"), steps=2, folder=tmp_path)
    assert all(step.studied.flops == step.against.flops > 0 for step in measured.steps)


def test_configs_must_differ_in_the_algorithm_only(tmp_path):
    config, _ = configs(tmp_path)
    _, against = configs(tmp_path, "rollout.group_size=2")
    with pytest.raises(ContractError, match="rollout"):
        cost(config, against, steps=1, folder=tmp_path)
    with pytest.raises(ContractError, match="steps=0"):
        cost(config, config, steps=0, folder=tmp_path)
    assert not any(tmp_path.iterdir())


def step(
    number: int, studied: float, against: float, *, replayed: int = 0, flops: tuple[int, int] = (10, 10)
) -> CostStep:
    mine, other = (
        LearningCost(studied, 2 * studied, studied / 2, studied / 4, flops[0]),
        LearningCost(against, 2 * against, against / 2, against / 4, flops[1]),
    )
    return CostStep(
        number, replayed, rollout_seconds=1.0, rollout_cpu_seconds=1.0, rollout_flops=10, studied=mine, against=other
    )


def test_summaries_are_the_sums_worked_out_by_hand():
    summary = summarise([step(1, 2.0, 1.0), step(2, 5.0, 3.0, flops=(40, 20)), step(3, 2.0, 2.0)])
    assert summary == pytest.approx(
        {
            "steps": 3,
            "rollout_seconds": 1.0,
            "seconds": 4.0,
            "seconds_against": 3.0,
            "median_seconds": 3.0,
            "median_seconds_against": 3.0,
            "extra": 1 / 3,
            "extra_median": 0.5,  # of 3/2, 6/4 and 3/3
            "learn_extra": 0.5,
            "learn_extra_median": 2 / 3,  # of 2/1, 5/3 and 2/2
            "cpu_seconds": 7.0,
            "cpu_seconds_against": 5.0,
            "extra_cpu": 7 / 5 - 1,  # 1 + 6 over 1 + 4
            "learn_extra_cpu": 0.5,
            "flops": 30.0,
            "flops_against": 70 / 3,
            "extra_flops": 90 / 70 - 1,
            "learn_extra_flops": 0.5,
            "prepare_more": 0.5,
            "update_more": 0.25,
            "rest_more": 0.25,
        }
    )


def test_bars_are_met_missed_or_left_open():
    quiet, dear = step(1, 1.1, 1.0), step(2, 2.0, 1.0, replayed=4)
    assert (
        verdicts(Cost("a", "b", [quiet]))["all"] is None
    )  # nothing was replayed: the average says nothing about replay
    assert verdicts(Cost("a", "b", [dear]))["without replay"] is None
    bars = verdicts(Cost("a", "b", [quiet, quiet, dear]))
    assert bars["without replay"]["met"] and bars["all"]["met"] and bars["all"]["wall"] == pytest.approx(0.2)
    bars = verdicts(Cost("a", "b", [step(1, 1.1, 1.0, flops=(16, 10)), dear]))
    assert not bars["without replay"]["met"] and not bars["all"]["met"]  # the one by FLOPs, the other by time
    text = table(Cost("a", "b", [quiet, quiet, dear]))
    assert "steps without replay: at most +10 %: wall time +5.0 %, FLOPs +0.0 %: met" in text and "NOT met" not in text
    assert "nothing was replayed" in table(Cost("a", "b", [quiet]))


def test_the_command_prints_json_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings = ["study", "cost", "--preset", "tiny", *SETTINGS, *FAST, "--algo", "grpo+sil"]
    assert main([*settings, "--steps", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["algo"], printed["against"], len(printed["steps"])) == ("grpo+sil", "grpo", 2)
    assert printed["summaries"]["all"]["steps"] == 2 and set(printed["bars"]) == {"without replay", "all"}
    assert not any(tmp_path.iterdir())

    assert main([*settings, "--steps", "1", "--output", "kept"]) == 0
    assert "extra FLOPs of a step" in capsys.readouterr().out and (tmp_path / "kept/studied/events.jsonl").exists()
    assert main([*settings, "--output", "kept"]) == 3 and "not an empty folder" in capsys.readouterr().err


def test_wrong_use_is_refused(capsys):
    assert main(["study", "speed", "--preset", "tiny"]) == 2 and "speed" in capsys.readouterr().err
    assert (
        main(["study", "cost", "--preset", "tiny", *SETTINGS, "--steps", "0"]) == 2
        and "steps=0" in capsys.readouterr().err
    )
    assert (
        main(["study", "cost", "--preset", "tiny", *SETTINGS, "--against", "grpp"]) == 2
        and "grpp" in capsys.readouterr().err
    )
