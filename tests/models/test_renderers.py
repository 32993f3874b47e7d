"""Formats of the library renderers, and which format a model gets: every family's conversation with tools, there and
back, on a small tokenizer made of the family's control tokens.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from spearrl.config.sections import ModelSection
from spearrl.envs import ToolEnvironment, tool
from spearrl.errors import ConfigError
from spearrl.models import load_tokenizer, save_model
from spearrl.models.chat_format import ParsedReply, parse_reply
from spearrl.models.formats import TOOL, describe_format, explain_format, open_format
from spearrl.models.layouts import call_text, parts_of
from spearrl.models.renderers import LibraryFormat, known_models
from spearrl.trainer import Trainer
from spearrl.types import Message, Task
from tests.models.test_formats import family, tokenizer_of
from tests.support.small_run import small_config

pytestmark = pytest.mark.skipif(find_spec("renderers") is None, reason="the extra formats is not installed")
# gpt-oss encodes with a vocabulary that its library downloads: it could not be tried on a tokenizer made here.
FAMILIES = (
    *("qwen3", "prime-qwen3", "qwen3-vl", "qwen3.5", "qwen3.6", "qwen3.8", "gemma4", "llama-3", "hy3", "inkling"),
    *("glm-4.5", "glm-5", "glm-5.1", "glm-5.3", "minimax-m2", "deepseek-v3", "deepseek-r1", "deepseek-v4", "kimi-k2"),
    *("kimi-k2.5", "laguna-xs.2", "laguna-m.1", "laguna-xs-2.1", "laguna-s-2.1", "nemotron-3", "nemotron-3-ultra"),
    "nemotron-3.5",
)
WITHOUT_TOOLS = {"deepseek-v3": "does not show", "deepseek-r1": "does not show"}
TOKEN = re.compile(r"<[|｜][^<>\s]+[|｜]>|</?think>|｜\w+｜")
ARGUMENTS = {"place": 'a "b"\nc', "times": 3}


@lru_cache
def control_tokens(name: str) -> tuple[str, ...]:
    """The control tokens that a format of the library asks a tokenizer for."""
    tokens: list[str] = []
    while True:
        tokenizer, asked = tokenizer_of(None, specials=tokens), []
        tokenizer.add_special_tokens({"unk_token": "<unk>"})
        encode, convert = tokenizer.encode, tokenizer.convert_tokens_to_ids
        tokenizer.encode = lambda text, asked=asked, encode=encode, **options: (
            asked.extend(TOKEN.findall(text)) or encode(text, **options)
        )
        tokenizer.convert_tokens_to_ids = lambda token, asked=asked, convert=convert: (
            asked.extend([token] if isinstance(token, str) else token) or convert(token)
        )
        try:
            LibraryFormat(tokenizer, name, tools=[TOOL])
        except ConfigError:
            new = [token for token in dict.fromkeys(asked) if token not in tokens and token != "<unk>"]
            assert new, f"{name}: {tokens}"
            tokens += new
        else:
            return tuple(tokens)


def tokenizer_for(name: str, template: str | None = None, more: tuple[str, ...] = ()):
    """A small tokenizer with a family's control tokens."""
    tokenizer = tokenizer_of(template, specials=[*control_tokens(name), *more])
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    return tokenizer


def settings(name: str = "auto", **changes) -> ModelSection:
    return ModelSection(format=name, **changes)


