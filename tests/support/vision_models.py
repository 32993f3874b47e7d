"""For tests of models that see: pictures, tiny models, transformers' own forward, and an environment of pictures."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from typing import Any

import torch

from spearrl.config.sections import TinySection
from spearrl.envs import Environment
from spearrl.models import build_tiny
from spearrl.seeds import derive
from spearrl.types import Action, Image, Message, Observation, Outcome, Reply, Task

TINY = TinySection(layers=2, hidden_size=64, heads=2, feed_forward=96, vocab_size=340, vision=True)
WORDS = ["which colour is it ? red , blue , green or gold", "it is red", "it is blue", "look again"] * 3


def picture(seed: int, width: int = 56, height: int = 56) -> Image:
    """Noise: no two seeds look alike."""
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height)).save(file, "PNG")
    return Image(file.getvalue())


def vision_model(seed: int = 0, *, gain: float = 3.0) -> tuple[Any, Any]:
    """A tiny model that sees and its tokenizer; weights large enough that pictures and positions matter."""
    model, tokenizer = build_tiny(WORDS, TINY, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(gain if "visual" in name else gain / 2)
    return model, tokenizer


def own_logprobs(model: Any, ids: Sequence[int], images: Sequence[Image]) -> torch.Tensor:
    """Log-probabilities of ids[1:] by transformers alone: its processor's patches, its positions; image tokens can not
    be said.
    """
    import PIL.Image

    vision = model.vision
    inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)])}
    if images:
        done = vision.processor(
            images=[PIL.Image.open(io.BytesIO(image.data)).convert("RGB") for image in images], return_tensors="pt"
        )
        inputs |= {"pixel_values": done["pixel_values"], "image_grid_thw": done["image_grid_thw"]}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == vision.image_id).int()
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0].float()
    logits[:, vision.forbidden] = -torch.inf
    return logits.log_softmax(-1)[:-1].gather(1, inputs["input_ids"][0, 1:, None])[:, 0]


COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 200, 30),
    "blue": (20, 40, 230),
    "gold": (240, 200, 0),
    "gray": (120, 120, 120),
    "pink": (250, 120, 200),
}


class Colours(Environment):
    """Two turns: each shows a square on a white ground, and its colour is to be named.

    Reward 5 for each; only the picture tells.
    """

    max_turns = 2

    class Options(Environment.Options):
        tasks: int = 24

    def tasks(self, split: str) -> Sequence[Task]:
        first = 0 if split == "train" else self.options.tasks
        return [Task(f"colours-{i}", split, {"index": i}) for i in range(first, first + self.options.tasks)]

    def reset(self, task: Task, seed: int) -> Observation:
        self._draw, self._noise = random.Random(f"colours {task.data['index']}"), random.Random(derive(seed, "colours"))
        self._turn, self._right = 0, 0
        return self._show()

    def step(self, action: Action) -> Outcome:
        self._right += action.text == f"it is {self._colour}"
        self._turn += 1
        if self._turn < self.max_turns:
            return Outcome(self._show(), 0.0, False)
        return Outcome(Observation("end"), 5.0 * self._right, True, info={"success": self._right == 2})

    def window(self, history, observation, task) -> list[Message]:
        return self.messages(observation, len(history))

    def parse(self, reply: Reply) -> Action:
        text = " ".join(reply.text.split())
        return Action(text, valid=text.startswith("it is "), tool_calls=int(text.startswith("it is ")))

    def format(self, text: str) -> str:
        return f" {text}"

    def expert(self) -> str:
        wrong = self._noise.random() < self.expert_noise
        return f"it is {self._noise.choice(list(COLOURS)) if wrong else self._colour}"

    def _show(self) -> Observation:
        import PIL.Image

        self._colour = self._draw.choice(list(COLOURS))
        canvas, file = PIL.Image.new("RGB", (56, 56), (255, 255, 255)), io.BytesIO()
        canvas.paste(COLOURS[self._colour], (0, 0, 28, 28) if self._draw.random() < 0.5 else (28, 28, 56, 56))
        canvas.save(file, "PNG")
        return Observation("what colour is it ?", anchor=(self._turn, self._colour), images=(Image(file.getvalue()),))
