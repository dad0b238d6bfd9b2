r"""Drifts of differential equations: linear, Gaussian process, neural network.

Every drift is a linear map of features of the state,

.. math:: f(x) = W^\top \psi(x), \qquad W_{md} \sim N(0, v_m),

the features being 1, the state itself, and what makes the drift nonlinear. So an engine can treat W exactly, whatever
the features are. Rates are in units of the pace, one over the time in which a latent typically changes.

A drift is a frozen set of options. Its sites are ``drift_weights`` (feature, latent), W over its prior standard
deviation, and those that its features have.
"""

from pyrodyn.drifts.drift import Drift, DriftParameters
from pyrodyn.drifts.gaussian_process import GaussianProcess
from pyrodyn.drifts.linear import Linear
from pyrodyn.drifts.mlp import MLP

__all__ = ["MLP", "Drift", "DriftParameters", "GaussianProcess", "Linear"]
