"""The local engine: the model's own log-probabilities, batching that does not show, prefix reuse, bounds, faults."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
import torch

from spearrl.batching.token_hashes import counter_uniforms
from spearrl.errors import ConfigError, EngineError
from spearrl.rollout import Completion, LocalEngine, Request, Sampling
from spearrl.rollout.local.cache import SlotCache
from spearrl.rollout.local.forward import Forward
from spearrl.rollout.local.sampling import draw
from spearrl.rollout.local.scheduler import common
from tests.support.engine_requests import VOCABULARY, prompt, requests, serve

CONTEXT = 96
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=0,
)


def tiny(kind: str = "qwen3", seed: int = 0, **changes):
    """A random model whose distributions are far from uniform, so that errors show."""
    import transformers

    config, model = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[kind]
    extra = {"head_dim": 8} if kind == "qwen3" else {}
    torch.manual_seed(seed)
    return model(config(**SHAPE, **extra, initializer_range=0.3, **changes)).eval()


def engine_of(model, **changes) -> LocalEngine:
    return LocalEngine(model, **{"slots": 8, "cache_mib": 16, "context_tokens": CONTEXT, **changes})


def reference(model, request: Request, completion: Completion) -> torch.Tensor:
    """Log-probabilities of the completion's tokens by one plain forward."""
    ids = torch.tensor([[*request.token_ids, *completion.token_ids]])
    temperature = request.sampling.temperature or 1.0
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0].float() / temperature, dim=-1)
    start = len(request.token_ids)
    return logprobs[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]


def assert_matches(model, request: Request, completion: Completion) -> None:
    assert len(completion.token_ids) == len(completion.logprobs)
    torch.testing.assert_close(
        torch.tensor(completion.logprobs), reference(model, request, completion), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_probabilities_are_those_of_a_plain_forward(kind: str, attention: str):
    model = tiny(kind, attn_implementation=attention)
    wanted = requests(temperature=0.7)
    for request, completion in zip(wanted, serve(engine_of(model), *wanted), strict=True):
        assert_matches(model, request, completion)


@pytest.mark.parametrize("order", [1, -1])
def test_a_request_gets_the_same_tokens_alone_and_in_any_batch(order: int):
    model = tiny()
    together = dict(
        zip((r.id for r in requests()[::order]), serve(engine_of(model), *requests()[::order]), strict=True)
    )
    for request in requests():
        alone = serve(engine_of(model, slots=1), request)[0]
        assert alone.token_ids == together[request.id].token_ids
        np.testing.assert_allclose(alone.logprobs, together[request.id].logprobs, atol=1e-5)


def conversation(engine: LocalEngine, sampled: list, group: int, sibling: int, turns: int = 4):
    async def play() -> None:
        ids = prompt(group, 20)
        for turn in range(turns):
            request = Request(
                (group, sibling, turn),
                ids,
                sampling=Sampling(max_tokens=3 + (group + sibling + turn) % 4, seed=97 * sibling + turn),
            )
            completion = await engine.generate(request)
            sampled.append((request, completion))
            ids = (*ids, *completion.token_ids, *prompt(1000 + group + turn, 5))

    return play()


@pytest.mark.parametrize("slots", [32, 6])
def test_conversations_reuse_their_prefix_and_stay_right(slots: int):
    model, sampled = tiny(), []
    engine = engine_of(model, slots=slots)

    async def play() -> None:
        await asyncio.gather(*(conversation(engine, sampled, g, s) for g in range(4) for s in range(4)))

    asyncio.run(play())
    for request, completion in sampled:
        assert_matches(model, request, completion)
    total = sum(len(request.token_ids) for request, _ in sampled)
    counters = engine.counters
    assert counters["prefilled_tokens"] + counters["cached_tokens"] == total
    if (
        slots == 32
    ):  # a first turn is computed once for its siblings, a later one computes the last sampled token and what is new
        assert counters["prefilled_tokens"] == 4 * 20 + 16 * 3 * 6
        assert all(c.cached_tokens >= len(r.token_ids) - 6 for r, c in sampled if r.id[2])


def test_two_runs_are_bit_identical():
    results = []
    for _ in range(2):
        model, sampled = tiny(), []
        engine = engine_of(model, slots=5)

        async def play(engine=engine, sampled=sampled) -> None:
            await asyncio.gather(*(conversation(engine, sampled, g, s) for g in range(3) for s in range(3)))

        asyncio.run(play())
        results.append(sorted((r.id, c.token_ids, c.logprobs) for r, c in sampled))
    assert results[0] == results[1]


def test_admission_follows_request_ids_not_submission(monkeypatch: pytest.MonkeyPatch):
    engine, admitted = engine_of(tiny(), slots=2), []
    assign = engine._table.assign
    monkeypatch.setattr(
        engine._table, "assign", lambda jobs: admitted.extend(job.request.id for job in jobs) or assign(jobs)
    )
    serve(engine, *requests(8)[::-1])
    assert admitted == sorted(admitted) and len(admitted) == 8


def test_a_prompt_that_keeps_only_its_beginning_reuses_that():
    model = tiny()
    engine = engine_of(model)
    first = Request((0, 0, 0), prompt(1, 30), sampling=Sampling(max_tokens=4, seed=1))
    second = Request((0, 0, 1), (*prompt(1, 30)[:20], *prompt(2, 12)), sampling=Sampling(max_tokens=4, seed=2))
    sibling = Request((0, 1, 0), (*prompt(1, 30)[:20], *prompt(3, 2)), sampling=Sampling(max_tokens=4, seed=3))
    for request, cached in ((first, 0), (second, 20), (sibling, 20)):
        completion = serve(engine, request)[0]
        assert completion.cached_tokens == cached
        assert_matches(model, request, completion)


def test_prompts_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("spearrl.rollout.local.engine.CHUNK", 7)
    model = tiny()
    wanted = requests()
    for request, completion in zip(wanted, serve(engine_of(model), *wanted), strict=True):
        assert_matches(model, request, completion)


def test_new_weights_flush_the_cache():
    model = tiny()
    engine = engine_of(model)
    first = serve(engine, Request((0, 0, 0), prompt(1, 30), sampling=Sampling(max_tokens=2)))[0]
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-0.7)
    engine.publish(3)
    request = Request((0, 0, 1), (*prompt(1, 30), *first.token_ids, 5), sampling=Sampling(max_tokens=5, seed=4))
    second = serve(engine, request)[0]
    assert (first.min_version, second.min_version, second.max_version, second.cached_tokens) == (0, 3, 3, 0)
    assert_matches(model, request, second)


