"""What tokens are worth, by hand: every estimator on chats and windows, bonus, penalties, masks, bootstrap, KL."""

from __future__ import annotations

import math

import pytest
import torch

from spearrl.algorithm import Shaped, assign_credit
from spearrl.algorithm.memory import baselines
from spearrl.config import AlgoSection
from spearrl.types import Status
from tests.support import reference as ref
from tests.support.short_runs import from_model, run, spy_on_updates
from tests.support.trajectories import episode, grouped, shaped, turn

VOID = "<action>thought of</action> but not taken </think>"


def algo(advantage: str, **sections) -> AlgoSection:
    return AlgoSection.model_validate({"advantage": advantage, **sections})


def credit_of(step: Shaped, settings: AlgoSection, *, values=None, old=None, reference=None):
    """assign_credit; per-token arguments are lists over the sampled tokens in order."""
    rows = step.rows

    def padded(numbers):
        flat = torch.zeros(len(rows.token_ids), dtype=torch.float64)
        flat[rows.turn_index >= 0] = torch.tensor(numbers, dtype=torch.float64)
        return rows.pad(flat)

    old_logprobs = torch.zeros(len(rows), rows.width) if old is None else padded(old)
    tensors = {
        "ref_logprobs": None if reference is None else padded(reference),
        "values": None if values is None else padded(values),
    }
    return assign_credit(step, settings, old_logprobs=old_logprobs, **tensors)


def sampled(step: Shaped, padded: torch.Tensor) -> list[float]:
    """Values at the sampled tokens in order; everything else must be 0."""
    flat = step.rows.unpad(padded)
    assert (flat[step.rows.turn_index < 0] == 0).all()
    return flat[step.rows.turn_index >= 0].tolist()


def near(*numbers: float):
    return pytest.approx(list(numbers), abs=1e-6)


# GiGPO


def three_episodes(style: str):
    """spear.md 10.3: two wins of 3 and 2 turns (one action invalid), a failure of 2; 2, 1 and 3 tokens a reply."""
    first = [turn(2, state="s0"), turn(1, state="s1"), turn(3, 10.0, state="s2")]
    second = [turn(1, state="s0"), turn(2, 10.0, state="s1", valid=False)]
    third = [turn(2, state="s0"), turn(2, state="s3")]
    made = zip((first, second, third), (Status.SUCCESS, Status.SUCCESS, Status.FAILURE), strict=True)
    return grouped(*(episode(i, 0, turns, status, style=style) for i, (turns, status) in enumerate(made)))


RELEASED = {  # normalize_std: the sums of spear.md 10.3
    False: (5.721428, 2.671429, 2.871428, 6.196429, 2.971428, -13.303572, -7.128572),
    True: (1.122044, -0.117474, 0.58963, 1.21078, 1.2762, -2.617372, -1.463809),
}


@pytest.mark.parametrize("style", ["chat", "windowed"])
@pytest.mark.parametrize("normalize_std", [False, True])
def test_gigpo_by_the_released_numbers(style, normalize_std):
    settings = algo("gigpo", groups={"statistics": "turn", "normalize_std": normalize_std})
    step = shaped(three_episodes(style), settings, group_size=3)
    assert len(step.rows) == (3 if style == "chat" else 7)
    credit = credit_of(step, settings)
    wanted = RELEASED[normalize_std]
    assert credit.turns.tolist() == near(*wanted)
    lengths = (2, 1, 3, 1, 2, 2, 2)
    assert sampled(step, credit.tokens) == pytest.approx(
        [v for v, n in zip(wanted, lengths, strict=True) for _ in range(n)], abs=1e-5
    )


def test_gigpo_by_default_counts_each_episode_once():
    """Rewards 10, 10, 10 | 10, 9.9 | 0, 0: episode means 10, 9.95, 0, their mean 6.65. ω = 0.5 halves the step part."""
    settings = algo("gigpo", groups={"normalize_std": False}, gigpo={"step_weight": 0.5})
    credit = credit_of(shaped(three_episodes("chat"), settings, group_size=3), settings)
    steps = (2.85, -0.2, 0.0, 3.325, 0.2, -6.175, 0.0)
    assert credit.step_part.tolist() == near(*(0.5 * s for s in steps))
    assert (credit.turns - credit.step_part).tolist() == near(3.35, 3.35, 3.35, 3.35, 3.25, -6.65, -6.65)
    assert credit.returns is None


