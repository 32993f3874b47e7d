"""What must not break a run: engines that report nonsense, stale replay, every way an episode can end, steps that teach
nothing."""

from __future__ import annotations

import math

import pytest
import torch

from spearrl.algorithm import Memory, assign_credit
from spearrl.config import AlgoSection
from spearrl.errors import ConfigError, EngineError
from spearrl.rollout.protocol import Request
from spearrl.trainer import Trainer
from spearrl.types import Status
from tests.support.short_runs import (
    assert_sound,
    change_logprobs,
    events,
    from_model,
    run,
    spy_on_updates,
    stopped_and_resumed,
    whole_fingerprint,
)
from tests.support.small_run import fingerprint
from tests.support.trajectories import episode, grouped, shaped, turn

NONSENSE = (math.nan, -math.inf, math.inf)


def warnings(trainer: Trainer) -> list[dict]:
    return events(trainer, "warning")


def keep_groups(trainer: Trainer) -> list[list]:
    """The list that fills with the groups of each step."""
    groups_of_steps, play = [], trainer.play

    def spy(step):
        groups, metrics = play(step)
        groups_of_steps.append(groups)
        return groups, metrics

    trainer.play = spy
    return groups_of_steps


def fail_requests(trainer: Trainer, wrong) -> None:
    """The engine refuses the requests whose id makes `wrong` true."""
    generate = trainer.parts.players.engine.generate

    async def refusing(request: Request):
        if wrong(*request.id):
            raise EngineError("the machine is gone")
        return await generate(request)

    trainer.parts.players.engine.generate = refusing


# Log-probabilities that are no numbers


def some_nonsense(request: tuple[int, ...], values: tuple[float, ...]) -> tuple[float, ...]:
    """The first token of every second reply, and the whole reply of sibling 2."""
    _, sibling, turn = request
    return tuple(NONSENSE[(i + turn) % 3] if sibling == 2 or (i == 0 and turn % 2) else v for i, v in enumerate(values))


GUARDED = ("grpo+spear", "gigpo+drbot+spear+tis", "ppo+sil+mis", "reinforce+++sil", "gspo+sil", "grpo+kl_cov+sil+tis")


@pytest.mark.parametrize("algo", GUARDED)
def test_tokens_without_a_sound_log_probability_are_left_out_and_counted(model, tmp_path, algo):
    batches, groups = [], []

    def spoil(trainer):
        change_logprobs(trainer, some_nonsense)
        batches.append(spy_on_updates(trainer))
        groups.append(keep_groups(trainer))

    settings = (
        "run.steps=4",
        "env.style=windowed",
        "algo.correction.level=sequence",
        "algo.filters.group_keep=1",
        "rollout.group_size=5",
    )
    trainer = run(from_model(model, tmp_path, *settings, algo=algo), spoil)
    assert_sound(trainer)
    lines = events(trainer, "step")
    for line, played in zip(lines, groups[0], strict=True):
        unmasked = [v for g in played for t in g.valid for turn in t.turns for v in turn.logprobs]
        broken = sum(not math.isfinite(v) for v in unmasked)
        assert 0 < line["guard/nonfinite_rollout_logprobs"] <= broken
        assert "drbot" in algo or line["guard/nonfinite_rollout_logprobs"] == broken  # quality filters come first
    replayed = 0
    for on_policy, replay, _ in batches[0]:
        for batch in (b for b in (on_policy, replay) if b is not None):
            mask = batch.action_mask
            assert mask.any() and torch.isfinite(batch.rollout_logprobs[mask]).all()
            assert all(
                torch.isfinite(tensor).all() for name, tensor in batch.tensors().items() if name != "rollout_logprobs"
            )
            assert (batch.advantages[~mask] == 0).all()
        replayed += replay is not None
    assert replayed, "nothing was replayed: the test would prove half"
    assert [w["flag"] for w in warnings(trainer) if w.get("flag") == "nonfinite_rollout"] == ["nonfinite_rollout"]


def test_a_run_goes_on_where_no_log_probability_is_sound(model, tmp_path):
    trainer = run(
        from_model(model, tmp_path, algo="grpo+spear"),
        lambda t: change_logprobs(t, lambda request, values: (math.nan,) * len(values)),
    )
    assert_sound(trainer, updates=False)
    assert all(line["policy/updates"] == 0 and line["replay/stored"] == 0 for line in events(trainer, "step"))
    assert trainer.step == 3 and trainer.parts.learner.steps == 0


