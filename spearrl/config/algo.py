"""The settings of the algorithm (section algo), one frozen model per part."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from spearrl.config.fidelity import COLUMNS, column
from spearrl.config.grammar import GrammarError, algo_settings
from spearrl.config.tables import nested

CALLABLE = r"^([a-z][a-z0-9_+]*|[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*)$"
QUANTILE = r"^quantile:(0(\.[0-9]+)?|1(\.0+)?|\.[0-9]+)$"

# A number, or "quantile:0.8" of the mini-batch's own values.
Threshold = float | Annotated[str, Field(pattern=QUANTILE)]


BatchScope = Literal["mini_batch", "micro_batch"]  # the second depends on the micro-batch size, as the releases do


class Section(BaseModel):
    """What every section of a config is: frozen; unknown keys and non-finite numbers are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PolicySection(Section):
    clip_low: float = Field(0.2, gt=0, le=1, description="Lower clip of the probability ratio; 1: none.")
    clip_high: float = Field(0.2, gt=0, description="Upper clip of the probability ratio.")
    dual_clip: float | None = Field(10.0, gt=1, description="Dual-clip bound of negative advantages; none: off.")
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = Field(
        "token-mean", description="How token losses become one number."
    )
    horizon: int = Field(512, ge=1, description="Tokens that seq-mean-token-sum-norm divides by: the longest response.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus, on-policy and replay.")
    mask: Literal["action", "attention"] = Field(
        "action",
        description='Tokens in the loss: "action" drops filtered turns; "attention" (released) keeps them at 0.',
    )
    denominator: BatchScope = Field(
        "mini_batch",
        description="What losses are averaged over; micro_batch depends on the micro-batch size (as released).",
    )


class GroupSection(Section):
    normalize_std: bool = Field(True, description="Divide group advantages by the group's standard deviation.")
    statistics: Literal["trajectory", "turn"] = Field("trajectory", description="What its mean and deviation are over.")
    singleton: Literal["zero", "raw"] = Field("zero", description="Advantage in a group of one: 0, or the raw reward.")
    blocks: Literal["group", "consecutive"] = Field(
        "group",
        description="What filter and baselines take for a group: it, or group_size episodes running (released).",
    )


class GigpoSection(Section):
    discount: float = Field(0.95, ge=0, le=1, description="Discount of a turn's return to its later rewards.")
    step_weight: float = Field(1.0, ge=0, description="Weight ω of the step part among turns that saw the same state.")


class CriticSection(Section):
    coef: float = Field(0.5, gt=0, description="Weight of the value loss.")
    clip: float = Field(0.5, gt=0, description="Clip of a value's change.")
    discount: float = Field(1.0, gt=0, le=1, description="Discount per action token.")
    lam: float = Field(1.0, ge=0, le=1, description="λ of generalised advantage estimation.")
    whiten: bool = Field(True, description="Give the step's advantages mean 0 and deviation 1.")


class KlSection(Section):
    loss_coef: float = Field(0.0, ge=0, description="Weight of the KL divergence from the starting model in the loss.")
    reward_coef: float = Field(0.0, ge=0, description="The same, taken off the reward token by token; 0: none.")
    estimator: Literal["k1", "k2", "k3", "abs"] = Field("k3", description="How it is estimated from sampled tokens.")


class KlCovSection(Section):
    ratio: float = Field(2e-4, gt=0, le=1, description="Share of on-policy tokens penalised, highest covariance first.")
    replay_ratio: float = Field(0.02, gt=0, le=1, description="ratio for replayed tokens.")
    coef: float = Field(0.1, ge=0, description="Weight of |log ratio| on these tokens.")


class CorrectionSection(Section):
    mode: Literal["none", "tis", "mis"] = Field(
        "none",
        description='Importance weights learner/engine: cut at cap ("tis"), or 0 outside floor..cap ("mis").',
    )
    level: Literal["token", "sequence"] = Field("token", description="A weight per token, or their product per row.")
    cap: float = Field(2.0, gt=1, description="Largest weight.")
    floor: float = Field(0.5, ge=0, lt=1, description='Smallest weight that mode="mis" lets through.')


class DynamicSection(Section):
    enabled: bool = Field(False, description="Play further tasks until groups_per_step groups differ in reward.")
    rounds: int = Field(10, ge=1, description="Rounds of rollout at most; the last one's groups are all kept.")