def test_greedy_top_p_allowed_and_stop():
    model = tiny()
    engine = engine_of(model)
    ids = prompt(5, 12)
    greedy = serve(engine, Request((0,), ids, sampling=Sampling(temperature=0, max_tokens=6)))[0]
    with torch.no_grad():
        wanted = model.generate(
            torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 12:].tolist()
    assert list(greedy.token_ids) == wanted
    assert_matches(model, Request((0,), ids), greedy)
    assert greedy.finish_reason == "length"
    stop = Sampling(temperature=0, max_tokens=6, stop_ids=(wanted[2],))
    stopped = serve(engine, Request((1,), ids, sampling=stop))[0]
    assert (list(stopped.token_ids), stopped.finish_reason) == (wanted[: wanted.index(wanted[2]) + 1], "stop")
    allowed = serve(engine, Request((2,), ids, sampling=Sampling(max_tokens=8, allowed_ids=(3, 4), seed=1)))[0]
    assert set(allowed.token_ids) <= {3, 4}
    single = serve(engine, Request((3,), ids, sampling=Sampling(max_tokens=3, allowed_ids=(7,))))[0]
    assert (single.token_ids, single.logprobs) == ((7, 7, 7), (0.0, 0.0, 0.0))
    narrow = serve(engine, Request((4,), ids, sampling=Sampling(max_tokens=4, top_p=1e-6, seed=2)))[0]
    assert list(narrow.token_ids) == wanted[:4]
    assert narrow.logprobs == (0.0,) * 4


def test_draws_follow_the_distribution_and_do_not_see_their_neighbours():
    torch.manual_seed(0)
    row = torch.randn(1, 12) * 2
    count = 20_000
    samplings = [Sampling(temperature=0.8, seed=i) for i in range(count)]
    tokens, logprobs = draw(row.expand(count, -1), samplings, [0] * count)
    wanted = torch.softmax(row[0].double() / 0.8, -1)
    observed = torch.bincount(torch.tensor(tokens), minlength=12) / count
    assert (observed - wanted).abs().max() < 0.012
    torch.testing.assert_close(torch.tensor(logprobs).double(), wanted.log()[tokens], atol=1e-5, rtol=0)
    mixed = [
        Sampling(seed=1),
        Sampling(seed=2, top_p=0.5),
        Sampling(seed=3, allowed_ids=(2, 5)),
        Sampling(temperature=0),
        Sampling(temperature=2.0, seed=4),
    ]
    logits = torch.randn(5, 300)
    together = draw(logits, mixed, [4] * 5)
    for index, sampling in enumerate(mixed):
        alone = draw(logits[index : index + 1], [sampling], [4])
        assert (together[0][index], together[1][index]) == (alone[0][0], alone[1][0])


