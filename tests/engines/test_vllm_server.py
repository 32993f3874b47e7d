"""A running vLLM server as the engine: the same tokens and log-probabilities over HTTP, its token asked for, new
weights through its routes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("vllm")

from spearrl.config.sections import RolloutSection, VllmSection
from spearrl.errors import ConfigError, EngineError
from spearrl.rollout import LocalEngine, Request, Sampling
from spearrl.rollout.vllm.server import RemoteEngine
from spearrl.rollout.vllm.worker_extension import EXTENSION
from tests.engines.test_vllm_engine import CONTEXT, assert_matches, endless, tiny
from tests.support.engine_requests import prompt, requests, send_weights, serve

SWITCHES = (
    "--skip-tokenizer-init --enable-scale-out --enable-prompt-tokens-details --logprobs-mode processed_logprobs "
    "--dtype float32 --enforce-eager "
    f"--max-model-len {CONTEXT} --no-enable-chunked-prefill --max-num-batched-tokens 4096 "
    f"--gpu-memory-utilization 0.1 --worker-extension-cls {EXTENSION}"
)
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
ROLLOUT = RolloutSection(context_tokens=CONTEXT)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """URL and model directory of a real server, in a process group of its own."""
    folder = tmp_path_factory.mktemp("served")
    tiny().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *SWITCHES.split(),
    ]
    environment = (
        os.environ
        | ENVIRONMENT
        | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    )
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [*command, "--api-key", "right"], env=environment, stdout=log, stderr=log, start_new_session=True
    )
    url, limit = f"http://127.0.0.1:{port}", time.monotonic() + 300
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None and time.monotonic() < limit, (folder / "log").read_text()[-3000:]
                time.sleep(0.5)
        yield url, folder
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def test_a_server(server, monkeypatch, tmp_path):
    url, folder = server
    for token, message in (
        ("", "wants a token, and SPEARRL_ENGINE_TOKEN is not set"),
        ("wrong", "refuses the token in SPEARRL_ENGINE_TOKEN"),
    ):
        monkeypatch.setenv("SPEARRL_ENGINE_TOKEN", token)
        with pytest.raises(EngineError, match=message) as refused:
            RemoteEngine(url, folder, VllmSection(), ROLLOUT)
        assert url in str(refused.value) and "wrong" not in str(refused.value)
    monkeypatch.setenv("SPEARRL_OTHER_TOKEN", "right")
    other = VllmSection(token_variable="SPEARRL_OTHER_TOKEN")
    with pytest.raises(ConfigError, match=f"holds {CONTEXT} tokens"):
        RemoteEngine(
            url, folder, VllmSection(token_variable="SPEARRL_OTHER_TOKEN"), RolloutSection(context_tokens=CONTEXT + 1)
        )
    engine, model = RemoteEngine(url, folder, VllmSection(token_variable="SPEARRL_OTHER_TOKEN"), ROLLOUT), tiny()
    assert engine.health()

    wanted = requests(16, temperature=0.0, max_tokens=16)
    local = LocalEngine(model, slots=16, cache_mib=64, context_tokens=CONTEXT)
    assert [c.token_ids for c in serve(engine, *wanted)] == [c.token_ids for c in serve(local, *wanted)]
    for sampling in (
        {"temperature": 0.7},
        {"allowed_ids": (2, 9, 33)},
        {"top_p": 0.6},
        {"stop_ids": tuple(range(48)), "max_tokens": 200},
    ):
        completions = serve(engine, *requests(**sampling))
        for request, completion in zip(requests(**sampling), completions, strict=True):
            assert_matches(model, request, completion)
        assert ({c.finish_reason for c in completions} == {"stop"}) == ("stop_ids" in sampling)
    assert serve(engine, requests()[3])[0].token_ids == serve(engine, *requests())[3].token_ids
    repeated = Request((0, 0), prompt(901, 300), sampling=Sampling(max_tokens=2))
    assert [serve(engine, repeated)[0].cached_tokens for _ in range(2)] == [0, 256]

    with pytest.raises(EngineError, match="token ids must lie in"):
        serve(engine, Request((0,), (5000,), sampling=Sampling(max_tokens=2)))
    with pytest.raises(EngineError, match="no reply within 0.01 s"):
        serve(engine, endless(deadline_s=0.01))

    async def cancelled():
        task = asyncio.create_task(engine.generate(endless()))
        await asyncio.sleep(0.05)
        await engine.cancel((9, 0))
        with pytest.raises(EngineError, match="cancelled"):
            await task

    asyncio.run(cancelled())

    other = tiny(seed=4)
    other.save_pretrained(tmp_path)
    send_weights(engine.receiver, tmp_path, 5)
    after = serve(engine, wanted[0])[0]
    assert (after.min_version, after.max_version, engine.version) == (5, 5, 5)
    assert_matches(other, wanted[0], after)
    with pytest.raises(EngineError, match="has no /nothing"):
        engine.post("/nothing", {}, 5)
    engine.close()
    assert not engine.health()
    with pytest.raises(EngineError, match="is closed"):
        serve(engine, wanted[0])
