"""Rows as a prefix tree in one sequence: nothing but padding and repetition goes away."""

from __future__ import annotations

import pytest
import torch

from spearrl.batching import forward_inputs, prefix_tree, sequences
from spearrl.config.sections import LearnerSection
from spearrl.errors import ConfigError
from spearrl.learner import LocalLearner, ValueHead
from spearrl.learner import packing as packed_models
from spearrl.learner.tree_attention import AttentionPlan, tree_attention
from spearrl.losses import ClipCov, KlCov, Objective
from tests.batching.test_prefix_tree import dense_mask, sharing_rows
from tests.batching.test_rows import make_rows
from tests.learner.test_learner import RUNS, full_batch, gradient, settings, tiny

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
    "max_position_embeddings": 128,
}
EXACT = 1e-9


def model_of(kind: str, attention: str = "sdpa", **shape) -> torch.nn.Module:
    import transformers

    family = {"head_dim": 8} if kind == "Qwen3" else {}
    grouped = {} if kind in ("Bloom", "Mamba") else {"num_key_value_heads": 1}
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **family, **grouped, **shape})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.ndim > 1 else 1.0)
    return model


def learner_of(model: torch.nn.Module, *, packing: str, **changes) -> LocalLearner:
    critic = ValueHead(16, 3).double()
    torch.nn.init.normal_(critic.outer.weight, generator=torch.Generator().manual_seed(1))
    options = settings(packing=packing, grad_clip=1e9, **changes)
    return LocalLearner(model.double(), options, temperature=0.7, critic=critic)


def test_a_pack_holds_tokens_up_to_each_rows_last_prediction():
    rows = make_rows([[1], [2, 1], [1]])
    clear = rows.turn_index != 0  # the first row predicts nothing: it is not there at all
    rows = rows.with_action_mask(rows.action_mask & clear)
    inputs = forward_inputs(rows, tree=True)
    assert inputs.tree.bounds == (0, 0, 6, 8) and not inputs.tree.shared and inputs.token_ids.shape == (1, 8)
    flat = inputs.token_ids[0].tolist()
    assert flat == rows.token_ids[3:9].tolist() + rows.token_ids[10:12].tolist()
    assert inputs.target.tolist() == rows.token_ids[rows.action_mask].tolist()
    assert inputs.source.tolist() == [1, 2, 5, 7]
    assert inputs.padded.tolist() == rows.padded_mask.flatten().nonzero().flatten().tolist()
    nothing = forward_inputs(rows.with_action_mask(torch.zeros_like(clear)), tree=True)
    assert nothing.tree.bounds[-1] == 1 and nothing.token_ids.shape == (1, 1) and not len(nothing.target)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
def test_log_probabilities_are_those_of_padded_rows(kind):
    rows = sharing_rows(RUNS)
    logprobs = [
        learner_of(model_of(kind), packing=name, micro_batch_tokens=30).logprobs(rows) for name in ("padded", "tree")
    ]
    assert float((logprobs[1] - logprobs[0]).abs().max()) <= EXACT and bool(logprobs[0][rows.padded_mask].all())
    single = [LocalLearner(model_of(kind), settings(packing=name)).logprobs(rows) for name in ("padded", "tree")]
    assert float((single[1] - single[0]).abs().max()) <= 1e-5


