"""Settings: precedence and sources, round trips, and messages that help."""

from __future__ import annotations

import math
import os
import re
import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spearrl.config import AlgoSection, advice, check, diff, load_config, resolve, to_toml
from spearrl.config import checks as checks_module
from spearrl.config.fields import constraint, dotted, leaves, sections
from spearrl.config.file import ConfigFile, parse
from spearrl.config.presets import DESCRIPTIONS, PRESETS
from spearrl.config.sections import RunConfig, RunSection
from spearrl.config.suggestions import ALIASES, nearest
from spearrl.errors import ConfigError

DOCS = Path(__file__).resolve().parents[2] / "docs"

# (settings on the command line or in a file, the key the message must name)
WRONG = [
    ("learner.learning_rate=1e-6", "learner.learning_rate"),
    ("learner.lr=-1", "learner.lr"),
    ("learner.lr=0", "learner.lr"),
    ("learner.lr=nan", "learner.lr"),
    ("learner.lr=inf", "learner.lr"),
    ('learner.lr="1e-6"', "learner.lr"),
    ("learner.lr=true", "learner.lr"),
    ("rollout.group_size=1", "rollout.group_size"),
    ("rollout.group_sise=8", "rollout.group_sise"),
    ("rollout.lr=3", "rollout.lr"),
    ("rollout.groups_per_step=8.5", "rollout.groups_per_step"),
    ("rollout.context_tokens=512\nrollout.max_reply_tokens=512", "rollout.context_tokens"),
    ("rollout.max_response_tokens=10", "rollout.max_response_tokens"),
    ("run.steps=1e3", "run.steps"),
    ("run.steps=-5", "run.steps"),
    ("run.steps.warmup=5", "run.steps.warmup"),
    ("run.seed=true", "run.seed"),
    ('run.device="gpu"', "run.device"),
    ("run=5", "run"),
    ('run.name="../../etc"', "run.name"),
    ('run.name="/tmp/run"', "run.name"),
    ('run.name="-rf"', "run.name"),
    ('run.name="a\\u0000b"', "run.name"),
    ('run.name="UPPER"', "run.name"),
    (f'run.name="{"a" * 300}"', "run.name"),
    ('run.output_dir=""', "run.output_dir"),
    ("optim.lr=1e-6", "optim"),
    ("gamma=0.95", "gamma"),
    ('sft.enabled="yes"', "sft.enabled"),
    ('algo.name="grpo+spaer"', "algo.name"),
    ('algo.name="grpo+gigpo"', "algo.name"),
    ('algo.name="gspo+drbot"', "algo.name"),
    ('algo.fidelity="release"', "algo.fidelity"),
    ('algo.advantage="grop"', "algo.advantage"),
    ('algo.advantage="my_pkg.mod:"', "algo.advantage"),
    ("algo.advantage=3", "algo.advantage"),
    ('algo.loss="../x:y"', "algo.loss"),
    ('algo.loss="kl_cov"', "algo.clip_cov.enabled"),
    ('algo.dynamic.enabled=true\nrollout.group_size=1\nalgo.groups.singleton="raw"', "algo.dynamic.enabled"),
    ('algo.filters.group_keep=0.75\nrollout.group_size=1\nalgo.groups.singleton="raw"', "algo.filters.group_keep"),
    ('algo.sil.gamma.kind="success"\nalgo.sil.gamma.low=0.9', "algo.sil.gamma.low"),
    ('algo.intrinsic.mu.kind="entropy"\nalgo.intrinsic.mu.high=0', "algo.intrinsic.mu.high"),
    ('algo.sil.max_age=11\nalgo.fidelity="release_agent"', "algo.sil.max_age"),
    ('algo.clip_cov.lower="quantile:2"', "algo.clip_cov.lower"),
    ('algo.clip_cov.lower="80%"', "algo.clip_cov.lower"),
    ("algo.clip_cov.lower=true", "algo.clip_cov.lower"),
    ("algo.clip_cov.upper=nan", "algo.clip_cov.upper"),
    ('algo.clip_cov.lower="quantile:0.9"\nalgo.clip_cov.upper="quantile:0.2"', "algo.clip_cov.lower"),
    ('algo.name="spear"', "algo.name"),
    ('algo.name="grpo+sil+sil"', "algo.name"),
    ('algo.name="grpo+"', "algo.name"),
    ("algo.name=3.5", "algo.name"),
    ("algo.policy.dual_clip=0.5", "algo.policy.dual_clip"),
    ("algo.policy.clip_low=1.5", "algo.policy.clip_low"),
    ('algo.policy.aggregation="token_mean"', "algo.policy.aggregation"),
    ("algo.clip_cov.lower=5", "algo.clip_cov.lower"),
    ("algo.clip_cov.replay_upper=1", "algo.clip_cov.replay_upper"),
    ("algo.sil.max_age=0", "algo.sil.max_age"),
    ("algo.sil.baseline_capacity=2", "algo.sil.baseline_capacity"),
    ("algo.intrinsic.per_call=3", "algo.intrinsic.per_call"),
    ("algo.filters.group_keep=0.01", "algo.filters.group_keep"),
    ("model.tiny.heads=3", "model.tiny.heads"),
    ("model.tiny.hidden_size=36", "model.tiny.hidden_size"),
    ("learner.mini_batches=100", "learner.mini_batches"),
    ('env.style="window"', "env.style"),
    ('env.name="my env"', "env.name"),
    ('env.name="../x:y"', "env.name"),
    ("env.options=3", "env.options"),
    ("env.options.a=nan", "env.options.a"),
    ('env.options.a="\\u0000"', "env.options.a"),
    ('preset="tinny"', "preset"),
]


