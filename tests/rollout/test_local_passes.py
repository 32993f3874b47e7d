"""The local engine's passes: equal to the model's plain forward for every family, whatever shares a pass; no token of
a policy version computed twice; bfloat16 weights in another order.
"""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

from spearrl.rollout import LocalEngine, Request, Sampling
from spearrl.rollout.local.packed import PackedLinears
from tests.rollout.test_local_engine import assert_matches, tiny
from tests.support.engine_requests import prompt, serve
from tests.support.families import build_family

# Of the largest logit. transformers' norms and rotations are in float32 even in a model in float64.
EXACT = {torch.float64: 1e-6, torch.float32: 1e-5}


def engine_of(model, **changes) -> LocalEngine:
    return LocalEngine(model, **{"slots": 8, "cache_mib": 16, "context_tokens": 256, **changes})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "qwen3_moe"])
def test_passes_of_any_mixture_are_a_plain_forward(family: str, dtype: torch.dtype, attention: str):
    """Random passes: some slots get one token, others several, others none; windows of 16 are passed several times."""
    if family == "qwen3_moe" and dtype == torch.float64:
        pytest.skip("torch's grouped products of experts know no float64")
    model = build_family(family, attn_implementation=attention)[0].to(dtype)
    engine, draws = engine_of(model), random.Random(3)
    engine.cache.reserve(8, 256)
    slots = engine._table.slots
    size = model.get_input_embeddings().num_embeddings
    for step in range(24):
        decoding = step % 3 == 2
        part = slots if decoding and step % 2 else sorted(draws.sample(slots, 5), key=lambda slot: slot.index)
        lengths = [1 if decoding and slot.held else draws.choice((1, 2, 7, 20)) for slot in part]
        new = [[draws.randrange(size) for _ in range(length)] for length in lengths]
        with engine.forward.evaluating():
            logits = engine.forward.run(part, new)
        for slot, tokens, row in zip(part, new, logits, strict=True):
            slot.held += tokens
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([slot.held]), use_cache=False).logits[0, -1]
            assert float((row - expected).abs().max()) <= EXACT[dtype] * float(expected.abs().max())
    assert model.config._attn_implementation == attention


def test_families_without_torchs_attention_keep_their_own():
    """gpt-oss has sinks in its softmax, which torch's attention does not know."""
    model = build_family("gpt_oss", attn_implementation="eager")[0]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(2.0)
    engine = engine_of(model)
    ids = list(range(1, 41))
    with engine.forward.evaluating():
        engine.cache.reserve(1, 64)
        row = engine.forward.run(engine._table.slots[:1], [ids])[0]
        expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def chats(engine: LocalEngine, groups: int, siblings: int, turns: int, base: int = 0) -> list:
    """Growing chats that begin alike: 40 tokens for all, 20 of a group, then each its own."""
    played = []

    async def chat(group: int, sibling: int) -> None:
        ids = (*prompt(7, 40), *prompt(100 + group, 20))
        for turn in range(turns):
            sampling = Sampling(max_tokens=3 + (group + sibling + turn) % 4, seed=97 * sibling + turn)
            request = Request((base, group, sibling, turn), ids, sampling=sampling)
            completion = await engine.generate(request)
            played.append((request, completion))
            ids = (*ids, *completion.token_ids, *prompt(1000 + group + 10 * sibling + turn, 30))

    async def all_of_them() -> None:
        await asyncio.gather(*(chat(g, s) for g in range(groups) for s in range(siblings)))

    asyncio.run(all_of_them())
    return played


def test_no_token_is_computed_twice_within_a_policy_version():
    """Tokens prefilled and decoded are the nodes of the prefix tree of all that was asked and sampled, but for the last
    token of each chat, which nobody looks at; evaluation with the same prompts afterwards computes nothing but replies.
    """
    model = tiny()
    engine = engine_of(model, slots=16)
    played = chats(engine, groups=4, siblings=4, turns=3)
    for request, completion in played:
        assert_matches(model, request, completion)
    whole = {(*request.token_ids, *completion.token_ids[:-1]) for request, completion in played}
    nodes = {row[:end] for row in whole for end in range(1, len(row) + 1)}
    counters = engine.counters
    computed = counters["prefilled_tokens"] + counters["decoded_tokens"]
    alike = sum(len(completion.token_ids) for _, completion in played)  # siblings may draw the same tokens
    assert len(nodes) <= computed <= len(nodes) + alike
    first = {request.token_ids[:end] for request, _ in played if not request.id[-1] for end in range(1, 61)}
    assert counters["prefilled_tokens"] == len(first) + 16 * 2 * 31  # later: the last sampled token, and what is new
    again = chats(engine, groups=4, siblings=1, turns=1, base=1)
    assert all(completion.cached_tokens == 59 for _, completion in again)
    assert counters["prefilled_tokens"] == len(first) + 16 * 2 * 31 + 4


def test_what_a_running_request_holds_is_not_reused_after_new_weights():
    """Its beginning was computed with the old weights; it ends with them, a later request begins anew."""
    model = tiny()
    engine = engine_of(model, slots=1)

    async def play():
        long = Request((0, 0, 0), prompt(1, 30), sampling=Sampling(max_tokens=60, seed=1))
        task = asyncio.create_task(engine.generate(long))
        while engine.counters["sampled_tokens"] < 5:
            await asyncio.sleep(0)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(-0.7)
        engine.publish(1)
        first = await task
        after = Request((0, 1, 0), (*prompt(1, 30), 5), sampling=Sampling(max_tokens=5, seed=4))
        return first, after, await engine.generate(after)

    first, after, second = asyncio.run(play())
    assert (first.min_version, first.max_version, second.cached_tokens) == (0, 1, 0)
    assert_matches(model, after, second)


needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor"
)


@needs_bfloat16
def test_packed_weights_are_the_parameters_in_another_order():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 160), torch.nn.Linear(160, 33, bias=False)).bfloat16()
    packed, inputs = PackedLinears(model), torch.randn(5, 96).bfloat16()
    for _ in range(2):
        with torch.inference_mode(), packed.used():
            got = model(inputs)
        exact = model.double()(inputs.double())
        torch.testing.assert_close(got.double(), exact, atol=0.02, rtol=0.02)
        assert not any("forward" in layer.__dict__ for layer in model)
        model.bfloat16()
        with torch.no_grad():
            model[0].weight.mul_(-2.0)
        packed.forget()


@needs_bfloat16
def test_an_engine_in_bfloat16_samples_with_the_weights_it_was_told_of():
    model = tiny("llama").bfloat16()
    engine = engine_of(model)
    request = Request((0, 0, 0), prompt(1, 30), sampling=Sampling(max_tokens=6, seed=1))
    changed = [(name, -0.5 * tensor.detach().clone()) for name, tensor in model.named_parameters()]
    serve(engine, request)
    engine.load(changed)
    engine.publish(1)
    completion = serve(engine, request)[0]
    ids = torch.tensor([[*request.token_ids, *completion.token_ids]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model.float()(input_ids=ids).logits[0], -1)
    wanted = logprobs[torch.arange(29, 35), ids[0, 30:]]
    torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=0.25, rtol=0)