def test_uniform_numbers():
    numbers = counter_uniforms([7] * 50_000, range(50_000))
    assert numbers.min() >= 0 and numbers.max() < 1 and abs(numbers.mean() - 0.5) < 0.01
    neighbours = counter_uniforms(range(50_000), [3] * 50_000)
    assert abs(np.corrcoef(numbers, neighbours)[0, 1]) < 0.02
    assert abs(np.corrcoef(neighbours[1:], neighbours[:-1])[0, 1]) < 0.02
    assert counter_uniforms([5], [9])[0] == counter_uniforms([1, 5], [2, 9])[1]
    assert len({*counter_uniforms([-1, 2**63 - 1, 2**64 + 5], [0, 0, 0]).tolist()}) == 3


PER_TOKEN = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head_dim, bytes


def test_the_cache_grows_with_what_is_in_flight():
    model = tiny()
    engine = engine_of(model, slots=64, cache_mib=128, context_tokens=4096)
    alone = Request((0, 0, 0), (1, 2, 3), sampling=Sampling(max_tokens=40, seed=1))
    serve(engine, alone)
    assert (engine.cache.allocated, engine.cache.bytes) == (1, 64 * PER_TOKEN)
    siblings = [Request((1, sibling, 0), (4, 5), sampling=Sampling(max_tokens=9, seed=sibling)) for sibling in range(5)]
    for request, completion in zip(siblings, serve(engine, *siblings), strict=True):
        assert_matches(model, request, completion)
    assert 5 <= engine.cache.allocated <= 8 and engine.cache.length == 64
    growing = Request((0, 0, 1), (1, 2, 3, *range(20)), sampling=Sampling(max_tokens=900, seed=1))
    assert_matches(model, growing, serve(engine, growing)[0])
    assert engine.cache.length < 2048


def test_the_cache_is_bounded_in_bytes():
    """Nine requests of up to 512 tokens in a cache for 4 of them: all are served, right, four at a time; then short
    ones go all at once.
    """
    model = tiny()
    engine = engine_of(model, slots=9, cache_mib=1, context_tokens=1024)
    limit = 1 << 20
    assert engine.cache.room(1024) == limit // (1024 * PER_TOKEN) == 4
    draws = random.Random(0)
    for round_, most in enumerate((500, 30, 1000, 200)):
        siblings = [
            Request(
                (round_, sibling, 0),
                tuple(draws.randrange(VOCABULARY) for _ in range(2 + sibling)),
                sampling=Sampling(max_tokens=most - sibling - 12, seed=sibling, stop_ids=(7, 8)),
            )
            for sibling in range(9)
        ]
        for request, completion in zip(siblings, serve(engine, *siblings), strict=True):
            assert_matches(model, request, completion)
        assert engine.cache.bytes <= limit
    with pytest.raises(ConfigError, match="needs 8 MiB of cache, rollout.cache_mib is 7"):
        engine_of(model, cache_mib=7, context_tokens=32 * 1024)


@pytest.mark.parametrize("fault", ["hole", "position", "stale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch, fault: str, dtype: torch.dtype):
    model = tiny("llama").to(dtype)
    engine_of(model, probe_ids=range(1, 21))
    aim, write, forward = SlotCache.aim, SlotCache._write, model.base_model.forward

    def shifted(*args, position_ids=None, input_ids=None, **kwargs):
        if position_ids is not None and input_ids.shape[1] == 1:
            position_ids = position_ids + 3
        return forward(*args, input_ids=input_ids, position_ids=position_ids, **kwargs)

    if fault == "hole":
        monkeypatch.setattr(SlotCache, "aim", lambda self, rows, places: aim(self, rows, places + 1))
    elif fault == "stale":
        monkeypatch.setattr(SlotCache, "_write", lambda self, store, new: write(self, store, new.roll(1, dims=2)))
    else:
        monkeypatch.setattr(model.base_model, "forward", shifted)
    with pytest.raises(ConfigError, match="off by"):
        engine_of(model, probe_ids=range(1, 21))


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request((0,), (), sampling=Sampling(max_tokens=3)), "prompt"),
        (Request((0,), (1,) * 90, sampling=Sampling(max_tokens=7)), "context holds 96"),
        (Request((0,), (1,), sampling=Sampling(max_tokens=0)), "must be >= 1"),
        (Request((0,), (1, VOCABULARY), sampling=Sampling(max_tokens=3)), "token ids"),
        (Request((0,), (1,), sampling=Sampling(max_tokens=3, top_p=0.0)), "top_p"),
        (Request((0,), (1,), sampling=Sampling(max_tokens=3, allowed_ids=())), "allowed_ids"),
    ],
)
def test_malformed_requests_are_refused_and_harm_nobody(request_: Request, message: str):
    model = tiny()
    engine, good = engine_of(model), requests()[2]

    async def both():
        return await asyncio.gather(engine.generate(request_), engine.generate(good), return_exceptions=True)

    refused, completion = asyncio.run(both())
    assert isinstance(refused, EngineError) and message in str(refused)
    assert_matches(model, good, completion)


