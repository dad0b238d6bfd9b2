"""Small switching systems, the sum over all paths of modes that judges them, and Geweke's test of their sweeps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyro
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyrodyn.conditioning import path_evidence
from pyrodyn.distributions import SwitchingPath
from pyrodyn.inference.engine import numerics, random_stream
from pyrodyn.program import globals_given
from pyrodyn.readouts import AffineReadout


def law(
    seed: int = 0,
    *,
    lead: tuple[int, ...] = (),
    modes: int = 2,
    bins: int = 8,
    latent: int = 2,
    lags: int = 1,
    recurrent: bool = False,
    inputs: bool = False,
    trials: int = 1,
    inside: Tensor | None = None,
) -> SwitchingPath:
    """A law with batch (*lead, 1) that keeps the broadcast rule; with ``inputs``, (*lead, trial)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, lead: tuple[int, ...] = (*lead, 1)) -> Tensor:
        return torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)

    def covariance(*shape: int) -> Tensor:
        root = 0.4 * normal(*shape, latent, latent)
        return root @ root.mT + 0.3 * torch.eye(latent, dtype=torch.float64)

    return SwitchingPath(
        torch.log_softmax(normal(modes), -1),
        torch.log_softmax(normal(modes, modes), -1),
        0.5 * normal(modes, latent, lags * latent),
        normal(bins - 1, modes, latent, lead=(*lead, trials)) if inputs else normal(1, modes, latent),
        covariance(modes),
        normal(latent),
        covariance(),
        num_bins=bins,
        recurrence=normal(modes, latent) if recurrent else None,
        push=normal(bins - 1, modes, lead=(*lead, trials)) if inputs else None,
        inside=inside,
    )


def enumerate_modes(found: SwitchingPath, path: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
    """Every path of modes and its log density together with the ``path`` (time, latent); a law without draws."""
    bins = len(path)
    lags = found.lags
    start = MultivariateNormal(found.start_mean.squeeze(0), found.start_covariance.squeeze(0))
    whole = found.drift.squeeze(0).expand(bins - 1, -1, -1)
    sequences = list(itertools.product(range(found.num_modes), repeat=bins))
    weights = []
    for modes in sequences:
        weight = found.initial[0, modes[0]] + start.log_prob(path[:lags]).sum()
        for t in range(1, bins):
            logit = found.transition[0, modes[t - 1]]
            if found.recurrence is not None:
                logit = logit + found.recurrence[0] @ path[t - 1]
            if found.push is not None:
                logit = logit + found.push[0, t - 1]
            weight = weight + torch.log_softmax(logit, 0)[modes[t]]
            if t >= lags:
                past = torch.cat([path[t - 1 - lag] for lag in range(lags)])
                mean = found.dynamics[0, modes[t]] @ past + whole[t - 1, modes[t]]
                weight = weight + MultivariateNormal(mean, found.process_noise[0, modes[t]]).log_prob(path[t])
        weights.append(weight)
    return sequences, torch.stack(weights)


def marginals(sequences: list[tuple[int, ...]], weights: Tensor, modes: int) -> Tensor:
    """Probabilities (time, mode) of the modes from all their paths."""
    chosen = torch.nn.functional.one_hot(torch.tensor(sequences), modes).to(weights.dtype)
    return torch.einsum("p,ptk->tk", torch.softmax(weights, 0), chosen)


def prior_draws(model: Any, like: Any, draws: int, seed: int) -> dict[str, Tensor]:
    with random_stream(seed), pyro.plate("draw", draws, dim=-2):
        trace = poutine.trace(model.sample_globals).get_trace(like)
    return {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes if name != "draw"}


def over_paths(model: Any, parameters: Any, recording: Any, sequences: list) -> np.ndarray:
    """Log p(y | parameters) of every draw and trial, (draw, trial), as a sum over every path of the modes."""
    chosen = torch.nn.functional.one_hot(torch.tensor(sequences), model.num_modes).double()
    chosen = chosen[:, None, None]  # (path, 1, 1, time, mode)
    with torch.no_grad(), numerics():
        prior = model.latent_path(parameters, recording).given_modes(chosen)
        seen = path_evidence(prior, model.readout_law(parameters, prior.mean, recording), recording.values)
    initial, transition = parameters.initial.log()[:, 0], parameters.transition.log()[:, 0]
    for i, modes in enumerate(sequences):
        steps = sum(transition[:, a, b] for a, b in itertools.pairwise(modes))
        seen[i] += (initial[:, modes[0]] + steps).unsqueeze(-1)
    return torch.logsumexp(seen, 0).numpy()


def sweeps_leave_the_prior_alone(model: Any, like: Any) -> None:
    """Geweke's test: a fault in any move, or in any prior that it uses, moves the parameters away from their prior."""
    groups, sweeps = 400, 25
    with torch.no_grad(), numerics():
        values = prior_draws(model, like, groups, 1)
        parameters = globals_given(model, values, like)
        with random_stream(2):
            path, modes = model.latent_path(parameters, like).expand((groups, 2)).sample_jointly()
            seen = torch.where(like.mask, model.readout_law(parameters, path, like).sample(), 0.0)
        sweep = model.conditionals(like.with_observations(seen[0]), seen)
        with random_stream(3):
            state = sweep.start({n: v.squeeze(1) for n, v in values.items()}, 1)
            total = sweep.prior.counts.sum(-1)
            rows = torch._standard_gamma(total.expand(groups, -1)) / total
            state |= {"path": path, "modes": modes, "table": state["table"] + rows.log().unsqueeze(-1)}
            for _ in range(sweeps):
                state = sweep.sweep(state, 1.0)
                noise = state["noise"].unsqueeze(1) if "noise" in state else None
                loading, offset = state["loading"].unsqueeze(1), state["offset"].unsqueeze(1)
                law = AffineReadout(model.readout.bound(like), state["path"], loading, offset, noise)
                sweep.values = torch.where(like.mask, law.sample(), 0.0)
            sites = {n: v.unsqueeze(1) for n, v in sweep.sites(state).items()}
        fresh = prior_draws(model, like, 8000, 4)
        moved, reference = globals_given(model, sites, like), globals_given(model, fresh, like)
        with random_stream(5):
            paths, chosen = model.latent_path(reference, like).expand((8000, 2)).sample_jointly()

        def statistics(parameters, sites, path, modes, loading) -> dict[str, np.ndarray]:
            found = {}
            for key, (_, value) in model.invariants(parameters).items():
                flat = value.flatten(1)
                found |= {f"{key}[{i}]": flat[:, i].numpy() for i in range(flat.shape[-1])}
            found["scale"] = sites["process_scale"].flatten().numpy()
            if "recurrence_variance" in sites:
                found["slopes"] = sites["recurrence_variance"].flatten().numpy()
            found["start"] = path[:, 0, 0].square().sum(-1).numpy()
            found["predictor"] = (path[:, 1, 4] * loading[:, 0]).sum(-1).abs().numpy()
            switches = (modes[:, 1, 1:6] != modes[:, 1, :5]).sum(-1)
            return found | {"switches": switches.double().numpy()}

        of_chain = statistics(moved, sites, state["path"], state["modes"], state["loading"])
        of_prior = statistics(reference, fresh, paths, chosen, reference.loading.squeeze(1))
    p = {key: scipy.stats.ks_2samp(of_chain[key], of_prior[key]).pvalue for key in of_chain}
    assert min(p.values()) > 5e-4, {key: value for key, value in p.items() if value < 5e-4}
    assert np.mean([value < 0.05 for value in p.values()]) < 0.2
