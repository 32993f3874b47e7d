"""spearrl trains tool-using language-model agents with SPEAR (arXiv 2509.22601).

The public names load lazily: importing the package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "RunConfig": "spearrl.config",
    "load_config": "spearrl.config",
    "Trainer": "spearrl.trainer",
    "evaluate": "spearrl.launch.assembly",
    "EvalResult": "spearrl.evaluation",
    "Environment": "spearrl.envs",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'spearrl' has no attribute {name!r}")
