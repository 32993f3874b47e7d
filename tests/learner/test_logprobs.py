"""Chunked log-probabilities against plain autograd in float64."""

from __future__ import annotations

import pytest
import torch

from spearrl.learner.logprobs import token_logprobs


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


def test_logits_of_the_whole_batch_never_exist(monkeypatch):
    sizes = []
    real = torch.Tensor.new_empty

    def watch(self, *shape, **options):
        made = real(self, *shape, **options)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", watch)
    hidden, weight, _, targets = problem(n=1000, vocabulary=50, bias=False)
    token_logprobs(hidden, weight, targets, chunk=10)[0].sum().backward()
    assert max(sizes) <= max(1000, 10 * 50)