def message_of(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def helps(text: str) -> bool:
    """Every problem ends with what to do."""
    fixes = [line for line in text.splitlines() if line.startswith("  ")]
    return bool(fixes) and all("fix" in line or "use" in line or "did you mean" in line for line in fixes)


@pytest.mark.parametrize(("text", "key"), WRONG, ids=[f"{k}-{n}" for n, (_, k) in enumerate(WRONG)])
def test_a_wrong_setting_is_named_placed_and_fixed(tmp_path, text, key):
    base = "tiny" if not text.startswith("preset") else None
    lines = text.split("\n")
    for message in (
        message_of(None, lines, preset=base),
        message_of(write(tmp_path, f"{text}\n" + ("" if base is None else f'preset = "{base}"\n'))),
    ):
        assert key in message and helps(message) and "1 error; nothing was started." in message, message
    assert "run.toml:1: " in message or "run.toml:2: " in message, message


def test_all_problems_come_at_once_with_their_places(tmp_path):
    path = write(
        tmp_path,
        '# a run\npreset = "tiny"\n\n[learner]\nlr = -1\nlearning_rte = 3\n\n'
        "[rollout]\ngroup_size = 1\n\n[optim]\nx = 1\n",
    )
    message = message_of(path, ["run.stepz=3", "eval.tasks=no", "word"], algo="grpo+spaer")
    for complaint in (
        f"{path}:5: learner.lr",
        f"{path}:6: learner.learning_rte",
        f"{path}:9: rollout.group_size=1",
        f"{path}:11: optim",
    ):
        assert complaint in message, message
    for words in (
        "command line: run.stepz",
        "did you mean run.steps (integer >= 0, default 100)?",
        "command line: eval.tasks",
    ):
        assert words in message, message
    assert 'command line: "word" is not a setting' in message and "did you mean 'spear'" in message
    assert message.endswith("8 errors; nothing was started.") and helps(message)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("learner.learning_rte", "learner.lr"),
        ("rollout.group_sise", "rollout.group_size"),
        ("rolout.group_size", "rollout.group_size"),
        ("algo.clip_low", "algo.policy.clip_low"),
        ("policy.clip_low", "algo.policy.clip_low"),
        ("rollout.max_new_tokens", "rollout.max_reply_tokens"),
        ("trainer.total_epochs", "run.steps"),
        ("algo.sil.buffer_capacity", "algo.sil.capacity"),
        ("model.tiny.layer", "model.tiny.layers"),
        ("advantage", "algo.advantage"),
        ("algorithm.adv_estimator", "algo.advantage"),
        ("actor.policy_loss.loss_mode", "algo.loss"),
        ("actor.kl_loss_coef", "algo.kl.loss_coef"),
        ("beta", "algo.kl.loss_coef"),
        ("algorithm.use_kl_in_reward", "algo.kl.reward_coef"),
        ("algorithm.kl_ctrl.kl_coef", "algo.kl.reward_coef"),
        ("algorithm.lam", "algo.critic.lam"),
        ("algorithm.filter_groups.enable", "algo.dynamic.enabled"),
        ("actor.tis_imp_ratio_cap", "algo.correction.cap"),
        ("importance_sampling", "algo.correction.mode"),
        ("critic.optim.lr", "learner.lr"),
        ("sil.gamma", "the section algo.sil.gamma"),
    ],
)
def test_the_meant_key_is_found(written, meant):
    assert f"did you mean {meant}" in nearest(tuple(written.split("."))), nearest(tuple(written.split(".")))


