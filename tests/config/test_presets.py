"""The presets of the paper's remaining cells against spear.md, section 8, and verl-agent's published scripts."""

from __future__ import annotations

import json

import pytest

from spearrl.cli.main import main
from spearrl.config import diff, load_config
from spearrl.config.presets import PRESETS
from spearrl.envs import load, option_errors

MATH = {"aime-32b": "Qwen/Qwen2.5-32B-Instruct", "aime-qwen3-32b": "Qwen/Qwen3-32B"}
AGENTS = ("sokoban-vl-3b", "sokoban-vl-3b-gigpo", "search-7b")
COLUMNS = ("", "-drbot", "-base")


def columns(name: str):
    return [load_config(preset=f"{name}{suffix}") for suffix in COLUMNS]


@pytest.mark.parametrize("name", MATH)
def test_aime_cells_are_those_of_section_8_2(name):
    """Columns Dr.BoT 2.5-32B and Qwen3-32B GRPO / Dr.BoT / SPEAR, and the line "Common"."""
    for config in columns(name):
        rollout, learner, policy = config.rollout, config.learner, config.algo.policy
        assert (config.model.path, config.env.name, config.env.style, config.env.max_turns) == (
            MATH[name],
            "math",
            "chat",
            8,
        )
        assert (rollout.groups_per_step, rollout.group_size, learner.mini_batch_rows) == (128, 16, 64 * 16)
        assert (rollout.context_tokens, rollout.max_response_tokens, policy.horizon) == (2048 + 16384, 16384, 16384)
        assert (config.vllm.tensor_parallel, learner.micro_batch_tokens, learner.offload, learner.lr) == (
            4,
            2048 + 16384,
            "all",
            1e-6,
        )
        assert (
            policy.clip_low,
            policy.dual_clip,
            policy.entropy_coef,
            config.algo.kl.loss_coef,
            config.algo.invalid_penalty,
        ) == (0.2, 10.0, 0.0, 0.0, 0.0)
        assert (rollout.temperature, config.eval.temperature, config.eval.top_p, config.eval.attempts) == (
            1.0,
            1.0,
            0.6,
            32,
        )
        assert config.env.options["sandbox"] == {"timeout_s": 30, "memory_mib": 1024}
    spear, drbot, base = (config.algo for config in columns(name))
    for algo, std, high, aggregation, keep in (
        (spear, False, 0.28, "seq-mean-token-sum-norm", 0.75),
        (drbot, False, 0.28, "seq-mean-token-sum-norm", 0.75),
    ):
        assert (algo.groups.normalize_std, algo.policy.clip_high, algo.policy.aggregation, algo.filters.group_keep) == (
            std,
            high,
            aggregation,
            keep,
        )
        assert algo.filters.void_turn and algo.filters.overlong and algo.filters.repetitive and algo.filters.unreadable
    assert (base.groups.normalize_std, base.policy.clip_high, base.policy.aggregation, base.filters.group_keep) == (
        True,
        0.2,
        "token-mean",
        1.0,
    )
    assert not base.filters.void_turn and not base.filters.overlong
    assert (
        [algo.clip_cov.enabled for algo in (spear, drbot, base)]
        == [algo.sil.enabled for algo in (spear, drbot, base)]
        == [True, False, False]
    )
    sil, clip = spear.sil, spear.clip_cov
    assert (sil.capacity, sil.baseline_capacity, sil.max_age, sil.gamma.peak, sil.gamma.kind, sil.gamma.steps) == (
        2048,
        10240,
        5,
        1.0,
        "cosine",
        300,
    )
    assert (clip.ratio, clip.lower, clip.upper, clip.replay_ratio, clip.replay_lower, clip.replay_upper) == (
        0.0002,
        1.0,
        5.0,
        0.02,
        1.0,
        40.0,
    )
    assert spear.intrinsic.enabled and (spear.intrinsic.mu.kind, spear.intrinsic.mu.steps) == ("cosine", 200)
    assert not drbot.intrinsic.enabled and not base.intrinsic.enabled
    assert spear.intrinsic.flat_when_right == ("qwen3" in name) and (spear.intrinsic.per_call, spear.intrinsic.cap) == (
        0.1,
        1.0,
    )


