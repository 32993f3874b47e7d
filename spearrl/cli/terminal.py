"""Everything the command line prints goes through `say`: text of models and environments drives no terminal."""

from __future__ import annotations

import sys
from typing import TextIO

from spearrl.errors import printable


def say(text: object = "", *, file: TextIO | None = None, end: str = "\n") -> None:
    """Print on standard output, or `file`; what that cannot encode is replaced."""
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(printable(str(text)).encode(encoding, "replace").decode(encoding), file=stream, end=end, flush=True)