@pytest.mark.parametrize("scope", ["mini_batch", "plain"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_padded_rows(scope, checkpointing):
    """Every kind of objective, on-policy and replayed, in one pass and in many; also where layers run again in the
    backward pass. (Norms in float32, as Qwen3's, round the sum of two rows' gradients otherwise than each of them.)
    """
    rules = {
        "mini_batch": {"clip_cov": ClipCov(0.3, -60.0, 60.0)},
        "plain": {"surrogate": "kl_cov", "kl_cov": KlCov(0.3, 0.5)},
    }[scope]
    objectives = [
        Objective("policy", **rules),
        Objective("sil", **rules, token_weight="unsure", token_power=2.0),
        Objective("entropy", weight=0.01),
        Objective("kl", weight=0.1),
        Objective("value", weight=0.5),
    ]
    results = []
    for name, budget in (("padded", 10**6), ("tree", 10**6), ("tree", 25), ("tree", 1)):
        learner = learner_of(
            model_of("Starcoder2"),
            packing=name,
            micro_batch_tokens=budget,
            mini_batches=2,
            gradient_checkpointing=checkpointing,
        )
        on_policy, replay = (
            full_batch(sharing_rows(RUNS), learner),
            full_batch(sharing_rows(RUNS, first_trajectory=100, seed=5), learner, seed=4),
        )
        results.append(gradient(learner, on_policy, replay, objectives, gamma=0.3))
    assert float(results[0].norm()) > 1e-3
    for other in results[1:]:
        assert float((other - results[0]).norm()) <= EXACT * float(results[0].norm())


def test_bf16_stays_within_its_rounding():
    rows = sharing_rows(RUNS)
    logprobs = [
        LocalLearner(tiny(), settings(packing=packing, precision="bf16")).logprobs(rows)
        for packing in ("padded", "tree")
    ]
    assert float((logprobs[1] - logprobs[0]).abs().max()) < 0.2
    exact = LocalLearner(tiny(), settings()).logprobs(rows)
    assert float((logprobs[1] - exact).abs().mean()) < 2 * float((logprobs[0] - exact).abs().mean()) + 1e-3


def test_who_shares_the_model_is_not_disturbed():
    """The engine passes masks of its own, and other callers none."""
    model = model_of("Qwen3")
    ids = torch.arange(24).view(2, 12) % 50
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    before = [
        model(input_ids=ids, use_cache=False).logits,
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits,
    ]
    LocalLearner(model, LearnerSection(packing="tree", precision="fp32"))
    after = [
        model(input_ids=ids, use_cache=False).logits,
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits,
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("kind", "attention", "complaint"),
    [
        ("Bloom", "eager", "'eager'; expected 'sdpa'"),
        ("Mamba", "eager", "'eager'; expected 'sdpa'"),
        ("Mistral", "sdpa", "sliding"),
        ("Gemma2", "sdpa", "sliding"),
    ],
)
def test_models_that_cannot_be_packed_are_refused(kind, attention, complaint):
    extra = {"pad_token_id": 0, "eos_token_id": 1} if kind == "Gemma2" else {}
    with pytest.raises(ConfigError, match=complaint) as raised:
        LocalLearner(model_of(kind, attention, **extra), settings(packing="tree"))
    assert raised.value.hint == "set learner.packing=padded"


def test_the_check_notices_attention_across_rows(monkeypatch):
    monkeypatch.setattr(packed_models, "attend", lambda inputs, options: _blind(inputs, options))
    with pytest.raises(ConfigError, match="see each other"):
        LocalLearner(model_of("Qwen2"), settings(packing="tree"))


def test_the_check_is_not_misled_by_the_rounding_of_autocast(monkeypatch):
    """A pretrained model's control tokens were off by 11.5 % in bfloat16: it was padded though it can be packed."""
    seen = []

    def rounding(inputs, options):
        seen.append(inputs[1])
        out, _ = packed_attention(inputs, options)
        return out * 1.1 if torch.is_autocast_enabled("cpu") else out, None

    packed_attention = packed_models.attend
    monkeypatch.setattr(packed_models, "attend", rounding)
    learner = LocalLearner(model_of("Qwen2"), settings(packing="tree", precision="bf16"))
    assert learner.passes.tree and seen
    assert learner.policy.bf16  # the check leaves it as it was


def test_the_check_of_narrow_weights_allows_what_rounding_explains(monkeypatch):
    """Where weights have bfloat16, rows computed alone say how far rounding reaches; the probe is no control token."""
    ids = []
    model = model_of("Llama").to(torch.bfloat16)
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: ids.append(inputs[0]))
    assert LocalLearner(model, settings(packing="tree")).passes.tree
    assert len(ids) >= 2 + len(packed_models.PROBE_ROWS)  # padded, packed, each row alone
    wide = model_of("Llama", vocab_size=6400)
    wide.model.embed_tokens.register_forward_hook(lambda module, inputs, output: ids.append(inputs[0]))
    del ids[:]
    LocalLearner(wide, settings(packing="tree"))
    assert {int(i) for i in ids[-1].flatten()} == {100 * n for row in packed_models.PROBE_ROWS for n in row}


def _blind(inputs, options):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = None if options.pop("cu_seq_lens_q", None) is not None else inputs[4]
    return sdpa_attention_forward(*inputs[:4], mask, **options)


def test_a_packed_learners_directory_loads_anywhere(tmp_path):
    """The attention it uses is this process's own affair."""
    LocalLearner(model_of("Qwen3"), settings(packing="tree")).save(tmp_path)
    assert packed_models.ATTENTION not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_over_a_tree_is_that_of_a_dense_mask(heads):
    """Outputs and gradients, in float64 and with a score scale of the model's own."""
    tree, _ = prefix_tree(sequences(sharing_rows([[9, 30], [40], [5, 5, 5], [17], [3, 60], [20]])))
    size = tree.bounds[-1]
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, heads[0], size, 8), (1, heads[1], size, 8), (1, heads[1], size, 8), (1, heads[0], size, 8)]
    query, key, value, upstream = (torch.randn(shape, dtype=torch.float64, generator=draw) for shape in shapes)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = tree_attention(query, key, value, AttentionPlan(tree), 0.3)
    scores = (query @ key.repeat_interleave(heads[0] // heads[1], 1).mT * 0.3).masked_fill(
        ~dense_mask(tree), -torch.inf
    )
    expected = scores.softmax(-1) @ value.repeat_interleave(heads[0] // heads[1], 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grads, expected_grads = (torch.autograd.grad(o, inputs, upstream, retain_graph=True) for o in (out, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_a_tree_computes_what_rows_share_once():
    rows = sharing_rows(RUNS)
    padded, tree = forward_inputs(rows), forward_inputs(rows, tree=True)
    assert tree.token_ids.numel() < len(rows.token_ids) <= padded.token_ids.numel()
    assert torch.equal(tree.target, padded.target) and torch.equal(tree.padded, padded.padded)


def test_rows_that_repeat_each_other():
    """Equal rows add nothing to the tree; one may also be a beginning of another."""
    rows = make_rows([[4], [4], [4, 3]])
    first = rows.token_ids[:6]
    rows.token_ids[6:12] = first
    rows.token_ids[12:18] = first
    padded, tree = (learner_of(model_of("Qwen3"), packing=name).logprobs(rows) for name in ("padded", "tree"))
    assert float((padded - tree).abs().max()) <= EXACT and torch.equal(tree[0, :6], tree[1, :6])


@pytest.mark.parametrize(("kind", "reason"), [("Qwen2", ""), ("Mistral", "sliding"), ("Bloom", "expected 'sdpa'")])
def test_auto_packs_where_the_model_can_and_says_why_not(kind, reason):
    learner = LocalLearner(model_of(kind, "eager" if kind == "Bloom" else "sdpa"), settings(packing="auto"))
    assert learner.passes.tree == (not reason) and reason in learner.why_padded


def test_auto_pads_where_packed_rows_would_see_each_other(monkeypatch):
    monkeypatch.setattr(packed_models, "attend", lambda inputs, options: _blind(inputs, options))
    learner = LocalLearner(model_of("Qwen2"), settings(packing="auto"))
    assert not learner.passes.tree and "see each other" in learner.why_padded
