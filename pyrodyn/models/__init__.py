"""The zoo: one model a file. Each is a frozen dataclass of options and a Pyro program of a recording."""

from pyrodyn.models.hmm import HMM
from pyrodyn.models.lds import LDS
from pyrodyn.models.linear_sde import LinearSDE
from pyrodyn.models.multi_region_lds import MultiRegionLDS

__all__ = ["HMM", "LDS", "LinearSDE", "MultiRegionLDS"]
