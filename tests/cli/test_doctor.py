"""spearrl doctor says what is there, what is missing and how to get it."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

from spearrl.cli import doctor as doctor_verb
from spearrl.cli.main import main
from spearrl.errors import ConfigError
from spearrl.sandbox import SandboxOptions, open_sandbox


def findings(capsys, *words: str) -> tuple[int, dict[str, dict]]:
    code = main(["doctor", "--json", *words])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    return code, {finding["name"]: finding for finding in report["findings"]}


@pytest.fixture
def no_bubblewrap(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def no_extras(monkeypatch):
    version = metadata.version

    def absent(name: str) -> str:
        if name in doctor_verb.EXTRAS:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", absent)


def test_this_machine(capsys):
    code, by_name = findings(capsys)
    assert code == 0
    assert "Python 3." in by_name["versions"]["words"] and "torch" in by_name["versions"]["words"]
    assert "processors" in by_name["machine"]["words"]
    try:
        with open_sandbox(SandboxOptions()) as sandbox:
            description = sandbox.describe()
    except ConfigError as error:
        assert by_name["sandbox"]["state"] == "fail" and error.message in by_name["sandbox"]["words"]
    else:
        assert by_name["sandbox"]["state"] == "ok" and by_name["sandbox"]["words"].startswith(description)
        for part in ("bubblewrap", "namespaces", "filter", "24 processes", "no network"):
            assert part in description


def test_what_is_missing_matters_where_it_is_asked_for(capsys, no_bubblewrap, no_extras):
    code, by_name = findings(capsys)
    assert code == 0 and by_name["sandbox"]["state"] == "fail"
    assert (
        "apt-get install bubblewrap" in by_name["sandbox"]["fix"] and "sandbox.kind=fusion" in by_name["sandbox"]["fix"]
    )
    assert by_name["vllm"] == {
        "name": "vllm",
        "state": "none",
        "words": "not installed: rollouts on GPUs",
        "fix": 'pip install "spearrl[vllm]"',
    }
    assert findings(capsys, "sandbox")[0] == 1
    assert findings(capsys, "vllm")[0] == 1
    assert main(["doctor", "machine", "vllm"]) == 1
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("missing: vllm") and "[fail] sandbox" in shown
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("training works on this machine; tools that run code do not")


def test_a_server_can_stand_in(capsys, no_bubblewrap, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    code, by_name = findings(capsys, "sandbox", "--sandbox-url", "http://127.0.0.1:9")
    assert code == 1 and "does not run code" in by_name["sandbox"]["words"]


def test_an_unknown_need_is_told(capsys):
    assert main(["doctor", "sandbix"]) == 2
    assert "sandbox" in capsys.readouterr().err


def test_every_extra_exists(no_bubblewrap):
    from configparser import ConfigParser
    from pathlib import Path

    settings = ConfigParser()
    settings.read(Path(__file__).resolve().parents[2] / "setup.cfg")
    extras = settings["options.extras_require"]
    for name, (_, extra) in doctor_verb.EXTRAS.items():
        assert extra in extras, f"{extra} is no extra of setup.cfg"
        assert name.lower() in extras[extra].lower().replace("_", "-"), f"extra {extra} does not install {name}"
