"""The cold start: supervised fine-tuning on episodes of a scripted expert, or on conversations of a file.

SPEAR (arXiv 2509.22601) starts from such a policy.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spearrl.batching import Batch, Rows, rows_from_groups
from spearrl.config.sections import LearnerSection, LoraSection, RunConfig, SftSection
from spearrl.errors import ConfigError
from spearrl.learner import LocalLearner
from spearrl.losses import Objective
from spearrl.models.chat_format import ChatFormat, next_prompt
from spearrl.models.formats import open_format
from spearrl.seeds import derive
from spearrl.start.transcripts import Transcript
from spearrl.types import Action, Group, Message, Trajectory, Turn

LOG = logging.getLogger(__name__)
REPORT_UPDATES, REPORT_S = 50, 10.0  # optimiser steps, or seconds, between two reports


@dataclass
class Examples:
    """Encoded transcripts.

    Args:
        rows: of S tokens in all.
        weights: float32 [S], the loss weight of each token.
        too_long: transcripts that were left out because they do not fit the context.
    """

    rows: Rows
    weights: torch.Tensor
    too_long: int


def cold_start(
    config: RunConfig,
    model: torch.nn.Module,
    tokenizer: Any,
    transcripts: list[Transcript],
    *,
    report: Callable[[str, dict[str, Any]], None],
) -> None:
    """Train `model` to imitate transcripts, in place, on the device it is on.

    Args:
        report: takes ("expert" or "conversations", what is imitated), then ("sft", progress).
    """
    seed, settings, style = derive(config.run.seed, "sft"), config.sft, config.env.style
    if settings.data:
        settings, style = settings.model_copy(update={"observation_weight": 0.0}), "chat"
    offered = next((transcript.tools for transcript in transcripts if transcript.tools), ())
    encoder = open_format(tokenizer, config.model, offered)
    examples = encode(
        transcripts,
        encoder,
        style=style,
        context_tokens=config.rollout.context_tokens,
        settings=settings,
        seed=seed,
    )
    sizes = {"episodes": len(transcripts), "tokens": len(examples.rows.token_ids), "dropped": examples.too_long}
    success = sum(transcript.success for transcript in transcripts) / len(transcripts)
    report("conversations" if settings.data else "expert", sizes | {"success": success})
    fit(model, examples, settings, config.learner, seed=seed, report=lambda values: report("sft", values))


def encode(
    transcripts: Sequence[Transcript],
    encoder: ChatFormat,
    *,
    style: str,
    context_tokens: int,
    settings: SftSection,
    seed: int,
) -> Examples:
    """Token ids by the same encoder and prefix rule as rollouts; action tokens weigh 1, others `observation_weight`.

    Args:
        style: "chat" or "windowed", as the environment's.
        seed: of the observation tokens that are kept, where `observation_fraction` is below 1.
    Raises:
        ConfigError: no transcript fits the context.
    """
    groups = []
    for number, transcript in enumerate(transcripts):
        turns = _turns(transcript, encoder, style)
        if all(len(turn.prompt_ids) + len(turn.token_ids) <= context_tokens for turn in turns):
            groups.append(Group(number, transcript.task, [Trajectory(transcript.task, number, 0, number, turns)]))
    if not groups:
        raise ConfigError(
            f"no episode fits rollout.context_tokens={context_tokens}", where="sft", hint="raise rollout.context_tokens"
        )
    rows = rows_from_groups(groups)
    imitated = torch.tensor([turn.action.valid for group in groups for turn in group.trajectories[0].turns])
    weights = torch.full((len(rows.token_ids),), settings.observation_weight)
    if settings.observation_fraction < 1:
        draws = torch.rand(len(weights), generator=torch.Generator().manual_seed(derive(seed, "observation-tokens")))
        weights[draws >= settings.observation_fraction] = 0.0
    weights[rows.action_mask] = imitated[rows.turn_index[rows.action_mask]].float()
    weights[rows.offsets[:-1]] = 0.0  # the first token of a row has no prediction
    if encoder.vision is not None:
        weights[rows.token_ids == encoder.vision.image_id] = 0.0  # no reply holds an image
    return Examples(rows, weights, len(transcripts) - len(groups))


def fit(
    model: torch.nn.Module,
    examples: Examples,
    settings: SftSection,
    learner_settings: LearnerSection,
    *,
    seed: int,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Train `model` in place: AdamW, warm-up then decay, batches of rows of similar length."""
    own = settings.model_dump(include={"lr", "warmup_steps", "weight_decay", "beta2"})
    # A cold start trains every weight: adapters are for what comes after.
    changes = own | {"mini_batches": 1, "mini_batch_rows": 0, "lora": LoraSection()}
    epochs = (derive(seed, "sft-epoch", epoch) for epoch in range(settings.epochs))
    batches = [batch for epoch in epochs for batch in _batches(examples.rows, settings.batch_episodes, epoch)]
    learner = LocalLearner(
        model,
        learner_settings.model_copy(update=changes),
        device=next(model.parameters()).device,
        total_steps=len(batches),
        decay=settings.decay,
    )
    objectives, start, tokens, loss, told = [Objective("sft")], time.monotonic(), 0, math.nan, 0.0
    for number, indices in enumerate(batches, 1):
        batch = _batch(examples, indices)
        if not bool(batch.action_mask.any()):  # nothing here to imitate
            continue
        tokens += len(batch.rows.token_ids)
        LOG.info("cold start: update %d of %d, loss %.3f", number, len(batches), loss)
        result = learner.update(batch, None, gamma=0.0, objectives=objectives, seed=derive(seed, "sft", number))
        loss = result.metrics.get("sft/loss", math.nan)
        seconds = time.monotonic() - start
        if number % REPORT_UPDATES == 0 or number == len(batches) or seconds - told >= REPORT_S:
            told = seconds
            progress = {"update": number, "updates": len(batches), "loss": loss}
            report(progress | {"tokens_per_s": tokens / seconds, "seconds": seconds})


