"""The command line's shell: help, exit codes, messages, `spearrl config`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from spearrl.cli import main as shell
from spearrl.cli.main import VERBS, Parser, main, module_of
from spearrl.cli.parsing import add_config_arguments, add_gpus, check_environment, config_from, resolved_from
from spearrl.config import RunConfig, load_config, to_toml
from spearrl.config.grammar import BASES, MODULES
from spearrl.config.presets import PRESETS
from spearrl.errors import CheckpointError, ConfigError, RefusedError, StorageError, WorkerError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "numpy", "pydantic", "tensorboard")


def process(*words: str, stdin: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=60, input=stdin)


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["--version"], ["trian"], *([verb, "--help"] for verb in VERBS)], ids=" ".join
)
def test_help_loads_nothing_heavy(words):
    code = f"import sys; from spearrl.cli.main import main; main({words!r}); loaded = set(sys.modules) & set({HEAVY!r})"
    code += "; print(sorted(loaded), file=sys.stderr)"
    done = process("-c", code)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_every_verb_is_documented(capsys):
    assert main([]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) <= 18
    for verb, summary in VERBS.items():
        assert callable(module_of(verb).run) and f"  {verb}" in table and summary in table
        assert main([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        assert "\nexamples:\n" in shown and shown.rstrip().endswith(
            str(module_of(verb).__doc__).rstrip().splitlines()[-1]
        )
        assert main(["help", verb]) == 0 and capsys.readouterr().out == shown
    main(["train", "--help"])
    words = capsys.readouterr().out
    assert all(name in words for name in (*BASES, *MODULES, *PRESETS))


def test_the_examples_in_help_resolve(tmp_path, monkeypatch):
    """Every `spearrl train` and `spearrl config show` line of the examples is a valid config."""
    (tmp_path / "shop.toml").write_text('preset = "tiny"\n')
    monkeypatch.chdir(tmp_path)
    lines = [line.strip() for verb in VERBS for line in str(module_of(verb).__doc__).splitlines()]
    lines = [
        line for line in lines if line.startswith(("spearrl train ", "spearrl config show")) and "--resume" not in line
    ]
    assert len(lines) > 4
    for line in lines:
        parser = Parser("spearrl", description="", examples="")
        add_config_arguments(parser)
        add_gpus(parser)
        words = [w for w in line.split()[1:] if w not in ("train", "config", "show", "--why")]
        check_environment(resolved_from(parser.parse_intermixed_args(words)))


def test_unknown_verbs_and_options_suggest(capsys):
    assert main(["trian"]) == 2 and "did you mean spearrl train?" in capsys.readouterr().err
    assert main(["zzz"]) == 2 and "fix: use one of: init, " in capsys.readouterr().err
    assert main(["train", "--modle", "x"]) == 2 and "did you mean --model?" in capsys.readouterr().err
    assert main(["config"]) == 2 and "fix:" in capsys.readouterr().err
    assert main(["config", "shwo"]) == 2 and "shwo" in capsys.readouterr().err
    assert main(["config", "show", "--pre", "tiny"]) == 2 and "did you mean --preset?" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ConfigError, RefusedError, CheckpointError, StorageError, WorkerError])
def test_errors_become_one_message_and_their_exit_code(capsys, monkeypatch, error):
    def fail(words):
        raise error("it broke", where="step 3", hint="use another")

    monkeypatch.setattr(shell, "_dispatch", fail)
    assert main(["train"]) == error.exit_code
    shown = capsys.readouterr()
    assert shown.err == "error: step 3: it broke\n  fix: use another\n" and shown.out == ""


def test_interrupts_and_bugs(capsys, monkeypatch):
    def interrupt(words):
        raise KeyboardInterrupt

    def bug(words):
        raise ZeroDivisionError

    monkeypatch.setattr(shell, "_dispatch", interrupt)
    assert main([]) == 130 and "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(shell, "_dispatch", bug)
    with pytest.raises(ZeroDivisionError):
        main([])


def test_a_closed_pipe_is_quiet():
    script = f"{sys.executable} -m spearrl config schema | head -c 10; echo ${{PIPESTATUS[0]}} >&2"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert len(done.stdout) == 10 and done.stderr.strip() in ("141", "0"), done.stderr


def test_wrong_settings_start_nothing(tmp_path):
    (tmp_path / "run.toml").write_text("[learner]\nlr = -1\n")
    done = process("-m", "spearrl", "train", str(tmp_path / "run.toml"), "run.stepz=3", f"run.output_dir={tmp_path}")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "run.toml:2: learner.lr" in done.stderr and "did you mean run.steps" in done.stderr
    assert done.stderr.rstrip().endswith("2 errors; nothing was started.") and len(list(tmp_path.iterdir())) == 1


def test_show_is_toml_and_the_choice_of_a_preset_is_told(capsys, tmp_path):
    assert main(["config", "show", "--env", "webshop", "--algo", "grpo+sil", "run.seed=4", "--why"]) == 0
    shown = capsys.readouterr()
    assert tomllib.loads(shown.out)["run"] | {"seed": 4, "started_from": "tiny"} == tomllib.loads(shown.out)["run"]
    assert (
        'observation = "compact"  # preset tiny' in shown.out
        and "seed = 4  # command line" in shown.out
        and "# algo grpo+sil" in shown.out
    )
    assert "using preset tiny" in shown.err
    (tmp_path / "config.toml").write_text(shown.out)
    assert load_config(tmp_path) == load_config(None, ["run.seed=4"], algo="grpo+sil")
    assert main(["config", "show", "--preset", "tiny", "--json", "run.steps=10"]) == 0
    shown = capsys.readouterr()
    assert (
        json.loads(shown.out)["config"]["run"]["steps"] == 10
        and json.loads(shown.out)["sources"]["run.steps"] == "command line"
    )
    assert "using preset" not in shown.err and "warning: " in shown.err and "fix: " in shown.err


def test_show_says_which_name_and_which_fidelity_set_a_value(capsys):
    words = [
        "--preset",
        "webshop-1.5b",
        "--algo",
        "reinforce+++sil",
        "algo.fidelity=release_agent",
        "algo.policy.mask=action",
    ]
    assert main(["config", "show", *words, "--why"]) == 0
    shown = capsys.readouterr().out
    for line in (
        'advantage = "reinforce++"  # algo reinforce+++sil',
        'fidelity = "release_agent"  # command line',
        'unit = "row"  # fidelity release_agent',
        'mask = "action"  # command line',
        "capacity = 2048  # preset webshop-1.5b",
        "group_keep = 1.0  # default",
    ):
        assert line in shown.splitlines(), line


def test_a_threshold_on_the_command_line(capsys):
    assert main(["config", "show", "algo.clip_cov.lower=quantile:0.8", "algo.clip_cov.upper=quantile:0.99"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["algo"]["clip_cov"]["lower"] == "quantile:0.8"


def test_file_and_overrides_in_any_order(tmp_path):
    path = tmp_path / "a=b.toml"
    path.write_text("[run]\nseed = 1\nsteps = 7\n")
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    for words in (
        ["run.seed=2", str(path), "--env", "webshop", "eval.tasks=3"],
        [str(path), "--env", "webshop", "eval.tasks=3", "run.seed=2"],
    ):
        config = config_from(parser.parse_intermixed_args(words))
        assert (config.run.seed, config.run.steps, config.eval.tasks) == (2, 7, 3)
    with pytest.raises(ConfigError, match="use one file"):
        config_from(parser.parse_intermixed_args([str(path), str(path)]))


def test_diff(capsys, tmp_path):
    (tmp_path / "config.toml").write_text(
        to_toml(
            load_config(None, ["learner.lr=1e-3", "env.options.data=x", "algo.policy.dual_clip=none"], preset="tiny")
        )
    )
    assert main(["config", "diff", "tiny", str(tmp_path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        'algo.policy.dual_clip 10.0 -> "none"',
        "learner.lr 0.0003 -> 0.001",
        'env.options.data not given -> "x"',
    ]
    assert main(["config", "diff", "tiny", "tiny"]) == 0 and capsys.readouterr().out == "no difference\n"
    assert main(["config", "diff", "tiny", str(tmp_path), "--json"]) == 0 and json.loads(capsys.readouterr().out)[
        "learner.lr"
    ] == [3e-4, 1e-3]
    assert main(["config", "diff", "tiny"]) == 2 and "use spearrl config diff A B" in capsys.readouterr().err
    assert main(["config", "diff", "tiny", "absent"]) == 2 and "absent" in capsys.readouterr().err


def test_schema(capsys):
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == {"preset", *RunConfig.model_fields} and schema["additionalProperties"] is False
    assert schema["properties"]["preset"]["enum"] == list(PRESETS)


@pytest.mark.parametrize("name", ["nosuch", "no_such_package.env:Mine", "json:JSONDecoder"])
def test_show_refuses_an_environment_that_is_none(name, capsys):
    assert main(["config", "show", "--env", name]) == 2
    shown = capsys.readouterr()
    assert name in shown.err and "fix: " in shown.err and shown.out == ""