def test_a_discount_is_not_the_weight_of_replay():
    for key in (("gamma",), ("algorithm", "gamma"), ("algo", "gamma")):
        assert (
            "algo.critic.discount" in nearest(key)
            and "algo.gigpo.discount" in nearest(key)
            and "sil" not in nearest(key)
        )


def test_every_alias_is_a_setting_or_a_section():
    known = {dotted(key) for key in (*leaves(), *sections())}
    assert all(key in known for keys in ALIASES.values() for key in keys)
    assert not {"advantage", "loss", "gigpo"} & set(ALIASES)


def test_names_import_paths_and_thresholds(tmp_path):
    advantage, loss, lower = (leaves()[("algo", *key.split("."))] for key in ("advantage", "loss", "clip_cov.lower"))
    assert constraint(lower) == 'number, or "quantile:0.8"'
    assert constraint(loss) == '"clip", "gspo", "cispo", "kl_cov", or an import path "my_pkg.mod:fn"' and constraint(
        advantage
    ).startswith('"grpo", "gigpo", ')
    for name in (*advantage.examples, "my_pkg.mod:fn"):
        assert load_config(None, [f"algo.advantage={name}"]).algo.advantage == name
    for name in (*loss.examples, "my_pkg.mod:fn"):
        assert load_config(None, [f"algo.loss={name}", "algo.clip_cov.enabled=false"]).algo.loss == name
    assert 'did you mean algo.advantage="reinforce++"?' in message_of(None, ["algo.advantage=reinforce"])
    assert 'did you mean algo.loss="gspo"?' in message_of(None, ["algo.loss=GSPO"])
    for wrong in ("loss", "advantage"):
        with pytest.raises(ValueError, match="import path"):
            AlgoSection.model_validate({wrong: "grop"})
    for text, threshold in (
        ("quantile:0.8", "quantile:0.8"),
        ("quantile:.5", "quantile:.5"),
        ("2", 2.0),
        ("-1.5", -1.5),
    ):
        config = load_config(None, [f"algo.clip_cov.lower={text}", "algo.clip_cov.upper=9"])
        assert config.algo.clip_cov.lower == threshold and type(config.algo.clip_cov.lower) is type(threshold)
        assert load_config(write(tmp_path, to_toml(config))) == config
    assert 'did you mean algo.clip_cov.lower="quantile:0.8"?' in message_of(None, ["algo.clip_cov.lower=q0.8"])
    assert "use algo.clip_cov.lower=2.0, without quotes" in message_of(None, ['algo.clip_cov.lower="2"'])
    assert (
        load_config(None, ["algo.clip_cov.lower=9", "algo.clip_cov.upper=quantile:0.1"]).algo.clip_cov.lower == 9
    )  # nothing to compare


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[run]\nsteps = 1\nsteps = 2\n", "run.toml:3: 'steps = 2' sets a key or table that is set already"),
        ("[run]\nsteps = 1\n[run]\nseed = 2\n", "run.toml:3"),
        ("[run\nsteps = 1\n", "run.toml:1"),
        ("[run]\nname = tiny\n", "run.toml:2: 'name = tiny' has no valid value"),
        ("run:\n  steps: 1\n", "run.toml:1"),
        ("[run]\nsteps = 1", None),
        ("a = " + "[" * 20_000, "nested too deeply"),
        ("[run]\nname = '''never closed\n", "run.toml:"),
        ("[[run]]\nsteps = 1\n", "run is a section"),
        ("[env.options]\n" + "a." * 30 + "a = 1\n", "nested deeper than 16"),
        ("[env.options]\n" + "a." * 500_000 + "a = 1\n", "run.toml:2: a key of more than 64 parts"),
        ("x = " + "{a = " * 20_000, "run.toml"),
        ('x = "' + "a" * 1_000_000 + '"\n', "x is not a setting"),
        ("[env.options]\n" + "".join(f"k{n} = 1\n" for n in range(5000)), "5000 settings"),
        ("run = { steps = 1, steps = 2 }\n", "run.toml:1"),
        (f"[run]\nseed = {'9' * 5000}\n", "run.toml"),
    ],
)
def test_files_that_are_not_a_config(tmp_path, text, words):
    path = write(tmp_path, text)
    if words is None:
        assert load_config(path).run.steps == 1
    else:
        message = message_of(path)
        assert words in message and helps(message), message
        assert len(message) < 4000


