"""A run directory from a stranger: what its config.toml may not decide, through every verb that reads it."""

from __future__ import annotations

import http.server
import io
import json
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from spearrl.cli.main import main
from spearrl.config import load_config, to_toml
from spearrl.errors import RefusedError
from spearrl.evaluation import evaluate
from spearrl.trainer import Trainer
from tests.support.short_runs import cold_started
from tests.support.small_run import SETTINGS, small_config

FETCH = "env.name=tests.support.toy_envs:Fetch"
PLANTED = """from pathlib import Path
from tests.support.toy_envs import Fetch

Path({mark!r}).touch()


class Env(Fetch):
    pass
"""
FAR = "http://192.0.2.1:8000"
FOREIGN = {  # settings of a stranger's config: the arguments that say them again
    "import": (["env.name=planted:Env"], ["env.name=planted:Env"]),
    "loss": (["algo.loss=planted:Env"], ["algo.loss=planted:Env"]),
    "advantage": (["algo.advantage=planted:Env"], ["algo.advantage=planted:Env"]),
    "standard library": (["env.name=antigravity:x"], ["env.name=antigravity:x"]),
    "server": (["rollout.engine=vllm", "rollout.workers=1", f"vllm.servers={FAR}"], [f"vllm.servers={FAR}"]),
    "hidden server": (
        ["rollout.engine=vllm", "rollout.workers=1", "vllm.servers=http://127.0.0.1.example.org:80"],
        ["vllm.servers=http://127.0.0.1.example.org:80"],
    ),
    "ray": (["rollout.launcher=ray", "rollout.workers=1"], ["rollout.launcher=ray"]),
    "retriever": ([f"env.options.retriever_url={FAR}/a?b"], [f"'env.options.retriever_url=\"{FAR}/a?b\"'"]),
    "addresses in a table": (
        ['env.options.deep={a=[{b="https://evil.example"}]}'],
        ["'env.options.deep.a=[{ b = \"https://evil.example\" }]'"],
    ),
    "sandbox": (
        ["env.options.sandbox.kind=none", "env.options.sandbox.unsandboxed=true"],
        ["env.options.sandbox.kind=none"],
    ),
    "sandbox server": (
        ["env.options.sandbox.kind=fusion", f"env.options.sandbox.url={FAR}"],
        [f"env.options.sandbox.url={FAR}"],
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended; its checkpoint is of step 0."""
    return cold_started(tmp_path_factory.mktemp("cold")).parents[1]


@pytest.fixture
def stranger(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a run directory with settings of its own; what it would import is on the path and leaves a mark."""
    (tmp_path / "planted.py").write_text(PLANTED.format(mark=str(tmp_path / "imported")))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "planted", raising=False)

    def make(*settings: str) -> Path:
        folder = tmp_path / "theirs"
        shutil.copytree(run, folder)
        (folder / "config.toml").write_text(to_toml(load_config(run / "config.toml", [FETCH, *settings])))
        return folder

    return make


@pytest.mark.parametrize("settings, again", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("verb", [("eval",), ("train", "--resume"), ("train",), ("play",), ("check-env",), ("sft",)])
def test_what_needs_a_word_of_the_user_is_refused(
    settings: list[str], again: list[str], verb: tuple[str, ...], stranger, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setattr("webbrowser.open", lambda *_: pytest.fail("antigravity was imported"))
    folder = stranger(*settings)
    before = (folder / "config.toml").read_bytes()
    output = ["--output", str(tmp_path / "new")] if verb == ("sft",) else []
    assert main([*verb, str(folder), *output]) == 3
    said = capsys.readouterr().err
    assert all(words in said for words in again) and f"error: {folder}: a directory's config" in said
    assert not (tmp_path / "imported").exists() and (folder / "config.toml").read_bytes() == before


def test_a_secret_is_never_a_token(run: Path, tmp_path: Path, monkeypatch, capsys):
    """The worst of it: any environment variable as the bearer token of any server."""
    seen: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(str(self.headers))
            self.send_error(500)

        def log_message(self, *_):
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
        config = load_config(run / "config.toml", [FETCH]).with_settings(
            {
                "vllm.servers": f"http://127.0.0.1:{server.server_port}",
                "vllm.token_variable": "AWS_SECRET_ACCESS_KEY",
                "rollout.engine": "vllm",
            }
        )
        theirs = shutil.copytree(run, tmp_path / "theirs")
        (theirs / "config.toml").write_text(to_toml(config))
        for command in (["eval", str(theirs), FETCH], ["train", "--resume", str(theirs), FETCH]):
            assert main(command) == 2
            said = capsys.readouterr().err
            assert "vllm.token_variable" in said and "SPEARRL_" in said and "very-secret" not in said
        server.shutdown()
    assert seen == []


def spearrl(*words: str, folder: Path) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); import spearrl.cli.main as m;"]
    command[-1] += f"sys.path.append({str(folder)!r}); sys.exit(m.main({list(words)!r}))"
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_ones_own_run_goes_on_with_what_the_error_says(tmp_path: Path):
    """The error's own words, added to the command, are enough; and the end of a run says them."""
    (tmp_path / "planted.py").write_text(PLANTED.format(mark=str(tmp_path / "imported")))
    small = ["sft.enabled=false", "run.steps=0", "eval.tasks=2", "rollout.groups_per_step=1", "rollout.group_size=2"]
    begun = spearrl("train", "--preset", "tiny", *SETTINGS[1:], *small, "env.name=planted:Env", folder=tmp_path)
    assert begun.returncode == 0 and begun.stdout.rstrip().endswith("--split val env.name=planted:Env"), begun.stderr
    (tmp_path / "imported").unlink()
    folder = begun.stdout.split()[1]
    refused = spearrl("train", "--resume", folder, "run.steps=1", folder=tmp_path)
    assert refused.returncode == 3 and not (tmp_path / "imported").exists(), refused.stderr
    added = shlex.split(refused.stderr.rpartition("overrides):")[2])
    done = spearrl("train", "--resume", folder, "run.steps=1", *added, folder=tmp_path)
    assert done.returncode == 0 and (tmp_path / "imported").exists(), done.stderr
    evaluated = spearrl("eval", folder, "--json", *added, folder=tmp_path)
    assert json.loads(evaluated.stdout)["success"]["tasks"] == 2, evaluated.stderr


def test_a_config_is_shown_and_compared_without_running_it(stranger, tmp_path: Path, capsys):
    folder = stranger("env.name=planted:Env", "algo.loss=planted:Env")
    assert main(["config", "show", str(folder)]) == 0
    shown = capsys.readouterr()
    assert 'name = "planted:Env"' in shown.out and "env.name=planted:Env algo.loss=planted:Env" in shown.err
    assert main(["config", "diff", str(folder), "tiny"]) == 0
    assert not (tmp_path / "imported").exists()


def test_a_file_that_is_named_is_ones_own(stranger, tmp_path: Path):
    folder = stranger("env.name=planted:Env")
    text = (folder / "config.toml").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.toml").write_text(text)
    assert load_config(tmp_path / "mine" / "config.toml").env.name == "planted:Env"
    for path in (folder, folder / "config.toml", tmp_path / "mine"):
        with pytest.raises(RefusedError, match="env.name=planted:Env: imports"):
            load_config(path)
        assert load_config(path, ["env.name=planted:Env"]).env.name == "planted:Env"


def test_a_loopback_server_and_built_in_names_need_no_word(stranger):
    servers = ["rollout.engine=vllm", "vllm.servers=http://127.0.0.1:8000, http://localhost:1/,http://[::1]:5"]
    load_config(stranger("env.name=webshop", *servers, "rollout.workers=3"))


def test_a_program_resumes_what_it_has_imported(tmp_path: Path):
    with Trainer(small_config(tmp_path, "sft.enabled=false", "run.steps=0", "eval.tasks=1")) as trainer:
        trainer.train()
    Trainer.resume(trainer.run.path).close()


NO_SANDBOX = [
    "env.options.sandbox.kind=none",
    "env.options.sandbox.unsandboxed=true",
    "env.options.sandbox.packages=[]",
]
MATH = ["--env", "math", "env.options.grader=plain", *NO_SANDBOX]
YES = "--i-know-tools-are-unsandboxed"


@pytest.mark.parametrize("verb", ["train", "sft", "eval", "play", "check-env", "study"])
def test_no_config_alone_switches_the_sandbox_off(verb: str, run: Path, tmp_path: Path, capsys):
    command = {
        "train": ["train", *MATH, f"run.output_dir={tmp_path}"],
        "sft": ["sft", *MATH, "--output", str(tmp_path / "new")],
        "eval": ["eval", *MATH, "--model", str(run)],
        "play": ["play", "math", *MATH[2:]],
        "check-env": ["check-env", "math", *MATH[2:]],
        "study": ["study", "cost", *MATH, "--algo", "grpo+spear"],
    }[verb]
    assert main(command) == 3
    said = capsys.readouterr().err
    assert "the sandbox is switched off" in said and YES in said
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.filterwarnings("always:the sandbox")
def test_with_the_word_it_is_off_and_every_start_says_so(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["play", "math", *MATH[2:], YES]) == 0
    assert "warning: the sandbox is switched off" in capsys.readouterr().err
    small = ["run.steps=1", "eval.tasks=1", "eval.every=0", "rollout.groups_per_step=1", "rollout.group_size=2"]
    small += ["sft.enabled=false", "run.tensorboard=false", "rollout.max_reply_tokens=8", f"run.output_dir={tmp_path}"]
    assert main(["train", "--preset", "tiny-math", *MATH, *small, "run.name=r", YES]) == 0
    assert "the sandbox is switched off" in capsys.readouterr().err
    folder = str(tmp_path / "r")
    assert main(["train", "--resume", folder, "run.steps=2", *NO_SANDBOX]) == 3  # repeated, but without the word
    assert YES in capsys.readouterr().err
    assert main(["train", "--resume", folder, "run.steps=2", YES]) == 3  # the word, but not repeated
    assert "env.options.sandbox.unsandboxed=true" in capsys.readouterr().err
    assert main(["train", "--resume", folder, "run.steps=2", *NO_SANDBOX, YES]) == 0
    assert main(["eval", folder, *NO_SANDBOX, YES]) == 0
    assert capsys.readouterr().err.count("the sandbox is switched off") == 2


def test_python_needs_the_word_too(tmp_path: Path, run: Path):
    config = load_config(None, [*MATH[2:], f"run.output_dir={tmp_path}", f"model.path={run}"], env="math")
    for start in (Trainer, evaluate):
        with pytest.raises(RefusedError, match="unsandboxed_tools=True"):
            start(config)
