"""A model's own format: what ends a reply, thoughts that the prompt opens, and how calls are written."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from spearrl.config.sections import ModelSection
from spearrl.errors import ConfigError
from spearrl.models import load_tokenizer
from spearrl.models.chat import ChatEncoder
from spearrl.models.formats import TOOL, open_format
from spearrl.models.layouts import BY_NAME, Layout, call_text, parts_of
from spearrl.types import Message
from tests.support.shared_data import shared

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
NEXT_ROLE = (  # GLM's manner: nothing ends a turn but the beginning of the next one
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|tool|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def tokenizer_of(template: str, *, specials=CHAT_TOKENS, added=(), eos: str = "<eos>"):
    """A byte-level tokenizer with special and merely added tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(["<eos>", *specials]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, additional_special_tokens=special)
    fast.add_tokens(list(added))
    fast.chat_template = template
    return fast


CALL = ("code_interpreter", {"code": "print(5)"})


def calls_of(layout: Layout, reply: str):
    return parts_of(layout.canonical(reply, {}))[2]


def names(tokenizer, encoder: ChatEncoder) -> dict[str, tuple[str, ...]]:
    return {tokenizer.convert_ids_to_tokens(i): where for i, where in encoder.stops.sources.items()}


def test_stop_tokens_are_the_union_of_what_template_files_and_tokenizer_declare(tmp_path):
    tokenizer = tokenizer_of(CHATML)
    tokenizer.save_pretrained(tmp_path)
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [user, 9999]}))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "text_config": {"eos_token_id": assistant}})
    )
    encoder = ChatEncoder(load_tokenizer(str(tmp_path)))
    assert names(tokenizer, encoder) == {
        "<eos>": ("tokenizer",),
        "<|im_end|>": ("chat template",),
        "<|user|>": ("generation_config.json",),
        "<|assistant|>": ("config.json",),
    }
    assert encoder.end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert any("token 9999 as eos, which the tokenizer does not have" in note for note in encoder.stops.notes)


def test_a_token_that_begins_turns_ends_no_reply():
    tokenizer = tokenizer_of(CHATML, specials=("<|im_start|>",), added=("<|im_end|>",), eos="<|im_start|>")
    encoder = ChatEncoder(tokenizer)  # as SmolLM2's converted tokenizer
    assert names(tokenizer, encoder) == {"<|im_end|>": ("chat template",)}
    assert encoder.stops.notes == (
        "tokenizer names <|im_start|> as eos, which begins a turn in the chat template: left out",
    )


def test_a_turn_that_only_the_next_one_ends():
    tokenizer = tokenizer_of(NEXT_ROLE)
    encoder = ChatEncoder(tokenizer)
    assert set(names(tokenizer, encoder)) == {"<|user|>", "<|tool|>", "<eos>"}
    start = encoder.start([Message("user", "one")])
    for role in ("user", "tool"):
        stop = tokenizer.convert_tokens_to_ids(f"<|{role}|>")
        reply = (*encoder.reply_ids("so")[:-1], stop)
        grown = encoder.extend(start, reply, [Message(role, "two")])
        assert tokenizer.decode(grown) == f"<|user|>\none<|assistant|>\nso<|{role}|>\ntwo<|assistant|>\n"


@pytest.mark.parametrize("special", [False, True])
def test_tags_of_thoughts_and_calls_stay_in_the_reply(special: bool):
    tokenizer = tokenizer_of(CHATML, specials=(*CHAT_TOKENS, *TAGS * special), added=() if special else TAGS)
    text = "<think>why</think><tool_call>x</tool_call>"
    ids = tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
    assert len(ids) == 9 and ChatEncoder(tokenizer).reply_text(ids) == text


def test_a_reply_goes_on_with_the_thought_that_its_prompt_opens():
    encoder = ChatEncoder(tokenizer_of(THINKING, added=TAGS))
    assert encoder.opens_thought and not ChatEncoder(tokenizer_of(CHATML, added=TAGS)).opens_thought
    for said, sampled in (
        ("<think>\nwhy\n</think>\n\nso", "why\n</think>\n\nso"),
        ("so", "\n</think>\n\nso"),
    ):
        ids = encoder.reply_ids(said)
        assert encoder.decode(ids) == sampled and encoder.reply_text(ids) == f"<think>\n{sampled}"


