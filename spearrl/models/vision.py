"""Pictures for models of the Qwen2-VL family: their patches, the tokens that stand for them, positions (M-RoPE, arXiv 2409.12191) and embeddings.

A picture stands in a prompt as one image token for each `merge` x `merge` block of patches. Which picture a token belongs to follows from the order
of the pictures alone, so rows keep content hashes, and the bytes beside them.
"""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spearrl.errors import ConfigError, ContractError
from spearrl.types import Image

KINDS = ("qwen2_vl", "qwen2_5_vl")  # model_type of config.json
CACHE_BYTES = 512 << 20  # of patches
NEVER = -1e30  # logit of an image token in a reply: it would stand for a picture that is not there


class Picture(NamedTuple):
    """What a vision tower takes: patches [n, d], float32, and how they lie, (1, rows, columns)."""

    patches: torch.Tensor
    grid: tuple[int, int, int]


class Seen(NamedTuple):
    """The pictures of one pass over [b, L] tokens, each once. Where there are none, `patches` hold a blank one: every pass uses the same weights."""

    positions: torch.Tensor  # int64 [3, b, L]: time, row, column
    patches: torch.Tensor  # float32 [n, d]
    grids: torch.Tensor  # int64 [pictures, 3]
    places: torch.Tensor  # int64 [image tokens], which of the vision tower's outputs each one is

    def to(self, device: torch.device) -> Seen:
        return Seen(*(tensor.to(device) for tensor in self))