def test_a_resumed_run_still_holds_its_spoilt_episodes(model, tmp_path):
    """What is stored keeps its mask: the tokens left out stay out when they are replayed after a restart."""
    config = from_model(
        model, tmp_path, "run.steps=4", "run.checkpoint_every=1", "algo.sil.capacity=3", algo="grpo+sil+tis"
    )
    resumed = stopped_and_resumed(config, 1, lambda trainer: change_logprobs(trainer, some_nonsense))
    assert_sound(resumed)
    assert any(line["replay/rows"] > 0 for line in events(resumed, "step"))


# Stale replay


def stale(trainer: Trainer, by: float, *, alternating: bool = False) -> list[int]:
    """Replayed tokens were e^by as likely when they were sampled (`alternating`: every second one e^-by). The list
    fills with the rows replayed."""
    drain, rows = trainer.memory.replay.drain, []

    def spy(step, baseline, generator):
        batch = drain(step, baseline, generator)
        if batch is not None:
            shift = torch.full_like(batch.old_logprobs, by)
            shift[:, ::2] *= -1 if alternating else 1
            batch.old_logprobs = torch.where(batch.action_mask, batch.old_logprobs + shift, 0.0)
            rows.append(len(batch))
        return batch

    trainer.memory.replay.drain = spy
    return rows


@pytest.mark.parametrize(("by", "alternating"), [(1e4, False), (-1e4, False), (1e4, True)])
@pytest.mark.parametrize(
    "algo", ["grpo+spear", "gspo+sil", "cispo+sil", "grpo+kl_cov+sil", "grpo+sil", "gigpo+drbot+spear"]
)
def test_replay_from_another_age_of_the_policy(model, tmp_path, algo, by, alternating):
    """Log ratios of ±1e4 are bounded: no number overflows, no step is skipped."""
    replays = []
    trainer = run(
        from_model(model, tmp_path, algo=algo), lambda t: replays.append(stale(t, by, alternating=alternating))
    )
    assert sum(replays[0]) > 0
    assert_sound(trainer)


def test_without_the_bound_an_overflow_costs_the_step_and_is_counted(model, tmp_path):
    """As released there is none: the gradient is not finite, the update is skipped, the weights stay sound and health
    says so."""
    settings = ("algo.clip_cov.log_ratio_clamp=none", "run.steps=4")
    trainer = run(from_model(model, tmp_path, *settings, algo="grpo+spear"), lambda t: stale(t, -1e4))
    lines = events(trainer, "step")
    replayed = [line["replay/rows"] > 0 for line in lines]
    assert any(replayed)
    assert [line["policy/skipped"] for line in lines] == [float(r) for r in replayed]
    assert all(line["policy/updates"] == 2 for line in lines)
    assert all(torch.isfinite(p).all() for p in trainer.parts.model.parameters())
    assert "skipped_updates" in [w.get("flag") for w in warnings(trainer)]


# Every way an episode can end


@pytest.mark.parametrize("status", list(Status))
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("algo", ["gigpo+sil", "ppo+sil"])
def test_every_status_through_a_step(model, tmp_path, algo, status, filtered):
    """One episode of the first group ends so. Errors leave loss, statistics and buffer; what was cut off trains, or the
    overlong filter masks it."""
    updates = []

    def prepare(trainer):
        updates.append(spy_on_updates(trainer))
        play = trainer.play

        def changed(step):
            groups, metrics = play(step)
            victim = groups[0].trajectories[1]
            victim.status = status
            victim.turns[-1].reward = 30.0  # the best of all, so that its absence shows
            updates.append(groups)
            return groups, metrics

        trainer.play = changed

    settings = (
        "run.steps=1",
        f"algo.filters.overlong={str(filtered).lower()}",
        "algo.invalid_penalty=0",
        "rollout.max_reply_tokens=24",
    )
    trainer = run(from_model(model, tmp_path, *settings, algo=algo), prepare)
    assert_sound(trainer)
    (on_policy, _, _), groups = updates[0][0], updates[1]
    victim, siblings = groups[0].trajectories[1], groups[0].trajectories
    trained = set(on_policy.rows.trajectory.tolist())
    tokens = int(on_policy.action_mask[on_policy.rows.trajectory == victim.id].sum())
    cut = status in (Status.CONTEXT_LIMIT, Status.OVERLONG)
    assert (victim.id in trained) != status.is_error
    assert tokens == (0 if status.is_error or (cut and filtered) else sum(len(t.token_ids) for t in victim.turns))
    assert len(trained) == 16 - status.is_error
    counted = [t.reward for t in siblings if not (status.is_error and t is victim)]
    first = trainer.memory.baseline.state_dict()["entries"][0]
    assert first["means"][0] == pytest.approx(sum(counted) / len(counted))
    stored = {int(i) for _, rows in trainer.memory.replay.entries for i in rows.trajectory}
    assert (victim.id in stored) == (tokens > 0)