def test_unreadable_files(tmp_path):
    assert "does not exist" in message_of(tmp_path / "absent.toml")
    assert "does not exist" in message_of(tmp_path)  # a directory without config.toml
    assert "a\\x00b.toml" in message_of("a\0b.toml")
    assert "\\x1b[31m" in message_of(write(tmp_path, '"\\u001b[31m" = 1\n')) and "\x1b" not in message_of(
        tmp_path / "run.toml"
    )
    assert "use" in message_of("x" * 5000)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in message_of(tmp_path / "binary.toml")
    with (tmp_path / "huge.toml").open("wb") as file:
        file.truncate(1 << 30)
    assert "larger than 1 MiB" in message_of(tmp_path / "huge.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    assert "not a regular file" in message_of(tmp_path / "pipe.toml")
    assert "use TOML" in message_of(write(tmp_path, "run:\n  steps: !!python/object 1\n", "run.yaml"))
    both = message_of(tmp_path / "absent.toml", ["run.stepz=3"])
    assert "2 errors" in both and "run.stepz" in both


def test_precedence_and_sources(tmp_path):
    path = write(tmp_path, 'preset = "tiny"\n[learner]\nlr = 1e-4\n[algo]\nname = "grpo+spear"\nsil.enabled = false\n')
    resolved = resolve(path, ["run.seed=3", "eval.split=test"])
    assert (resolved.config.learner.lr, resolved.config.run.seed, resolved.config.eval.split) == (1e-4, 3, "test")
    assert not resolved.config.algo.sil.enabled and resolved.config.algo.intrinsic.enabled
    assert resolved.sources["learner.lr"] == f"{path}:3"
    assert resolved.sources["algo.sil.enabled"] == f"{path}:6"
    assert resolved.sources["algo.intrinsic.enabled"] == "algo grpo+spear"
    assert resolved.sources["run.seed"] == "command line"
    assert resolved.sources["rollout.max_reply_tokens"] == resolved.sources["env.options.reply"] == "preset tiny"
    assert resolved.sources["learner.weight_decay"] == "default"
    assert set(resolved.sources) >= {dotted(key) for key in leaves() if key != ("env", "options")}
    # A flag stands above the file, in what its modules set too; an override stands above the flag.
    assert (
        load_config(path, algo="grpo+sil").algo.sil.enabled
        and not load_config(path, algo="grpo").algo.intrinsic.enabled
    )
    assert not load_config(path, ["algo.sil.enabled=false"], algo="grpo+spear").algo.sil.enabled
    assert load_config(path, preset="webshop-1.5b").rollout.group_size == 8
    assert load_config(path, preset="webshop-1.5b").run.steps == 350


def test_the_embedded_default_is_tiny(tmp_path):
    for resolved in (resolve(), resolve(env="webshop", algo="grpo+spear"), resolve(None, ["run.seed=1"])):
        assert resolved.preset == "tiny" and resolved.by_default and resolved.config.run.started_from == "tiny"
        assert (
            resolved.config.sft.enabled
            and resolved.config.algo.sil.enabled
            and resolved.config.env.options == {"observation": "compact", "reply": "plain"}
        )
    for resolved in (
        resolve(model="models/shop"),
        resolve(None, ["model.path=models/shop"]),
        resolve(write(tmp_path, "")),
    ):
        assert not resolved.preset and not resolved.by_default and resolved.config.run.steps == RunConfig().run.steps
    assert resolve(None, ["preset=webshop-1.5b"]).preset == "webshop-1.5b"


def test_real_data_starts_from_a_larger_default():
    resolved = resolve(None, ["env.options.data=some/folder"], env="webshop", algo="grpo+spear")
    assert resolved.preset == "tiny-real" and resolved.by_default and resolved.config.sft.episodes == 6000
    assert resolved.config.env.options == {"observation": "compact", "reply": "plain", "data": "some/folder"}
    assert resolve(None, ["env.options.data=some/folder"], preset="tiny").config.sft.episodes == 2000


def test_another_environment_starts_without_the_options_of_the_first(tmp_path):
    config = load_config(preset="tiny", env="my_pkg.mod:Mine")
    assert config.env.options == {} and config.env.max_turns == 0 and config.env.name == "my_pkg.mod:Mine"
    same = load_config(None, ["env.options.data=goals.json"], preset="tiny", env="webshop")
    assert (
        same.env.options == {"observation": "compact", "reply": "plain", "data": "goals.json"}
        and same.env.max_turns == 8
    )
    path = write(tmp_path, 'preset = "tiny"\n[env]\nname = "my_pkg.mod:Mine"\nmax_turns = 3\noptions.size = 4\n')
    assert load_config(path).env.options == {"size": 4} and load_config(path).env.max_turns == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("run.name=20", "20"),
        ("run.name=true", "true"),
        ("run.output_dir=runs/a b", "runs/a b"),
        ("run.output_dir=a=b", "a=b"),
        ('run.output_dir="runs"', "runs"),
        ("model.path=1e5", "1e5"),
        ("algo.policy.dual_clip=none", None),
        ('algo.policy.dual_clip="none"', None),
        ("algo.policy.dual_clip=3", 3.0),
        ("env.options.seed=7", 7),
        ("env.options.word=[not toml", "[not toml"),
        ("env.options.line=a\nb = 1", "a\nb = 1"),
        ("env.options.trick=1\nb = 1", "1\nb = 1"),
        ('env.options.a.b={ c = [1, "x"] }', {"b": {"c": [1, "x"]}}),
        ("env.options.empty=", ""),
    ],
)
def test_override_values(text, value):
    config = load_config(None, [text])
    key = text.partition("=")[0].split(".")
    value_of_key = config.model_dump()
    for part in key[:3]:
        value_of_key = value_of_key[part]
    assert value_of_key == value and load_config(None, [f"{text}"]) == config


