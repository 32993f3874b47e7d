"""Derived seeds: every random draw names the run, step, group, sibling and turn it belongs to.

Seeds are hashed, not streamed, so a sample that is drawn again after a crash is the same sample.
"""

from __future__ import annotations

import hashlib

SEED_BITS = 63  # torch and numpy generators take non-negative int64


def derive(*parts: int | str) -> int:
    """A 63-bit seed from integers and strings, stable over processes, machines and Python versions.

    Example:
        derive(run_seed, "rollout", step, group, sibling, turn)
    """
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)
