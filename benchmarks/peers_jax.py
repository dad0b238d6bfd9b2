"""The peers that run on JAX, in a process and an environment of their own: one case a run, one line of JSON back.

`bench_kernel.py` and `bench_mcmc.py` start this file with the Python that the variable PYRODYN_PEERS names; inputs are
read from an .npz file. Versions: constraints/peers.txt. Everything runs in the peers' default precision, float32.
"""

from __future__ import annotations

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import value_and_grad, vmap

RUNS, SECONDS = 3, 0.3  # as many runs as fill the seconds, and no fewer than that


def timed(function, *arguments) -> dict[str, float]:
    """Seconds to compile, and milliseconds of the median of some runs after that."""
    began = time.process_time()
    value = jax.block_until_ready(function(*arguments))
    compiling, seconds = time.process_time() - began, []
    while len(seconds) < RUNS or sum(seconds) < SECONDS:
        began = time.process_time()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.process_time() - began)
    return {"value": float(value[0]), "compile_s": compiling, "ms": 1e3 * float(np.median(seconds))}


def gaussian(held) -> dict[str, float]:
    """dynamax: log likelihood of a linear-Gaussian model and its gradient."""
    from dynamax.linear_gaussian_ssm.inference import (
        ParamsLGSSM,
        ParamsLGSSMDynamics,
        ParamsLGSSMEmissions,
        ParamsLGSSMInitial,
        lgssm_filter,
    )

    dim, units = len(held["dynamics"]), len(held["loading"])

    def score(parameters, values):
        dynamics, process_noise, loading, offset, noise_sd = parameters
        model = ParamsLGSSM(
            ParamsLGSSMInitial(jnp.zeros(dim), jnp.eye(dim)),
            ParamsLGSSMDynamics(dynamics, jnp.zeros(dim), jnp.zeros((dim, 0)), process_noise),
            ParamsLGSSMEmissions(loading, offset, jnp.zeros((units, 0)), noise_sd**2),  # a diagonal covariance
        )
        return vmap(lambda trial: lgssm_filter(model, trial).marginal_loglik)(values).sum()

    parameters = tuple(jnp.asarray(held[n]) for n in ("dynamics", "process_noise", "loading", "offset", "noise_sd"))
    return timed(jax.jit(value_and_grad(score)), parameters, jnp.asarray(held["values"]))


def poisson(held) -> dict[str, float]:
    """dynamax: approximate log likelihood of a Poisson LDS by the extended Kalman form, and its gradient."""
    from dynamax.generalized_gaussian_ssm import EKFIntegrals, ParamsGGSSM, conditional_moments_gaussian_filter
    from tensorflow_probability.substrates.jax import distributions as tfd

    dim = len(held["dynamics"])

    def score(parameters, values):
        dynamics, process_noise, loading, offset = parameters
        model = ParamsGGSSM(
            jnp.zeros(dim),
            jnp.eye(dim),
            lambda state: dynamics @ state,
            process_noise,
            lambda state: jnp.exp(loading @ state + offset),
            lambda state: jnp.diag(jnp.exp(loading @ state + offset)),
            lambda mean, covariance: tfd.Poisson(mean, name=f"units{len(covariance)}"),
        )

        def one(trial):
            return conditional_moments_gaussian_filter(model, EKFIntegrals(), trial).marginal_loglik

        return vmap(one)(values).sum()

    parameters = tuple(jnp.asarray(held[n]) for n in ("dynamics", "process_noise", "loading", "offset"))
    return timed(jax.jit(value_and_grad(score)), parameters, jnp.asarray(held["values"]))


def modes(held) -> dict[str, float]:
    """dynamax: log likelihood of a hidden Markov model given its log likelihoods, and the gradient."""
    from dynamax.hidden_markov_model import hmm_filter

    def score(parameters):
        initial, transition, likelihood = parameters
        first, steps = jax.nn.softmax(initial), jax.nn.softmax(transition, -1)
        return vmap(lambda trial: hmm_filter(first, steps, trial).marginal_loglik)(likelihood).sum()

    return timed(
        jax.jit(value_and_grad(score)), tuple(jnp.asarray(held[n]) for n in ("initial", "transition", "likelihood"))
    )


def hierarchical_model(seen):
    import numpyro
    import numpyro.distributions as dist

    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    spread = numpyro.sample("spread", dist.LogNormal(0.0, 1.0))
    each = numpyro.sample("each", dist.Normal(mean, spread).expand([len(seen)]).to_event(1))
    numpyro.sample("seen", dist.Normal(each, 1.0).to_event(1), obs=seen)