def test_the_two_models_differ_in_nothing_else():
    for suffix in COLUMNS:
        changed = set(diff(*(load_config(preset=f"{name}{suffix}") for name in MATH)))
        assert changed == {"run.started_from", "model.path"} | (
            {"algo.intrinsic.flat_when_right"} if not suffix else set()
        )


def test_the_cold_start_is_retools():
    """Section 8.2, last paragraph."""
    config = load_config(preset="aime-32b")
    sft, steps = config.sft, 372
    assert (sft.batch_episodes, sft.lr, sft.decay, sft.weight_decay, config.learner.beta1, sft.beta2) == (
        32,
        1e-5,
        "cosine",
        0.01,
        0.9,
        0.95,
    )
    assert (sft.epochs, sft.warmup_steps, config.learner.grad_clip) == (
        6,
        steps // 10,
        1.0,
    ) and config.rollout.context_tokens >= 16384
    assert not sft.enabled


def test_sokoban_and_search_cells_are_verl_agents():
    for name, model, groups, size, context, rows, turns, penalty in (
        ("sokoban-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", 32, 8, 1024 + 512, 64, 15, 0.1),
        ("search-7b", "Qwen/Qwen2.5-7B-Instruct", 256, 5, 4096 + 512, 512, 4, 0.01),
    ):
        for config in columns(name):
            rollout, learner = config.rollout, config.learner
            assert (config.model.path, config.env.max_turns, config.env.style, config.algo.invalid_penalty) == (
                model,
                turns,
                "windowed",
                penalty,
            )
            assert (rollout.groups_per_step, rollout.group_size, rollout.context_tokens, rollout.max_reply_tokens) == (
                groups,
                size,
                context,
                512,
            )
            assert (learner.mini_batch_rows, learner.lr, config.run.steps, config.eval.temperature) == (
                rows,
                1e-6,
                150,
                0.4,
            )
    assert all(config.env.options == {"vision": True} for config in columns("sokoban-vl-3b"))


@pytest.mark.parametrize("name", AGENTS)
def test_columns_of_agents_differ_as_the_papers_do(name):
    spear, drbot, base = (config.algo for config in columns(name))
    base_name = "gigpo" if "gigpo" in name else "grpo"
    assert [algo.name for algo in (spear, drbot, base)] == [f"{base_name}+drbot+spear", f"{base_name}+drbot", base_name]
    assert (spear.sil.capacity, spear.sil.gamma.steps, spear.intrinsic.mu.steps, spear.clip_cov.replay_upper) == (
        2048,
        100,
        100,
        60.0,
    )
    assert (drbot.policy.clip_high, base.policy.clip_high, drbot.groups.normalize_std, base.groups.normalize_std) == (
        0.28,
        0.2,
        False,
        True,
    )
    assert (spear.gigpo.discount, spear.gigpo.step_weight) == (0.95, 1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_the_environment_takes_every_option_of_a_preset(name):
    section = load_config(preset=name).env
    assert option_errors(load(section.name), section.options) == []


@pytest.mark.parametrize("name", ["aime-32b", "aime-qwen3-32b-base", "sokoban-vl-3b", "search-7b"])
def test_config_show_tells_where_the_numbers_come_from(name, capsys):
    assert main(["config", "show", "--preset", name, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["config"]
    config = load_config(preset=name)
    assert (
        shown["rollout"]["groups_per_step"] == config.rollout.groups_per_step and shown["run"]["started_from"] == name
    )
    assert main(["config", "show", "--preset", name, "--why"]) == 0
    assert f"groups_per_step = {config.rollout.groups_per_step}  # preset {name}" in capsys.readouterr().out
