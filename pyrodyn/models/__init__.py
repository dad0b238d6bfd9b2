"""The zoo: one model a file. Each is a frozen dataclass of options and a Pyro program of a recording."""

from pyrodyn.models.lds import LDS

__all__ = ["LDS"]
