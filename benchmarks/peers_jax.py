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

RUNS = 5


def timed(function, *arguments) -> dict[str, float]:
    """Seconds to compile, and milliseconds of the median of some runs after that."""
    began = time.process_time()
    value = jax.block_until_ready(function(*arguments))
    compiling, seconds = time.process_time() - began, []
    for _ in range(RUNS):
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


def main() -> None:
    case, file = sys.argv[1:3]
    held = {name: np.asarray(value, np.float32) for name, value in np.load(file).items()}
    print(json.dumps({"gaussian": gaussian, "poisson": poisson, "modes": modes}[case](held)))


if __name__ == "__main__":
    main()
