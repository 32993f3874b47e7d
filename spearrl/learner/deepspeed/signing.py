"""Messages between ranks carry a keyed hash: whoever only reaches a port of theirs commands nobody.

The secret is drawn anew for the ranks that a trainer starts. Ranks of a launcher share the variable
SPEARRL_RANK_SECRET; without it their network is taken as trusted.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import sys
import time
from datetime import timedelta
from typing import Any

VARIABLE = "SPEARRL_RANK_SECRET"
BYTES = 32
RETRY_S = 0.2


class Signer:
    """Signs messages by name, with the secret of a run.

    Args:
        secret: any text; "": none, and everybody can sign.
    """

    def __init__(self, secret: str):
        self._key, self._complained = hashlib.sha256(secret.encode()).digest() if secret else b"", False

    @classmethod
    def of_environment(cls) -> Signer:
        """With the secret that this process was started with."""
        return cls(os.environ.get(VARIABLE, ""))

    def seal(self, name: str, data: Any) -> bytes:
        """The hash that goes before the data, which is bytes or an array of them."""
        digest = hashlib.blake2b(name.encode() + b"\0", key=self._key, digest_size=BYTES)
        digest.update(data)
        return digest.digest()

    def sound(self, name: str, seal: bytes, data: Any) -> bool:
        """Whether the data was sealed under this name by somebody who has the secret."""
        return hmac.compare_digest(seal, self.seal(name, data))

    def write(self, store: Any, key: str, text: str) -> None:
        """Put a text into the ranks' store."""
        store.set(key, self.seal(key, text.encode()) + text.encode())

    def read(self, store: Any, key: str) -> str | None:
        """What `write` put there; None, said once, where somebody else did."""
        value = store.get(key)
        if self.sound(key, value[:BYTES], value[BYTES:]):
            return value[BYTES:].decode()
        if not self._complained:
            self._complained = True
            print(
                f"refused {key}, which lacks this run's signature: somebody else writes to its store", file=sys.stderr
            )
        return None

    def wait(self, store: Any, key: str) -> str:
        """What `write` puts there, sooner or later."""
        while True:
            store.wait([key], timedelta(days=3650))  # the heartbeat ends it where nothing can come any more
            if (text := self.read(store, key)) is not None:
                return text
            time.sleep(RETRY_S)