class ScheduleSection(Section):
    kind: Literal["cosine", "linear", "constant", "entropy", "success", "curiosity"] = Field(
        "cosine",
        description="Shape over steps, or adaptive: by entropy spent, success rate, or share of states seen before.",
    )
    steps: int = Field(200, ge=1, description="Steps over which it rises (γ) or falls (μ); not of adaptive kinds.")
    peak: float = Field(1.0, ge=0, description="Largest value.")
    low: float = Field(0.2, ge=0, le=1, description="Adaptive kinds: lower end of the band of the driving quantity.")
    high: float = Field(0.8, ge=0, le=1, description="Adaptive kinds: upper end of the band.")
    smoothing: float = Field(0.8, ge=0, lt=1, description="Adaptive kinds: share of the old estimate a step keeps.")


class SilSection(Section):
    enabled: bool = Field(False, description="Self-imitation: replay the agent's own good trajectories.")
    capacity: int = Field(64, ge=1, description="Replay units drawn at most per flush.")
    baseline_capacity: int = Field(10240, ge=1, description="Group baselines kept for the P50 recalibration.")
    max_age: int = Field(5, ge=0, description="Steps a stored trajectory stays usable.")
    fill_factor: float = Field(
        1.5, gt=0, description="Replay needs more than this x capacity units above the baseline."
    )
    recalibration: Literal["median", "decay"] = Field(
        "median",
        description='"median": reward − P50 of recent group means; "decay": old advantage x decay.',
    )
    decay: float = Field(1.0, gt=0, le=1, description='Factor of recalibration="decay".')
    normalize_std: bool = Field(False, description="Divide recalibrated advantages by the P50 of group deviations.")
    keep_zero: bool = Field(False, description="Keep units whose recalibrated advantage is exactly 0.")
    age_reference: Literal["current", "newest"] = Field(
        "current", description="What age is counted from: this step, or the newest stored entry."
    )
    subset: Literal["all", "power_of_two"] = Field("all", description="Replay all units, or a power of two of them.")
    min_rows: int = Field(1, ge=1, description="Fewer replay rows than this: no replay this step.")
    unit: Literal["trajectory", "row"] = Field("trajectory", description="What is stored and drawn at a time.")
    update: Literal["alternating", "joint"] = Field(
        "alternating", description="Replay in optimiser steps of its own, or in one objective with on-policy rows."
    )
    reward_scale: float = Field(
        1.0,
        gt=0,
        description="Divides recalibrated advantages (10: rewards of 0/10 become 0/1), not a kept step part.",
    )
    keep_step_part: bool = Field(True, description="GiGPO: a replayed turn keeps the step part of its own time.")
    require_tool_call: bool = Field(False, description="Store only trajectories with a tool call.")
    min_wins: int = Field(1, ge=1, description="Wins a task needs in the run before any is stored, against luck.")
    token_weight: Literal["none", "confident", "unsure"] = Field(
        "none",
        description='Weight of a replayed token of probability p: p^power ("confident"), (1 − p)^power ("unsure").',
    )
    token_weight_power: float = Field(1.0, gt=0, description="The power.")
    gamma: ScheduleSection = Field(ScheduleSection(), description="Schedule of the replay weight γ: warm-up.")


class IntrinsicSection(Section):
    enabled: bool = Field(False, description="Intrinsic reward for tool calls, fading out.")
    per_call: float = Field(0.1, ge=0, description="Bonus per counted call.")
    cap: float = Field(1.0, ge=0, description="Largest bonus of an episode.")
    count: Literal["tool_calls", "turns"] = Field("tool_calls", description="What is counted.")
    condition: Literal["always", "correct_only"] = Field("always", description="Paid to all, or for success only.")
    flat_when_right: bool = Field(False, description="A success with a call gets the whole cap (released Qwen3 runs).")
    in_evaluation: bool = Field(False, description="Report evaluation rewards with the bonus (as released).")
    mu: ScheduleSection = Field(ScheduleSection(), description="Schedule of the bonus weight μ: decay.")


class ClipCovSection(Section):
    enabled: bool = Field(False, description="Covariance clipping: drop a few high-covariance tokens from the loss.")
    ratio: float = Field(2e-4, gt=0, le=1, description="Share of on-policy action tokens dropped at most.")
    lower: Threshold = Field(1.0, description='Candidates lie above this; "quantile:0.8": above that share of them.')
    upper: Threshold = Field(5.0, description='Only covariances below this are candidates; a number or "quantile:…".')
    replay_ratio: float = Field(0.02, gt=0, le=1, description="ratio for replayed tokens.")
    replay_lower: Threshold = Field(2.0, description="lower for replayed tokens.")
    replay_upper: Threshold = Field(60.0, description="upper for replayed tokens.")
    scope: BatchScope = Field(
        "mini_batch",
        description="Tokens a selection is made over; micro_batch depends on the micro-batch size (as released).",
    )
    log_ratio_clamp: float | None = Field(20.0, gt=0, description="Bound on |log ratio| under it; none: as released.")


