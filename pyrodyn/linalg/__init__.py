"""Block-tridiagonal Gaussians and hidden Markov chains: the one place written for speed."""

from pyrodyn.linalg.chain import ChainFactor, log_normaliser
from pyrodyn.linalg.markov import mode_log_normaliser, mode_marginals, most_probable_modes, sample_modes
from pyrodyn.linalg.matrix import square_roots

__all__ = [
    "ChainFactor",
    "log_normaliser",
    "mode_log_normaliser",
    "mode_marginals",
    "most_probable_modes",
    "sample_modes",
    "square_roots",
]