def test_the_whole_context_can_be_used():
    model = tiny()
    request = Request((0, 0, 0), prompt(1, CONTEXT - 3), sampling=Sampling(max_tokens=3, seed=1))
    other = Request((1, 0, 0), prompt(2, 4), sampling=Sampling(max_tokens=40, seed=1))
    engine = engine_of(model, slots=2)
    for wanted, completion in zip((request, other), serve(engine, request, other), strict=True):
        assert_matches(model, wanted, completion)


def test_cancel_deadline_pause_and_close():
    model = tiny()
    engine = engine_of(model, slots=2, context_tokens=512)
    long = Sampling(max_tokens=400)

    async def play():
        tasks = [
            asyncio.create_task(engine.generate(Request((i, 0, 0), prompt(i, 5), sampling=long, deadline_s=d)))
            for i, d in enumerate((None, 0.01, None, None))
        ]
        await asyncio.sleep(0.02)
        await engine.cancel((0, 0, 0))
        tasks[3].cancel()
        await asyncio.sleep(0)
        engine.pause()
        await asyncio.sleep(0.02)
        before = engine.counters["sampled_tokens"]
        await asyncio.sleep(0.02)
        assert engine.counters["sampled_tokens"] == before and not tasks[2].done()
        engine.resume()
        finished = await tasks[2]
        rest = await asyncio.gather(*tasks, return_exceptions=True)
        last = asyncio.create_task(engine.generate(Request((9, 0, 0), prompt(9, 5), sampling=long)))
        await asyncio.sleep(0.005)
        engine.close()
        return finished, rest, (await asyncio.gather(last, return_exceptions=True))[0]

    finished, rest, last = asyncio.run(play())
    assert len(finished.token_ids) == 400 and not engine.health()
    assert isinstance(rest[0], EngineError) and "cancelled" in str(rest[0])
    assert isinstance(rest[1], EngineError) and "no reply within" in str(rest[1])
    assert isinstance(rest[3], asyncio.CancelledError)
    assert isinstance(last, EngineError) and "closed" in str(last)
    with pytest.raises(EngineError, match="closed"):
        serve(engine, requests()[0])


def test_failures_of_the_model_become_engine_errors_and_leave_the_engine_usable(monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    engine = engine_of(model)
    with monkeypatch.context() as broken:
        broken.setattr(Forward, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(EngineError, match="RuntimeError: out of memory"):
            serve(engine, requests()[0])
    assert_matches(model, requests()[1], serve(engine, requests()[1])[0])
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = float("nan")
    engine.publish(1)
    with pytest.raises(EngineError, match="not finite"):
        serve(engine, Request((0, 0, 0), (3, 4), sampling=Sampling(max_tokens=2)))


def test_the_model_is_left_as_it_was():
    model = tiny()
    model.gradient_checkpointing_enable()
    model.train()
    engine = engine_of(model)
    completion = serve(engine, requests()[4])[0]
    assert model.training and model.model.layers[0].training
    assert not any(t.is_inference() for t in [*model.parameters(), *model.buffers()])
    model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).logits.sum().backward()
    model.eval()
    assert_matches(model, requests()[4], completion)


def test_models_the_cache_does_not_suit_are_refused():
    import transformers

    torch.manual_seed(0)
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)
    )
    mamba.config.num_attention_heads = 4
    with pytest.raises(ConfigError, match="local engine"):
        engine_of(mamba)
    granite = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SHAPE, initializer_range=0.3, logits_scaling=4.0)
    ).eval()
    with pytest.raises(ConfigError, match="off by"):
        engine_of(granite)


def test_common_beginning():
    draws = random.Random(0)
    for _ in range(300):
        first = [draws.randrange(2) for _ in range(draws.randrange(12))]
        second = [draws.randrange(2) for _ in range(draws.randrange(12))]
        wanted = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
        )
        assert common(first, second) == wanted
