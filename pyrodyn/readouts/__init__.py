"""From latent to observations: laws for one kind of unit, and one law for each region."""

from pyrodyn.readouts.law import Law, Readout
from pyrodyn.readouts.laws import Bernoulli, Gaussian, NegativeBinomial, Poisson
from pyrodyn.readouts.observations import AffineReadout, NetworkReadout, mode_log_likelihood
from pyrodyn.readouts.per_region import PerRegion, as_readout

__all__ = [
    "AffineReadout",
    "Bernoulli",
    "Gaussian",
    "Law",
    "NegativeBinomial",
    "NetworkReadout",
    "PerRegion",
    "Poisson",
    "Readout",
    "as_readout",
    "mode_log_likelihood",
]
