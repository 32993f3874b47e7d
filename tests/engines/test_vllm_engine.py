"""The vLLM engine: the local engine's tokens, the learner's log-probabilities, per-request seeds, bounds, faults,
adapters; no process stays behind.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from spearrl.batching import rows_from_groups
from spearrl.config.sections import LearnerSection, RolloutSection, VllmSection
from spearrl.errors import EngineError
from spearrl.learner import LocalLearner
from spearrl.rollout import Completion, LocalEngine, Request, Sampling
from spearrl.rollout.vllm import VLLMEngine
from spearrl.types import Action, Group, Image, Status, Task, Trajectory, Turn
from tests.support.engine_requests import VOCABULARY, all_begun, prompt, requests, send_weights, serve
from tests.support.gates import LIMIT_S

CONTEXT, BLOCK = 512, 128
ROLLOUT = RolloutSection(context_tokens=CONTEXT, cache_mib=64, slots=32)


def tiny(seed: int = 0):
    """A random model whose distributions are far from uniform, so that errors show."""
    import transformers

    shape = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    torch.manual_seed(seed)
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**shape, eos_token_id=3, tie_word_embeddings=True, initializer_range=0.3)
    ).eval()


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return tiny()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    before = dict(os.environ)
    made = VLLMEngine(folder, VllmSection(), ROLLOUT, threads=1)
    assert dict(os.environ) == before
    assert (
        len(made._processes.ids()) == 2
    )  # core and worker: so a watch that kills by the mark in their environment finds both
    yield made
    made.close()
    assert made._processes.ids() == [] and not made.health()


def scores(model, request: Request, completion: Completion) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] at the request's temperature, by one plain forward."""
    ids = torch.tensor([[*request.token_ids, *completion.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].float()
    return torch.log_softmax(logits[len(request.token_ids) - 1 : -1] / (request.sampling.temperature or 1.0), dim=-1)


def assert_matches(model, request: Request, completion: Completion) -> None:
    """Against the learner's log-probabilities, of the tokens that top_p and allowed ids leave."""
    table, sampling = scores(model, request, completion), request.sampling
    if sampling.allowed_ids is not None:
        left = torch.full_like(table, -torch.inf)
        left[:, list(sampling.allowed_ids)] = table[:, list(sampling.allowed_ids)]
        table = torch.log_softmax(left, dim=-1)
    if sampling.top_p < 1:
        ordered, order = table.sort(dim=-1, descending=True)
        dropped = torch.zeros_like(table, dtype=torch.bool).scatter(
            1, order, ordered.exp().cumsum(-1) - ordered.exp() >= sampling.top_p
        )
        table = torch.log_softmax(table.masked_fill(dropped, -torch.inf), dim=-1)
    expected = table[torch.arange(len(completion.token_ids)), list(completion.token_ids)]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_greedy_tokens_are_those_of_the_local_engine(model, engine):
    wanted = requests(24, temperature=0.0, max_tokens=24)
    local = LocalEngine(model, slots=32, cache_mib=64, context_tokens=CONTEXT)
    for request, ours, theirs in zip(wanted, serve(local, *wanted), serve(engine, *wanted), strict=True):
        assert ours.token_ids == theirs.token_ids
        torch.testing.assert_close(torch.tensor(theirs.logprobs), torch.tensor(ours.logprobs), atol=1e-4, rtol=0)
        assert_matches(model, request, theirs)


def test_log_probabilities_are_the_learners(model, engine):
    """Of free replies and of such as were restricted to allowed ids."""
    wanted = [
        *requests(temperature=0.7),
        *requests(temperature=0.7, allowed_ids=(2, 9, 33, 70)),
        *requests(temperature=0.7, allowed_ids=tuple(range(50))),
    ]
    completions = serve(engine, *wanted)
    groups = []
    for i, (request, completion) in enumerate(zip(wanted, completions, strict=True)):
        turn = Turn(
            request.token_ids,
            completion.token_ids,
            completion.logprobs,
            "stop",
            "",
            "",
            None,
            Action("x"),
            allowed_ids=request.sampling.allowed_ids,
        )
        task = Task(f"task-{i}", "train")
        groups.append(Group(i, task, [Trajectory(task, i, i, i, [turn], Status.FAILURE)]))
    rows = rows_from_groups(groups)
    assert rows.allowed is not None and rows.allowed.sets == 2
    for packing in ("padded", "tree"):
        logprobs = LocalLearner(model, LearnerSection(precision="fp32", packing=packing), temperature=0.7).logprobs(
            rows
        )
        torch.testing.assert_close(
            logprobs[rows.padded_mask], rows.rollout_logprobs[rows.action_mask], atol=1e-4, rtol=0
        )
    assert int(rows.action_mask.sum()) == sum(len(c.token_ids) for c in completions)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(engine):
    together = serve(engine, *requests())
    for request, completion in zip(requests(), together, strict=True):
        alone = serve(engine, request)[0]
        assert alone.token_ids == completion.token_ids
    other = serve(engine, *requests(seed=7))
    assert [c.token_ids for c in other] != [c.token_ids for c in together]


def test_siblings_of_one_prompt_differ_and_repeat(engine):
    siblings = [Request((0, i, 0), prompt(1, 20), sampling=Sampling(max_tokens=12, seed=i)) for i in range(8)]
    first, second = serve(engine, *siblings), serve(engine, *siblings)
    assert len({c.token_ids for c in first}) == 8
    assert [c.token_ids for c in first] == [c.token_ids for c in second]


def test_only_the_requests_stop_ids_stop(engine):
    free = serve(engine, *requests(64, max_tokens=40, temperature=1.5))
    assert all(c.finish_reason == "length" and len(c.token_ids) == 40 for c in free)
    assert any(3 in c.token_ids for c in free)  # the model's own end token
    stops = (5, 11, 17, VOCABULARY + 3)  # a tokenizer may know tokens that its model cannot say
    for completion in serve(engine, *requests(16, max_tokens=200, temperature=1.5, stop_ids=stops)):
        assert completion.finish_reason == "stop" and len(completion.logprobs) == len(completion.token_ids)
        assert completion.token_ids[-1] in stops and not set(completion.token_ids[:-1]) & set(stops)


@pytest.mark.parametrize(
    "sampling",
    [
        {"allowed_ids": (2, 9, 33, 70)},
        {"top_p": 0.5},
        {"top_p": 0.7, "allowed_ids": tuple(range(0, 96, 2)), "temperature": 1.3},
    ],
)
def test_restricted_draws_are_renormalised(model, engine, sampling):
    for request, completion in zip(requests(**sampling), serve(engine, *requests(**sampling)), strict=True):
        assert set(completion.token_ids) <= set(sampling.get("allowed_ids", range(VOCABULARY)))
        assert_matches(model, request, completion)


def test_shared_beginnings_are_computed_once(model, engine):
    before = dict(engine.counters)
    start = prompt(900, 2 * BLOCK)
    first = serve(engine, Request((0, 0, 0), (*start, 1, 2), sampling=Sampling(max_tokens=4, seed=1)))[0]
    request = Request((0, 0, 1), (*start, 7, 8, 9), sampling=Sampling(max_tokens=4, seed=2))
    second = serve(engine, request)[0]
    assert (first.cached_tokens, second.cached_tokens) == (0, 2 * BLOCK)
    assert_matches(model, request, second)
    gained = {name: engine.counters[name] - before[name] for name in before}
    assert (gained["prefilled_tokens"], gained["cached_tokens"], gained["sampled_tokens"]) == (
        2 * BLOCK + 2 + 3,
        2 * BLOCK,
        8,
    )
    assert 0 < gained["seconds"] < 60


def test_many_requests_from_two_event_loops(model, engine):
    results: dict[int, list[Completion]] = {}
    threads = [
        threading.Thread(target=lambda part=part: results.update({part: serve(engine, *requests(64, max_tokens=30))}))
        for part in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * LIMIT_S)
    assert [c.token_ids for c in results[0]] == [c.token_ids for c in results[1]] and len(results[0]) == 64
    for request, completion in list(zip(requests(64, max_tokens=30), results[0], strict=True))[::9]:
        assert_matches(model, request, completion)


def endless(number: int = 0, **changes) -> Request:
    return Request((9, number), prompt(number, 5), sampling=Sampling(max_tokens=CONTEXT - 5), **changes)


def idle(engine) -> bool:
    """Whether vLLM itself has nothing left to do."""
    limit = time.monotonic() + LIMIT_S
    while (left := engine.llm.get_num_unfinished_requests()) and time.monotonic() < limit:
        time.sleep(0.01)
    return not left


def test_deadline(engine):
    with pytest.raises(EngineError, match=r"request \(9, 0\): no reply within 0.01 s"):
        serve(engine, endless(deadline_s=0.01))
    assert idle(engine)


def test_cancel_and_a_cancelled_caller(engine):
    async def play():
        ours, others, finished = (asyncio.create_task(engine.generate(endless(i))) for i in range(3))
        await all_begun(engine, 3)
        await engine.cancel((9, 0))
        others.cancel()
        with pytest.raises(EngineError, match=r"request \(9, 0\): cancelled"):
            await ours
        with pytest.raises(asyncio.CancelledError):
            await others
        return await finished

    assert len(asyncio.run(play()).token_ids) == CONTEXT - 5
    assert idle(engine)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"token_ids": ()}, "0 prompt"),
        ({"token_ids": (VOCABULARY,)}, "token ids must lie in"),
        ({"token_ids": (1,) * CONTEXT}, f"the context holds {CONTEXT}"),
        ({"sampling": Sampling(max_tokens=0)}, "0 reply tokens"),
        ({"sampling": Sampling(top_p=0.0, max_tokens=4)}, "top_p"),
        ({"sampling": Sampling(temperature=0.001, max_tokens=4)}, "at least 0.01"),
        ({"sampling": Sampling(allowed_ids=(), max_tokens=4)}, "allowed_ids"),
        ({"images": (Image(b"no picture"),)}, "takes no images"),
    ],
)
def test_requests_that_cannot_be_served(engine, changes, text):
    with pytest.raises(EngineError, match=text):
        serve(engine, Request(**{"id": (1, 2), "token_ids": (1, 2), "sampling": Sampling(max_tokens=4), **changes}))


