"""The room as a picture: NumPy tiles, written as PNG."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BLACK, BROWN, MORTAR = (20, 20, 24), (124, 84, 56), (84, 56, 40)
GREEN, YELLOW, ORANGE, RED = (80, 190, 80), (240, 200, 80), (220, 120, 30), (220, 50, 50)


@lru_cache(maxsize=128)
def tile(symbol: str, pixels: int) -> np.ndarray:
    """One cell of the grid, uint8 [pixels, pixels, 3]."""
    y, x = np.mgrid[0:pixels, 0:pixels] * (2 / (pixels - 1)) - 1.0  # -1 ... 1
    image = np.full((pixels, pixels, 3), BROWN if symbol == "#" else BLACK, np.uint8)
    if symbol == "#":
        image[(np.abs(y) > 0.9) | (np.abs(y) < 0.1) | (np.abs(x - np.sign(y) * 0.4) < 0.1)] = MORTAR
    if symbol in "O√S":  # a target: outlined, with a diamond
        image[(np.maximum(np.abs(x), np.abs(y)) > 0.85) | (np.abs(x) + np.abs(y) < 0.35)] = RED
    if symbol in "X√":
        image[np.maximum(np.abs(x), np.abs(y)) < 0.75] = YELLOW
        image[(np.maximum(np.abs(x), np.abs(y)) < 0.6) & (np.abs(np.abs(x) - np.abs(y)) < 0.2)] = ORANGE
    if symbol in "PS":  # head, two antennae, two eyes
        image[(x**2 + (y - 0.2) ** 2 < 0.3) | ((np.abs(np.abs(x) - 0.3) < 0.1) & (y > -0.75) & (y < 0))] = GREEN
        image[(np.abs(x) - 0.22) ** 2 + (y - 0.1) ** 2 < 0.02] = BLACK
    return image


def draw(rows: Sequence[str], pixels: int) -> np.ndarray:
    """The whole grid, uint8 [rows * pixels, columns * pixels, 3]."""
    return np.concatenate([np.concatenate([tile(symbol, pixels) for symbol in row], axis=1) for row in rows])


def png(image: np.ndarray) -> bytes:
    """An RGB picture as a PNG file."""
    height, width, _ = image.shape
    lines = b"".join(b"\0" + line.tobytes() for line in image)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
