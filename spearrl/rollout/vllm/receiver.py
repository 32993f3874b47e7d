"""How vLLM engines take new weights: in a process of ours, and over a server's routes."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from spearrl.errors import EngineError
from spearrl.sync.buckets import digest, read_bucket

ASK_S = 30.0  # for what a server says about itself


class VLLMWeights:
    """The receiver of a VLLMEngine.

    Running requests are recomputed under new weights: vLLM does not drop cached keys and values while requests hold
    them, and a new request with the same beginning would be served those of the old weights.
    """

    def __init__(self, engine: Any):
        self.engine = engine
        self.name: str = engine.name
        self._plan: dict[str, Any] = {}
        self._adapter: Any = None
        self._probes = 0

    @property
    def transports(self) -> tuple[str, ...]:
        """What this engine was started for."""
        backend = self.engine.transfer_backend
        return (*(("adapter",) if self.engine.lora_rank else ()), *((backend,) if backend else ()), "shared_memory")

    @property
    def shards(self) -> int:
        """GPUs the engine is split over."""
        return self.engine.shards

    def pause(self, timeout_s: float) -> None:
        llm = self.engine.llm
        self.engine.run(lambda: llm.pause_generation(mode="keep", clear_cache=False), timeout_s, doing="pause")

    def resume(self, timeout_s: float) -> None:
        self.engine.run(self.engine.llm.resume_generation, timeout_s, doing="resume")

    def begin(self, plan: dict[str, Any], timeout_s: float) -> None:
        self._plan = plan
        if plan["transport"] != "adapter":
            self._call("spearrl_begin", plan, timeout_s)

    def take(self, bucket: dict[str, Any], timeout_s: float) -> dict[str, int]:
        if "adapter" in bucket:
            return self._take_adapter(bucket["adapter"], timeout_s)
        results = self._call("spearrl_take", bucket, timeout_s)
        for shard, result in enumerate(results):
            if different := [name for name in result if result[name] != results[0].get(name)]:
                raise EngineError(
                    f"shard {shard} received another {different[0]} than shard 0",
                    where=self.name,
                    hint="look at that GPU's log",
                )
        return results[0]

    def finish(self, version: int, timeout_s: float) -> list[int]:
        digests, whole = [], self._plan["transport"] != "adapter"
        self.engine.adapter = None if whole else self._adapter  # whole weights have adapters merged in
        if whole:
            digests = [result["digest"] for result in self._call("spearrl_finish", self._plan, timeout_s) if result]
            self._settle(version, timeout_s)
        self.engine.version = version
        return digests

    def probe(self, token_ids: list[int], timeout_s: float) -> list[float]:
        read = self._prefix_logprobs if self.engine.lora_rank else self._prompt_logprobs
        return self.engine.run(lambda: read(token_ids), timeout_s, doing="probe")

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def _call(self, method: str, argument: dict[str, Any], timeout_s: float) -> list[Any]:
        llm, text = self.engine.llm, json.dumps(argument)
        return self.engine.run(
            lambda: llm.collective_rpc(method, args=(text,)), timeout_s, doing=method.removeprefix("spearrl_")
        )

    def _settle(self, version: int, timeout_s: float) -> None:
        """Drop what the old weights left behind, and label what the new ones sample."""
        llm, slept = self.engine.llm, self.engine.asleep

        async def settle() -> None:
            if slept:  # level 2 gave the caches' memory back too
                await llm.wake_up(["kv_cache"])
            await llm.reset_prefix_cache(reset_running_requests=True)
            if self.engine.takes_images:  # what the old vision tower made of pictures
                await llm.reset_encoder_cache()
            await llm.update_weight_version(str(version))

        self.engine.run(settle, timeout_s, doing="finish")
        self.engine.asleep = False

    def _take_adapter(self, folder: str, timeout_s: float) -> dict[str, int]:
        # Every version has a folder, so a name and an id, of its own: requests in flight keep theirs, cached prefixes
        # are kept apart.
        llm, self._adapter = self.engine.llm, self.engine.adapter_request(folder)
        self.engine.run(lambda: llm.add_lora(self._adapter), timeout_s, doing="adapter")
        return {
            name: digest(tensor) for name, tensor in read_bucket(Path(folder) / "adapter_model.safetensors").items()
        }

    async def _prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        scores = (await self._generate(token_ids, {"prompt_logprobs": 0})).prompt_logprobs
        return [float(scores[i][token].logprob) for i, token in enumerate(token_ids) if i]

    async def _prefix_logprobs(self, token_ids: list[int]) -> list[float]:
        """A request for every beginning: on processors, prompt log-probabilities end a vLLM that was started with
        adapters.
        """
        requests = [
            self._generate(token_ids[:i], {"logprob_token_ids": [token]}) for i, token in enumerate(token_ids) if i
        ]
        outputs = await asyncio.gather(*requests)
        return [
            float(output.outputs[0].logprobs[0][token].logprob)
            for output, token in zip(outputs, token_ids[1:], strict=True)
        ]

    async def _generate(self, token_ids: list[int], settings: dict[str, Any]) -> Any:
        """vLLM's last output for one more token, computed afresh."""
        from vllm import SamplingParams

        self._probes += 1
        sampling = SamplingParams(
            max_tokens=1, temperature=1.0, detokenize=False, skip_reading_prefix_cache=True, **settings
        )
        prompt = {"type": "token", "prompt_token_ids": token_ids}
        stream = self.engine.llm.generate(
            prompt, sampling, request_id=f"probe-{self._probes}", lora_request=self.engine.adapter
        )
        return [output async for output in stream][-1]


class ServerWeights(VLLMWeights):
    """The receiver of a RemoteEngine: the same calls over the server's development routes."""

    @property
    def transports(self) -> tuple[str, ...]:
        """Shared memory needs this machine; NCCL a server started with --weight-transfer-config."""
        local = urlsplit(self.engine.url).hostname in ("localhost", "127.0.0.1", "::1", socket.gethostname())
        return ("shared_memory", "nccl") if local else ("nccl",)

    @property
    def shards(self) -> int:
        """GPUs behind the server."""
        return int(self.engine.get("/get_world_size", ASK_S)["world_size"])

    def pause(self, timeout_s: float) -> None:
        self.engine.post("/pause?mode=keep&clear_cache=false", None, timeout_s)

    def resume(self, timeout_s: float) -> None:
        self.engine.post("/resume", None, timeout_s)

    def probe(self, token_ids: list[int], timeout_s: float) -> list[float]:
        sampling = {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
        answer = self.engine.post(
            "/inference/v1/generate", {"token_ids": token_ids, "sampling_params": sampling}, timeout_s
        )
        return [float(answer["prompt_logprobs"][i][str(token)]["logprob"]) for i, token in enumerate(token_ids) if i]

    def _call(self, method: str, argument: dict[str, Any], timeout_s: float) -> list[Any]:
        body = {"method": method, "args": [json.dumps(argument)], "timeout": timeout_s}
        return self.engine.post("/collective_rpc", body, timeout_s)["results"]

    def _settle(self, version: int, timeout_s: float) -> None:
        if not self.engine.post("/reset_prefix_cache?reset_running_requests=true", None, timeout_s)["success"]:
            raise EngineError("the server could not drop its prefix cache", where=self.name)
        if self.engine.takes_images:
            self.engine.post("/reset_encoder_cache", None, timeout_s)
        self.engine.post("/update_weight_version", {"new_version": str(version)}, timeout_s)