def test_what_the_collector_cuts_off(model, tmp_path):
    """Context and reply limits as they really occur: counted as such, trained, and masked where the overlong filter is
    on."""
    for limit, name in (("rollout.context_tokens=22", "context_limit"), ("rollout.max_response_tokens=8", "overlong")):
        for filtered in ("false", "true"):
            settings = (limit, f"algo.filters.overlong={filtered}", "algo.invalid_penalty=0.5")
            trainer = run(from_model(model, tmp_path, *settings, algo="ppo+sil", name=f"{name}-{filtered}"))
            assert_sound(trainer, updates=False)
            cut = sum(line.get(f"status/{name}", 0) for line in events(trainer, "step"))
            assert cut > 0, name
            assert (sum(line.get("filter/overlong", 0) for line in events(trainer, "step")) >= cut) == (
                filtered == "true"
            )


def test_errors_as_they_really_occur(model, tmp_path):
    """Task 3 breaks the environment; the engine refuses the first group's sibling 0."""
    refused = []

    def prepare(trainer):
        fail_requests(
            trainer,
            lambda group, sibling, turn: trainer.step == 1 and (group, sibling) == (0, 0) and not refused.append(turn),
        )

    trainer = run(from_model(model, tmp_path, "env.options.broken=3", "run.steps=6", algo="grpo+sil"), prepare)
    assert_sound(trainer)
    lines = events(trainer, "step")
    assert lines[0]["status/engine_error"] == 1 and len(refused) == 2, "an episode is played again once"
    broken = [line for line in lines if line.get("status/env_error")]
    assert broken and all(line["status/env_error"] == 4 and line["rollout/groups_lost"] == 1 for line in broken)


def test_a_group_with_one_sound_sibling_is_dropped_and_counted(model, tmp_path):
    """Of the second group three are lost, of the third two."""
    updates = []

    def prepare(trainer):
        updates.append(spy_on_updates(trainer))
        count = trainer.config.rollout.groups_per_step
        fail_requests(
            trainer,
            lambda group, sibling, turn: (group % count == 1 and sibling < 3) or (group % count == 2 and sibling < 2),
        )

    trainer = run(from_model(model, tmp_path, algo="grpo+sil"), prepare)
    assert_sound(trainer)
    for line, (on_policy, _, _) in zip(events(trainer, "step"), updates[0], strict=True):
        assert (line["rollout/errors"], line["rollout/groups_lost"]) == (5, 1)
        assert sorted(g % 4 for g in on_policy.rows.group.unique().tolist()) == [0, 2, 3]
        assert len(on_policy.rows.trajectory.unique()) == 10
    assert all(len(entry["means"]) == 3 for entry in trainer.memory.baseline.state_dict()["entries"])


def test_a_step_with_nothing_to_train_is_said_and_survived(model, tmp_path):
    """Every request of step 2 fails: no update, no new version, a warning with the cause; steps 3 and 4 train again,
    resumed or not."""

    def prepare(trainer):
        count = trainer.config.rollout.groups_per_step
        fail_requests(trainer, lambda group, sibling, turn: group // count == 1)

    trainer = run(from_model(model, tmp_path, "run.steps=4", algo="ppo+spear"), prepare)
    lines = events(trainer, "step")
    assert [line.get("policy/updates", 0) > 0 for line in lines] == [True, False, True, True]
    assert trainer.policy_version == 3
    text = [w["text"] for w in warnings(trainer) if "nothing was trained" in w["text"]]
    assert len(text) == 1 and text[0].startswith("step 2") and "the machine is gone" in text[0]
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))


