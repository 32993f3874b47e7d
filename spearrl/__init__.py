"""spearrl trains tool-using language-model agents with SPEAR (arXiv 2509.22601).

Everything a user needs is imported from here, e.g. `from spearrl import Environment, Observation, Outcome, Task`.
The names load lazily: importing the package loads neither torch nor transformers nor pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spearrl.config import RunConfig, load_config
    from spearrl.envs import Done, Environment, ToolEnvironment, call, make, tool
    from spearrl.envs.check import RuleFinding, check_environment, failures
    from spearrl.errors import ConfigError, ContractError, SpearError
    from spearrl.evaluation import EvalResult, Rate, evaluate
    from spearrl.learner import UpdateResult
    from spearrl.trainer import Trainer
    from spearrl.types import (
        Action,
        Group,
        Image,
        Message,
        Observation,
        Outcome,
        Reply,
        Status,
        Task,
        Text,
        Trajectory,
        Turn,
    )

__version__ = "0.1.0"

__all__ = ["ConfigError", "ContractError", "SpearError", "__version__"]
__all__ += ["EvalResult", "Rate", "RunConfig", "Trainer", "UpdateResult", "evaluate", "load_config"]
__all__ += ["Done", "Environment", "ToolEnvironment", "call", "make", "tool"]
__all__ += ["RuleFinding", "check_environment", "failures"]
__all__ += ["Action", "Group", "Image", "Message", "Observation", "Outcome", "Reply", "Status", "Task", "Text"]
__all__ += ["Trajectory", "Turn"]

_HOMES = {
    "spearrl.config": ("RunConfig", "load_config"),
    "spearrl.envs": ("Done", "Environment", "ToolEnvironment", "call", "make", "tool"),
    "spearrl.envs.check": ("RuleFinding", "check_environment", "failures"),
    "spearrl.errors": ("ConfigError", "ContractError", "SpearError"),
    "spearrl.evaluation": ("EvalResult", "Rate", "evaluate"),
    "spearrl.learner": ("UpdateResult",),
    "spearrl.trainer": ("Trainer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'spearrl' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF.get(name, "spearrl.types")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