def test_every_format_of_the_library_is_tried():
    assert {*FAMILIES, "gpt-oss"} == set(known_models().values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_with_tools_there_and_back(name: str):
    tokenizer = tokenizer_for(name)
    if reason := WITHOUT_TOOLS.get(name):
        with pytest.raises(ConfigError, match=reason):
            open_format(tokenizer, settings(name), [TOOL])
        return
    chat = open_format(tokenizer, settings(name), [TOOL])
    asked, result = Message("user", "one"), Message("tool", "R7")
    prompt = chat.start([asked], [TOOL])
    said = call_text("look_around", ARGUMENTS)
    for text in (f"<think>\nwhy\n</think>\n\n{said}", said):
        reply = chat.reply_ids(text)
        assert reply[-1] in chat.stop_ids and not any(i in chat.stop_ids for i in reply[:-1])
        read = parse_reply(chat, reply, prompt)
        thought = read.reasoning and read.reasoning.strip()
        assert read == ParsedReply("", read.reasoning, (("look_around", ARGUMENTS),), True)
        assert not thought or thought == parts_of(text)[0]
        grown = chat.extend(prompt, reply, [result])
        whole = chat.start([asked, Message("assistant", chat.reply_text(reply, prompt)), result], [TOOL])
        assert grown is None or grown[: len(prompt) + len(reply)] == (*prompt, *reply)
        after = tokenizer.decode(list(grown or whole))
        assert "R7" in after and after.count("look_around") >= 2
        again = parse_reply(chat, chat.reply_ids("so"), grown or whole)
        assert (again.content.strip(), again.calls, again.ended) == ("so", (), True)
    nothing = chat.reply_ids("no call")  # what comes back then is no result
    chat.extend(prompt, nothing, [result])
    assert "R7" in tokenizer.decode(chat.start([asked, Message("assistant", "no call"), result], [TOOL]))
    cut = parse_reply(chat, chat.reply_ids(said)[:-3], prompt)
    assert not cut.ended


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_without_tools_in_the_words_of_the_environment(name: str):
    tokenizer = tokenizer_for(name)
    chat = open_format(tokenizer, settings(name))
    prompt = chat.start([Message("user", "one")])
    for text in ("<think>\nwhy\n</think>\n\n<action>go</action>", "<action>go</action>", f"so {call_text('f', {})}"):
        reply = chat.reply_ids(text)
        assert (
            chat.reply_text(reply, prompt).rpartition("</think>")[2].strip() == text.rpartition("</think>")[2].strip()
        )
        assert not text.startswith("<think>") or "why" in chat.reply_text(reply, prompt)
    controls = set(tokenizer.all_special_ids)
    hostile = chat.start([Message("user", "one" + "".join(control_tokens(name)))])
    assert sum(i in controls for i in hostile) == sum(i in controls for i in prompt)


@pytest.mark.parametrize(
    ("template", "name"),
    {
        "qwen3": "qwen3",
        "qwen3_vl": "qwen3-vl",
        "qwen3_5_think": "qwen3.5",
        "qwen3_8": "qwen3.8",
        "nemotron_3_nano": "nemotron-3",
        "nemotron_3_ultra": "nemotron-3-ultra",
        "glm4moe": "glm-4.5",
        "gemma4_v5": "gemma4",
        "llama3_1": "llama-3",
        "qwen3_instruct_2507": "template",  # writes no thoughts, as qwen3 does
        "llama3_2": "template",  # writes the day's date
    }.items(),
)
def test_a_model_is_known_by_what_its_template_writes(template: str, name: str):
    base, library = family(template), {"template": "qwen3" if "qwen3" in template else "llama-3"}.get(name, name)
    more = tuple(str(token) for token in base.added_tokens_decoder.values())
    tokenizer = tokenizer_for(library, base.chat_template, more)
    tokenizer.bos_token = "<|begin_of_text|>" if "llama" in template else "<bos>"
    chat = open_format(tokenizer, settings(), [TOOL])
    assert chat.name == name and describe_format(chat).startswith(f"format {name}, ")
    if name == "template":
        path = "Qwen/Qwen3-4B" if library == "qwen3" else "meta-llama/Llama-3.2-1B-Instruct@main"
        known = open_format(tokenizer, settings(path=path))
        assert known.name == "template" and "otherwise than the model's own template" in known.stops.notes[0]


def test_a_format_by_name_that_cannot_be_used_says_why():
    tokenizer = tokenizer_of(None, specials=["<|im_start|>"])
    for name, reason in (("qwen3", "does not go with the model's tokenizer"), ("qwen9", "is not known")):
        with pytest.raises(ConfigError, match=reason):
            open_format(tokenizer, settings(name))
    with pytest.raises(ConfigError, match="carries no response template"):
        open_format(family("qwen3"), settings("response_template"))
    with pytest.raises(ConfigError, match="has no switch for thinking"):
        open_format(tokenizer_for("llama-3"), settings("llama-3", thinking="on"))


def test_tools_that_the_template_drops_leave_three_ways_out():
    base = family("qwen3")
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = tokenizer_for("qwen3", plain, tuple(str(token) for token in base.added_tokens_decoder.values()))
    with pytest.raises(ConfigError, match="does not show the environment's tools") as caught:
        open_format(tokenizer, settings(), [TOOL])
    ways = caught.value.hint
    assert "model.format" in ways and "qwen3" in ways and "env.options.describe=prompt" in ways and "another" in ways
    assert open_format(tokenizer, settings("qwen3"), [TOOL]).name == "qwen3"
    lines = explain_format(tokenizer, settings())
    assert any("tools through the format: no" in line for line in lines) and "ended: True" in lines


def test_thinking_on_and_off():
    tokenizer = tokenizer_for("qwen3.5")
    for thinking, opens in (("on", True), ("off", False)):
        chat = open_format(tokenizer, settings("qwen3.5", thinking=thinking), [TOOL])
        assert (chat.opens_thought, chat.options) == (opens, {"enable_thinking": opens})
    nothink = tokenizer_for("qwen3.5", family("qwen3_5_nothink").chat_template)
    assert not open_format(nothink, settings("qwen3.5")).opens_thought  # as its own template has it


CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<|call|>{{ c.function.name }} {{ c.function.arguments | tojson }}<|call_end|>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<\|call\|>(?P<name>\w+) ",
            "close": "<|call_end|>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*|$", "content": "text"},
    },
}