def lds_model(values):
    """The prior of `pyrodyn.models.LDS` with two latents and its pivots in the first two units."""
    import numpyro
    import numpyro.distributions as dist
    from dynamax.linear_gaussian_ssm.inference import (
        ParamsLGSSM,
        ParamsLGSSMDynamics,
        ParamsLGSSMEmissions,
        ParamsLGSSMInitial,
        lgssm_filter,
    )

    units = values.shape[-1]
    mixing = numpyro.sample("mixing", dist.Normal(0.0, 3.0).expand([2, 2]).to_event(2))
    first = numpyro.sample("first", dist.Weibull(2.0**0.5, 2.0))  # chi with two degrees of freedom
    second = numpyro.sample("second", dist.HalfNormal(1.0))
    rest = numpyro.sample("rest", dist.Normal(0.0, 1.0).expand([2 * units - 3]).to_event(1))
    loading = jnp.zeros((units, 2)).at[0, 0].set(first).at[1, 1].set(second).at[1, 0].set(rest[0])
    loading = loading.at[2:].set(rest[1:].reshape(units - 2, 2)) / 2.0**0.5
    offset = numpyro.sample("offset", dist.Normal(0.0, 1.0).expand([units]).to_event(1))
    noise = numpyro.sample("noise_sd", dist.LogNormal(jnp.log(0.5), 1.0).expand([units]).to_event(1))
    power, axes = jnp.linalg.eigh(jnp.eye(2) + mixing @ mixing.T)
    inverse = (axes / jnp.sqrt(power)) @ axes.T
    model = ParamsLGSSM(
        ParamsLGSSMInitial(jnp.zeros(2), jnp.eye(2)),
        ParamsLGSSMDynamics(inverse @ mixing, jnp.zeros(2), jnp.zeros((2, 0)), inverse @ inverse),
        ParamsLGSSMEmissions(loading, offset, jnp.zeros((units, 0)), noise**2),
    )
    numpyro.factor("evidence", vmap(lambda trial: lgssm_filter(model, trial).marginal_loglik)(values).sum())


def nuts(
    model, argument, chains: int, warmup: int, draws: int, positive: tuple[str, ...], start: dict | None = None
) -> tuple[np.ndarray, float]:
    """Unconstrained draws (chain, draw, coordinate) and processor seconds, compilation included."""
    from numpyro.infer import MCMC, NUTS, init_to_uniform, init_to_value

    began = time.process_time()
    strategy = init_to_value(values=start) if start else init_to_uniform
    options = {"num_warmup": warmup, "num_samples": draws, "num_chains": chains, "chain_method": "sequential"}
    run = MCMC(NUTS(model, init_strategy=strategy), **options, progress_bar=False)
    run.run(jax.random.PRNGKey(0), argument)
    found = {name: np.asarray(value) for name, value in run.get_samples(group_by_chain=True).items()}
    seconds = time.process_time() - began
    parts = [np.log(v) if name in positive else v for name, v in found.items()]
    return np.concatenate([part.reshape(chains, draws, -1) for part in parts], -1), seconds


def blackjax_nuts(seen) -> tuple[np.ndarray, float]:
    """Two chains of 500 + 500 of blackjax's NUTS with its window adaptation, all compiled."""
    import blackjax
    from jax.scipy.stats import norm

    def log_density(place):
        mean, log_spread, each = place[0], place[1], place[2:]
        prior = norm.logpdf(mean) + norm.logpdf(log_spread) + norm.logpdf(each, mean, jnp.exp(log_spread)).sum()
        return prior + norm.logpdf(seen, each, 1.0).sum()

    def chain(key):
        adapt, draw = jax.random.split(key)
        warmup = blackjax.window_adaptation(blackjax.nuts, log_density)
        (state, parameters), _ = warmup.run(adapt, jnp.zeros(2 + len(seen)), num_steps=500)
        kernel = blackjax.nuts(log_density, **parameters)

        def step(state, key):
            state, _ = kernel.step(key, state)
            return state, state.position

        return jax.lax.scan(step, state, jax.random.split(draw, 500))[1]

    began = time.process_time()
    run = jax.jit(chain)
    draws = np.stack([np.asarray(run(key)) for key in jax.random.split(jax.random.PRNGKey(0), 2)])
    return draws, time.process_time() - began


SAMPLERS = {
    "hierarchical": lambda held: nuts(hierarchical_model, jnp.asarray(held["seen"]), 2, 500, 500, ("spread",)),
    "hierarchical_blackjax": lambda held: blackjax_nuts(jnp.asarray(held["seen"])),
    "lds_nuts": lambda held: nuts(lds_model, jnp.asarray(held["values"]), 4, 150, 150, ("first", "second", "noise_sd")),
}


def main() -> None:
    case, file = sys.argv[1:3]
    held = {name: np.asarray(value, np.float32) for name, value in np.load(file).items()}
    if case in SAMPLERS:
        draws, seconds = SAMPLERS[case](held)
        np.savez(sys.argv[3], draws=draws, seconds=seconds)
        return
    print(json.dumps({"gaussian": gaussian, "poisson": poisson, "modes": modes}[case](held)))


if __name__ == "__main__":
    main()