@pytest.mark.parametrize(
    "algo", ["grpo+spear", "ppo+spear", "gigpo+drbot+spear", "reinforce++", "reinforce++_baseline"]
)
def test_a_step_whose_every_turn_is_filtered(model, tmp_path, algo):
    """All replies are overlong: rows without a token in the loss make no update, and no number is undefined."""
    settings = (
        "rollout.max_reply_tokens=1",
        "algo.filters.overlong=true",
        "algo.kl.loss_coef=0.1",
        "algo.policy.entropy_coef=0.01",
    )
    trainer = run(from_model(model, tmp_path, *settings, algo=algo))
    assert_sound(trainer, updates=False)
    assert all(line["policy/updates"] == 0 for line in events(trainer, "step"))
    assert trainer.step == 3


@pytest.mark.parametrize("algo", ["dapo", "dapo+spear"])
def test_dynamic_sampling_that_never_finds_a_mixed_group(model, tmp_path, algo):
    """Siblings that all play alike: the last round's groups train (to no effect), the others are counted; ids never
    repeat."""
    groups_of_runs = []
    trainer = run(
        from_model(
            model, tmp_path, "rollout.temperature=0.001", "algo.dynamic.rounds=3", "eval.temperature=0.4", algo=algo
        ),
        lambda t: groups_of_runs.extend((spy_on_updates(t), keep_groups(t))),
    )
    assert_sound(trainer)
    lines = events(trainer, "step")
    assert [(line["dynamic/rounds"], line["dynamic/groups_dropped"]) for line in lines] == [(3, 8)] * 3
    assert all(line["rollout/mixed_groups"] == 0 for line in lines)
    assert all(
        (batch.advantages == 0).all() and len(batch.rows.group.unique()) == 4 for batch, _, _ in groups_of_runs[0]
    )
    ids = [t.id for groups in groups_of_runs[1] for g in groups for t in g.trajectories]
    assert len(ids) == len(set(ids)) == 48


def test_dynamic_sampling_trains_on_mixed_groups_only(model, tmp_path):
    groups_of_runs = []
    trainer = run(
        from_model(model, tmp_path, "algo.dynamic.rounds=10", algo="dapo"),
        lambda t: groups_of_runs.append(keep_groups(t)),
    )
    assert_sound(trainer)
    for line, groups in zip(events(trainer, "step"), groups_of_runs[0], strict=True):
        assert 1 <= line["dynamic/rounds"] < 10 and len(groups) >= 4
        assert all(len({t.reward for t in g.trajectories}) > 1 for g in groups)
        assert len(groups) + line["dynamic/groups_dropped"] == 4 * line["dynamic/rounds"]
    assert any(line["dynamic/rounds"] > 1 for line in events(trainer, "step"))


# Health


def test_alarms_are_warning_events_of_the_run(model, tmp_path):
    """Once when the condition begins, with the step, the words of run/health.py and the setting to try; sound runs have
    none of these."""

    def far_off(trainer):
        change_logprobs(trainer, lambda request, values: tuple(v - 0.5 for v in values))

    ill, well = (run(from_model(model, tmp_path, name=n), p) for n, p in (("ill", far_off), ("well", None)))
    gaps = [w for w in warnings(ill) if w.get("flag") == "sampler_gap"]
    assert (
        len(gaps) == 1
        and gaps[0]["step"] == 1
        and gaps[0]["text"].startswith("step 1: ")
        and "algo.correction" in gaps[0]["text"]
    )
    assert not [w for w in warnings(well) if w.get("flag") == "sampler_gap"]
    assert whole_fingerprint(ill) == whole_fingerprint(well), "without a correction the engine's numbers are not used"


