"""A model's own format: what ends a reply, thoughts that the prompt opens, and how calls are written."""

from __future__ import annotations

import json

import pytest

from spearrl.models import load_tokenizer
from spearrl.models.chat import ChatEncoder
from spearrl.models.layouts import BY_NAME, Layout, parts_of
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