def _turns(transcript: Transcript, encoder: ChatFormat, style: str) -> list[Turn]:
    """Turns as the collector would have made them; `action.valid` marks those to imitate."""
    turns: list[Turn] = []
    conversation: list[Message] = []
    for step in transcript.steps:
        conversation = [*conversation, *step.messages] if style == "chat" else step.messages
        images = tuple(image for message in conversation for image in message.images)
        if turns and style == "chat":
            turn = turns[-1].prompt_ids, turns[-1].token_ids
            prompt = next_prompt(encoder, turn, conversation, step.messages, transcript.tools)
        else:
            prompt = encoder.start(conversation, transcript.tools)
        conversation = [*conversation, Message("assistant", step.reply)]
        ids, observation = encoder.reply_ids(step.reply), step.messages[-1].text
        action, logprobs = Action(step.reply, step.imitate), (0.0,) * len(ids)
        turns.append(Turn(prompt, ids, logprobs, "stop", step.reply, observation, None, action))
        turns[-1].images = images
    return turns


def _batches(rows: Rows, size: int, seed: int) -> list[torch.Tensor]:
    """Row indices in batches of `size` of similar length, in random order."""
    draw = random.Random(seed)
    keys = [(int(length) + draw.uniform(-8, 8), row) for row, length in enumerate(rows.lengths.tolist())]
    order = [row for _, row in sorted(keys)]
    batches = [torch.tensor(order[i : i + size]) for i in range(0, len(order), size)]
    draw.shuffle(batches)
    return batches


def _batch(examples: Examples, indices: torch.Tensor) -> Batch:
    """A batch whose advantages are loss weights, scaled so that the token mean is the weighted mean."""
    starts, ends = examples.rows.offsets[indices].tolist(), examples.rows.offsets[indices + 1].tolist()
    weights = torch.cat([examples.weights[a:b] for a, b in zip(starts, ends, strict=True)])
    rows = examples.rows.select(indices).with_action_mask(weights > 0)
    scale = float((weights > 0).sum() / weights.sum().clamp(min=1e-9))
    padded = rows.pad(weights * scale)
    return Batch(rows, padded, torch.zeros_like(padded))
