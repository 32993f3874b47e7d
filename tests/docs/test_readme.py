"""Every `spearrl` command the documentation shows is one the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from spearrl.cli.main import VERBS
from spearrl.config import check, load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every indented or fenced line that starts with spearrl, comments cut off."""
    commands = []
    for page in PAGES:
        for line in page.read_text().replace("\\\n", " ").splitlines():
            match = re.match(r"\s*(?:\$ )?(spearrl [a-z].*)$", line)
            if match and not line.startswith("spearrl trains"):
                commands.append((page.name, match.group(1).split("   #")[0].strip()))
    return commands


def test_there_are_commands_to_check():
    assert len(commands()) > 8


@pytest.mark.parametrize(("page", "command"), commands())
def test_documented_commands_are_real(page: str, command: str):
    words = shlex.split(command)
    verb, rest = words[1], words[2:]
    assert verb in VERBS, f"{page}: {command}"
    if verb not in ("train", "sft") or "--resume" in rest:
        return
    flags = {flag: rest[rest.index(flag) + 1] for flag in ("--preset", "--env", "--algo", "--model") if flag in rest}
    config = load_config(
        None,
        [word for word in rest if "=" in word],
        env=flags.get("--env"),
        algo=flags.get("--algo"),
        model=flags.get("--model"),
        preset=flags.get("--preset", "tiny"),
    )
    check(config)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