def test_a_flag_and_an_override_may_not_contradict():
    assert "given twice" in message_of(None, ["env.name=webshop"], env="my:Env")
    assert load_config(None, ["env.name=webshop"], env="webshop").env.name == "webshop"
    assert load_config(None, ["run.seed=1", "run.seed=2"]).run.seed == 2


OPTIONS = {
    "data": 'a "quoted" \\ path',
    "tab\tname.with dot": "line\nbreak\x7f\x1b é 漢",
    "numbers": [1, -2.5, 1e-300],
    "nested": {"deep": {"er": [{"x": True}, {}]}, "empty": {}},
    "none": "none",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip_of_presets(tmp_path, preset):
    config = load_config(None, ["algo.policy.dual_clip=none", "run.seed=9007199254740993"], preset=preset)
    config = config.model_copy(update={"env": config.env.model_copy(update={"options": OPTIONS})})
    again = load_config(write(tmp_path, to_toml(config)))
    assert again.algo.policy.dual_clip is None and diff(again, config) == {} and again == config
    assert to_toml(again) == to_toml(config)
    commented = to_toml(config, {"learner.lr": "run.toml:3"})
    assert "# run.toml:3" in commented and load_config(write(tmp_path, commented)) == config


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(options=st.dictionaries(texts, values, max_size=4), seed=st.integers(0, 2**62), lr=st.floats(1e-300, 1e300))
def test_round_trip_of_anything(tmp_path_factory, options, seed, lr):
    config = RunConfig.model_validate({"env": {"options": options}, "run": {"seed": seed}, "learner": {"lr": lr}})
    path = tmp_path_factory.mktemp("trip") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load_config(path) == config


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(texts.filter(bool), min_size=1, max_size=6, unique=True),
    options=st.lists(values, min_size=6, max_size=6),
)
def test_every_key_keeps_its_line(names, options):
    from spearrl.config.dump import toml_value

    lines, expected = ["# [not] = a header", "[t.'a b']  # x = 1"], {}
    for name, value in zip(names, options, strict=False):
        shown = f"[\n  {toml_value(value)}, # ]\n]" if len(name) % 2 else toml_value(value)
        expected[name] = "\n".join(lines).count("\n") + 2
        lines.append(f'{toml_value(name)} . "x" = {shown}')
    file = parse("\n".join(lines), "f")
    assert isinstance(file, ConfigFile)
    for name, line in expected.items():
        assert file.at(("t", "a b", name, "x")) == f"f:{line}"


