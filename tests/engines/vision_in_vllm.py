"""Run by test_vllm_vision.py in a process of its own: a tiny Qwen2.5-VL in vLLM against transformers' own forward,
before and after a weight sync.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from spearrl.config.sections import LearnerSection, RolloutSection, SyncSection, VllmSection
from spearrl.learner import LocalLearner
from spearrl.models import save_model
from spearrl.rollout import ChatEncoder
from spearrl.rollout.vllm import VLLMEngine
from spearrl.sync import Bridge
from tests.models.test_vision import played
from tests.support.vision_models import own_logprobs, vision_model


def compare(model, engine, encoder, seeds) -> None:
    """Conversations of four turns, with up to four pictures and with none."""
    for request, completion in (turn for chat in played(engine, encoder, *seeds) for turn in chat.played):
        wanted = own_logprobs(model, [*request.token_ids, *completion.token_ids], request.images)[
            -len(completion.token_ids) :
        ]
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=2e-4, rtol=0)
        assert not set(completion.token_ids) & set(model.vision.forbidden)


def main(folder: Path) -> None:
    model, tokenizer = vision_model()
    save_model(model, tokenizer, folder / "model")
    engine = VLLMEngine(
        folder / "model", VllmSection(), RolloutSection(context_tokens=400, cache_mib=64, slots=8), threads=1
    )
    try:
        encoder = ChatEncoder(tokenizer)
        compare(model, engine, encoder, range(6))
        learner = LocalLearner(model, LearnerSection(precision="fp32"))
        bridge = Bridge(
            learner,
            [engine.receiver],
            settings=SyncSection(),
            probe_ids=list(range(24)),
            run_folder=folder,
            float32=True,
        )
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num(0.1))
        bridge.publish(1)
        compare(model, engine, encoder, range(6, 9))
        bridge.close()
    finally:
        engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
