"""The chat encoder on three template families: growth equals rendering, control tokens in text stay text, sampled ids
are kept.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

from spearrl.errors import ConfigError
from spearrl.rollout import ChatEncoder
from spearrl.types import Image, Message, Text

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN25 = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n"
    "{% elif messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user"
    "{% endif %}\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{% set last = namespace(query=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set thought = '' %}{% set said = m.content %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > last.query and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n"
    "{% endif %}{{ said }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
FAMILIES = {
    "qwen2.5": (QWEN25, IM, "<|im_end|>"),
    "qwen3": (QWEN3, IM, "<|im_end|>"),
    "llama3": (LLAMA3, HEADERS, "<|eot_id|>"),
}
TEXT = [
    "system user assistant You help. Tools tool_response think",
    "one two three find a red lamp buy now",
    "search [ red lamp ] click [ buy ]",
] * 3


@lru_cache
def tokenizer_of(family: str):
    """A byte-level BPE tokenizer with the family's control tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template, specials, end = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=340, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, additional_special_tokens=[s for s in specials if s != end]
    )
    fast.chat_template = template
    return fast


def encoder_of(family: str) -> ChatEncoder:
    encoder = ChatEncoder(tokenizer_of(family))
    encoder.verify()
    return encoder


def user(text: str) -> Message:
    return Message("user", text)


def rendered(family: str, *messages: Message) -> str:
    chat = [{"role": m.role, "content": m.text} for m in messages]
    return str(tokenizer_of(family).apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def shown(family: str, ids) -> str:
    return str(tokenizer_of(family).decode(list(ids), skip_special_tokens=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_growing_equals_the_templates_rendering(family: str):
    encoder = encoder_of(family)
    messages = [user("find a red lamp")]
    ids = encoder.start(messages)
    assert shown(family, ids) == rendered(family, *messages)
    for number in range(3):
        reply, new = f"search [ red lamp {number} ]", user(f"one {number} two")
        before = ids
        ids = encoder.extend(ids, encoder.reply_ids(reply), [new])
        messages += [Message("assistant", reply), new]
        assert ids[: len(before)] == before
        assert shown(family, ids) == rendered(family, *messages)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reply_without_its_end_is_ended(family: str):
    encoder = encoder_of(family)
    start, reply = encoder.start([user("one")]), encoder.reply_ids("two")
    assert reply[-1] == encoder.end_id and encoder.end_id in encoder.stop_ids
    assert encoder.extend(start, reply, [user("three")]) == encoder.extend(start, reply[:-1], [user("three")])
    empty = encoder.extend(start, (), [user("three")])
    assert empty[: len(start) + 1] == (*start, encoder.end_id)
    assert empty == encoder.extend(start, (encoder.end_id,), [user("three")])


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_ids_are_never_tokenised_again(family: str):
    encoder = encoder_of(family)
    text = "red lamp"
    byte_wise = tuple(tokenizer_of(family).convert_tokens_to_ids(["Ġ" if c == " " else c for c in text]))
    assert byte_wise != encoder.reply_ids(text)[:-1] and encoder.decode(byte_wise) == text
    start = encoder.start([user("one")])
    assert encoder.extend(start, byte_wise, [user("two")])[len(start) :][: len(byte_wise)] == byte_wise


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_messages_are_plain_text(family: str):
    encoder, tokenizer = encoder_of(family), tokenizer_of(family)
    controls = set(tokenizer.all_special_ids)
    hostile = "one " + " ".join(FAMILIES[family][1]) + "two \ue000\ue0013\ue000 0\ue001 \ue0000\ue001three"
    count = lambda ids: sum(i in controls for i in ids)  # noqa: E731
    clean, dirty = encoder.start([user("x")]), encoder.start([user(hostile)])
    assert count(clean) == count(dirty)
    assert shown(family, dirty) == rendered(family, user(hostile))
    reply = encoder.reply_ids(hostile)
    assert count(reply) == 1 and tokenizer.decode(reply[:-1]) == hostile
    clean, dirty = (encoder.extend(clean, reply, [user(text)]) for text in ("x", hostile))
    assert count(clean) == count(dirty) and shown(family, dirty).count(hostile) == 2


def test_thinking_that_is_dropped_means_rewritten_history():
    assert {family: encoder_of(family).rewrites_history for family in FAMILIES} == {
        "qwen2.5": False,
        "qwen3": True,
        "llama3": False,
    }
    encoder = encoder_of("qwen3")
    thought = Message("assistant", "<think>\nwhy\n</think>\n\nso")
    again = encoder.start([user("one"), thought, user("two")])
    assert "why" not in shown("qwen3", again) and "so" in shown("qwen3", again)
    assert "why" in shown(
        "qwen3", encoder.extend(encoder.start([user("one")]), encoder.reply_ids(thought.text), [user("two")])
    )


def test_tool_messages_tools_and_images():
    encoder = encoder_of("qwen2.5")
    results = [Message("tool", "red"), Message("tool", "lamp")]
    start = encoder.start([user("one")])
    grown = encoder.extend(start, encoder.reply_ids("two"), results)
    assert shown("qwen2.5", grown) == rendered("qwen2.5", user("one"), Message("assistant", "two"), *results)
    with_tools = encoder.start([user("one")], [{"type": "function", "function": {"name": "buy"}}])
    assert '"buy"' in shown("qwen2.5", with_tools) and with_tools != start
    with pytest.raises(ConfigError, match="shows pictures, which this model does not take"):
        encoder.start([Message("user", (Text("one"), Image(b"png")))])


def test_templates_that_are_missing_or_fail():
    class Bare:
        chat_template = None

    with pytest.raises(ConfigError, match="no chat template"):
        ChatEncoder(Bare())
    with pytest.raises(ConfigError, match="roles user, assistant, tool: unknown role"):
        encoder = encoder_of("llama3")
        encoder.extend(encoder.start([user("one")]), encoder.reply_ids("two"), [Message("tool", "x")])


def test_text_round_trips_and_broken_bytes_decode():
    encoder = encoder_of("llama3")
    text = "Lämpchen 🙂 \t ‹x›\n  two"
    assert encoder.decode(encoder.reply_ids(text)) == text
    half = encoder.reply_ids("🙂")[:2]
    assert "\ufffd" in encoder.decode(half)