def test_the_bonus_is_in_the_episode_part_only():
    settings = algo("gigpo", groups={"normalize_std": False}, intrinsic={"enabled": True})
    plain, paid = (
        credit_of(shaped(three_episodes("chat"), settings, mu=mu, group_size=3), settings) for mu in (0.0, 0.5)
    )
    assert plain.step_part.tolist() == paid.step_part.tolist()
    # 3, 2 and 2 calls at 0.1 and μ = 0.5: 0.15, 0.1, 0.1, of which the mean 0.35 / 3 is taken off.
    gained = (paid.turns - plain.turns).tolist()
    assert gained == near(*([0.15 - 0.35 / 3] * 3 + [0.1 - 0.35 / 3] * 4))


# Token by token


def one_of_two_turns(style: str, *, status=Status.FAILURE, text="<action>x</action>", valid=True):
    """2 tokens that earn 1, then 1 token that earns 2; beside it a sibling of one token that earns nothing."""
    long = episode(0, 0, [turn(2, 1.0), turn(1, 2.0, text=text, valid=valid)], status, style=style)
    return grouped(long, episode(1, 0, [turn(1)], style=style))


VALUES = (0.5, 0.25, 1.0, 0.0)  # of the 3 + 1 tokens
GAE = {"discount": 0.9, "lam": 0.5, "whiten": False}
# d = (0 + .9·.25 − .5, 1 + .9·1 − .25, 2 − 1) = (−.275, 1.65, 1);  A_t = d_t + .45 A_{t+1}
BY_HAND = (0.67, 2.1, 1.0, 0.0)


@pytest.mark.parametrize("style", ["chat", "windowed"])
def test_gae_runs_through_rows_and_over_observations(style):
    settings = algo("gae", critic=GAE)
    step = shaped(one_of_two_turns(style), settings)
    assert len(step.rows) == (2 if style == "chat" else 3)
    credit = credit_of(step, settings, values=VALUES)
    assert sampled(step, credit.tokens) == near(*BY_HAND)
    assert sampled(step, credit.returns) == near(*(a + v for a, v in zip(BY_HAND, VALUES, strict=True)))
    assert credit.turns.tolist() == near((0.67 + 2.1) / 2, 1.0, 0.0) and credit.step_part is None


def test_rows_in_another_order_have_the_same_credit():
    settings = algo("gae", critic=GAE)
    step = shaped(one_of_two_turns("windowed"), settings)
    values = step.rows.pad(
        torch.zeros(len(step.rows.token_ids)).masked_scatter(step.rows.turn_index >= 0, torch.tensor(VALUES))
    )
    credit = assign_credit(step, settings, old_logprobs=torch.zeros_like(values), values=values)
    keep = torch.tensor([2, 0, 1])  # the sibling first; turns of a trajectory stay in order
    moved = step.rows.select(keep)
    other = Shaped(moved, step.rewards, step.bonuses, step.muted, step.blocks, step.step_returns)
    again = assign_credit(other, settings, old_logprobs=torch.zeros_like(values), values=values[keep][:, : moved.width])
    assert again.tokens.tolist() == credit.tokens[keep][:, : moved.width].tolist()


@pytest.mark.parametrize("style", ["chat", "windowed"])
def test_reinforce_plus_plus_runs_through_rows_and_over_observations(style):
    """Returns 3, 3, 2 and 0: mean 2, variance (1 + 1 + 0 + 4) / 3 = 2."""
    settings = algo("reinforce++")
    step = shaped(one_of_two_turns(style), settings)
    root = math.sqrt(2)
    assert sampled(step, credit_of(step, settings).tokens) == near(1 / root, 1 / root, 0, -2 / root)
    halved = algo("reinforce++", critic={"discount": 0.5})  # 0 + .5 (1 + .5 · 2), 1 + .5 · 2, 2 and 0
    returns = torch.tensor([1.0, 2.0, 2.0, 0.0])
    assert sampled(step, credit_of(step, halved).tokens) == near(*((returns - returns.mean()) / returns.std()).tolist())


def test_whitened_advantages_but_not_returns():
    settings = algo("gae", critic={**GAE, "whiten": True})
    step = shaped(one_of_two_turns("chat"), settings)
    credit = credit_of(step, settings, values=VALUES)
    raw = torch.tensor(BY_HAND)
    assert sampled(step, credit.tokens) == near(*((raw - raw.mean()) / raw.std()).tolist())
    assert sampled(step, credit.returns) == near(1.17, 2.35, 2.0, 0.0)


