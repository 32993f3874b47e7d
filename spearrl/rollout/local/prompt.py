"""A prompt with pictures as the local engine's cache knows it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spearrl.errors import ContractError, EngineError
from spearrl.models.vision import Picture, Sight
from spearrl.rollout.protocol import Request


@dataclass
class View:
    """What a prompt shows."""

    prompt: list[
        int
    ]  # token ids; those of a picture are a negative number that follows from its content, so that equal beginnings show equal pictures
    positions: torch.Tensor  # int64 [3, prompt]
    shift: int  # of the positions that follow, against their place
    pictures: list[tuple[int, Picture]]  # with the place of each one's first token

    def within(self, begin: int, end: int) -> list[Picture]:
        """Pictures that begin at these places of the prompt."""
        return [picture for place, picture in self.pictures if begin <= place < end]


def view_of(request: Request, sight: Sight | None) -> View | None:
    """None where the request has no pictures. Raises EngineError: pictures that the model does not take, or that the prompt has no tokens for."""
    if not request.images and (sight is None or sight.image_id not in request.token_ids):
        return None
    where = f"request {request.id}"
    if sight is None:
        raise EngineError(
            "the model takes no images", where=where, hint="give a model directory of the Qwen2-VL family"
        )
    if request.token_ids[-1] == sight.image_id:
        raise EngineError(
            "the prompt ends inside a picture", where=where, hint="a prompt ends with what asks for the reply"
        )
    try:
        pictures = [sight.picture(image.digest, image.data) for image in request.images]
        positions = sight.positions(torch.tensor(request.token_ids), [picture.grid for picture in pictures])
    except ContractError as error:
        raise EngineError(str(error), where=where) from error
    prompt, places = (
        list(request.token_ids),
        (i for i, token in enumerate(request.token_ids) if token == sight.image_id),
    )
    shown = []
    for image, picture in zip(request.images, pictures, strict=True):
        own = [next(places) for _ in range(sight.tokens(picture.grid))]
        for place in own:
            prompt[place] = -1 - int(image.digest[:15], 16)
        shown.append((own[0], picture))
    return View(prompt, positions, int(positions[0, -1]) + 1 - len(prompt), shown)


def whole_pictures(tokens: list[int], most: int) -> int:
    """Where to cut tokens so that about `most` come before and no picture is cut in two."""
    cut = most
    while cut and tokens[cut - 1] < 0 and tokens[cut] == tokens[cut - 1]:
        cut -= 1
    if not cut:
        cut = next(place for place in range(most, len(tokens)) if tokens[place] != tokens[0])
    return cut