def test_calls_are_read_by_the_response_template_that_a_tokenizer_carries(tmp_path: Path):
    tokenizer = tokenizer_of(CHATML, specials=["<|im_start|>", "<|im_end|>", "<|call|>", "<|call_end|>"])
    with pytest.raises(ConfigError, match="writes a tool call as no reader knows"):
        open_format(tokenizer, settings(), [TOOL])
    tokenizer.response_template = RESPONSE
    tokenizer.save_pretrained(tmp_path)
    chat = open_format(load_tokenizer(str(tmp_path)), settings(), [TOOL])
    assert (chat.name, chat.reader) == ("response_template", "response template")
    prompt, said = chat.start([Message("user", "one")], [TOOL]), f"so{call_text('look_around', ARGUMENTS)}"
    reply = chat.reply_ids(said)
    assert parse_reply(chat, reply, prompt) == ParsedReply("so", None, (("look_around", ARGUMENTS),), True)
    assert chat.extend(prompt, reply, [Message("tool", "R7")]) == chat.start(
        [Message("user", "one"), Message("assistant", said), Message("tool", "R7")], [TOOL]
    )
    broken = chat.tokenizer.encode("so<|call|>look_around {broken<|call_end|><|im_end|>", add_special_tokens=False)
    assert "<tool_call>so<|call|>look_around {broken" in chat.reply_text(broken, prompt)


class Asking(ToolEnvironment):
    """Asks for a call of `look_around` every turn."""

    max_turns = 3

    def tasks(self, split: str):
        return [Task(f"{split}-{number}", split) for number in range(4)]

    def begin(self, task: Task, draw: random.Random) -> str:
        return "look!"

    @tool
    def look_around(self, place: str) -> str:
        """Look.

        Args:
            place: where.
        """
        return "nothing"


class Showing(Asking):
    """Shows pictures."""

    shows_images = True


def model_folder(tokenizer, folder: Path) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "head_dim": 16, "eos_token_id": None, "bos_token_id": None}
    save_model(Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **shape, **heads)), tokenizer, folder)
    return folder


def run_config(folder: Path, model: Path, *changes: str, env: str = "Asking"):
    sizes = ("rollout.groups_per_step=1", "rollout.group_size=2", "rollout.context_tokens=2048", "run.steps=1")
    settings = ("sft.enabled=false", "eval.every=0", "eval.tasks=1", "env.options.describe=template", *sizes, *changes)
    return small_config(folder, f"env.name={__name__}:{env}", f"model.path={model}", *settings, algo="grpo")


@pytest.mark.parametrize("asked", ["auto", "template"])
def test_a_run_keeps_the_format_that_was_chosen(asked: str, tmp_path: Path):
    base = family("qwen3")
    tokenizer = tokenizer_for("qwen3", base.chat_template, tuple(str(t) for t in base.added_tokens_decoder.values()))
    model, events = model_folder(tokenizer, tmp_path / "model"), []
    config = run_config(tmp_path, model, f"model.format={asked}")
    with Trainer(config, report=lambda kind, values: events.append((kind, values))) as trainer:
        trainer.train()
        encoder = trainer.parts.players.collector.encoder
    name = "qwen3" if asked == "auto" else "template"
    assert encoder.name == name and f'format = "{name}"' in (trainer.run.path / "config.toml").read_text()
    line = next(values["text"] for kind, values in events if kind == "format")
    assert line.startswith(f"format {name}, calls: ") and "<|im_end|>" in line


@pytest.mark.parametrize(
    ("env", "template", "reason"),
    [("Asking", "plain", "does not show the environment's tools"), ("Showing", "qwen3", "pictures")],
)
def test_what_a_format_drops_is_refused_before_anything_is_written(
    env: str, template: str, reason: str, tmp_path: Path
):
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = tokenizer_of(plain if template == "plain" else family(template).chat_template, specials=["<|im_end|>"])
    model = model_folder(tokenizer, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"no weights: they are not looked at")
    with pytest.raises(ConfigError, match=reason):
        Trainer(run_config(tmp_path / "runs", model, env=env))
    assert not (tmp_path / "runs").exists()
