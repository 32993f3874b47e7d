"""Random inputs that tests/test_reference*.py and tests/mathematics/test_invariance.py share, and how closely the
package must agree.

Hypothesis draws shapes, options and a seed; the numbers come from that seed, continuous where a formula has an edge
(max, clip, a threshold), so that no case sits on one. Everything outside a mask is NaN or infinite.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

checked = settings(max_examples=100, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 8))


def compare(actual, expected, *, floor=1e-12):
    """Every number to 1e-9 of its own size, or to `floor` where sums cancel."""
    actual = torch.as_tensor(actual, dtype=torch.float64).detach().numpy()
    expected = np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=floor)


class Turns:
    """N turns of interleaved trajectories and groups: lone groups, groups of equal rewards, turns with a penalty.

    Rewards are eighths, so sums are exact.
    """

    def __init__(self, count: int, seed: int):
        rng = np.random.default_rng(seed)
        trajectories = rng.integers(0, rng.integers(1, count + 1), count)
        group_of = rng.integers(0, rng.integers(1, 5), count) * 7 - 3
        group_of[-1] = 1000
        worth = rng.integers(-16, 81, count) / 8 if rng.random() < 0.7 else rng.choice([0.0, 10.0], count)
        worth[group_of == group_of[0]] = rng.choice([0.0, 0.1, 10.0])
        self.trajectories = trajectories.tolist()
        self.groups = [int(group_of[name]) for name in trajectories]
        penalties = (rng.random(count) < 0.3) * rng.choice([0.0, 0.125])
        self.rewards = [float(worth[name] - lost) for name, lost in zip(trajectories, penalties, strict=True)]
        self.anchors = rng.integers(0, rng.integers(1, count + 1), count).tolist()
        self.counts = rng.integers(0, 5, count).tolist()
        self.rng = rng

    def __getattr__(self, name: str) -> torch.Tensor:
        """`t_rewards` is `rewards` as a tensor."""
        if not name.startswith("t_"):
            raise AttributeError(name)
        values = getattr(self, name.removeprefix("t_"))
        return torch.tensor(values, dtype=torch.float64 if isinstance(values[0], float) else torch.int64)


turn_tables = st.builds(Turns, st.integers(1, 20), seeds)


class Tokens:
    """[B, T] tables, float64.

    Tokens at the given share of clamped ratios are far off-policy; some advantages are 0; some rows are empty.
    """

    def __init__(self, shape: tuple[int, int], seed: int, spread: float = 0.5):
        rng = np.random.default_rng(seed)
        self.rng, self.shape = rng, shape
        self.mask = rng.random(shape) < rng.choice([0.3, 0.7, 1.0])
        self.mask[rng.random(shape[0]) < 0.1] = False
        self.old = self.table(-rng.exponential(2.0, shape))
        shift = rng.normal(0, spread, shape)
        stale = rng.random(shape) < 0.1
        shift[stale] = (rng.uniform(19, 26, shape) * rng.choice([-1, 1], shape))[stale]
        self.logprobs = self.table(np.nan_to_num(self.old) + shift)
        self.advantages = self.table(rng.normal(0, 1.5, shape) * (rng.random(shape) > 0.15))
        self.drop = rng.random(shape) < 0.2
        self.near = self.table(np.nan_to_num(self.old) + rng.normal(0, spread, shape))

    def table(self, values) -> np.ndarray:
        """Garbage outside the mask."""
        return np.where(self.mask, values, self.rng.choice([np.nan, np.inf, -np.inf], self.shape))

    def leaf(self, name: str = "logprobs") -> torch.Tensor:
        return torch.tensor(getattr(self, name), requires_grad=True)

    def tensors(self, *names: str) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor(getattr(self, name)) for name in names)


token_tables = st.builds(Tokens, shapes, seeds)
