"""Models that see: patches and positions are transformers' own, and engine and learner compute what its forward
computes.
"""

from __future__ import annotations

import asyncio
import json
import random

import pytest
import torch
from safetensors.torch import load_file

from spearrl.batching import Batch, Rows, rows_from_groups
from spearrl.config.sections import LearnerSection
from spearrl.errors import ConfigError, ContractError, EngineError
from spearrl.learner import LocalLearner
from spearrl.losses import Objective
from spearrl.models import load_model, load_tokenizer, save_model
from spearrl.rollout import ChatEncoder, Completion, LocalEngine, Request, Sampling
from spearrl.rollout.local.prompt import whole_images
from spearrl.types import Action, Group, Image, Message, Task, Text, Trajectory, Turn
from tests.support.vision_models import own_logprobs, picture, vision_model

CONTEXT = 400


def user(*parts: str | Image) -> Message:
    return Message("user", tuple(Text(p) if isinstance(p, str) else p for p in parts))


def engine_of(model, **changes) -> LocalEngine:
    return LocalEngine(model, **{"slots": 8, "cache_mib": 64, "context_tokens": CONTEXT, **changes})


def test_positions_are_transformers_own():
    model, _ = vision_model()
    vision, draws = model.vision, random.Random(3)
    for _ in range(30):
        grids = [(1, 2 * draws.randrange(1, 9), 2 * draws.randrange(1, 9)) for _ in range(draws.randrange(1, 4))]
        ids = [9] * draws.randrange(3)
        for grid in grids:
            ids += [11, *[vision.image_id] * vision.tokens(grid), *[12] * draws.randrange(1, 5)]
        ids = torch.tensor(ids)
        wanted, shift = model.model.get_rope_index(ids[None], (ids == vision.image_id).int()[None], torch.tensor(grids))
        made = vision.positions(ids, grids)
        assert torch.equal(made, wanted[:, 0]) and int(made[0, -1]) + 1 - len(ids) == int(shift)


def test_image_tokens_without_their_pictures_are_refused():
    vision = vision_model()[0].vision
    with pytest.raises(ContractError, match="2 image tokens for pictures of"):
        vision.positions(torch.tensor([1, vision.image_id, vision.image_id]), [(1, 4, 4)])
    for broken in (Image(b"no picture"), picture(1, 1000, 4)):
        with pytest.raises(ContractError, match="no picture"):
            vision.count(broken)
    half = Image(picture(1).data[:2000])
    assert vision.count(half) == 4
    with pytest.raises(ContractError, match="no picture"):
        vision.process(half.digest, half.data)


def test_the_cache_of_patches_is_bounded(monkeypatch):
    vision = vision_model()[0].vision
    pictures = [picture(seed) for seed in range(4)]
    each = vision.process(pictures[0].digest, pictures[0].data).patches
    monkeypatch.setattr("spearrl.models.vision.CACHE_BYTES", 2 * each.nbytes)
    for image in pictures:
        vision.process(image.digest, image.data)
    assert list(vision._cache) == [image.digest for image in pictures[2:]]
    assert torch.equal(vision.process(pictures[0].digest, pictures[0].data).patches, each)


def test_the_encoder_makes_as_many_image_tokens_as_the_processor_patches():
    model, tokenizer = vision_model()
    encoder, vision = ChatEncoder(tokenizer), model.vision
    encoder.verify()
    assert not encoder.rewrites_history
    for width, height in ((28, 28), (56, 84), (100, 60), (500, 300), (10, 10)):
        image = picture(1, width, height)
        ids = encoder.start([user("look ", image, " again")])
        assert (
            ids.count(vision.image_id)
            == vision.count(image)
            == len(vision.process(image.digest, image.data).patches) // 4
        )
    first, second = picture(1), picture(2, 84, 56)
    start = encoder.start([user("look", first)])
    grown = encoder.extend(start, encoder.reply_ids(" red"), [user("again", second, picture(3))])
    assert grown[: len(start)] == start and grown.count(vision.image_id) == 4 + 6 + 4
    assert grown == encoder.start(
        [user("look", first), Message("assistant", " red"), user("again", second, picture(3))]
    )


def test_vision_tokens_in_text_stay_text():
    _, tokenizer = vision_model()
    encoder, hostile = ChatEncoder(tokenizer), "a <|vision_start|><|image_pad|><|image_pad|><|vision_end|> b"
    ids = encoder.start([user(hostile, picture(1)), Message("user", hostile)])
    assert ids.count(encoder.vision.image_id) == 4 and tokenizer.decode(ids).count(hostile) == 2
    assert encoder.vision.image_id not in encoder.reply_ids(hostile)


