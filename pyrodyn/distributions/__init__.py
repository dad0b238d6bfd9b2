"""Whole trajectories, switching or not, gauged matrices, and networks of dynamics, as single random variables."""

from pyrodyn.distributions.affine_subspace import SubspaceNormal
from pyrodyn.distributions.bent_chain import BentChain
from pyrodyn.distributions.euler_maruyama import EulerMaruyama
from pyrodyn.distributions.gauss_markov import GaussMarkov
from pyrodyn.distributions.gaussian_process import GaussianProcess
from pyrodyn.distributions.horseshoe import HorseshoeNetwork
from pyrodyn.distributions.loading import GaugedLoading
from pyrodyn.distributions.network import NetworkLayout, NetworkPrior, network_layout
from pyrodyn.distributions.nonlinear_markov import NonlinearMarkov, Recurrence
from pyrodyn.distributions.pool import Pool, PoolPrior
from pyrodyn.distributions.student_steps import StudentSteps
from pyrodyn.distributions.switching import GivenModes, SwitchingPath
from pyrodyn.distributions.transition import Transition
from pyrodyn.distributions.varying import varying_chain

__all__ = [
    "BentChain",
    "EulerMaruyama",
    "GaugedLoading",
    "GaussMarkov",
    "GaussianProcess",
    "GivenModes",
    "HorseshoeNetwork",
    "NetworkLayout",
    "NetworkPrior",
    "NonlinearMarkov",
    "Pool",
    "PoolPrior",
    "Recurrence",
    "StudentSteps",
    "SubspaceNormal",
    "SwitchingPath",
    "Transition",
    "network_layout",
    "varying_chain",
]