def test_triple_quoted_text_does_not_hide_the_lines_below():
    text = 'a = """\n[b]\nc = 1 \\"""\n"""" # four\nd = \'\'\'\ne = 2\'\'\'\nf = 3\n[[g]]\nh = 1\n'
    file = parse(text, "f")
    assert isinstance(file, ConfigFile)
    assert [file.at((key,)) for key in "adfg"] == ["f:1", "f:5", "f:7", "f:8"] and file.at(("b",)) == file.at(
        ("e",)
    ) == "f"


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf[run]\r\nsteps = 3\r\nseed = -1\r\n")
    assert "run.toml:3: run.seed" in message_of(tmp_path / "run.toml")


def test_secrets_of_pydantic_stay_out_of_messages():
    message = message_of(None, ["run.steps=x", "learner.beta1=2"])
    assert "pydantic" not in message and "input_value" not in message and "2 errors" in message


def test_options_are_plain_data():
    with pytest.raises(ValueError, match="type object"):
        RunConfig.model_validate({"env": {"options": {"a": object()}}})
    with pytest.raises(ValueError, match="finite"):
        RunConfig.model_validate({"env": {"options": {"a": [math.inf]}}})
    assert RunConfig.model_validate({"env": {"options": {"a": None, "b": 1}}}).env.options == {"b": 1}


def test_checks_of_configs_made_in_code():
    check(RunConfig())
    config = RunConfig.model_validate(
        {"rollout": {"group_size": 1, "context_tokens": 16, "max_reply_tokens": 16}, "algo": {"name": "grop"}}
    )
    with pytest.raises(ConfigError, match="3 errors"):
        check(config)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["algo.sil.capacity=2048"], "algo.sil.capacity"),
        (["run.steps=10"], "algo.sil.gamma.steps"),
        (["learner.lr=1e-6"], "learner.lr"),
        (["learner.warmup_steps=500"], "learner.warmup_steps"),
        (["eval.split=train"], "eval.split"),
        (["eval.attempts=4", "eval.temperature=0"], "eval.attempts"),
        (["sft.episodes=32"], "sft.warmup_steps"),
        (["algo.loss=gspo"], "algo.policy.clip_high"),
        (["algo.loss=cispo", "algo.policy.dual_clip=3"], "algo.policy.dual_clip"),
        (["algo.critic.lam=0.9"], "algo.critic"),
        (["learner.critic_lr=1e-5"], "learner.critic_lr"),
        (["algo.gigpo.step_weight=2"], "algo.gigpo"),
        (["algo.kl_cov.coef=1"], "algo.kl_cov"),
        (["algo.sil.enabled=false", "algo.sil.min_wins=2"], "algo.sil.min_wins"),
        (["algo.sil.enabled=false", "algo.sil.token_weight=unsure"], "algo.sil.token_weight"),
        (["algo.kl.loss_coef=0.1", "algo.kl.reward_coef=0.1"], "algo.kl.reward_coef"),
        (["algo.dynamic.enabled=true", "algo.dynamic.rounds=1"], "algo.dynamic.rounds"),
    ],
)
def test_advice(changes, key):
    problems = advice(load_config(None, changes))
    assert any(key in str(problem) and helps(str(problem)) for problem in problems)
    assert advice(load_config()) == []


@pytest.mark.parametrize(
    ("algo", "change"),
    [
        ("grpo+kl_cov", "algo.policy.clip_high=0.3"),
        ("grpo+kl_cov", "algo.policy.clip_low=0.1"),
        ("rloo", "algo.groups.normalize_std=true"),
        ("ppo", "algo.groups.normalize_std=false"),
        ("gspo+clip_cov", "algo.clip_cov.log_ratio_clamp=10"),
        ("cispo+spear", "algo.clip_cov.log_ratio_clamp=none"),
    ],
)
def test_what_has_no_effect_is_told_to_whoever_set_it(algo, change):
    resolved = resolve(None, [change], algo=algo)
    (problem,) = advice(resolved.config, resolved.sources)
    assert change.partition("=")[0] in str(problem) and problem.where == "command line" and helps(str(problem))
    unset = resolve(algo=algo)  # the preset sets it too
    assert advice(unset.config, unset.sources) == []
    assert advice(*(lambda r: (r.config, r.sources))(resolve(None, [change], algo="grpo+spear"))) == []