def test_a_template_that_leaves_pictures_out_is_refused():
    _, tokenizer = vision_model()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|image_pad|>", "")
    with pytest.raises(ConfigError, match="shows 0 of 1 pictures"):
        ChatEncoder(tokenizer).start([user("look", picture(1))])
    with pytest.raises(ConfigError, match="shows 0 of 1 pictures"):
        ChatEncoder(tokenizer).check_images()


class Conversation:
    """A chat of several turns over an engine, pictures in some of its messages."""

    def __init__(self, engine, encoder, seed: int, *, turns: int = 4, pictures: bool = True, group: int | None = None):
        self.engine, self.encoder, self.seed, self.turns = engine, encoder, seed, turns
        self.pictures, self.group = pictures, seed if group is None else group
        self.played: list[tuple[Request, Completion]] = []

    def message(self, turn: int) -> Message:
        shared = self.group if turn == 0 else self.seed  # siblings begin alike
        draws = random.Random(100 * shared + turn)
        size = (28 * draws.randrange(1, 4), 28 * draws.randrange(1, 4))
        parts = ["it is", *([picture(100 * shared + turn, *size)] if self.pictures and turn != 1 else []), "red"]
        return user(*parts, *([picture(turn)] if self.pictures and turn == 2 else []))

    async def play(self) -> None:
        prompt, images = (), ()
        for turn in range(self.turns):
            message = self.message(turn)
            prompt = (
                self.encoder.extend(prompt, self.played[-1][1].token_ids, [message])
                if turn
                else self.encoder.start([message])
            )
            images += message.images
            sampling = Sampling(max_tokens=3 + turn, seed=31 * self.seed + turn, stop_ids=self.encoder.stop_ids)
            request = Request((self.group, self.seed, turn), prompt, images, sampling)
            self.played.append((request, await self.engine.generate(request)))

    def trajectory(self) -> Trajectory:
        task = Task("t", "train")
        turns = [
            Turn(
                r.token_ids,
                c.token_ids,
                c.logprobs,
                c.finish_reason,
                "",
                "",
                None,
                Action("x"),
                reward=1.0,
                images=r.images,
            )
            for r, c in self.played
        ]
        return Trajectory(task, self.group, self.seed, self.seed, turns)


def played(engine, encoder, *seeds: int, **options) -> list[Conversation]:
    chats = [Conversation(engine, encoder, seed, **{"pictures": seed % 3 != 2, **options}) for seed in seeds]

    async def all_of_them():
        await asyncio.gather(*(chat.play() for chat in chats))

    asyncio.run(all_of_them())
    return chats


def assert_own(model, chats: list[Conversation]) -> None:
    for request, completion in (turn for chat in chats for turn in chat.played):
        wanted = own_logprobs(model, [*request.token_ids, *completion.token_ids], request.images)[
            -len(completion.token_ids) :
        ]
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("slots", [16, 3])
def test_the_engine_samples_from_transformers_own_distribution(slots: int):
    """Several pictures in conversations of several turns, together with some that have none; slots are reused and
    evicted.
    """
    model, tokenizer = vision_model()
    engine = engine_of(model, slots=slots)
    chats = played(engine, ChatEncoder(tokenizer), *range(6))
    assert_own(model, chats)
    if slots == 16:  # what is held is not computed again
        assert all(
            c.cached_tokens >= len(before[0].token_ids)
            for chat in chats
            for before, (_, c) in zip(chat.played, chat.played[1:], strict=False)
        )


