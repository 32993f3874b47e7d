"""`spearrl eval` of a model without a run, and how the command line says what the package warns of."""

from __future__ import annotations

import json
import warnings

from spearrl.cli.main import main
from spearrl.envs.text import records

SETTINGS = ("eval.tasks=2", "rollout.max_reply_tokens=8", "rollout.context_tokens=128", "run.threads=1")


def test_a_model_without_a_run_is_evaluated_on_an_environment(model, capsys):
    environment = ("--env", "tests.support.toy_envs:Fetch")
    assert main(["eval", str(model), *environment, "--json", *SETTINGS]) == 0
    shown = capsys.readouterr()
    first = json.loads(shown.out)
    assert first["model"] == str(model) and first["success"]["tasks"] == 2 and shown.err.startswith("starting\n")
    assert main(["eval", "--model", str(model), *environment, "--json", *SETTINGS]) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_it_says_what_is_missing(model, capsys):
    assert main(["eval", str(model)]) != 0
    assert "--env NAME" in capsys.readouterr().err
    assert main(["eval", "--env", "webshop"]) != 0
    assert "0 runs or models are named" in capsys.readouterr().err


def test_warnings_of_the_package_are_one_line_of_words(capsys):
    with warnings.catch_warnings():
        main(["version"])
        capsys.readouterr()
        warnings.showwarning("2 replies left out", UserWarning, records.__file__, 65)
        assert capsys.readouterr().err == "warning: 2 replies left out\n"
        warnings.showwarning("of another package", UserWarning, json.__file__, 1)
        assert f"{json.__file__}:1: UserWarning: of another package" in capsys.readouterr().err
