r"""Hidden Markov chains: the log likelihood of all bins with the modes summed out, and what the posterior says of them.

.. math:: Z = \sum_{z_{1:T}} \exp\!\Big(\pi_{z_1} + \sum_{t>1} P^{(t)}_{z_{t-1} z_t} + \sum_t \ell_{t,z_t}\Big)

with log potentials :math:`\pi` of the first mode, :math:`P` of transitions (they may change with time) and
:math:`\ell` of the observations. Potentials need not be normalised: the gradient of :math:`\log Z` is the posterior
probability of modes and of pairs of modes.

On the CPU in float64 compiled loops go bin by bin; elsewhere pairs of neighbouring bins are contracted in about log2(T)
batched steps of torch.

Shapes: ``initial`` (*batch, mode), ``transition`` (*batch, time - 1 or 1, mode, mode) from the first mode to the
second, and ``likelihood`` (*batch, time, mode). Batches broadcast; a transition of one bin holds for all.

References
----------
Rabiner, Proc. IEEE 77:257 (1989); Särkkä & García-Fernández, IEEE Trans. Autom. Control 66:299 (2021).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyrodyn.linalg._mode_chain import ModeChain, ModeLogNormaliser, array, kernels, refuse_nan
from pyrodyn.linalg.chain import _compiled_for
from pyrodyn.linalg.matrix import broadcast_shapes


def mode_log_normaliser(initial: Tensor, transition: Tensor, likelihood: Tensor) -> Tensor:
    """Log normaliser, (*batch): the log likelihood, where initial and transition are normalised log probabilities.

    Differentiable once; see the module for shapes.

    Raises
    ------
    ValueError
        Where the shapes do not fit together, or a potential is NaN.
    """
    initial, transition, likelihood, batch = _aligned(initial, transition, likelihood)
    if _compiled_for(initial, transition, likelihood) is None:
        value = _contracted(initial, transition, likelihood)
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and bool(torch.isnan(value).any()):
            refuse_nan(initial=initial, transition=transition, likelihood=likelihood)
        return value.reshape(batch)
    graded = torch.is_grad_enabled() and any(part.requires_grad for part in (initial, transition, likelihood))
    return ModeLogNormaliser.apply(initial, transition, likelihood, graded).reshape(batch)


def mode_marginals(initial: Tensor, transition: Tensor, likelihood: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior probabilities of modes (*batch, time, mode), and of pairs of them, in the shape of ``transition``.

    Those of pairs are summed over what shares a transition, batch elements and bins.
    """
    batch = _aligned(initial, transition, likelihood)[-1]
    likelihood = likelihood.expand(*batch, *likelihood.shape[-2:])
    leaves = [part.detach().requires_grad_() for part in (initial, transition, likelihood)]
    with torch.enable_grad():
        value = mode_log_normaliser(*leaves).sum()
        _, pairs, marginal = torch.autograd.grad(value, leaves, materialize_grads=True)
    return marginal, pairs


def sample_modes(
    initial: Tensor, transition: Tensor, likelihood: Tensor, samples: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Whole paths of modes from their posterior, (*batch, sample, time), by filtering forward and drawing backward.

    Raises
    ------
    ValueError
        Where the shapes do not fit together, or a potential is NaN.
    """
    initial, transition, likelihood, batch = _aligned(initial, transition, likelihood)
    refuse_nan(initial=initial, transition=transition, likelihood=likelihood)
    with torch.no_grad():
        found = ModeChain(initial, transition, likelihood).filter()
    if found is None:
        filtered = np.empty(likelihood.shape)
        kernels().filter_logarithmic(*(array(part) for part in (initial, transition, likelihood)), filtered)
    else:
        with np.errstate(divide="ignore"):  # what underflowed is not drawn
            filtered = np.log(np.ascontiguousarray(found[1].filtered))
    shape = (len(filtered), samples, likelihood.shape[-2])
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator).numpy()
    drawn = np.empty(shape, np.int64)
    kernels().draw(array(transition), filtered, uniform, drawn)
    return torch.from_numpy(drawn).reshape(*batch, *shape[1:]).to(likelihood.device)


def most_probable_modes(initial: Tensor, transition: Tensor, likelihood: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable path of modes (*batch, time), and its log probability together with the data, (*batch).

    Raises
    ------
    ValueError
        Where the shapes do not fit together, or a potential is NaN.
    """
    initial, transition, likelihood, batch = _aligned(initial, transition, likelihood)
    refuse_nan(initial=initial, transition=transition, likelihood=likelihood)
    arrays = [array(part) for part in (initial, transition, likelihood)]
    value, path = np.empty(len(arrays[2])), np.empty(arrays[2].shape[:2], np.int64)
    kernels().most_probable(*arrays, value, path)
    device = likelihood.device
    return torch.from_numpy(path).reshape(*batch, -1).to(device), torch.from_numpy(value).reshape(batch).to(device)


def _aligned(initial: Tensor, transition: Tensor, likelihood: Tensor) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """One batch dimension: (element, mode), (element or 1, bins, mode, mode), (element, time, mode)."""
    time, modes = likelihood.shape[-2:]
    steps = transition.shape[-3] if transition.dim() > 2 else -1
    fits = transition.shape[-2:] == (modes, modes) and initial.shape[-1:] == (modes,)
    if not fits or steps not in (1, time - 1):
        raise ValueError(
            "initial, transition and likelihood must be (*batch, mode), (*batch, time - 1 or 1, mode, mode) and "
            f"(*batch, time, mode), got {tuple(initial.shape)}, {tuple(transition.shape)} and {tuple(likelihood.shape)}"
        )
    if steps == 0:  # of one bin: no transition is ever made
        transition = torch.zeros_like(likelihood[..., :1, :, None] * likelihood[..., :1, None, :])
    batch = broadcast_shapes(initial.shape[:-1], transition.shape[:-3], likelihood.shape[:-2])
    initial = initial.expand(*batch, modes).reshape(-1, modes)
    likelihood = likelihood.expand(*batch, time, modes).reshape(-1, time, modes)
    if transition.shape[:-3].numel() == 1:
        transition = transition.reshape(1, *transition.shape[-3:])
    else:
        transition = transition.expand(*batch, *transition.shape[-3:]).reshape(-1, *transition.shape[-3:])
    return initial, transition, likelihood, batch


def _contracted(initial: Tensor, transition: Tensor, likelihood: Tensor) -> Tensor:
    """Neighbouring bins in pairs, until one is left."""
    # What cannot happen is merely beyond belief: minus infinity has no gradient.
    initial, transition, likelihood = (part.clamp(min=-1e100) for part in (initial, transition, likelihood))
    time = likelihood.shape[-2]
    start = initial + likelihood[:, 0]
    if time == 1:
        return torch.logsumexp(start, -1)
    links = transition.expand(len(likelihood), time - 1, *transition.shape[-2:]) + likelihood[:, 1:].unsqueeze(-2)
    while links.shape[1] > 1:
        pairs = links.shape[1] // 2
        joined = torch.logsumexp(
            links[:, 0 : 2 * pairs : 2].unsqueeze(-1) + links[:, 1 : 2 * pairs : 2].unsqueeze(-3), -2
        )
        links = torch.cat([joined, links[:, 2 * pairs :]], 1)
    return torch.logsumexp(start.unsqueeze(-1) + links[:, 0], (-2, -1))
