"""The engines: frozen options that turn a program and a recording into draws."""

from pyrodyn.inference.collapse import collapse, collapses
from pyrodyn.inference.density import LogDensity
from pyrodyn.inference.gibbs import Gibbs
from pyrodyn.inference.hmc import HMC
from pyrodyn.inference.laplace import Laplace
from pyrodyn.inference.local import LocalInference
from pyrodyn.inference.natural import NaturalGradient
from pyrodyn.inference.nuts import NUTS
from pyrodyn.inference.sgld import SGLD
from pyrodyn.inference.svi import SVI
from pyrodyn.inference.training import Constant, Cosine, EarlyStopping, Training

__all__ = [
    "HMC",
    "NUTS",
    "SGLD",
    "SVI",
    "Constant",
    "Cosine",
    "EarlyStopping",
    "Gibbs",
    "Laplace",
    "LocalInference",
    "LogDensity",
    "NaturalGradient",
    "Training",
    "collapse",
    "collapses",
]
