"""Pictures through vLLM: a tiny random BLIP-2 against transformers' own forward (the processors of Qwen-VL need
torchvision).
"""

from __future__ import annotations

import asyncio
import io

import pytest
import torch

pytest.importorskip("vllm")

from spearrl.config.sections import RolloutSection, VllmSection
from spearrl.errors import EngineError
from spearrl.models import train_tokenizer
from spearrl.rollout import Request, Sampling
from spearrl.rollout.vllm import VLLMEngine
from spearrl.types import Image

SIDE, QUERIES = 28, 4


def build(folder):
    """A model and its processor, saved to folder; weights large enough that a picture matters."""
    import transformers as t

    tokenizer = train_tokenizer(["what is in this picture: a red square, a green one"] * 3, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vocabulary = -(-len(tokenizer) // 8) * 8
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = t.OPTConfig(
        **shape,
        vocab_size=vocabulary,
        ffn_dim=96,
        word_embed_proj_dim=64,
        max_position_embeddings=256,
        bos_token_id=5,
        eos_token_id=5,
    )
    vision = t.Blip2VisionConfig(**shape, intermediate_size=96, image_size=SIDE, patch_size=14)
    queries = t.Blip2QFormerConfig(**shape, intermediate_size=96, vocab_size=vocabulary, encoder_hidden_size=64)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = t.Blip2Config(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        qformer_config=queries.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=image,
    )
    torch.manual_seed(0)
    model = t.Blip2ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    pictures = t.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    t.Blip2Processor(image_processor=pictures, tokenizer=tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)
    return model, tokenizer, pictures, image


def test_log_probabilities_given_a_picture(tmp_path):
    import PIL.Image

    model, tokenizer, pictures, image = build(tmp_path)
    prompt = tuple(tokenizer("what is in this picture")["input_ids"])
    engine = VLLMEngine(tmp_path, VllmSection(), RolloutSection(context_tokens=128, cache_mib=32), threads=1)
    replies = []
    try:
        for colour in ((200, 10, 10), (0, 250, 60)):
            file = io.BytesIO()
            PIL.Image.new("RGB", (SIDE, SIDE), colour).save(file, "PNG")
            request = Request((0,), prompt, (Image(file.getvalue()),), Sampling(temperature=0.8, max_tokens=8, seed=1))
            completion = asyncio.run(engine.generate(request))
            ids = torch.tensor(
                [[*(image,) * QUERIES, *prompt, *completion.token_ids]]
            )  # the processor puts the picture first
            pixels = pictures(images=[PIL.Image.open(file)], return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=pixels).logits[0].float()
            expected = torch.log_softmax(logits[-9:-1] / 0.8, dim=-1)[torch.arange(8), list(completion.token_ids)]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)
            replies.append(completion.token_ids)
        assert replies[0] != replies[1]
        with pytest.raises(EngineError, match="cannot identify image"):
            asyncio.run(engine.generate(Request((1,), prompt, (Image(b"no picture"),), Sampling(max_tokens=2))))
        assert engine.health()
    finally:
        engine.close()
