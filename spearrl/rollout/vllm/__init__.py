"""vLLM as a rollout engine: in processes of this run, or on a server."""

from spearrl.rollout.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine"]