def test_a_return_counts_what_was_earned_in_rows_that_are_left_out():
    """Taking a random power of two of the rows (as released) may leave out the winning one; the others' returns still
    know of it (spear.md section 0)."""
    settings = {
        "name": "gigpo",
        "filters": {"group_keep": 0.5, "subsample": "power_of_two"},
        "gigpo": {"discount": 0.5},
    }
    algo = AlgoSection.model_validate(settings)
    won = episode(
        0,
        0,
        [turn(state=f"s{i}") for i in range(4)] + [turn(reward=10.0, state="s4")],
        Status.SUCCESS,
        style="windowed",
    )
    lost = episode(1, 0, [turn(state="t") for _ in range(4)], style="windowed")
    equal = [episode(2 + i, 1, [turn()], style="windowed") for i in range(2)]
    lengths = set()
    for seed in range(12):
        step = shaped(grouped(won, lost, *equal), algo, seed=seed)
        of_winner = step.rows.turns.trajectory_ids == 0
        lengths.add(int(of_winner.sum()))
        assert len(step.rows) == 8 and set(step.step_returns[of_winner].tolist()) <= {0.625, 1.25, 2.5, 5.0, 10.0}
    assert 4 in lengths


def test_what_a_filter_muted_is_not_imitated_either(model, tmp_path):
    """policy.mask="attention" keeps filtered turns in the mask at advantage 0; on replay they must not get reward − P50
    instead."""
    memory = Memory(AlgoSection.model_validate({"name": "grpo+sil", "sil": {"capacity": 1, "fill_factor": 0.5}}).sil, 0)
    algo = AlgoSection.model_validate(
        {"name": "grpo+sil", "policy": {"mask": "attention"}, "filters": {"void_turn": True}}
    )
    won = episode(0, 0, [turn(text="<action>nothing</action></think>"), turn(reward=10.0)], Status.SUCCESS)
    groups = grouped(won, episode(1, 0, [turn(), turn()]))
    step = shaped(groups, algo)
    assert step.muted.tolist() == [True, False, False, False] and step.rows.padded_mask[0].sum() == 4
    logprobs = torch.zeros(len(step.rows), step.rows.width)
    memory.remember(1, groups, step, assign_credit(step, algo, old_logprobs=logprobs), logprobs)
    batch = memory.due(2)
    assert batch is not None and batch.advantages[batch.action_mask].tolist() == [5.0, 5.0]


def test_a_stopped_run_makes_up_its_evaluation(model, tmp_path):
    def stop(trainer):
        step = trainer.train_step
        trainer.train_step = lambda number: (setattr(trainer, "stop_requested", True), step(number))[1]

    first = run(from_model(model, tmp_path, "run.steps=2", "eval.every=1", algo="grpo"), stop)
    assert [line["step"] for line in events(first, "eval")] == [0]
    resumed = Trainer.resume(first.run.path)
    result = resumed.train()
    resumed.close()
    assert [line["step"] for line in events(resumed, "eval")] == [0, 1, 2] and result is not None
    again = Trainer.resume(first.run.path)
    assert again.train() is None and [line["step"] for line in events(again, "eval")] == [0, 1, 2]
    again.close()


def test_ctrl_c_interrupts_an_evaluation_and_a_resumed_run_makes_it_up(model, tmp_path):
    """As the command line does: in the middle of a panel the signal's handler raises."""

    def config(name: str):
        return from_model(model, tmp_path, "eval.every=1", "run.checkpoint_every=0", name=name)

    whole = run(config("whole"))

    def interrupt(*_) -> None:
        if trainer.evaluating and trainer.step == 1:
            trainer.stop_requested = True
            raise KeyboardInterrupt

    with Trainer(config("interrupted")) as trainer:
        trainer.parts.players.engine.on_token = interrupt
        assert trainer.train() is None and trainer.step == 1
    assert [event["step"] for event in events(trainer, "eval")] == [0]
    again = Trainer.resume(trainer.run.path)
    with again:
        again.train()
    assert [event["step"] for event in events(again, "eval")] == [0, 1, 2, 3]
    assert fingerprint(again.parts.model) == fingerprint(whole.parts.model)


def test_an_override_the_run_cannot_go_on_with_leaves_it_as_it_was(model, tmp_path):
    first = run(from_model(model, tmp_path, "run.steps=2", algo="grpo"))
    before = (first.run.path / "config.toml").read_text()
    with pytest.raises(ConfigError, match="reference"):
        Trainer.resume(first.run.path, overrides=["algo.kl.loss_coef=0.1"])
    assert (first.run.path / "config.toml").read_text() == before
    Trainer.resume(first.run.path).close()