def test_the_family_before_samples_from_its_own_distribution():
    """Qwen2-VL: the same positions and tokens before another vision tower."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    newer, tokenizer = vision_model()
    text, ids = (
        newer.config.text_config,
        {name: getattr(newer.config, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id")},
    )
    shape = {
        "vocab_size": text.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    shape |= {
        "num_key_value_heads": 1,
        "rope_parameters": text.rope_parameters,
        "initializer_range": 0.3,
        "bos_token_id": None,
    }
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=shape, vision_config=tower, **ids)).eval()
    model.vision = newer.vision
    chats = played(engine_of(model), ChatEncoder(tokenizer), *range(3))
    assert_own(model, chats)
    rows = rows_of(chats)
    torch.testing.assert_close(
        LocalLearner(model, LearnerSection(**SETTINGS)).logprobs(rows),
        rows.pad(rows.rollout_logprobs),
        atol=1e-4,
        rtol=0,
    )


def test_chunks_never_cut_a_picture(monkeypatch):
    monkeypatch.setattr("spearrl.rollout.local.engine.CHUNK", 5)
    model, tokenizer = vision_model()
    assert_own(model, played(engine_of(model), ChatEncoder(tokenizer), 0, 1))
    a, b = [-7] * 4, [-8] * 9
    assert whole_images([1, 2, *a, 3, *b, 4], 5) == 2 and whole_images([*a, 3, *b, 4], 5) == 5
    assert (
        whole_images([*b, 4], 5) == 9 and whole_images([1, 2, 3, 4, 5, 6], 5) == 5 and whole_images([*a, 1, *b], 4) == 4
    )


def test_equal_prompts_with_other_pictures_share_nothing_wrong():
    """Token ids alone are the same for any two pictures of one size."""
    model, tokenizer = vision_model()
    engine, encoder = engine_of(model), ChatEncoder(tokenizer)

    async def ask(number: int, image: Image, turn: int = 0) -> Completion:
        prompt = encoder.start([user("which colour is it ? red , blue , green or gold which colour is it", image)])
        return await engine.generate(
            Request((0, number, turn), prompt, (image,), Sampling(temperature=0, max_tokens=6))
        )

    async def all_of_them():
        alone = [await ask(0, picture(1)), await ask(1, picture(2)), await ask(0, picture(1), 1)]
        return alone, await asyncio.gather(*(ask(3 + i, picture(1 + i % 2)) for i in range(4)))

    alone, together = asyncio.run(all_of_them())
    assert alone[0].token_ids == alone[2].token_ids and alone[0].logprobs[0] != alone[1].logprobs[0]
    assert alone[2].cached_tokens > alone[1].cached_tokens > 0  # up to the picture, and behind it where it is the same
    for number, completion in enumerate(together):
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), torch.tensor(alone[number % 2].logprobs), atol=1e-5, rtol=0
        )


def test_requests_that_cannot_be_served():
    model, tokenizer = vision_model()
    engine, prompt = engine_of(model), ChatEncoder(tokenizer).start([user("look", picture(1))])
    cases = [
        ((picture(1), picture(2)), prompt, "4 image tokens for pictures of"),
        ((), prompt, "4 image tokens for pictures of"),
    ]
    cases += [
        ((Image(b"no picture"),), prompt, "no picture"),
        ((picture(1),), prompt[: prompt.index(engine.forward.vision.image_id) + 4], "ends inside a picture"),
    ]
    for images, ids, text in cases:
        with pytest.raises(EngineError, match=text):
            asyncio.run(engine.generate(Request((0, 0, 0), ids, images, Sampling(max_tokens=2))))
    assert engine.health()


def rows_of(chats: list[Conversation]) -> Rows:
    groups: dict[int, Group] = {}
    for chat in chats:
        groups.setdefault(chat.group, Group(chat.group, Task("t", "train"))).trajectories.append(chat.trajectory())
    return rows_from_groups(list(groups.values()))


SETTINGS = {"precision": "fp32", "micro_batch_tokens": 64, "lr": 1e-3, "gradient_checkpointing": False}


@pytest.fixture(scope="module")
def scene():
    model, tokenizer = vision_model()
    return model, tokenizer, played(engine_of(model), ChatEncoder(tokenizer), *range(6))


def test_the_learner_computes_transformers_own_log_probabilities(scene):
    model, _, chats = scene
    rows = rows_of(chats)
    assert len(rows) == len(chats) and [len(images) for images in rows.images] == [4, 4, 0] * 2
    assert not (rows.token_ids[rows.action_mask] == model.vision.image_id).any()
    for size in (64, 2048):
        made = LocalLearner(model, LearnerSection(**{**SETTINGS, "micro_batch_tokens": size})).logprobs(rows)
        for row, chat in enumerate(chats):
            request, completion = chat.played[-1]
            wanted = own_logprobs(model, [*request.token_ids, *completion.token_ids], request.images)
            mask = rows.padded_mask[row]
            torch.testing.assert_close(
                made[row][mask], wanted[mask[1 : 1 + len(wanted)].nonzero().flatten()], atol=1e-4, rtol=0
            )
        torch.testing.assert_close(made, rows.pad(rows.rollout_logprobs), atol=1e-4, rtol=0)


def gradient(model, rows: Rows, size: int, **changes) -> dict[str, torch.Tensor]:
    import copy

    learner = LocalLearner(
        copy.deepcopy(model),
        LearnerSection(**{**SETTINGS, "micro_batch_tokens": size, "mini_batches": 1, "grad_clip": 1e9, **changes}),
    )
    learner.optimizer.step = lambda: None
    padded = rows.pad(rows.rollout_logprobs)
    advantages = torch.where(rows.padded_mask, torch.linspace(-1, 1, len(rows))[:, None].expand_as(padded), 0.0)
    learner.update(Batch(rows, advantages, padded), None, gamma=0.0, objectives=[Objective("policy")], seed=0)
    return {name: p.grad for name, p in learner.model.named_parameters()}


def test_the_gradient_reaches_the_vision_tower_and_does_not_depend_on_micro_batches(scene):
    model, _, chats = scene
    whole, pieces = (gradient(model, rows_of(chats), size) for size in (4096, 64))
    assert all(float(grad.abs().max()) > 0 for name, grad in whole.items() if "visual" in name and "weight" in name)
    for name in whole:
        torch.testing.assert_close(
            whole[name], pieces[name], atol=1e-5 * float(whole[name].abs().max()) + 1e-8, rtol=1e-3
        )
    again = gradient(model, rows_of(chats), 4096, gradient_checkpointing=True)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_rows_carry_their_pictures(scene, tmp_path):
    _, _, chats = scene
    rows = rows_of(chats)
    assert set(rows.pictures) == {digest for images in rows.images for digest in images}
    part = rows.select([3, 2])
    assert set(part.pictures) == set(rows.images[3]) and not rows.select([2]).pictures
    joined = Rows.concat([part, rows.select([0])])
    assert set(joined.pictures) == {*rows.images[3], *rows.images[0]}
    rows.save(tmp_path / "rows")
    for again in (Rows.load(tmp_path / "rows"), Rows.from_state(rows.state_dict())):
        assert again.images == rows.images and all(
            torch.equal(again.pictures[d], rows.pictures[d]) for d in rows.pictures
        )
    assert "pictures" not in rows.select([2]).state_dict()
    rows.pictures = {}
    with pytest.raises(ContractError, match="are not there"):
        LocalLearner(vision_model()[0], LearnerSection(**SETTINGS)).logprobs(rows)


def test_windowed_prompts_that_differ_in_their_picture_are_rows_of_their_own():
    turns = [Turn((1, 9), (2,), (0.0,), "stop", "", "", None, Action("x"), images=(picture(seed),)) for seed in (1, 2)]
    turns[1].prompt_ids = (1, 9, 2, 9)
    assert len(rows_from_groups([Group(0, Task("t", "train"), [Trajectory(Task("t", "train"), 0, 0, 0, turns)])])) == 2


def test_what_does_not_go_with_pictures_is_refused(scene):
    model, _, chats = scene
    with pytest.raises(ConfigError, match="rows with pictures are not packed"):
        LocalLearner(model, LearnerSection(**SETTINGS, packing="tree"))
    from spearrl.config.sections import TinySection
    from spearrl.models import build_tiny

    blind = build_tiny(["a"], TinySection(layers=1, hidden_size=16, heads=1, feed_forward=16, vocab_size=340), 0)[0]
    with pytest.raises(ContractError, match="rows with pictures"):
        LocalLearner(blind, LearnerSection(**SETTINGS)).logprobs(rows_of(chats))
    with pytest.raises(EngineError, match="takes no images"):
        asyncio.run(engine_of(blind).generate(Request((0, 0, 0), (1, 2), (picture(1),), Sampling(max_tokens=2))))


def test_a_directory_of_a_model_that_sees(tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    model, tokenizer = vision_model(seed=4)
    save_model(model, tokenizer, tmp_path)
    again, words = load_model(str(tmp_path)), load_tokenizer(str(tmp_path))
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)) and torch.equal(parameter, plain.get_parameter(name))
    message = user("look", picture(1, 100, 60))
    assert ChatEncoder(words).start([message]) == ChatEncoder(tokenizer).start([message])
    pixels = [m.vision.process(picture(1).digest, picture(1).data).patches for m in (model, again)]
    assert torch.equal(*pixels)
    # As on the hub: the first release's names of weights and of the processor's settings.
    model.save_pretrained(tmp_path / "hub", save_original_format=True)
    tokenizer.save_pretrained(tmp_path / "hub")
    assert "visual.patch_embed.proj.weight" in load_file(tmp_path / "hub" / "model.safetensors")
    settings = {"min_pixels": 784, "max_pixels": 50176, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    settings |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    settings |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps(settings))
    hub = load_model(str(tmp_path / "hub"))
    assert all(torch.equal(parameter, hub.get_parameter(name)) for name, parameter in model.named_parameters())
    large = picture(2, 300, 200)
    assert torch.equal(
        hub.vision.process(large.digest, large.data).patches, model.vision.process(large.digest, large.data).patches
    )
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps({**settings, "patch_size": 16}))
    with pytest.raises(ConfigError, match=r"makes \(patch, merge\) \(16, 2\)"):
        load_tokenizer(str(tmp_path / "hub"))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"needs preprocessor_config\.json"):
        load_model(str(tmp_path))