@pytest.mark.parametrize("style", ["chat", "windowed"])
def test_bonus_and_penalty_lie_on_last_tokens(style):
    """λ = 1, no values: what comes after a token. Two calls' bonus, μ · 0.2, is last; an invalid turn costs 0.1."""
    settings = algo("gae", critic={"whiten": False}, intrinsic={"enabled": True})
    step = shaped(one_of_two_turns(style, valid=False), settings, mu=0.5)
    assert sampled(step, credit_of(step, settings, values=[0.0] * 4).tokens) == near(3.0, 3.0, 2.0, 0.05)
    first_off = algo("gae", critic={"whiten": False, "discount": 0.5}, intrinsic={"enabled": True})
    # 2 − .1 + .1 at the end; half of it, plus 1, before; half again at the first token
    assert sampled(step, credit_of(step, first_off, values=[0.0] * 4).tokens) == near(1.0, 2.0, 2.0, 0.05)
    invalid_first = grouped(
        episode(0, 0, [turn(2, 1.0, valid=False), turn(1, 2.0)], style=style), episode(1, 0, [turn(1)], style=style)
    )
    earlier = shaped(invalid_first, first_off, mu=0.5)
    assert sampled(earlier, credit_of(earlier, first_off, values=[0.0] * 4).tokens) == near(0.975, 1.95, 2.1, 0.05)


@pytest.mark.parametrize("style", ["chat", "windowed"])
@pytest.mark.parametrize("mask", ["action", "attention"])
@pytest.mark.parametrize("advantage", ["gae", "reinforce++"])
def test_a_masked_turn_passes_credit_on(style, mask, advantage):
    """The last turn has no action. Out of the loss, or in it at advantage 0, what it earned reaches the turn before."""
    settings = algo(advantage, critic=GAE, filters={"void_turn": True}, policy={"mask": mask})
    step = shaped(one_of_two_turns(style, text=VOID), settings)
    assert step.metrics["filter/void_turn"] == 1
    assert int(step.rows.action_mask.sum()) == (3 if mask == "action" else 4)
    advantages = sampled(step, credit_of(step, settings, values=VALUES).tokens)
    assert advantages[2] == 0
    if advantage == "gae":
        assert advantages == near(0.67, 2.1, 0.0, 0.0)
    else:  # .9 (1 + .9 · 2), 1 + .9 · 2, 2, 0, whitened over all sampled tokens
        returns = torch.tensor([2.52, 2.8, 2.0, 0.0])
        white = ((returns - returns.mean()) / returns.std()).tolist()
        assert advantages == near(white[0], white[1], 0.0, white[3])


@pytest.mark.parametrize("status", [s for s in Status if not s.is_error])
def test_only_a_context_limit_is_bootstrapped(status):
    """The value before the last token stands for the state behind it: 2 + .9 · 1 − 1 instead of 2 − 1."""
    settings = algo("gae", critic=GAE)
    step = shaped(one_of_two_turns("chat", status=status), settings)
    last = 1.9 if status is Status.CONTEXT_LIMIT else 1.0
    second = 1.65 + 0.45 * last
    assert sampled(step, credit_of(step, settings, values=VALUES).tokens) == near(
        -0.275 + 0.45 * second, second, last, 0.0
    )


# KL in the reward

OLD, REFERENCE = (-1.0, -2.0, -0.5, -1.0), (-1.5, -2.0, -1.5, -1.25)  # k1: .5, 0, 1 and .25


@pytest.mark.parametrize("style", ["chat", "windowed"])
def test_kl_in_the_reward_is_charged_per_token_or_per_episode(style):
    kl = {"reward_coef": 0.1, "estimator": "k1"}
    settings = algo("gae", critic={"whiten": False}, kl=kl)
    step = shaped(one_of_two_turns(style), settings)
    tokens = sampled(step, credit_of(step, settings, values=[0.0] * 4, old=OLD, reference=REFERENCE).tokens)
    assert tokens == near(3 - 0.15, 3 - 0.1, 2 - 0.1, -0.025)
    settings = algo("grpo", groups={"normalize_std": False}, kl=kl)
    step = shaped(one_of_two_turns(style), settings)
    # Episodes earn 3 − .15 and −.025; half their difference, on every turn alike.
    half = (2.85 + 0.025) / 2
    credit = credit_of(step, settings, old=OLD, reference=REFERENCE)
    assert credit.turns.tolist() == near(half, half, -half)
    assert sampled(step, credit.tokens) == near(half, half, half, -half)


def test_masked_tokens_are_not_charged():
    settings = algo(
        "grpo", groups={"normalize_std": False}, kl={"reward_coef": 0.1, "estimator": "k1"}, filters={"void_turn": True}
    )
    step = shaped(one_of_two_turns("chat", text=VOID), settings)
    half = (2.95 + 0.025) / 2
    assert credit_of(step, settings, old=OLD, reference=REFERENCE).turns.tolist() == near(half, half, -half)


