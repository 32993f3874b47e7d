"""The settings of a run, one frozen model per section; a field's description is its help text and documentation."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from spearrl.config.algo import AlgoSection, Section

RUN_NAME = r"^([a-z0-9][a-z0-9._-]{0,63})?$"
PLAIN_TEXT = r"^[^\x00-\x1f\x7f]+$"
LIST = r"^[^\x00-\x1f\x7f]*$"
VARIABLE = r"^SPEARRL_([A-Z0-9]+_)*(TOKEN|KEY|PASSWORD)$"
ENVIRONMENT = r"^([a-z][a-z0-9_-]*|[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*)$"
MAX_OPTION_DEPTH = 16


def option_problem(value: Any, depth: int = 0) -> str | None:
    """Why a free-form option cannot be stored in a TOML file; None where it can."""
    if depth > MAX_OPTION_DEPTH:
        return f"is nested deeper than {MAX_OPTION_DEPTH} levels"
    if isinstance(value, float):
        return None if math.isfinite(value) else "is not a finite number"
    if isinstance(value, str):
        storable = "\x00" not in value and value.encode(errors="ignore").decode() == value
        return None if storable else "holds characters that no text file can hold"
    if isinstance(value, (bool, int, datetime.date, datetime.time)):
        return None
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        return "has keys that are not text"
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return next((fault for item in items if (fault := option_problem(item, depth + 1))), None)
    return f"is of type {type(value).__name__}, which TOML does not have"


class RunSection(Section):
    name: str = Field("", pattern=RUN_NAME, description="Folder below output_dir; empty: made from env, algo and seed.")
    output_dir: str = Field("runs", pattern=PLAIN_TEXT, description="Folder that holds run directories.")
    seed: int = Field(0, ge=0, description="Seed every random draw of the run is derived from.")
    steps: int = Field(100, ge=0, description="Training steps (one rollout and one update each).")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the local engine and learner compute.")
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0: OMP_NUM_THREADS, or all cores.")
    deterministic: bool = Field(True, description="Deterministic kernels and delivery: two CPU runs are bit-identical.")
    checkpoint_every: int = Field(20, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept, beside the best on the panel.")
    trajectories_every: int = Field(1, ge=0, description="Steps between trajectory files; 0: none.")
    tensorboard: bool = Field(True, description="Write TensorBoard files into the run directory.")
    started_from: str = Field("", description="Record of the preset the settings came from; sets nothing.")


class TinySection(Section):
    layers: int = Field(3, ge=1, description="Decoder layers.")
    hidden_size: int = Field(128, ge=8, description="Width of the residual stream.")
    heads: int = Field(4, ge=1, description="Attention heads (hidden_size must divide by it).")
    feed_forward: int = Field(256, ge=8, description="Width of the gated feed-forward layer.")
    vocab_size: int = Field(1024, ge=300, description="Largest vocabulary, trained on the environment's text.")
    vision: bool = Field(False, description="A model that takes images too (Qwen2.5-VL's architecture).")


class ModelSection(Section):
    path: str = Field(
        "tiny",
        pattern=PLAIN_TEXT,
        description='Model directory, name (org/name, org/name@revision, smollm2-135m), or "tiny": built here.',
    )
    format: str = Field(
        "auto",
        pattern=PLAIN_TEXT,
        description="Chat format: auto, template, response_template, or one of the library renderers (qwen3, …).",
    )
    thinking: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether the model thinks, where its template has a switch; auto: as that has it."
    )
    tiny: TinySection = Field(TinySection(), description="Shape of the tiny model.")


class EnvSection(Section):
    name: str = Field("webshop", pattern=ENVIRONMENT, description='Built-in name, or "my_pkg.mod:Class" of your own.')
    options: dict[str, Any] = Field(default_factory=dict, description="Settings of its own; None counts as not given.")
    style: Literal["chat", "windowed"] = Field("chat", description="One growing conversation, or a prompt per turn.")
    max_turns: int = Field(0, ge=0, description="Turns per episode; 0: as many as the environment's class says.")

    @field_validator("options")
    @classmethod
    def _storable(cls, options: dict[str, Any]) -> dict[str, Any]:
        options = {key: value for key, value in options.items() if value is not None}
        if fault := option_problem(options):
            raise ValueError(fault)
        return options


class RolloutSection(Section):
    engine: Literal["local", "vllm"] = Field("local", description="What samples replies; vllm needs the vllm extra.")
    workers: int = Field(0, ge=0, description="Processes with engine and environments; 0: the trainer's only.")
    launcher: Literal["processes", "ray"] = Field(
        "processes", description="What starts rollout workers: processes here, or Ray actors on a cluster."
    )
    worker_restarts: int = Field(8, ge=0, description="Rollout workers that may be replaced in a run before it stops.")
    max_staleness: int = Field(0, ge=0, description="Weight versions generation may be ahead of the learner; 0: none.")
    reply_deadline_s: float = Field(600.0, gt=0, description="Seconds for one reply; a later one is an engine error.")
    groups_per_step: int = Field(8, ge=1, description="Tasks played per step.")
    group_size: int = Field(8, ge=1, le=4096, description="Episodes per task (siblings of a group).")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature, at which log-probabilities are taken too.")
    max_reply_tokens: int = Field(512, ge=1, description="Tokens a single reply may have.")
    max_response_tokens: int = Field(0, ge=0, description="Reply tokens of an episode, then overlong; 0: no limit.")
    context_tokens: int = Field(4096, ge=16, description="Prompt and reply tokens; more ends as context_limit.")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Type the local engine samples in; auto: bf16 where measured faster for a large model."
    )
    slots: int = Field(64, ge=1, description="Sequences decoded at a time by an engine.")
    cache_mib: int = Field(1024, ge=1, description="MiB the local engine's key-value cache may take.")
    train_split: str = Field("train", pattern=PLAIN_TEXT, description="Split that training tasks come from.")
    env_workers: int = Field(0, ge=0, description="Workers stepping environments; 0: one per core, or its threads.")
    env_deadline_s: float = Field(60.0, gt=0, description="Seconds a step may take before its worker is replaced.")
    max_env_errors: float = Field(0.2, ge=0, le=1, description="Largest share of env_error; more stops the run.")
    env_restarts: int = Field(32, ge=0, description="Workers that may be replaced in one rollout before the run stops.")


class VllmSection(Section):
    servers: str = Field(
        "",
        pattern=LIST,
        description='Addresses of running vLLM servers, "http://a:8000, http://b:8000"; empty: engines of our own.',
    )
    token_variable: str = Field(
        "SPEARRL_ENGINE_TOKEN", pattern=VARIABLE, description="Environment variable that holds the servers' token."
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs that one engine is split over.")
    memory_fraction: float = Field(0.85, gt=0, le=1, description="Share of a GPU's memory an engine may take.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the engine's weights and activations; auto: the model's, if the CPU is fast in it."
    )
    prefix_caching: bool = Field(True, description="Compute a beginning that prompts share once.")
    eager: bool = Field(False, description="No CUDA graphs or compilation: starts sooner, samples slower.")
    start_timeout_s: float = Field(600.0, gt=0, description="Seconds an engine may take to start.")

    @property
    def addresses(self) -> list[str]:
        """`servers`, one by one."""
        return [url.strip() for url in self.servers.split(",") if url.strip()]


class SyncSection(Section):
    transport: Literal["auto", "shared_memory", "nccl", "ipc"] = Field(
        "auto",
        description="How weights reach engines; auto: ipc on one set of GPUs, nccl between GPUs, else shared memory.",
    )
    bucket_mib: int = Field(256, ge=1, description="MiB of weights under way at a time.")
    timeout_s: float = Field(120.0, gt=0, description="Seconds each part of a sync may take before the run stops.")
    probe_tolerance: float = Field(0.0, ge=0, description="Largest difference on the probe, nats; 0: measured.")


class LoraSection(Section):
    rank: int = Field(0, ge=0, description="Rank of the adapters (arXiv 2106.09685, lora extra); 0: train all weights.")
    alpha: float = Field(32.0, gt=0, description="Adapters count alpha / rank.")
    targets: str = Field(
        "",
        pattern=LIST,
        description='Layers that get adapters, "q_proj, v_proj"; empty: every linear layer but the head.',
    )


class PlacementSection(Section):
    gpus: int = Field(0, ge=0, description="GPUs of this run over all machines; 0: those of this machine.")
    mode: Literal["auto", "colocated", "disaggregated"] = Field(
        "auto",
        description="Engines and learner take turns on GPUs, or have their own; auto: their own with max_staleness.",
    )


class LearnerSection(Section):
    backend: Literal["local", "deepspeed"] = Field(
        "local", description='What updates the policy: this process alone, or DeepSpeed (extra) on "processes".'
    )
    processes: int = Field(1, ge=1, description="DeepSpeed processes, a GPU each; under torchrun its world size.")
    zero_stage: Literal[0, 1, 2, 3] = Field(3, description="Shards optimiser state (1), gradients (2), parameters (3).")
    offload: Literal["none", "optimizer", "all"] = Field("none", description="What DeepSpeed keeps in host memory.")
    timeout_s: float = Field(600.0, gt=0, description="Seconds a learner process may take over one command.")
    packing: Literal["auto", "padded", "tree"] = Field(
        "auto",
        description="Rows of a pass: padded, or a tree with shared beginnings once; auto: a tree where the model can.",
    )
    lora: LoraSection = Field(LoraSection(), description="Low-rank adapters instead of all weights.")
    lr: float = Field(1e-6, gt=0, description="AdamW learning rate, constant after warm-up.")
    critic_lr: float | None = Field(None, gt=0, description="Learning rate of the critic's head; none: ten times lr.")
    warmup_steps: int = Field(0, ge=0, description="Optimiser steps of linear warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay (not on norms and biases).")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW first moment decay.")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW second moment decay.")
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm.")
    mini_batches: int = Field(
        2, ge=1, description="On-policy optimiser steps per training step; not used where mini_batch_rows is set."
    )
    mini_batch_rows: int = Field(0, ge=0, description="Rows per optimiser step; 0: the step's rows make mini_batches.")
    micro_batch_tokens: int = Field(16384, ge=1, description="Tokens of one pass, padding too; changes no gradient.")
    lm_head_chunk: int = Field(
        4096, ge=1, description="Action tokens whose logits exist at a time, for a slice of the vocabulary."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description='bf16 autocast, or fp32; "auto": bf16 where the processor has it.'
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")


class SftSection(Section):
    enabled: bool = Field(False, description="Cold start: clone scripted-expert episodes before training.")
    data: str = Field(
        "",
        pattern=LIST,
        description="Conversations to clone (.jsonl or .parquet) instead of expert episodes; replies are learnt.",
    )
    episodes: int = Field(3000, ge=1, description="Expert episodes generated.")
    epochs: int = Field(4, ge=1, description="Passes over them.")
    batch_episodes: int = Field(32, ge=1, description="Episodes per optimiser step.")
    lr: float = Field(3e-3, gt=0, description="Peak AdamW learning rate; warms up, then falls to 0.")
    decay: Literal["linear", "cosine"] = Field("linear", description="How it falls.")
    warmup_steps: int = Field(30, ge=0, description="Optimiser steps of warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW second moment decay.")
    observation_weight: float = Field(
        0.05, ge=0, le=1, description="Loss weight of observation tokens of expert episodes; action tokens weigh 1."
    )
    observation_fraction: float = Field(1.0, gt=0, le=1, description="Share of observation tokens drawn for the loss.")
    noise: float = Field(0.3, ge=0, le=1, description="How imperfect the expert is: 0 perfect, 1 random.")
    recovery: float = Field(
        0.08,
        ge=0,
        le=1,
        description="Chance per turn of a bad action, played but not imitated, so that recoveries are learnt.",
    )


class EvalSection(Section):
    every: int = Field(10, ge=0, description="Training steps between evaluations, from step 0 on; 0: only at the end.")
    tasks: int = Field(128, ge=1, description="Size of the fixed panel: the first tasks of the split.")
    split: str = Field("val", pattern=PLAIN_TEXT, description="Split the panel comes from.")
    attempts: int = Field(1, ge=1, description="Episodes per task.")
    temperature: float = Field(0.4, ge=0, description="Sampling temperature; 0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling threshold.")
    seed: int = Field(1000, ge=0, description="Seed of the panel's episodes, independent of run.seed.")


class RunConfig(Section):
    """Everything that defines a run. Sections are frozen; `spearrl config schema` prints this as JSON schema."""

    run: RunSection = Field(RunSection(), description="Run directory, length, logging.")
    model: ModelSection = Field(ModelSection(), description="The policy.")
    env: EnvSection = Field(EnvSection(), description="The environment.")
    rollout: RolloutSection = Field(RolloutSection(), description="Episodes and engine.")
    algo: AlgoSection = Field(AlgoSection(), description="The algorithm.")
    learner: LearnerSection = Field(LearnerSection(), description="Optimiser and batching.")
    vllm: VllmSection = Field(VllmSection(), description="vLLM engines.")
    sync: SyncSection = Field(SyncSection(), description="How new weights reach the engines.")
    placement: PlacementSection = Field(PlacementSection(), description="Which GPUs do what.")
    sft: SftSection = Field(SftSection(), description="Cold start.")
    eval: EvalSection = Field(EvalSection(), description="Evaluation.")

    def with_settings(self, settings: Mapping[str, Any]) -> RunConfig:
        """A copy with settings "section.key" changed; nothing is checked."""
        changes: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            section, _, name = key.partition(".")
            changes.setdefault(section, {})[name] = value
        sections = {name: getattr(self, name).model_copy(update=values) for name, values in changes.items()}
        return self.model_copy(update=sections)