def test_a_template_that_takes_text_in_parts_only():
    template = CHATML.replace("{{ m['content'] }}", "{% for part in m['content'] %}{{ part.text }}{% endfor %}")
    encoder = ChatEncoder(tokenizer_of(template))
    assert encoder.decode(encoder.start([Message("user", "one")])) == "user\none\nassistant\n"


def test_every_layout_that_templates_teach_is_read():
    rows = [
        row for row in json.loads(shared("cases/tool_calls.json").read_text()) if row["kind"] == "template call format"
    ]
    assert len(rows) == 14
    for row in rows:
        read = [name for name, layout in BY_NAME.items() if calls_of(layout, row["input"]) == [CALL]]
        assert len(read) == 1 or read[0] == "hermes", (row["name"], read)


@pytest.mark.parametrize(
    ("layout", "reply"),
    {
        "hermes": '<tool_call>{"name": "code_interpreter", "arguments": {"code": "print(5)"}}</tool_call>',
        "function tags": "<function=code_interpreter><parameter=code>print(5)</parameter></function>",
        "argument tags": "<tool_call>code_interpreter<arg_key>code</arg_key>"
        "<arg_value>print(5)</arg_value></tool_call>",
        "bare JSON": '<|python_tag|>{"name": "code_interpreter", "parameters": {"code": "print(5)"}}',
        "gemma": '<|tool_call>call:code_interpreter{code:<|"|>print(5)<|"|>}<tool_call|>',
        "harmony": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions."
        'code_interpreter <|constrain|>json<|message|>{"code": "print(5)"}<|call|>',
        "invoke tags": '<minimax:tool_call>\n<invoke name="code_interpreter">\n<parameter name="code">print(5)'
        "</parameter>\n</invoke>\n</minimax:tool_call>",
        "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.code_interpreter:0"
        '<|tool_call_argument_begin|>{"code": "print(5)"}<|tool_call_end|><|tool_calls_section_end|>',
        "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>code_interpreter\n```json\n"
        '{"code": "print(5)"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "python list": '<|tool_call_start|>[code_interpreter(code="print(5)")]<|tool_call_end|>',
        "named arguments": '[TOOL_CALLS]code_interpreter[ARGS]{"code": "print(5)"}',
        "JSON list": '[TOOL_CALLS][{"name": "code_interpreter", "arguments": {"code": "print(5)"}}]',
    }.items(),
)
def test_layouts(layout: str, reply: str):
    assert calls_of(BY_NAME[layout], reply) == [CALL]
    assert calls_of(BY_NAME[layout], f"<think>{reply}</think>so") == []  # a call in a thought is text
    cut = BY_NAME[layout].canonical(reply.replace('"print(5)"', '"print(5'), {})
    assert layout in ("function tags", "argument tags", "bare JSON", "gemma", "invoke tags") or "<tool_call>" in cut


def test_bare_values_follow_the_schema():
    layout = BY_NAME["function tags"]
    reply = "".join(
        f"<parameter={key}>\n{value}\n</parameter>" for key, value in (("a", "5"), ("b", "5"), ("c", '["x"]'))
    )
    reply = f"<tool_call><function=f>{reply}</function></tool_call>"
    assert calls_of(layout, reply) == [("f", {"a": "5", "b": "5", "c": ["x"]})]
    kinds = {"f": {"a": "string", "b": "integer", "c": "string"}}
    assert parts_of(layout.canonical(reply, kinds))[2] == [("f", {"a": "5", "b": 5, "c": '["x"]'})]