# Groups


def ten_or_nothing(number: int, group: int, reward: float, *, invalid: int = 0, tools: int = 0):
    turns = [turn(1, valid=index >= invalid, tools=tools) for index in range(2)]
    turns[-1].reward = reward
    return episode(number, group, turns, Status.SUCCESS if reward else Status.FAILURE, style="windowed")


def test_every_estimator_by_hand():
    """Rewards 10 | 0 | 0, then 0 | 0 with an invalid first turn of the last: means 10/3 and −.025."""
    groups = grouped(
        *(ten_or_nothing(i, 0, r) for i, r in enumerate((10.0, 0.0, 0.0))),
        ten_or_nothing(3, 1, 0.0),
        ten_or_nothing(4, 1, 0.0, invalid=1),
    )
    plain = [20 / 3] * 2 + [-10 / 3] * 4 + [0.025] * 2 + [-0.075, 0.025]
    cases = {
        "grpo": plain,
        "rloo": [p * (1.5 if i < 6 else 2) for i, p in enumerate(plain)],
        "reinforce++_baseline": ref.whiten(plain, [1.0] * 10),
    }
    for advantage, wanted in cases.items():
        settings = algo(advantage, groups={"normalize_std": False})
        assert credit_of(shaped(groups, settings, group_size=3), settings).turns.tolist() == near(*wanted), advantage


def test_attention_keeps_filtered_turns_in_the_mask_at_nothing():
    settings = algo("grpo", filters={"void_turn": True}, policy={"mask": "attention"})
    step = shaped(one_of_two_turns("chat", text=VOID), settings)
    credit = credit_of(step, settings)
    assert step.rows.action_mask.sum() == 4 and credit.turns[1] == 0
    assert sampled(step, credit.tokens) == near(0.5**0.5, 0.5**0.5, 0.0, -(0.5**0.5))


def test_consecutive_blocks_mix_groups_after_a_loss():
    """Group 0 lost a sibling: blocks of three are 0, 0, 1 and 1, 1. Filter and baselines go by them, advantages not."""
    played = [ten_or_nothing(i, g, r) for i, (g, r) in enumerate(((0, 10.0), (0, 10.0), (1, 0.0), (1, 0.0), (1, 0.0)))]
    for blocks, means, stds in (
        ("group", (10.0, 0.0), (0.0, 0.0)),
        ("consecutive", (20 / 3, 0.0), (math.sqrt(200 / 9), 0.0)),
    ):
        settings = algo("grpo", groups={"blocks": blocks})
        step = shaped(grouped(*played), settings, group_size=3)
        assert baselines(step) == (near(*means), near(*stds))
        assert (credit_of(step, settings).turns == 0).all()
    filtered = algo("grpo", groups={"blocks": "consecutive"}, filters={"group_keep": 0.5})
    assert shaped(grouped(*played), filtered, group_size=3).rows.trajectory.unique().tolist() == [0, 1, 2]


def test_the_group_filter_sees_rewards_with_bonus_and_without_penalties():
    """Group 0 differs by penalties, group 1 by bonus, group 2 by reward."""
    played = [
        ten_or_nothing(0, 0, 10.0, invalid=2),
        ten_or_nothing(1, 0, 10.0),
        ten_or_nothing(2, 1, 0.0, tools=3),
        ten_or_nothing(3, 1, 0.0),
        ten_or_nothing(4, 2, 10.0),
        ten_or_nothing(5, 2, 0.0),
    ]
    settings = algo("grpo", filters={"group_keep": 0.67}, intrinsic={"enabled": True}, invalid_penalty=20.0)
    step = shaped(grouped(*played), settings, mu=1.0)
    assert step.rows.group.unique().tolist() == [1, 2] and step.metrics["filter/groups_dropped"] == 1
    assert step.rewards.tolist() == near(0.6, 0.6, 0, 0, 10, 10, 0, 0)
    # Shares are rounded down: 0.34 of three groups is one.
    assert shaped(
        grouped(*played), algo("grpo", filters={"group_keep": 0.34}), mu=1.0
    ).rows.group.unique().tolist() == [2]