def test_new_weights_label_the_tokens_drawn_from_them(engine, folder, tmp_path):
    other = tiny(seed=4)
    other.save_pretrained(tmp_path)
    request = Request((0, 0), prompt(1, 300), sampling=Sampling(max_tokens=8, temperature=0.0))
    before = serve(engine, request)[0]

    async def play():
        running = [asyncio.create_task(engine.generate(endless(i))) for i in range(4)]
        await all_begun(engine, 4)
        await asyncio.to_thread(send_weights, engine.receiver, tmp_path, 7)
        return await asyncio.gather(*running)

    for completion in asyncio.run(play()):
        assert (completion.min_version, completion.max_version) == (0, 7) and len(completion.token_ids) == CONTEXT - 5
    after = serve(engine, request)[0]
    assert (after.min_version, after.max_version, engine.version, after.cached_tokens) == (7, 7, 7, 0)
    assert_matches(other, request, after)
    send_weights(engine.receiver, folder, 8)
    again = serve(engine, request)[0]
    assert again.token_ids == before.token_ids and (again.min_version, again.max_version) == (8, 8)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    """A random low-rank adapter, far from zero."""
    peft = pytest.importorskip("peft")
    path, base = tmp_path_factory.mktemp("adapter"), tiny()
    wrapped = peft.get_peft_model(
        base,
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(path)
    return path


def test_adapters_then_a_killed_core(folder, model, adapter):
    """One more engine: with adapters; then its core process is killed in mid-request."""
    import peft

    engine = VLLMEngine(folder, VllmSection(), ROLLOUT, threads=1, lora_rank=4, name="worker 3")
    try:
        plain = requests(6, temperature=0.7)
        completions = serve(engine, *plain)
        engine.receiver.begin({"version": 1, "transport": "adapter"}, 60)
        assert engine.receiver.take({"adapter": str(adapter)}, 60)
        engine.receiver.finish(1, 60)
        completions += serve(engine, *plain)
        merged = peft.PeftModel.from_pretrained(tiny(), adapter).merge_and_unload().eval()
        for i, request in enumerate(plain):
            assert_matches(model, request, completions[i])
            assert_matches(merged, request, completions[6 + i])
        assert (
            max(abs(scores(model, r, c) - scores(merged, r, c)).max() for r, c in zip(plain, completions, strict=False))
            > 0.1
        )

        async def play():
            tasks = [asyncio.create_task(engine.generate(endless(i))) for i in range(3)]
            await all_begun(engine, 3)
            for process in engine._processes.ids():
                if "Core" in Path(f"/proc/{process}/cmdline").read_text():
                    os.kill(process, signal.SIGKILL)
            return await asyncio.gather(*tasks, return_exceptions=True)

        for error in asyncio.run(play()):
            assert isinstance(error, EngineError) and "worker 3 died" in str(error)
        assert not engine.health()
        with pytest.raises(EngineError, match="worker 3 (died|is dead)"):
            serve(engine, plain[0])
    finally:
        engine.close()
    assert engine._processes.ids() == []
