"""A prompt with pictures as the local engine's cache knows it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spearrl.errors import ContractError, EngineError
from spearrl.models.vision import ProcessedImage, Vision
from spearrl.rollout.protocol import Request


@dataclass
class ImagePrompt:
    """A prompt with pictures.

    Args:
        token_ids: the prompt. A picture's tokens are a negative number that follows from its content, so that
            equal beginnings show equal pictures.
        positions: int64 [3, prompt], by M-RoPE.
        shift: what is added to the index of a token after the prompt to get its position.
        images: each picture, with the index of its first token.
    """

    token_ids: list[int]
    positions: torch.Tensor
    shift: int
    images: list[tuple[int, ProcessedImage]]

    def within(self, begin: int, end: int) -> list[ProcessedImage]:
        """Pictures whose first token has an index from `begin` to `end` - 1."""
        return [image for first, image in self.images if begin <= first < end]


def image_prompt(request: Request, vision: Vision | None) -> ImagePrompt | None:
    """A request's prompt as the cache knows it; None where it has no pictures.

    Raises:
        EngineError: pictures that the model does not take, or that the prompt has no tokens for.
    """
    if not request.images and (vision is None or vision.image_id not in request.token_ids):
        return None
    where = f"request {request.id}"
    if vision is None:
        hint = "give a model directory of the Qwen2-VL family"
        raise EngineError("the model takes no images", where=where, hint=hint)
    if request.token_ids[-1] == vision.image_id:
        hint = "a prompt ends with what asks for the reply"
        raise EngineError("the prompt ends inside a picture", where=where, hint=hint)
    try:
        processed = [vision.process(image.digest, image.data) for image in request.images]
        positions = vision.positions(torch.tensor(request.token_ids), [image.grid for image in processed])
    except ContractError as error:
        raise EngineError(str(error), where=where) from error
    prompt = list(request.token_ids)
    free = (i for i, token in enumerate(request.token_ids) if token == vision.image_id)
    images = []
    for source, image in zip(request.images, processed, strict=True):
        indices = [next(free) for _ in range(vision.tokens(image.grid))]
        for index in indices:
            prompt[index] = -1 - int(source.digest[:15], 16)
        images.append((indices[0], image))
    return ImagePrompt(prompt, positions, int(positions[0, -1]) + 1 - len(prompt), images)


def whole_images(tokens: list[int], most: int) -> int:
    """Where to cut tokens so that about `most` come before and no picture is cut in two."""
    cut = most
    while cut and tokens[cut - 1] < 0 and tokens[cut] == tokens[cut - 1]:
        cut -= 1
    if not cut:
        cut = next(index for index in range(most, len(tokens)) if tokens[index] != tokens[0])
    return cut