def test_a_power_of_two_of_the_kept_rows():
    """3 of 4 groups, 12 rows: 8 of them stay, in order, with their own turns, chosen by the seed."""
    played = [ten_or_nothing(i, i // 2, 10.0 * (i % 2) * (i > 1)) for i in range(8)]
    settings = algo("grpo", filters={"group_keep": 0.75, "subsample": "power_of_two"})
    steps = [shaped(grouped(*played), settings, seed=seed) for seed in (1, 1, 2)]
    assert [len(s.rows) for s in steps] == [8, 8, 8] and [len(s.rewards) for s in steps] == [8, 8, 8]
    chosen = [s.rows.uid.tolist() for s in steps]
    assert chosen[0] == chosen[1] != chosen[2] and chosen[0] == sorted(chosen[0])
    assert set(steps[0].rows.group.tolist()) <= {1, 2, 3}
    assert steps[0].rewards.tolist() == [10.0 * (t % 2) for t in steps[0].rows.turns.trajectory_ids.tolist()]
    whole = shaped(grouped(*played), algo("grpo", filters={"subsample": "power_of_two"}))
    assert len(whole.rows) == 16, "without a group filter nothing is left out"


# The trainer


def expected(advantage: str, groups, mu: float) -> dict[int, list[float]]:
    """Advantages of every trained trajectory's turns (or tokens), from the played episodes alone."""
    turns = [(g.id, t, number, x) for g in groups for t in g.valid for number, x in enumerate(t.turns)]
    penalties = [0.1 * (not x.action.valid) for *_, x in turns]
    bonus = [mu * min(1.0, 0.1 * sum(x.action.tool_calls for x in t.turns)) for _, t, _, _ in turns]
    ids, of = [g for g, *_ in turns], [t.id for _, t, _, _ in turns]
    rewards = [t.reward + b - p for (_, t, _, _), b, p in zip(turns, bonus, penalties, strict=True)]
    options = {"statistics": "balanced", "singleton": "zero"}
    if advantage == "reinforce++":
        tokens = {t.id: [] for g in groups for t in g.valid}
        for (_, t, number, x), b, p in zip(turns, bonus, penalties, strict=True):
            tokens[t.id] += [0.0] * (len(x.token_ids) - 1) + [x.reward - p + b * (number == len(t.turns) - 1)]
        table = ref.reinforce_plus_plus(
            list(tokens.values()), [[True] * len(row) for row in tokens.values()], gamma=1.0, gaps="skip"
        )
        return dict(zip(tokens, table, strict=True))
    if advantage == "grpo":
        advantages = ref.grpo(rewards, ids, of, normalize_std=True, **options)
    elif advantage == "rloo":
        advantages = ref.rloo(rewards, ids, of, **options)
    elif advantage == "reinforce++_baseline":
        advantages = ref.reinforce_plus_plus_baseline(
            rewards, ids, [float(len(x.token_ids)) for *_, x in turns], of, **options
        )
    else:
        late = [r - p for r, p in zip(ref.discounted([x.reward for *_, x in turns], of, 0.95), penalties, strict=True)]
        advantages = ref.gigpo(
            rewards, late, ids, [x.observation for *_, x in turns], of, step_weight=1.0, normalize_std=True, **options
        )
    worth: dict[int, list[float]] = {}
    for name, value, (*_, x) in zip(of, advantages, turns, strict=True):
        worth.setdefault(name, []).extend([value] * len(x.token_ids))
    return worth


@pytest.mark.parametrize("style", ["chat", "windowed"])
@pytest.mark.parametrize("advantage", ["grpo", "gigpo", "rloo", "reinforce++", "reinforce++_baseline"])
def test_the_learner_gets_what_the_episodes_are_worth(model, tmp_path, advantage, style):
    batches, played = [], []

    def spy(trainer):
        batches.append(spy_on_updates(trainer))
        play = trainer.play
        trainer.play = lambda step: played.append(play(step)) or played[-1]

    settings = (f"env.style={style}", "rollout.group_size=6", "algo.groups.normalize_std=true")
    trainer = run(from_model(model, tmp_path, *settings, algo=f"{advantage}+intrinsic"), spy)
    assert len(batches[0]) == len(played) == 3
    for number, ((batch, _, _), (groups, _)) in enumerate(zip(batches[0], played, strict=True)):
        wanted = expected(advantage, groups, trainer.curriculum.mu(number + 1))
        by_name: dict[int, list[float]] = {}
        for row, mask, trajectory in zip(
            batch.advantages, batch.action_mask, batch.rows.trajectory.tolist(), strict=True
        ):
            by_name.setdefault(trajectory, []).extend(row[mask].tolist())
        assert by_name == {name: pytest.approx(values, abs=1e-5) for name, values in wanted.items()}
        assert any(abs(v) > 0.1 for values in wanted.values() for v in values)
