"""The error tree. Every error says what was seen, where, and how to fix it; the exit code belongs to the class.

SpearError (1)
├── ConfigError (2)        bad settings, bad command line
├── RefusedError (3)       locked run, mismatch on resume, unsafe request
├── CheckpointError (4)    no valid checkpoint
├── StorageError (5)       disk full, unwritable
├── NumericsError (7)      losses or gradients are not finite, again and again
├── WorkerError (6)        an engine or environment used up its restarts
│   ├── EngineError
│   │   └── WorkerLost    a rollout worker went down; others play its episodes
│   └── EnvironmentFault   an environment raised; becomes Status.ENV_ERROR
└── ContractError (2)      an environment, loss or engine broke its contract
"""

from __future__ import annotations

import errno
import re

_SECRET = re.compile(
    r"(?:^|[_.\W])(api)?(tokens?|keys?|secrets?|passw(or)?ds?|passphrases?|credentials?)(?=$|[_.\W])", re.I
)


def is_secret(name: str) -> bool:
    """Whether a variable or setting of that name holds what nobody else should read."""
    return bool(_SECRET.search(name))


# What drives a terminal or reorders a line: control characters, marks of direction and of nothing, surrogates, tags.
_DRIVES = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"
    r"\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """The text with what drives a terminal escaped, as \\u001b; line breaks and tabs stay."""
    return _DRIVES.sub(lambda match: f"\\u{ord(match[0]):04x}" if match[0] <= "\uffff" else "\ufffd", text)


class SpearError(Exception):
    """Base of every error spearrl raises on purpose.

    Args:
        message: what was seen and what was expected.
        where: file:line, environment, step or tensor it concerns.
        hint: the fix, as an instruction.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None):
        super().__init__(message)
        self.message, self.where, self.hint = message, where, hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  fix: {self.hint}" if self.hint else text


class ConfigError(SpearError):
    exit_code = 2


class ContractError(SpearError):
    exit_code = 2


class RefusedError(SpearError):
    exit_code = 3


class CheckpointError(SpearError):
    exit_code = 4


class StorageError(SpearError):
    exit_code = 5


class NumericsError(SpearError):
    exit_code = 7


class WorkerError(SpearError):
    exit_code = 6


class EngineError(WorkerError):
    pass


class WorkerLost(EngineError):
    pass


class EnvironmentFault(WorkerError):
    pass


# What the system says where a disk is full, or files cannot be written or are no files: trouble of the machine's.
STORAGE = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EFBIG", "EISDIR", "ENOTDIR", "ENAMETOOLONG")


def system_name(error: BaseException | None) -> str:
    """The system's name for what went wrong with a file, "ENOSPC"; "" where it has none."""
    number = getattr(error, "errno", None)
    if number is None and (said := re.search(r"\(os error (\d+)\)", str(error))):  # safetensors says it in words
        number = int(said[1])
    return errno.errorcode.get(number or 0, "")