@pytest.mark.parametrize(
    "changes",
    [
        ["algo.name=ppo", "algo.critic.lam=0.9", "learner.critic_lr=1e-5"],
        ["algo.name=gigpo", "algo.gigpo.step_weight=2"],
        ["algo.name=grpo+kl_cov", "algo.kl_cov.coef=1"],
        ["algo.advantage=my_pkg.mod:fn", "algo.critic.lam=0.9"],
        ["algo.sil.min_wins=2", "algo.sil.token_weight=unsure"],
        ["algo.name=gspo"],
        ["algo.name=cispo+spear"],
        ["algo.sil.gamma.kind=success", "algo.sil.gamma.steps=9999"],
        ["algo.name=dapo"],
    ],
)
def test_no_advice_where_a_setting_is_used(changes):
    assert advice(load_config(None, changes)) == []


@pytest.mark.parametrize("algo", ["ppo", "reinforce++", "ppo+spear"])
def test_groups_of_one_where_siblings_are_not_compared(algo):
    assert load_config(None, ["rollout.group_size=1", "rollout.groups_per_step=64"], algo=algo).rollout.group_size == 1


@pytest.mark.parametrize("algo", ["grpo", "gigpo", "rloo", "reinforce++_baseline", "dr_grpo"])
def test_groups_of_one_where_siblings_are_compared(algo):
    assert "compares the siblings" in message_of(None, ["rollout.group_size=1"], algo=algo)
    assert load_config(None, ["rollout.group_size=1", "algo.groups.singleton=raw"], algo=algo).rollout.group_size == 1


def test_every_fix_of_a_check_removes_its_problem():
    """The `key=value` that a check proposes first must be accepted."""
    tried = 0
    for changes in (text.split("\n") for text, _ in WRONG):
        message = message_of(None, [*changes], **({} if changes[0].startswith("preset") else {"preset": "tiny"}))
        if proposed := re.search(r"use ([a-z_.]+=[^\s,;?…]+)(?: |,|;|$)", message.split("fix: ")[-1]):
            key = proposed.group(1).partition("=")[0]
            if key.split(".")[-1] == "key" or "…" in proposed.group(0):
                continue  # a pattern, not a proposal
            load_config(None, [*(c for c in changes if c.partition("=")[0] != key), proposed.group(1)])
            tried += 1
    assert tried > 10


def test_presets_set_known_values_only():
    assert list(DESCRIPTIONS) == list(PRESETS)
    for name, values in PRESETS.items():
        for key in values:
            assert tuple(key.split(".")) in leaves() or key.startswith("env.options."), (name, key)
        config = load_config(preset=name)
        assert checks_module.problems(config) == [] and advice(config) == []
    paper = load_config(preset="webshop-1.5b")
    assert (
        paper.rollout.groups_per_step,
        paper.rollout.group_size,
        paper.rollout.context_tokens,
        paper.learner.mini_batch_rows,
    ) == (32, 8, 4608, 256)
    assert paper.algo.sil.enabled and not load_config(preset="webshop-1.5b-drbot").algo.sil.enabled
    for environment, suffix in ((e, s) for e in ("webshop", "alfworld") for s in ("", "-drbot", "-base")):
        grpo, gigpo = (load_config(preset=f"{environment}-1.5b{middle}{suffix}") for middle in ("", "-gigpo"))
        assert set(diff(grpo, gigpo)) == {"run.started_from", "algo.name", "algo.advantage"}
        assert gigpo.algo.advantage == "gigpo" and (gigpo.algo.gigpo.discount, gigpo.algo.gigpo.step_weight) == (
            0.95,
            1.0,
        )
    tricks = load_config(preset="alfworld-1.5b-gigpo-drbot").algo
    assert (
        tricks.name == "gigpo+drbot"
        and not tricks.groups.normalize_std
        and tricks.filters.void_turn
        and tricks.policy.clip_high == 0.28
    )
    base = load_config(preset="alfworld-1.5b-base").algo
    assert (
        base.groups.normalize_std
        and base.policy.clip_high == 0.2
        and base.filters.group_keep == 1.0
        and base.policy.aggregation == "token-mean"
    )


def test_every_setting_is_described_and_the_page_is_current():
    for key, info in leaves().items():
        assert info.description and info.description.rstrip().endswith("."), dotted(key)
    for key, model in sections().items():
        assert all(info.description for info in model.model_fields.values()), key
    written = runpy.run_path(str(DOCS / "config_page.py"))["page"]()
    assert (DOCS / "config.md").read_text() == written, "run `python docs/config_page.py > docs/config.md`"


def test_sections_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunSection().steps = 3  # type: ignore[misc]
