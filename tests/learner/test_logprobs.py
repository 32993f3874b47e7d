"""Chunked log-probabilities against plain autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spearrl.learner.logprobs import TILE_BYTES, token_logprobs


def problem(n=7, d=5, vocabulary=11, dtype=torch.float64, bias=True, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, d, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    shift = torch.randn(vocabulary, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, weight, shift, torch.randint(0, vocabulary, (n,), generator=draw)


def plain(hidden, weight, bias, targets, temperature):
    logits = (torch.nn.functional.linear(hidden, weight, bias)) / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("uses", ["logprobs", "entropy", "both"])
def test_values_and_gradients(chunk, temperature, bias, uses):
    hidden, weight, shift, targets = problem(bias=bias)
    computed = token_logprobs(hidden, weight, targets, bias=shift, temperature=temperature, chunk=chunk)
    expected = plain(hidden, weight, shift, targets, temperature)
    for one, two in zip(computed, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    scale = torch.randn(len(targets), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [x for x in (hidden, weight, shift) if x is not None]
    gradients = []
    for logp, entropy in (computed, expected):
        total = (scale * logp).sum() if uses != "entropy" else torch.zeros((), dtype=torch.float64)
        total = total + (scale.cos() * entropy).sum() if uses != "logprobs" else total
        gradients.append(torch.autograd.grad(total, leaves))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


def test_backward_twice_through_a_kept_graph():
    hidden, weight, shift, targets = problem()
    logp, _ = token_logprobs(hidden, weight, targets, bias=shift, chunk=100)
    first = torch.autograd.grad(logp.sum(), hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(logp.sum(), hidden)[0])


def test_tied_weights_add_up():
    table = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    ids, targets = torch.tensor([1, 2, 3]), torch.tensor([4, 1, 3])
    one = torch.autograd.grad(token_logprobs(table[ids], table, targets, chunk=2)[0].sum(), table)[0]
    two = torch.autograd.grad(plain(table[ids], table, None, targets, 1.0)[0].sum(), table)[0]
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_half_precision_inputs_and_autocast_compute_in_float32():
    hidden, weight, shift, targets = problem(n=9, d=64, vocabulary=100)
    exact = plain(hidden.bfloat16().double(), weight.bfloat16().double(), None, targets, 1.0)[0].detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        computed = token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets, chunk=4)[0]
    assert computed.dtype == torch.float32
    assert float((computed.detach().double() - exact).abs().max()) < 1e-5
    computed.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float64


def test_frozen_head_and_no_positions():
    hidden, weight, _, targets = problem(bias=False)
    logp, _ = token_logprobs(hidden, weight.detach(), targets, chunk=3)
    logp.sum().backward()
    assert hidden.grad is not None
    none = hidden.detach()[:0].requires_grad_()
    logp, entropy = token_logprobs(none, weight, targets[:0], chunk=3)
    (logp.sum() + entropy.sum()).backward()
    assert none.grad.shape == (0, 5) and float(weight.grad.abs().sum()) == 0


def test_confident_distributions_have_finite_entropy_gradients():
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    logp, entropy = token_logprobs(hidden, torch.eye(2), torch.tensor([0]))
    (logp + entropy).sum().backward()
    assert float(entropy.detach()) == 0.0 and torch.isfinite(hidden.grad).all()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel() * tensor.element_size())
        return made


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("n", [300, 900])
def test_logits_of_the_whole_batch_never_exist(trained, n):
    hidden, weight, _, targets = problem(n=n, d=4, vocabulary=50_000, dtype=torch.float32, bias=False)
    with Largest() as largest:
        logp, entropy = token_logprobs(hidden, weight.requires_grad_(trained), targets)
        (logp.sum() + entropy.sum()).backward()
    assert largest.size <= TILE_BYTES["cpu"] < n * 50_000 * 4 / 7


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 15 numbers, and nothing kept."""
    monkeypatch.setattr("spearrl.learner.logprobs.TILE_BYTES", {"cpu": 15 * 8, "cuda": 15 * 8})
    monkeypatch.setattr("spearrl.learner.logprobs.KEPT_BYTES", 0)


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
@pytest.mark.parametrize("trained", ["all", "hidden", "head", "weight", "hidden and bias"])
@pytest.mark.parametrize("uses", ["logprobs", "entropy", "both"])
def test_tiles_of_the_vocabulary_are_plain_autograd(small_tiles, chunk, trained, uses):
    hidden, weight, shift, targets = problem(n=8, vocabulary=23)
    named = {"hidden": hidden, "weight": weight, "bias": shift}
    chosen = {"all": list(named), "head": ["weight", "bias"]}.get(trained, trained.split(" and "))
    for name, leaf in named.items():
        leaf.requires_grad_(name in chosen)
    leaves = [named[name] for name in chosen]
    scale = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5, 3.0, 0.0, -1.0], dtype=torch.float64)
    results = []
    for logp, entropy in (
        token_logprobs(hidden, weight, targets, bias=shift, temperature=0.7, chunk=chunk),
        plain(hidden, weight, shift, targets, 0.7),
    ):
        total = {"logprobs": logp, "entropy": 0.3 * entropy, "both": logp - 0.3 * entropy}[uses]
        results.append((logp, entropy, *torch.autograd.grad((scale * total).sum(), leaves)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk", [2, 100])
def test_a_position_without_upstream_gradient_takes_no_part(chunk):
    """Not even one whose hidden state is not finite: a clipped or masked token."""
    hidden, weight, _, targets = problem(bias=False)
    with torch.no_grad():
        hidden[2] = float("nan")
    logp, _ = token_logprobs(hidden, weight, targets, chunk=chunk)
    scale = torch.ones_like(logp).index_fill(0, torch.tensor([2, 5]), 0.0)
    one = torch.autograd.grad(logp, (hidden, weight), scale)
    used = torch.tensor([0, 1, 3, 4, 6])
    part = hidden.detach()[used].requires_grad_()
    two = torch.autograd.grad(token_logprobs(part, weight, targets[used])[0].sum(), (part, weight))
    torch.testing.assert_close(one[0][used], two[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one[1], two[1], rtol=1e-12, atol=1e-12)
    assert not one[0][[2, 5]].any()


def test_nothing_upstream_gives_zero_gradients():
    hidden, weight, shift, targets = problem()
    logp, _ = token_logprobs(hidden, weight, targets, bias=shift, chunk=3)
    for gradient in torch.autograd.grad(logp, (hidden, weight, shift), torch.zeros_like(logp)):
        assert not gradient.any()


@pytest.mark.parametrize("trained", [True, False])
def test_two_computations_are_bit_identical(trained):
    def compute():
        hidden, weight, _, targets = problem(n=300, d=64, vocabulary=60_000, dtype=torch.float32, bias=False)
        weight.requires_grad_(trained)
        logp, entropy = token_logprobs(hidden, weight, targets)
        (logp.sum() + logp.square().sum()).backward()
        return [logp, entropy, hidden.grad, *([weight.grad] if trained else [])]

    assert all(torch.equal(one, two) for one, two in zip(compute(), compute(), strict=True))


@pytest.mark.parametrize("trained", [True, False])
def test_a_large_vocabulary_in_float32_is_right(trained):
    """Several tiles of the real size."""
    hidden, weight, _, targets = problem(n=70, d=16, vocabulary=130_000, dtype=torch.float32, bias=False)
    weight.requires_grad_(trained)
    leaves = [hidden, weight] if trained else [hidden]
    logp, entropy = token_logprobs(hidden, weight, targets)
    wide = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    expected = plain(*wide, None, targets, 1.0)
    for one, two in zip((logp, entropy), expected, strict=True):
        assert float((one - two).detach().abs().max()) < 1e-5
    one = torch.autograd.grad(logp.sum(), leaves)
    two = torch.autograd.grad(expected[0].sum(), wide[: len(leaves)])
    for left, right in zip(one, two, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-4, atol=1e-5)
