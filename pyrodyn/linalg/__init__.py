"""Linear algebra of block-tridiagonal Gaussians: the one place written for speed."""

from pyrodyn.linalg.chain import ChainFactor, log_normaliser
from pyrodyn.linalg.matrix import square_roots

__all__ = ["ChainFactor", "log_normaliser", "square_roots"]
