"""The zoo: one model a file. Each is a frozen dataclass of options and a Pyro program of a recording."""

from pyrodyn.models.accumulator import Accumulator
from pyrodyn.models.arhmm import ARHMM
from pyrodyn.models.gain_hmm import GainHMM
from pyrodyn.models.hmm import HMM
from pyrodyn.models.latent_rnn import LatentRNN
from pyrodyn.models.lds import LDS
from pyrodyn.models.lfads import LFADS
from pyrodyn.models.linear_sde import LinearSDE
from pyrodyn.models.multi_region_lds import MultiRegionLDS
from pyrodyn.models.multi_region_switching_lds import MultiRegionSwitchingLDS
from pyrodyn.models.neural_ode import NeuralODE
from pyrodyn.models.neural_sde import NeuralSDE
from pyrodyn.models.race import Race
from pyrodyn.models.replay import Replay, place_fields, replay_categories
from pyrodyn.models.stepping import Stepping
from pyrodyn.models.switching_lds import SwitchingLDS
from pyrodyn.models.time_priors import MarkovPrior, SmoothPrior, StaticPrior
from pyrodyn.models.vae import VAE

__all__ = [
    "ARHMM",
    "Accumulator",
    "GainHMM",
    "HMM",
    "LDS",
    "LFADS",
    "LatentRNN",
    "LinearSDE",
    "MarkovPrior",
    "MultiRegionLDS",
    "MultiRegionSwitchingLDS",
    "NeuralODE",
    "NeuralSDE",
    "Race",
    "Replay",
    "SmoothPrior",
    "StaticPrior",
    "SwitchingLDS",
    "Stepping",
    "VAE",
    "place_fields",
    "replay_categories",
]