class FilterSection(Section):
    overlong: bool = Field(False, description="Mask turns whose reply hit max_reply_tokens.")
    void_turn: bool = Field(False, description="Mask turns without a well-formed action.")
    repetitive: bool = Field(False, description="Mask turns in which some 20-gram of tokens occurs 10 times.")
    unreadable: bool = Field(False, description="Mask turns whose text holds replacement characters.")
    void_rule: Literal["no_action", "never"] = Field(
        "no_action", description='When void_turn fires: a reply without an action, or "never" (release_math).'
    )
    subsample: Literal["none", "power_of_two"] = Field(
        "none",
        description="With group_keep < 1: train on all kept rows, or on a random power of two of them (as released).",
    )
    group_keep: float = Field(1.0, gt=0, le=1, description="Share of groups kept: those of highest reward deviation.")


class AlgoSection(Section):
    name: str = Field("grpo", description="base[+module...]; sets fields of this section before your own settings do.")
    fidelity: Literal["default", "paper", "release_agent", "release_math"] = Field(
        "default",
        description="Whose reading of SPEAR sets fields here: ours, the paper's, the released agent or math code's.",
    )
    advantage: str = Field(
        "grpo",
        pattern=CALLABLE,
        examples=["grpo", "gigpo", "rloo", "reinforce++", "reinforce++_baseline", "gae"],
        description='A built-in one (gae: with a critic), or your own "my_pkg.mod:fn".',
    )
    loss: str = Field(
        "clip",
        pattern=CALLABLE,
        examples=["clip", "gspo", "cispo", "kl_cov"],
        description='A built-in one (clip: that of PPO), or your own "my_pkg.mod:fn".',
    )
    groups: GroupSection = Field(GroupSection(), description="Group-relative advantages.")
    gigpo: GigpoSection = Field(GigpoSection(), description="GiGPO's step part.")
    critic: CriticSection = Field(CriticSection(), description='Critic of advantage="gae".')
    policy: PolicySection = Field(PolicySection(), description="Policy loss, on-policy and replay.")
    sil: SilSection = Field(SilSection(), description="Self-imitation.")
    intrinsic: IntrinsicSection = Field(IntrinsicSection(), description="Intrinsic tool-call reward.")
    clip_cov: ClipCovSection = Field(ClipCovSection(), description="Covariance clipping.")
    kl_cov: KlCovSection = Field(KlCovSection(), description='Covariance penalty, loss="kl_cov".')
    kl: KlSection = Field(KlSection(), description="KL divergence from the starting model.")
    correction: CorrectionSection = Field(CorrectionSection(), description="Importance weights of engine and learner.")
    dynamic: DynamicSection = Field(DynamicSection(), description="Dynamic sampling.")
    filters: FilterSection = Field(FilterSection(), description="Quality and group filters.")
    invalid_penalty: float = Field(0.1, ge=0, description="Taken off the reward of a turn whose action is invalid.")

    @field_validator("advantage", "loss")
    @classmethod
    def _built_in_or_import_path(cls, value: str, info: ValidationInfo) -> str:
        names = cls.model_fields[str(info.field_name)].examples or ()
        if ":" not in value and value not in names:
            raise ValueError(f'is none of {", ".join(map(str, names))}, and no import path "my_pkg.mod:fn"')
        return value

    @model_validator(mode="before")
    @classmethod
    def _implied_by_the_name(cls, values: Any) -> Any:
        """A config made in code gets what its algorithm's name and fidelity stand for, below what it sets itself."""
        if not isinstance(values, dict):
            return values
        name, fidelity = values.get("name"), values.get("fidelity")
        try:
            fields = algo_settings(name) if isinstance(name, str) else {}
            if fidelity in COLUMNS:
                fields = fields | column(fidelity, name if isinstance(name, str) else cls.model_fields["name"].default)
        except GrammarError:
            return values  # reported with all other contradictions by check()
        return _above(nested({tuple(key.split(".")[1:]): value for key, value in fields.items()}), values)


def _above(fields: dict[str, Any], own: Any) -> Any:
    """A tree of fields, below what a section, or a tree, sets itself."""
    own = own.model_dump(exclude_unset=True) if isinstance(own, BaseModel) else own
    if not isinstance(own, dict):
        return own
    deeper = {name: _above(fields[name], own[name]) for name in own if isinstance(fields.get(name), dict)}
    return fields | own | deeper
