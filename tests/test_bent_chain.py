"""A bent chain against the dense Gaussian that it is."""

from __future__ import annotations

import torch

from pyrodyn.distributions import BentChain, GaussMarkov
from pyrodyn.inference.engine import random_stream


def bent() -> BentChain:
    with random_stream(0):
        chain = GaussMarkov.from_dynamics(
            0.5 * torch.randn(3, 1, 2, 2, dtype=torch.float64),
            torch.eye(2),
            num_bins=4,
            initial_covariance=torch.eye(2),
        ).condition(torch.eye(2).expand(5, 4, 2, 2).double(), torch.randn(3, 5, 4, 2, dtype=torch.float64))
        root = torch.randn(5, 4, 2, 2, dtype=torch.float64).tril(-1) + torch.diag(torch.tensor([0.7, 1.6])).double()
        return BentChain(chain, torch.randn(5, 4, 2, dtype=torch.float64), root)


def test_density_and_draws_are_those_of_the_dense_gaussian():
    law = bent()
    chain = law.chain
    # Column by column: what the chain makes of each number of noise.
    unit = torch.eye(8, dtype=torch.float64).reshape(8, 1, 1, 4, 2).expand(8, 3, 5, 4, 2)
    colour = torch.stack([(chain.transform(column) - chain.mean).flatten(-2) for column in unit], -1)
    block = torch.zeros(5, 8, 8, dtype=torch.float64)
    for t in range(4):
        block[:, 2 * t : 2 * t + 2, 2 * t : 2 * t + 2] = law.root[:, t]
    mean = chain.mean.flatten(-2) + (colour @ law.shift.flatten(-2).unsqueeze(-1)).squeeze(-1)
    root = colour @ block
    dense = torch.distributions.MultivariateNormal(mean, root @ root.mT)
    with random_stream(1):
        path = law.sample()
    torch.testing.assert_close(law.log_prob(path), dense.log_prob(path.flatten(-2)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chain.transform(chain.whiten(path)), path)
    with random_stream(2):
        many = law.expand((4000, 3, 5)).sample().flatten(-2)
    score = (many.mean(0) - mean) / (dense.variance / 4000).sqrt()
    assert float(score.abs().max()) < 4.5
    torch.testing.assert_close(many.var(0), dense.variance, rtol=0.12, atol=0.0)


def test_unbent_it_is_the_chain():
    law = bent()
    plain = BentChain(law.chain, torch.zeros_like(law.shift), torch.eye(2, dtype=torch.float64).expand_as(law.root))
    with random_stream(3):
        path = plain.sample()
    torch.testing.assert_close(plain.log_prob(path), law.chain.log_prob(path))
