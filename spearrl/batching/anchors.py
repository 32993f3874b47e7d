"""Anchor states: what makes two of them the same, and a stable integer for each (GiGPO, arXiv 2505.10978)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from spearrl.errors import ContractError
from spearrl.seeds import SEED_BITS


def canonical(anchor: Any) -> Any:
    """A hashable value that is equal for equal anchors.

    Scalars and strings stay; arrays become flat tuples (their shape is ignored); lists and tuples are treated item by
    item; mappings become tuples of items sorted by key. Equality is Python's: 1, 1.0 and True are the same state, "x"
    and "X" are not.

    Raises:
        ContractError: for any other type.
    """
    if isinstance(anchor, (np.generic, np.ndarray, torch.Tensor)):
        values = anchor.reshape(-1).tolist()
        return tuple(canonical(value) for value in values) if anchor.ndim else canonical(values[0])
    if anchor is None or isinstance(anchor, (str, bytes)):
        return anchor
    if isinstance(anchor, (bool, int, float)):
        return anchor if isinstance(anchor, float) and not anchor.is_integer() else int(anchor)
    if isinstance(anchor, (list, tuple)):
        return tuple(canonical(item) for item in anchor)
    if isinstance(anchor, Mapping):
        items = [(canonical(key), canonical(value)) for key, value in anchor.items()]
        return tuple(sorted(items, key=lambda item: _encode(item[0])))
    raise ContractError(
        f"an anchor of type {type(anchor).__name__} cannot be compared",
        where="Observation.anchor",
        hint="use a string, a number, an array, or lists, tuples and dicts of these",
    )


def anchor_id(anchor: Any) -> int:
    """A 63-bit integer, the same for equal anchors on every machine. Raises ContractError as `canonical` does."""
    digest = hashlib.blake2b(_encode(canonical(anchor)), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


def _encode(value: Any) -> bytes:
    """Bytes that differ for different canonical values: every part carries its type and length."""
    if isinstance(value, tuple):
        body = b"".join(_encode(item) for item in value)
        return b"t%d:" % len(value) + body
    body = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
    return f"{type(value).__name__[0]}{len(body)}:".encode() + body