class Sight:
    """How a model sees: its image processor and its image tokens.

    Args:
        processor: of transformers; resizes, normalises and cuts into patches.
        config: the model's.
    Raises:
        ConfigError: the processor cuts other patches than the model takes.
    """

    def __init__(self, processor: Any, config: Any):
        self.processor, self.image_id = processor, int(config.image_token_id)
        self.merge = int(config.vision_config.spatial_merge_size)
        cut, taken = (processor.patch_size, processor.merge_size), (config.vision_config.patch_size, self.merge)
        if cut != taken:
            hint = "take config.json and preprocessor_config.json of the same model"
            raise ConfigError(
                f"the image processor makes (patch, merge) {cut}, the model takes {taken}",
                where="preprocessor_config.json",
                hint=hint,
            )
        self.forbidden = sorted({self.image_id, int(config.video_token_id)})  # in replies
        self._cache: OrderedDict[str, Picture] = OrderedDict()
        self._bytes = 0

    def count(self, image: Image) -> int:
        """Tokens that stand for a picture. Raises ContractError where it is none."""
        with _opened(image.data) as opened:
            return int(self.processor.get_number_of_image_patches(opened.height, opened.width)) // self.merge**2

    def picture(self, digest: str, data: bytes) -> Picture:
        """The patches of an encoded picture, kept for the next time. Raises ContractError where it is none."""
        if (found := self._cache.pop(digest, None)) is None:
            with _opened(data) as opened:
                done = self.processor(images=[opened.convert("RGB")], return_tensors="pt")
            found = Picture(done["pixel_values"].float(), tuple(done["image_grid_thw"][0].tolist()))
            self._bytes += found.patches.nbytes
        self._cache[digest] = found
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            self._bytes -= self._cache.popitem(last=False)[1].patches.nbytes
        return found

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Image tokens of a picture whose patches lie so."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def positions(self, token_ids: torch.Tensor, grids: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """int64 [3, L]: text counts on in all three; a picture that begins at p has its rows and columns at p + 0, 1, …, and what follows counts on
        from the larger side (arXiv 2409.12191, section 2.1).

        Raises:
            ContractError: [L] token ids hold another number of image tokens than the pictures have.
        """
        spots, sizes = (token_ids == self.image_id).nonzero().flatten().tolist(), [self.tokens(grid) for grid in grids]
        if sum(sizes) != len(spots):
            hint = "every picture of a prompt goes along with it, and no reply holds an image token"
            raise ContractError(f"{len(spots)} image tokens for pictures of {sizes} tokens", where="vision", hint=hint)
        found, used = torch.arange(len(token_ids)).repeat(3, 1), 0
        for size, grid in zip(sizes, grids, strict=True):
            begin, rows, columns = spots[used], grid[1] // self.merge, grid[2] // self.merge
            here, places = found[0, begin].clone(), torch.arange(size)
            found[:, begin + size :] += max(rows, columns) - size
            found[:, begin : begin + size] = here + torch.stack(
                [places // (rows * columns), places // columns % rows, places % columns]
            )
            used += size
        return found

    def seen(self, token_ids: torch.Tensor, images: Sequence[Sequence[str]], store: Mapping[str, torch.Tensor]) -> Seen:
        """The pictures of rows [b, L].

        Args:
            images: content hashes of each row's, in order. `store`: bytes by content hash, uint8.
        Raises:
            ContractError: bytes are missing, or another number of image tokens.
        """
        if missing := {digest for row in images for digest in row} - set(store):
            raise ContractError(
                f"the bytes of picture {min(missing)} are not there",
                where="Rows.pictures",
                hint="make rows with rows_from_groups",
            )
        pictures = [[self.picture(digest, store[digest].numpy().tobytes()) for digest in row] for row in images] or [[]]
        positions = [self.positions(ids, [p.grid for p in row]) for ids, row in zip(token_ids, pictures, strict=True)]
        return Seen(torch.stack(positions, 1), *self.joined([p for row in pictures for p in row]))

    def joined(self, pictures: Sequence[Picture]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(patches [n, d], grids, places) of `Seen`."""
        distinct = {id(picture): picture for picture in pictures}  # siblings see the same
        if not pictures:
            width = self.processor.temporal_patch_size * 3 * self.processor.patch_size**2
            distinct = {0: Picture(torch.zeros(self.merge**2, width), (1, self.merge, self.merge))}
        sizes = [self.tokens(picture.grid) for picture in distinct.values()]
        spans = dict(zip(distinct, torch.arange(sum(sizes)).split(sizes), strict=True))
        places = torch.cat([torch.zeros(0, dtype=torch.int64), *(spans[id(picture)] for picture in pictures)])
        return (
            torch.cat([p.patches for p in distinct.values()]),
            torch.tensor([p.grid for p in distinct.values()]),
            places,
        )

    def embed(
        self, model: Any, token_ids: torch.Tensor, patches: torch.Tensor, grids: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """[b, L, d]: embeddings of tokens [b, L], those of image tokens from the vision tower. The tower runs whatever the tokens: processes that
        share a sharded model gather the same weights in the same order."""
        words = model.get_input_embeddings()(token_ids)
        features = torch.cat(model.base_model.get_image_features(patches, grids).pooler_output)[places]
        return words.masked_scatter((token_ids == self.image_id).unsqueeze(-1), features.to(words.dtype))

    def save(self, folder: str | Path) -> None:
        """Write preprocessor_config.json."""
        self.processor.save_pretrained(folder)


def sight_of(part: Any) -> Sight | None:
    """How a model, or a tokenizer, of `spearrl.models` sees; None where it does not."""
    return getattr(part, "sight", None)


def load_sight(path: str | Path) -> Sight | None:
    """Of a model directory; None where the model does not see, or in another way than KINDS.

    Raises:
        ConfigError: Pillow is missing, or the directory has no preprocessor_config.json of this model.
    """
    if model_kind(path) not in KINDS:
        return None
    from transformers import AutoConfig

    if not (Path(path) / "preprocessor_config.json").is_file():
        raise ConfigError(
            "a model that sees needs preprocessor_config.json",
            where=str(path),
            hint="download it too, beside config.json",
        )
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return Sight(_processor_class().from_pretrained(path, local_files_only=True), config)


def make_processor(*, patch: int, merge: int, most_pixels: int) -> Any:
    """An image processor that resizes pictures to whole blocks of patches, `most_pixels` at most."""
    block = patch * merge
    return _processor_class()(
        patch_size=patch, merge_size=merge, size={"shortest_edge": block * block, "longest_edge": most_pixels}
    )


def model_kind(path: str | Path) -> str:
    """model_type of a model directory; empty where there is none."""
    try:
        return str(json.loads((Path(path) / "config.json").read_text()).get("model_type", ""))
    except (OSError, ValueError):
        return ""  # whoever loads the model says what is wrong


def _processor_class() -> Any:
    """The one that needs no torchvision, on every machine: pictures are then the same bits everywhere."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    except ImportError as error:
        raise ConfigError(
            f"pictures need Pillow: {error}", where="model.path", hint='pip install "spearrl[envs]"'
        ) from error
    return Qwen2VLImageProcessorPil


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    """The picture. Raises ContractError where its bytes, or its shape, cannot be used."""
    try:
        import PIL.Image
    except ImportError as error:
        raise ConfigError(
            f"pictures need Pillow: {error}", where="Observation.images", hint='pip install "spearrl[envs]"'
        ) from error
    try:
        with PIL.Image.open(io.BytesIO(data)) as opened:
            yield opened
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ContractError(
            f"this is no picture: {error}", where="Observation.images", hint="give the bytes of a PNG or JPEG file"
        ) from error
