"""`spearrl play`: by hand, by expert, by model; it shows what the model sees."""

from __future__ import annotations

import io
import json

import pytest

from spearrl.cli.main import main
from spearrl.config.sections import TinySection
from spearrl.models import build_tiny, save_model

FETCH = "tests.support.toy_envs:Fetch"


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_an_episode_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    typed(monkeypatch, "look\nsay blue\n")
    assert main(["play", FETCH, "--task", "fetch-1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "task fetch-1 (train), seed 0, style chat, at most 4 turns\n"
        "--- turn 1 of 4\nuser: want: look or say\n(possible: look | say red"
    )
    assert "--- turn 2 of 4\nuser: it is blue\n" in out and "action: 'say blue'   reward 10\nend: end\n" in out
    assert out.endswith('info: {"success": true, "closeness": 1.0}\nsuccess: reward 10 in 2 turns\n')


@pytest.mark.parametrize(
    "lines, status, turns",
    [
        ("look\n", "stopped", 1),
        ("", "stopped", 0),
        ("say red\n", "failure", 1),
        ("x\n\nlook\nlook\nlook\n", "turn_limit", 4),
    ],
)
def test_how_a_hand_played_episode_ends(
    lines: str, status: str, turns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    typed(monkeypatch, lines)
    assert main(["play", FETCH, "--json"]) == 0
    episode = json.loads(capsys.readouterr().out)
    assert (episode["status"], len(episode["turns"]), episode["reward"]) == (status, turns, 0.0)


def test_invalid_and_raw_replies(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    typed(monkeypatch, "dance\n")
    main(["play", FETCH])
    assert "action: 'dance' (invalid)   reward 0" in capsys.readouterr().out
    tagged = ["play", "webshop", "--json"]
    typed(monkeypatch, "search[a b]\n")
    main(tagged)
    turn = json.loads(capsys.readouterr().out)["turns"][0]
    assert turn["reply"].endswith("<action>search[a b]</action>") and (turn["action"], turn["valid"]) == (
        "search[a b]",
        True,
    )
    typed(monkeypatch, "search[a b]\n")
    main([*tagged, "--raw"])
    turn = json.loads(capsys.readouterr().out)["turns"][0]
    assert (turn["reply"], turn["valid"]) == ("search[a b]", False)


def test_the_expert_plays(capsys: pytest.CaptureFixture[str]):
    assert main(["play", FETCH, "--expert", "--json", "--split", "val", "--seed", "4"]) == 0
    episode = json.loads(capsys.readouterr().out)
    assert (episode["status"], episode["split"], episode["seed"]) == ("success", "val", 4)
    assert [turn["action"] for turn in episode["turns"]][0] == "look" and episode["turns"][0]["prompt"] == [
        ["user", "want: look or say"]
    ]
    assert main(["play", FETCH, "--expert", "--style", "windowed"]) == 0
    assert "user: want: look or say look now it is red" in capsys.readouterr().out


def test_tools_that_the_template_shows_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    typed(monkeypatch, "add(a=1, b=2)\n")
    assert main(["play", "tests.envs.test_tool_env:Shop", "env.options.describe=template"]) == 0
    out = capsys.readouterr().out
    assert 'tool: {"type": "function", "function": {"name": "add"' in out and "tool: 3" in out


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    shape = TinySection(layers=1, hidden_size=32, heads=2, feed_forward=48, vocab_size=330)
    save_model(*build_tiny([" look say red blue want: or it is"] * 9, shape, seed=0), folder)
    return folder


@pytest.mark.parametrize("style", ["chat", "windowed"])
def test_a_model_plays_and_its_prompt_is_shown_token_for_token(
    model_folder, style: str, capsys: pytest.CaptureFixture[str]
):
    words = [
        "play",
        FETCH,
        "--model",
        str(model_folder),
        "--style",
        style,
        "rollout.max_reply_tokens=4",
        "rollout.context_tokens=256",
        "run.device=cpu",
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "the prompt\n<|user|>" in out and "want: look or say<|end|><|assistant|>\n--- the reply\n" in out
    assert (
        out.count("--- turn") == 4
        and ("the prompt goes on" in out) == (style == "chat")
        and "turn_limit: reward 0 in 4 turns" in out
    )
    assert main([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first and len(first["turns"]) == 4
    if style == "chat":
        assert first["turns"][1]["prompt"].startswith(first["turns"][0]["prompt"] + first["turns"][0]["reply"])


@pytest.mark.parametrize("seed", ["3", "8"])
def test_a_model_meets_the_episode_that_the_seed_names(model_folder, seed: str, capsys: pytest.CaptureFixture[str]):
    words = ["play", "tests.support.contract_breakers:Sound", "--seed", seed, "--json", "run.device=cpu"]
    assert main([*words, "--expert"]) == 0
    by_script = json.loads(capsys.readouterr().out)["turns"][0]["prompt"][-1][1]
    assert main([*words, "--model", str(model_folder), "rollout.max_reply_tokens=4", "rollout.context_tokens=256"]) == 0
    assert f"{by_script}<|end|>" in json.loads(capsys.readouterr().out)["turns"][0]["prompt"], by_script


def test_what_it_raises_while_a_model_plays_is_said_in_three_lines(model_folder, capsys: pytest.CaptureFixture[str]):
    words = ["--model", str(model_folder), "rollout.max_reply_tokens=4", "rollout.context_tokens=256", "run.device=cpu"]
    assert main(["play", "tests.support.contract_breakers:AlwaysRaises", *words]) == 0
    captured = capsys.readouterr()
    assert (
        "env_error: reward 0" in captured.out
        and "error: KeyError: 'shelf'\n  where: File " in captured.err
        and "contract_breakers.py" in captured.err
    )
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "animal, where, what",
    [
        ("CrashingStep", "task train-0, seed 5", "it raised KeyError: 'shelf'"),
        ("NotBuilt", "tests.support.contract_breakers:NotBuilt (", "it raised FileNotFoundError: catalogue.json"),
    ],
)
def test_what_an_environment_raises_is_one_error_with_its_place(
    animal: str, where: str, what: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["play", f"tests.support.contract_breakers:{animal}", "--expert", "--seed", "5"]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith(f"error: tests.support.contract_breakers:{animal}")
        and where in said
        and what in said
        and "contract_breakers.py:" in said
    )
    assert "Traceback" not in said and "\n  fix: mend that line" in said


@pytest.mark.parametrize(
    "words, said",
    [
        (["--task", "fetch-x1"], "has no task 'fetch-x1'\n  fix: did you mean fetch-1"),
        (["--task", "zzz"], "there are 24, such as fetch-0"),
        (["--split", "dev"], "split 'dev' is not one of train, val"),
        (["--expert", "--model", "x"], "one of them can play"),
        (["--model", "no/such"], "is no directory"),
        (["env.options.taks=3"], "did you mean env.options.tasks"),
    ],
)
def test_wrong_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["play", FETCH, *words]) == 2
    assert said in capsys.readouterr().err


def test_an_environment_without_an_expert_says_so(capsys: pytest.CaptureFixture[str]):
    assert main(["play", "tests.envs.test_tool_env:Shop", "--expert"]) == 2
    assert "Shop has no scripted expert here" in capsys.readouterr().err
