"""What runs inside vLLM's own worker processes when weights arrive.

vLLM's weight-transfer calls return nothing, and the check of every sync needs to know what each worker read. A worker
extension (`worker_extension_cls`) is vLLM's own way to add calls that do answer: `collective_rpc("spearrl_take", ...)`,
also over a server's /collective_rpc route. It needs no registration and inherits from nothing that moves between
versions; NCCL and CUDA IPC go through vLLM's transfer engines underneath.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from spearrl.sync.buckets import digest, model_digest, read_bucket

EXTENSION = "spearrl.rollout.vllm.worker_extension.WeightReceiver"


class WeightReceiver:
    """Mixed into vLLM's worker, whose attributes it uses. Arguments are JSON text: over HTTP nothing else passes."""

    def spearrl_begin(self, text: str) -> None:
        """Open an update; "init" holds what vLLM's transfer engine needs to meet the trainer first."""
        worker: Any = self
        plan = json.loads(text)
        if plan["transport"] == "shared_memory":
            forget_kernels(worker.model_runner.get_model())
            _in_context(worker, "initialize_layerwise_reload", worker.model_runner.get_model())
        elif "init" in plan:
            if hasattr(
                worker, "shutdown_weight_transfer_engine"
            ):  # a replaced worker elsewhere means a new group for everybody
                worker.shutdown_weight_transfer_engine()
            worker.init_weight_transfer_engine(plan["init"])
        else:
            worker.start_weight_update()

    def spearrl_take(self, text: str) -> dict[str, int]:
        """Load one bucket; the digest of every tensor as it was received."""
        worker: Any = self
        bucket, model, received = json.loads(text), worker.model_runner.get_model(), {}
        load = model.load_weights

        def recorded(weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
            pairs = list(weights)
            received.update({name: digest(tensor) for name, tensor in pairs})
            return load(pairs)

        if "path" in bucket:
            from vllm.config import set_current_vllm_config

            tensors = read_bucket(bucket["path"])
            with ThreadPoolExecutor(1) as beside, set_current_vllm_config(worker.vllm_config):
                digests = beside.submit(lambda: {name: digest(tensor) for name, tensor in tensors.items()})
                load(tensors.items())
                return digests.result()
        model.load_weights = recorded  # hides the class's method until it is deleted
        try:
            worker.update_weights(bucket["update"])
        finally:
            del model.load_weights
        return received

    def spearrl_finish(self, text: str) -> dict[str, int]:
        """Make what was loaded the model's weights; {"digest": of all parameters} where asked for."""
        worker: Any = self
        plan, model = json.loads(text), worker.model_runner.get_model()
        if plan["transport"] == "shared_memory":
            _in_context(worker, "finalize_layerwise_reload", model, worker.vllm_config.model_config)
            refresh_head(model)
            worker.model_runner.reset_lora_state()
        else:
            worker.finish_weight_update()
        return {"digest": model_digest(model)} if plan.get("digest") else {}


def _in_context(worker: Any, step: str, *arguments: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import reload

    function: Callable[..., None] = getattr(reload, step)
    with set_current_vllm_config(worker.vllm_config):
        function(*arguments)


def forget_kernels(model: Any) -> None:
    """On processors experts are packed only where their layer has no kernel yet (vLLM 0.32): a reload would leave them
    as they came.
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None and next(layer.parameters()).device.type == "cpu":
            method.moe_kernel = None


def refresh_head(model: Any) -> None:
    """On processors the head keeps a packed copy of its weights; where it is tied to the embedding, a reload renews the
    embedding's only.
    """
    head = getattr(
        getattr(model, "language_model", model), "lm_head", None
    )  # that of a model with a vision part belongs to its language model
    if head is not None and head.weight.device.type == "cpu":
        head.quant_method.process_weights_after_loading(head)