SHOWS_NO_TOOLS = "does not show the environment's tools"
FAMILIES = {  # templates of the package trl: the layout that reads their calls, or why tools are refused
    **dict.fromkeys(("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"), "hermes"),
    **dict.fromkeys(("qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"), "function tags"),
    **dict.fromkeys(("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"), "function tags"),
    "nemotron_3_5_lightning": "function tags",
    "glm4moe": "argument tags",
    **dict.fromkeys(("llama3_1", "llama3_2"), "bare JSON"),
    **dict.fromkeys(("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma"), "gemma"),
    "gptoss": "harmony",
    "muse_glimmer": "invoke tags",
    **dict.fromkeys(("lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"), "python list"),
    "lfm2": "leaves tool calls out",
    **dict.fromkeys(("cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3"), SHOWS_NO_TOOLS),
    **dict.fromkeys(("idefics3", "llama3", "llava_next", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"), SHOWS_NO_TOOLS),
}
CONTROL = re.compile(r"<\|[^<>\s]+>|<[a-z_]+\|>|<｜[^<>\s]+｜>|<(?:start_of_turn|end_of_turn|end_of_utterance|bos)>")


@lru_cache
def family(name: str):
    """A small tokenizer with a template of trl and the control tokens that it uses."""
    package = find_spec("trl")
    if package is None or package.origin is None:
        pytest.skip("the package trl, which has chat templates of many models, is not installed")
    template = (Path(package.origin).parent / "chat_templates" / f"{name}.jinja").read_text()
    tags = [tag for tag in TAGS if tag in template]
    tokenizer = tokenizer_of(template, specials=sorted({"<bos>", *CONTROL.findall(template)}), added=tags)
    tokenizer.bos_token = "<bos>"
    return tokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_with_tools_in_every_family_of_trl(name: str):
    tokenizer, expected = family(name), FAMILIES[name]
    settings = ModelSection()
    if expected not in BY_NAME:
        with pytest.raises(ConfigError, match=expected):
            open_format(tokenizer, settings, [TOOL])
        encoder = open_format(tokenizer, settings)
        assert encoder.reply_text(encoder.reply_ids("so")).endswith("so")
        return
    encoder = open_format(tokenizer, settings, [TOOL])
    assert encoder.layout.name == expected
    arguments = {"place": 'a "b"\nc', "times": 3}
    said = call_text("look_around", arguments)
    prompt, reply = encoder.start([Message("user", "one")], [TOOL]), encoder.reply_ids(said)
    assert reply[-1] in encoder.stop_ids
    text = encoder.reply_text(reply)
    assert parts_of(text)[1:] == ("", [("look_around", arguments)])
    conversation = [Message("user", "one"), Message("assistant", text), Message("tool", "R7")]
    whole = tokenizer.decode(encoder.start(conversation, [TOOL]))
    assert "R7" in whole and whole.count("look_around") >= 2
    orphan = encoder.start([Message("user", "one"), Message("assistant", "no call"), Message("tool", "R7")], [TOOL])
    assert "R7" in tokenizer.decode(orphan)
    if not encoder.rewrites_history:
        nothing = encoder.reply_ids("no call")
        assert encoder.extend(prompt, nothing, [Message("tool", "R7")]) == orphan
        assert tokenizer.decode(encoder.extend(prompt, reply, [Message("tool", "R7")])) == whole


@pytest.mark.parametrize("name", FAMILIES)
def test_what_ends_a_turn_of_a_family_of_trl_ends_replies(name: str):
    encoder = open_format(family(name), ModelSection())
    ends = {"cohere2": "<|END_RESPONSE|>", "glm4moe": "<|user|>", "gptoss": "<|return|>", "llava_next": "<eos>"}
    ends |= dict.fromkeys(("idefics3", "smolvlm"), "<end_of_utterance>")
    end = family(name).convert_ids_to_tokens(encoder.end_id)
    assert end == ends.get(name, end) and end not in ("<eos>",) * (name not in ends)
    grown = encoder.extend(encoder.start([Message("user", "q")]), encoder.reply_ids("so"), [Message("user", "two")])
    whole = encoder.start([Message("user", "q"), Message("assistant", "so"), Message("user", "two")])
    assert encoder.rewrites_history or grown == whole
