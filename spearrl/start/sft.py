"""Cold start: behaviour cloning of action tokens on episodes of a scripted expert or conversations of a file (arXiv 2509.22601 starts from such a policy)."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spearrl.batching import Batch, Rows, rows_from_groups
from spearrl.config import LearnerSection, LoraSection, SftSection
from spearrl.errors import ConfigError
from spearrl.learner import LocalLearner
from spearrl.losses import Objective
from spearrl.models.chat import ChatEncoder
from spearrl.seeds import derive
from spearrl.start.transcripts import Transcript
from spearrl.types import Action, Group, Trajectory, Turn


@dataclass
class Lessons:
    """Encoded episodes: rows, and the loss weight of each of their S tokens."""

    rows: Rows
    weights: torch.Tensor
    dropped: int  # episodes that did not fit the context


def encode(
    transcripts: Sequence[Transcript],
    encoder: ChatEncoder,
    *,
    style: str,
    context_tokens: int,
    settings: SftSection,
    seed: int,
) -> Lessons:
    """Token ids by the same encoder and prefix rule as rollouts; action tokens weigh 1, observation tokens `observation_weight`."""
    groups, dropped = [], 0
    for number, transcript in enumerate(transcripts):
        turns = _turns(transcript, encoder, style)
        if any(len(turn.prompt_ids) + len(turn.token_ids) > context_tokens for turn in turns):
            dropped += 1
            continue
        groups.append(Group(number, transcript.task, [Trajectory(transcript.task, number, 0, number, turns)]))
    if not groups:
        raise ConfigError(
            f"no episode fits rollout.context_tokens={context_tokens}", where="sft", hint="raise rollout.context_tokens"
        )
    rows = rows_from_groups(groups)
    imitated = torch.tensor([turn.action.valid for g in groups for turn in g.trajectories[0].turns])
    weights = torch.full((len(rows.token_ids),), settings.observation_weight)
    if settings.observation_fraction < 1:
        draws = torch.rand(len(weights), generator=torch.Generator().manual_seed(derive(seed, "observation-tokens")))
        weights[draws >= settings.observation_fraction] = 0.0
    weights[rows.action_mask] = imitated[rows.turn_index[rows.action_mask]].float()
    weights[rows.offsets[:-1]] = 0.0  # the first token of a row has no prediction
    if encoder.vision is not None:
        weights[rows.token_ids == encoder.vision.image_id] = 0.0  # nobody says a picture
    return Lessons(rows, weights, dropped)


def fit(
    model: torch.nn.Module,
    lessons: Lessons,
    settings: SftSection,
    learner_settings: LearnerSection,
    *,
    seed: int,
    device: str,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Train `model` in place: AdamW, warm-up then decay, batches of episodes of similar length."""
    batches = [
        b
        for epoch in range(settings.epochs)
        for b in _batches(lessons.rows, settings.batch_episodes, derive(seed, "sft-epoch", epoch))
    ]
    changes = {
        "lr": settings.lr,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "beta2": settings.beta2,
        "mini_batches": 1,
        "mini_batch_rows": 0,
        "lora": LoraSection(),  # a cold start trains every weight: adapters are for what comes after
    }
    learner = LocalLearner(
        model,
        learner_settings.model_copy(update=changes),
        device=device,
        total_steps=len(batches),
        decay=settings.decay,
    )
    objective, start, tokens = [Objective("sft")], time.monotonic(), 0
    for number, chosen in enumerate(batches, 1):
        batch = _batch(lessons, chosen)
        if not bool(batch.action_mask.any()):  # nothing here to imitate
            continue
        tokens += len(batch.rows.token_ids)
        result = learner.update(batch, None, gamma=0.0, objectives=objective, seed=derive(seed, "sft", number))
        if number % 50 == 0 or number == len(batches):
            seconds = time.monotonic() - start
            report(
                {
                    "update": number,
                    "updates": len(batches),
                    "loss": result.metrics.get("sft/loss", math.nan),
                    "tokens_per_s": tokens / seconds,
                    "seconds": seconds,
                }
            )


def _turns(transcript: Transcript, encoder: ChatEncoder, style: str) -> list[Turn]:
    """Turns as the collector would have made them; `action.valid` marks those to imitate."""
    turns: list[Turn] = []
    conversation: list[Any] = []
    for step in transcript.steps:
        if style == "windowed" or not turns:
            prompt = encoder.start(step.messages, transcript.tools)
        elif encoder.rewrites_history:
            prompt = encoder.start([*conversation, *step.messages], transcript.tools)
        else:
            prompt = encoder.extend(turns[-1].prompt_ids, turns[-1].token_ids, step.messages)
        reply = encoder.reply_ids(step.reply)
        conversation += [*step.messages, encoder.reply_message(step.reply)]
        shown, images = step.messages[-1].text, tuple(image for message in step.messages for image in message.images)
        turn = Turn(
            tuple(prompt),
            tuple(reply),
            (0.0,) * len(reply),
            "stop",
            step.reply,
            shown,
            None,
            Action(step.reply, step.imitate),
        )
        turn.images = images if style == "windowed" or not turns else turns[-1].images + images
        turns.append(turn)
    return turns


def _batches(rows: Rows, size: int, seed: int) -> list[torch.Tensor]:
    """Row indices in batches of `size` of similar length, in random order."""
    draw = random.Random(seed)
    keys = [(int(length) + draw.uniform(-8, 8), row) for row, length in enumerate(rows.lengths.tolist())]
    order = [row for _, row in sorted(keys)]
    batches = [torch.tensor(order[i : i + size]) for i in range(0, len(order), size)]
    draw.shuffle(batches)
    return batches


def _batch(lessons: Lessons, chosen: torch.Tensor) -> Batch:
    """A batch whose advantages are loss weights, scaled so that the token mean is the weighted mean."""
    starts, ends = lessons.rows.offsets[chosen].tolist(), lessons.rows.offsets[chosen + 1].tolist()
    weights = torch.cat([lessons.weights[a:b] for a, b in zip(starts, ends, strict=True)])
    rows = lessons.rows.select(chosen)
    rows = rows.with_action_mask(weights > 0)
    scale = float((weights > 0).sum() / weights.sum().clamp(min=1e-9))
    padded = rows.pad(weights * scale)
    return Batch(rows, padded, torch.zeros_like(padded))
