"""Images for models of the Qwen2-VL family: patches, image tokens, positions (M-RoPE, arXiv 2409.12191) and embeddings.

An image stands in a prompt as one image token for each `merge` x `merge` block of patches. Which image a token belongs
to follows from the order of the images alone, so rows keep content hashes, and the encoded images beside them.
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
FORBIDDEN_LOGIT = -1e30  # of an image token in a reply: it would stand for an image that is not there
INSTALL = 'pip install "spearrl[envs]"'

Grid = tuple[int, int, int]  # how patches lie: (1, rows, columns)


class ProcessedImage(NamedTuple):
    """What a vision tower takes of an image: float32 patches [n, d] and how they lie."""

    patches: torch.Tensor
    grid: Grid


class ImageInputs(NamedTuple):
    """The distinct images of one pass over token ids [b, L].

    Where there are none, `patches` are those of one blank image, so that every pass uses the same weights.

    Args:
        positions: int64 [3, b, L]: time, row, column.
        patches: float32 [n, d], of all distinct images.
        grids: int64 [images, 3].
        features: int64 [image tokens]: which output of the vision tower each image token is.
    """

    positions: torch.Tensor
    patches: torch.Tensor
    grids: torch.Tensor
    features: torch.Tensor

    def to(self, device: torch.device) -> ImageInputs:
        """The same on a device."""
        return ImageInputs(*(tensor.to(device) for tensor in self))


class Vision:
    """How a model takes images: its image processor and its image tokens.

    Args:
        processor: transformers' image processor; it resizes, normalises and cuts into patches.
        config: the model's.
    Raises:
        ConfigError: the processor cuts other patches than the model takes.
    """

    def __init__(self, processor: Any, config: Any):
        self.processor, self.image_id = processor, int(config.image_token_id)
        self.merge = int(config.vision_config.spatial_merge_size)
        made, expected = (processor.patch_size, processor.merge_size), (config.vision_config.patch_size, self.merge)
        if made != expected:
            text = f"the image processor makes (patch, merge) {made}, the model takes {expected}"
            hint = "take config.json and preprocessor_config.json of the same model"
            raise ConfigError(text, where="preprocessor_config.json", hint=hint)
        self.forbidden = sorted({self.image_id, int(config.video_token_id)})  # token ids that no reply may hold
        self._cache: OrderedDict[str, ProcessedImage] = OrderedDict()
        self._bytes = 0

    def count(self, image: Image) -> int:
        """Number of tokens that stand for an image. Raises ContractError where it is none."""
        with _opened(image.data) as opened:
            return int(self.processor.get_number_of_image_patches(opened.height, opened.width)) // self.merge**2

    def process(self, digest: str, data: bytes) -> ProcessedImage:
        """The patches of an encoded image, cached under its content hash. Raises ContractError where it is none."""
        if (image := self._cache.pop(digest, None)) is None:
            with _opened(data) as opened:
                made = self.processor(images=[opened.convert("RGB")], return_tensors="pt")
            image = ProcessedImage(made["pixel_values"].float(), tuple(made["image_grid_thw"][0].tolist()))
            self._bytes += image.patches.nbytes
        self._cache[digest] = image
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            self._bytes -= self._cache.popitem(last=False)[1].patches.nbytes
        return image

    def tokens(self, grid: Grid) -> int:
        """Number of tokens that stand for an image whose patches lie so."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def positions(self, token_ids: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """M-RoPE positions int64 [3, L] of token ids [L] (arXiv 2409.12191, section 2.1).

        Text counts on in all three. An image that begins at position p has rows and columns p + 0, p + 1, ..., and what
        follows counts on from the larger side. transformers' `get_rope_index` gives the same, but is a method of the
        model, takes its token types, and differs between versions.

        Raises:
            ContractError: the ids hold another number of image tokens than the images have.
        """
        indices = (token_ids == self.image_id).nonzero().flatten().tolist()
        sizes = [self.tokens(grid) for grid in grids]
        if sum(sizes) != len(indices):
            text = f"{len(indices)} image tokens for pictures of {sizes} tokens"
            hint = "every picture of a prompt goes along with it, and no reply holds an image token"
            raise ContractError(text, where="vision", hint=hint)
        positions, used = torch.arange(len(token_ids)).repeat(3, 1), 0
        for size, grid in zip(sizes, grids, strict=True):
            begin, rows, columns = indices[used], grid[1] // self.merge, grid[2] // self.merge
            start, tokens = positions[0, begin].clone(), torch.arange(size)
            axes = [tokens // (rows * columns), tokens // columns % rows, tokens % columns]
            positions[:, begin + size :] += max(rows, columns) - size
            positions[:, begin : begin + size] = start + torch.stack(axes)
            used += size
        return positions

    def inputs(
        self, token_ids: torch.Tensor, images: Sequence[Sequence[str]], encoded: Mapping[str, torch.Tensor]
    ) -> ImageInputs:
        """The images of rows of token ids [b, L].

        Args:
            images: content hashes of each row's images, in order.
            encoded: the encoded images by content hash, uint8.
        Raises:
            ContractError: an image is missing, or rows hold another number of image tokens than their images have.
        """
        if missing := {digest for row in images for digest in row} - set(encoded):
            text = f"the bytes of picture {min(missing)} are not there"
            raise ContractError(text, where="Rows.pictures", hint="make rows with rows_from_groups")
        rows = [[self.process(digest, encoded[digest].numpy().tobytes()) for digest in row] for row in images] or [[]]
        positions = [self.positions(ids, [i.grid for i in row]) for ids, row in zip(token_ids, rows, strict=True)]
        return ImageInputs(torch.stack(positions, 1), *self.join([image for row in rows for image in row]))

    def join(self, images: Sequence[ProcessedImage]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(patches [n, d], grids, features) of `ImageInputs`: each distinct image once."""
        distinct = {id(image): image for image in images}  # siblings show the same images
        if not images:
            width = self.processor.temporal_patch_size * 3 * self.processor.patch_size**2
            distinct = {0: ProcessedImage(torch.zeros(self.merge**2, width), (1, self.merge, self.merge))}
        sizes = [self.tokens(image.grid) for image in distinct.values()]
        spans = dict(zip(distinct, torch.arange(sum(sizes)).split(sizes), strict=True))
        features = torch.cat([torch.zeros(0, dtype=torch.int64), *(spans[id(image)] for image in images)])
        patches, grids = zip(*distinct.values(), strict=True)
        return torch.cat(patches), torch.tensor(grids), features

    def embed(
        self, model: Any, token_ids: torch.Tensor, patches: torch.Tensor, grids: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        """Embeddings [b, L, d] of token ids [b, L]; those of image tokens come from the vision tower.

        The tower runs whatever the tokens: processes that share a sharded model gather the same weights in the same
        order.
        """
        words = model.get_input_embeddings()(token_ids)
        images = torch.cat(model.base_model.get_image_features(patches, grids).pooler_output)[features]
        return words.masked_scatter((token_ids == self.image_id).unsqueeze(-1), images.to(words.dtype))

    def save(self, folder: str | Path) -> None:
        """Write preprocessor_config.json."""
        self.processor.save_pretrained(folder)


def vision_of(part: Any) -> Vision | None:
    """How a model, or the model of a tokenizer, takes images (`spearrl.models` sets it); None where it takes none."""
    return getattr(part, "vision", None)


def load_vision(path: str | Path) -> Vision | None:
    """How the model of a directory takes images; None where it is none of KINDS.

    Raises:
        ConfigError: Pillow is missing, or the directory has no preprocessor_config.json of this model.
    """
    if model_kind(path) not in KINDS:
        return None
    from transformers import AutoConfig

    if not (Path(path) / "preprocessor_config.json").is_file():
        raise ConfigError(
            "a vision model needs preprocessor_config.json", where=str(path), hint="download it too, beside config.json"
        )
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return Vision(_processor_class().from_pretrained(path, local_files_only=True), config)


def make_processor(*, patch: int, merge: int, most_pixels: int) -> Any:
    """An image processor that resizes images to whole blocks of patches, `most_pixels` pixels at most."""
    size = {"shortest_edge": (patch * merge) ** 2, "longest_edge": most_pixels}
    return _processor_class()(patch_size=patch, merge_size=merge, size=size)


def model_kind(path: str | Path) -> str:
    """model_type in a model directory's config.json; empty where there is none: whoever loads the model says why."""
    try:
        return str(json.loads((Path(path) / "config.json").read_text()).get("model_type", ""))
    except (OSError, ValueError):
        return ""


def _processor_class() -> Any:
    """The image processor that needs no torchvision, on every machine: patches are then the same bits everywhere."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    except ImportError as error:
        raise ConfigError(f"pictures need Pillow: {error}", where="model.path", hint=INSTALL) from error
    return Qwen2VLImageProcessorPil


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    """The Pillow image. Raises ContractError where its bytes, or its shape, cannot be used."""
    try:
        import PIL.Image
    except ImportError as error:
        raise ConfigError(f"pictures need Pillow: {error}", where="Observation.images", hint=INSTALL) from error
    try:
        with PIL.Image.open(io.BytesIO(data)) as opened:
            yield opened
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        hint = "give the bytes of a PNG or JPEG file"
        raise ContractError(f"this is no picture: {error}", where="Observation.images", hint=hint) from error
