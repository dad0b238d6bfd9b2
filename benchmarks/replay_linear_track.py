"""Replay on a real linear track and on simulated events: runs decoded, pauses and rest against shuffles.

Run `python benchmarks/replay_linear_track.py`; it writes docs/tables/replay.md, in about fifteen minutes on one core.
$PYRODYN_DATA names the folder of recordings. The exit code is 1 unless all bars are met.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.special import gammaln, logsumexp

import pyrodyn as dyn
from pyrodyn import inference, models
from pyrodyn.models.replay import COHERENT, ReplayParameters, replay_categories
from pyrodyn.readers import count_spikes

TABLE = Path(__file__).resolve().parents[1] / "docs" / "tables" / "replay.md"
FOLDER = Path(os.environ.get("PYRODYN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

RUN_BIN, EVENT_BIN = 0.25, 0.002  # seconds
FINE = 10  # bins of a run's bin in which places are learned
PLACES = 32  # bins of the track
SMOOTHING, PRIOR = 1.0, 0.1  # bins of the track, seconds: the likeliest of a grid for held-out passes
ON_TRACK, AT_REST = (4430.0, 5370.0), (5390.0, 6365.0)  # seconds on the recording's clock
SPEED, LEAST = 0.08, 0.3  # of a run: lengths of the track a second, and length of the track
FASTEST = 4.0  # events a second of a unit that is taken for an interneuron where bursts are looked for
WALK = np.sqrt(6.0 / EVENT_BIN)  # cm per root of a second: a variance of 6 square centimetres a bin
STAY, THRESHOLD = 0.98, 0.8
LENGTH, SPACING = 180.0, 3.0  # cm, of the simulated track and its places

RUN_ERROR, ACCURACY, SURE, SHUFFLED, CHANCE = 0.062, 0.02, 0.90, 0.15, 0.05


class Track(NamedTuple):
    """A session on a track: spikes, and where the animal is along it, from 0 to 1."""

    spikes: list[np.ndarray]  # one array of times a unit
    time: np.ndarray  # of the camera, seconds
    place: np.ndarray
    speed: np.ndarray  # lengths of the track a second


def linear_track(folder: Path) -> Track:
    """The track is the axis along which the camera sees most of the variance; its ends hold 99% of the time."""
    with np.load(folder / "nelpy_hippocampus" / "linear-track.npz", allow_pickle=False) as held:
        spikes = [held["spike_times"][held["spike_unit"] == k] for k in range(len(held["unit_tetrode"]))]
        seen, first = np.unique(held["pos_t"], return_index=True)
        pixels = np.stack([held["pos_x"], held["pos_y"]], -1)[first].astype(float)
    inside = (seen > ON_TRACK[0]) & (seen < ON_TRACK[1])
    centred = pixels - pixels[inside].mean(0)
    along = centred @ np.linalg.svd(centred[inside], full_matrices=False)[2][0]
    low, high = np.quantile(along[inside], [0.005, 0.995])
    place = gaussian_filter1d((along - low) / (high - low), 10.0)  # a sixth of a second
    return Track(spikes, seen, place, np.abs(np.gradient(place, seen)))


class Runs(NamedTuple):
    """Spikes and places in the span of running, in bins of 25 ms, and the passes from one end towards the other."""

    counts: np.ndarray  # (time, unit)
    place: np.ndarray  # (time,)
    passes: list[slice]  # of whole bins of 250 ms

    def during(self, passes: list[slice]) -> np.ndarray:
        """The bins of some passes."""
        return np.concatenate([np.arange(part.start, part.stop) for part in passes])

    def coarse(self, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Counts (time, unit) and places (time,) of a pass in bins of 250 ms."""
        counts, place = (values[part].reshape(-1, FINE, *values.shape[1:]) for values in (self.counts, self.place))
        return counts.sum(1), place.mean(1)


def runs(track: Track) -> Runs:
    coarse, width = int((ON_TRACK[1] - ON_TRACK[0]) / RUN_BIN), RUN_BIN / FINE
    start, bins = np.array([ON_TRACK[0]]), coarse * FINE
    counts = np.stack([count_spikes(times, start, bins, width)[0] for times in track.spikes], -1)
    middle = ON_TRACK[0] + width * (np.arange(bins) + 0.5)
    place, speed = np.interp(middle, track.time, track.place), np.interp(middle, track.time, track.speed)
    of_bins, fast = place.reshape(coarse, FINE), speed.reshape(coarse, FINE).mean(1) > SPEED
    inside = (of_bins.min(1) >= 0) & (of_bins.max(1) <= 1)
    passes = [
        slice(a * FINE, b * FINE)
        for a, b in stretches(fast & inside)
        if abs(of_bins[b - 1].mean() - of_bins[a].mean()) > LEAST
    ]
    return Runs(counts, place, passes)


def stretches(true: np.ndarray) -> np.ndarray:
    """Where an array is true, as pairs of first position and one past the last."""
    return np.flatnonzero(np.diff(np.r_[0, true.astype(int), 0])).reshape(-1, 2)


def learned(run: Runs, passes: list[slice], units: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Place fields of some units from some passes, the animal being at ``place`` (time,)."""
    during = run.during(passes)
    counts = run.counts[during][None][..., units]
    recording = dyn.Recording.from_arrays(counts, bin_width=RUN_BIN / FINE, counts=True)
    ends = np.linspace(0, 1, PLACES + 1)
    return models.place_fields(recording, place[during][None], ends, prior=PRIOR, smoothing=SMOOTHING)


def given(fields: np.ndarray, spacing: float, walk: float, gain: float = 1.0) -> tuple[models.Replay, ReplayParameters]:
    """A model, and its parameters without draws, known."""
    model = models.Replay(fields=fields, spacing=spacing, walk=walk, stay=STAY)
    one = torch.ones(1, dtype=torch.float64)
    units = one.new_ones(len(fields))
    return model, ReplayParameters(gain * one, gain * units, walk * one, STAY * one.new_ones(3))


def decode_runs(run: Runs, folds: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the place in held-out passes, as shares of the track: bins one by one, and decoded as one path.

    Passes go to the folds in turn. The walk is that of the other passes, bin by bin.
    """
    places = (np.arange(PLACES) + 0.5) / PLACES
    alone, together = [], []
    for fold in range(folds):
        held, rest = run.passes[fold::folds], [p for i, p in enumerate(run.passes) if i % folds != fold]
        units = np.flatnonzero(run.counts[run.during(rest)].sum(0))
        fields = learned(run, rest, units, run.place)
        steps = np.concatenate([np.diff(run.coarse(part)[1]) for part in rest])
        model, parameters = given(fields, 1.0 / PLACES, float(np.sqrt(np.mean(steps**2) / RUN_BIN)))
        recording = dyn.Recording.from_arrays(
            [run.coarse(part)[0][:, units] for part in held], bin_width=RUN_BIN, counts=True
        )
        law = model.decode(parameters, recording).sum(-2).numpy()
        single = of_places(recording, fields).argmax(-1)
        for i, part in enumerate(held):
            place = run.coarse(part)[1]
            here = np.arange(len(place))
            median = places[(law[i, here].cumsum(-1) >= 0.5).argmax(-1)]
            together.append(np.abs(median - place))
            alone.append(np.abs(places[single[i, here]] - place))
    return np.concatenate(alone), np.concatenate(together)


def of_places(recording: dyn.Recording, fields: np.ndarray) -> np.ndarray:
    """Log likelihood of every bin at every place, (trial, time, position)."""
    counts = recording.values.numpy()
    rates = fields * recording.bin_width
    return counts @ np.log(rates) - rates.sum(0) - gammaln(counts + 1.0).sum(-1, keepdims=True)


def bursts(track: Track, span: tuple[float, float], units: np.ndarray, active: int = 5) -> dyn.Recording:
    """Events of 50 to 500 ms in which the population fires more than three sd above its mean, in bins of 2 ms.

    They last while it fires more than its mean, ``active`` units take part or more, and the animal does not run. Of
    ``units`` all are binned, and those that fire slowly looked at.
    """
    step, start = 0.001, np.array([span[0]])
    bins = int((span[1] - span[0]) / step)
    counts = np.stack([count_spikes(track.spikes[k], start, bins, step)[0] for k in units], -1)
    slow = counts.sum(0) < FASTEST * (span[1] - span[0])
    rate = gaussian_filter1d(counts[:, slow].sum(1).astype(float), 15.0)
    mean, sd = rate.mean(), rate.std()
    found = [
        (a, b)
        for a, b in stretches(rate > mean)
        if rate[a:b].max() > mean + 3 * sd
        and 50 <= b - a <= 500
        and (counts[a:b, slow].sum(0) > 0).sum() >= active
        and np.interp(span[0] + step * (a + b) / 2, track.time, track.speed) < SPEED
    ]
    binned = [counts[a : b - (b - a) % 2].reshape((b - a) // 2, 2, -1).sum(1) for a, b in found]
    return dyn.Recording.from_arrays(binned, bin_width=EVENT_BIN, counts=True)


class Scored(NamedTuple):
    coherence: float  # nats by which an event is likelier under all dynamics than if places were drawn in every bin
    classified: float  # share of events that belong to any category of dynamics at any time
    coherent: float  # and to one that keeps a place, or goes on from it


def score(events: dyn.Recording, fields: np.ndarray, spacing: float, walk: float) -> Scored:
    """How events are decoded with known fields, each unit's scaled to the number of its events."""
    counts = events.values.numpy().sum((0, 1))
    seconds = events.lengths.sum() * events.bin_width
    fields = fields * ((counts + 1.0) / (fields.mean(1) * seconds + 1.0))[:, None]
    model, parameters = given(fields, spacing, walk)
    inside = np.arange(events.num_bins) < events.lengths[:, None]
    jumping = (logsumexp(of_places(events, fields), axis=-1) - np.log(fields.shape[1]))[inside].sum()
    with torch.no_grad():
        evidence = float(model.evidence(parameters, events, events.values).sum())
    category = np.where(inside, replay_categories(model.decode(parameters, events).sum(-1), THRESHOLD), -1)
    known, coherent = category >= 0, (category >= 0) & (category < len(COHERENT))
    return Scored((evidence - jumping) / events.num_trials, float(known.any(1).mean()), float(coherent.any(1).mean()))


def shuffles(run: Runs, units: np.ndarray, fields: np.ndarray, events: dyn.Recording) -> dict[str, Callable]:
    """What breaks the bond of spikes and places, each as a draw of (events, fields)."""

    def turned(rng: np.random.Generator):
        """Every unit's field moved round the track by a distance of its own: bursts of one unit stay coherent."""
        return events, np.stack([np.roll(field, rng.integers(1, PLACES)) for field in fields])

    def resampled(rng: np.random.Generator):
        """Fields learned from places drawn anew from those of the run."""
        during = run.during(run.passes)
        place = run.place.copy()
        place[during] = rng.choice(place[during], len(during))
        return events, learned(run, run.passes, units, place)

    def reordered(rng: np.random.Generator):
        """The bins of every event in another order."""
        parts = [
            rng.permutation(counts[:bins])
            for counts, bins in zip(events.values.numpy(), events.lengths.tolist(), strict=True)
        ]
        return dyn.Recording.from_arrays(parts, bin_width=EVENT_BIN, counts=True), fields

    return {"fields turned": turned, "places resampled": resampled, "bins reordered": reordered}


def against_shuffles(track: Track, run: Runs, span: tuple[float, float], repeats: int) -> tuple[int, Scored, dict]:
    """Number of events, what is made of them, and of each kind of shuffle the scores (repeat, score)."""
    units = np.flatnonzero(run.counts[run.during(run.passes)].sum(0))
    events = bursts(track, span, units)
    fields = learned(run, run.passes, units, run.place)
    walk = WALK / LENGTH  # the track's length in cm is not known: as if it were the simulated one
    found = score(events, fields, 1.0 / PLACES, walk)
    broken = {
        name: np.array([
            score(*shuffle(np.random.default_rng([seed, k])), 1.0 / PLACES, walk) for seed in range(repeats)
        ])
        for k, (name, shuffle) in enumerate(shuffles(run, units, fields, events).items())
    }  # fmt: skip
    return events.num_trials, found, broken


def simulated_fields() -> np.ndarray:
    """19 cells with peaks of 15 Hz every 10 cm, standard deviation 6 cm."""
    place = np.arange(0.0, LENGTH + SPACING / 2, SPACING)
    return 0.1 + 15.0 * np.exp(-0.5 * ((place - np.linspace(0.0, LENGTH, 19)[:, None]) / 6.0) ** 2)


class Simulated(NamedTuple):
    events: dyn.Recording
    dynamics: np.ndarray  # (trial, time)


def own_samples(gain: float, events: int, seed: int) -> Simulated:
    """Events of 300 ms drawn from the model."""
    fields = simulated_fields()
    model, parameters = given(fields, SPACING, float(WALK), gain)
    like = dyn.Recording.from_arrays(np.ones((events, 150, len(fields))), bin_width=EVENT_BIN, counts=True)
    values = {"gain": parameters.gain, "unit_gain": parameters.unit_gain, "walk": parameters.walk}
    recording, truth = dyn.simulate(model, like, seed=seed, values=values | {"stay": parameters.stay})
    return Simulated(recording, truth["dynamics_path"].values)


def rightness(probability: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Share of bins whose dynamics are right, of those that are sure, and share that is sure."""
    right, sure = probability.argmax(-1) == truth, probability.max(-1) > THRESHOLD
    return float(right.mean()), float(right[sure].mean()), float(sure.mean())


def learned_in_simulation(seed: int, resample: bool) -> np.ndarray:
    """Fields from 20 minutes of running to and fro at 20 cm a second, places drawn anew or not."""
    rng, width = np.random.default_rng(seed), 0.02
    fields = simulated_fields()
    centres = np.arange(fields.shape[1]) * SPACING
    way = 20.0 * width * np.arange(60_000) % (2 * LENGTH)
    place = np.minimum(way, 2 * LENGTH - way)
    rates = np.stack([np.interp(place, centres, field) for field in fields], -1)
    run = dyn.Recording.from_arrays(rng.poisson(rates * width)[None].astype(float), bin_width=width, counts=True)
    if resample:
        place = rng.choice(place, len(place))
    ends = np.append(centres - SPACING / 2, LENGTH + SPACING / 2)
    return models.place_fields(run, place[None], ends, smoothing=1.0)


def three_segments(events: int, gain: float | None, seed: int) -> tuple[float, float]:
    """Shares of events of 60, 190 and 30 ms held, swept and jumping that are decoded in that order.

    In each segment the dynamics are those with the largest mean probability. The second share takes the first segment
    for right where dynamics are a mixture of stationary and continuous. Without a gain there is a spike in every bin,
    of the cell whose field lies at the place; with one spikes are Poisson.
    """
    rng, fields = np.random.default_rng(seed), simulated_fields()
    cells, places = fields.shape
    where = np.concatenate([
        np.zeros((events, 30), int),
        np.tile(np.linspace(0, places - 1, 95).round().astype(int), (events, 1)),
        rng.integers(places, size=(events, 15)),
    ], 1)  # fmt: skip
    if gain is None:
        counts = np.eye(cells)[np.round(where * (cells - 1) / (places - 1)).astype(int)]
    else:
        counts = rng.poisson(fields.T[where] * gain * EVENT_BIN).astype(float)
    recording = dyn.Recording.from_arrays(counts, bin_width=EVENT_BIN, counts=True)
    model, parameters = given(fields, SPACING, float(WALK), 1.0 if gain is None else gain)
    law = model.decode(parameters, recording).sum(-1).numpy()
    first, second, third = (law[:, a:b].mean(1) for a, b in ((0, 30), (30, 125), (125, 140)))
    rest = (second.argmax(-1) == 1) & (third.argmax(-1) == 2)
    mixture = (replay_categories(first) == 0) | (replay_categories(first) == 1)
    return float((rest & (first.argmax(-1) == 0)).mean()), float((rest & mixture).mean())


def simulations(events: int, seed: int) -> tuple[list[str], list[tuple[str, str, str]], list[bool]]:
    """Lines of the table of gains, rows of (what, measured, bar), and which bars are met."""
    fields, lines, met = simulated_fields(), [], []
    for gain in (5.0, 15.0):
        drawn = own_samples(gain, events, seed)
        model, parameters = given(fields, SPACING, float(WALK), gain)
        exact = rightness(model.decode(parameters, drawn.events).sum(-1).numpy(), drawn.dynamics)
        fresh = models.Replay(fields=fields, spacing=SPACING)
        posterior = dyn.fit(fresh, drawn.events, inference.Laplace(draws=100), seed=seed)
        fitted = rightness(posterior["latents"]["dynamics_probability"].values, drawn.dynamics)
        spikes = float(drawn.events.values.sum((1, 2)).mean())
        for name, (right, surely, sure) in (("known", exact), ("fitted", fitted)):
            lines.append(f"| {gain:.0f} | {spikes:.0f} | {name} | {right:.3f} | {surely:.3f} | {sure:.2f} |")
        met += [abs(fitted[0] - exact[0]) <= ACCURACY, fitted[1] >= SURE]
        if gain == 5.0:
            shares = {
                resample: score(drawn.events, learned_in_simulation(seed, resample), SPACING, float(WALK)).classified
                for resample in (False, True)
            }
    dense, poisson = three_segments(100, None, seed), three_segments(200, 15.0, seed)
    met += [shares[True] <= SHUFFLED, dense[0] == 1.0]
    rows = [
        ("events classified, fields learned in a simulated run", f"{shares[False]:.2f}", ""),
        ("events classified, places of the run resampled", f"{shares[True]:.2f}", f"{SHUFFLED:.2f}"),
        ("three segments, a spike in every bin: decoded in order", f"{dense[0]:.2f}", "1.00"),
        ("three segments, Poisson spikes at 15 times the rates of running: in order", f"{poisson[0]:.2f}", ""),
        ("the same, stationary or mixed with continuous at first", f"{poisson[1]:.2f}", ""),
    ]
    return lines, rows, met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=49, help="shuffles of each kind")
    parser.add_argument("--events", type=int, default=200, help="simulated, for each gain")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", dyn.FitWarning)
    warnings.filterwarnings("ignore", message=".*silent")  # in passes held out, in a few events
    track = linear_track(FOLDER)
    run = runs(track)
    alone, together = decode_runs(run)
    real, met = [], [float(np.median(together)) <= RUN_ERROR]
    for name, span in (("pauses on the track", ON_TRACK), ("rest", AT_REST)):
        number, found, broken = against_shuffles(track, run, span, chosen.repeats)
        shares = f"{found.classified:.2f} | {found.coherent:.2f}"
        real.append(f"| {name} | {number} | recorded | {found.coherence:.2f} | | {shares} |")
        for kind, scores in broken.items():
            means = scores.mean(0)
            chance = (1 + int((scores[:, 0] >= found.coherence).sum())) / (1 + chosen.repeats)
            met.append(chance < CHANCE)
            real.append(
                f"| {name} | {number} | {kind} | {means[0]:.2f} | {chance:.2f} | {means[1]:.2f} | {means[2]:.2f} |"
            )
    lines, rows, simulated = simulations(chosen.events, chosen.seed)
    met += simulated
    seconds = time.perf_counter() - began
    command = f"--repeats {chosen.repeats} --events {chosen.events} --seed {chosen.seed}"
    text = f"""# Replay

`python benchmarks/replay_linear_track.py {command}`, {seconds / 60:.0f} minutes on one core.

## A rat on a linear track

31 units of the hippocampus, {len(run.passes)} passes over the track in 16 minutes, then 16 minutes of rest. Fields have
{PLACES} places, are smoothed by {SMOOTHING:g} of them, with {PRIOR:g} seconds of the unit's mean rate. Runs are decoded
in bins of 250 ms, passes held out in five folds.

| median error, share of the track | |
|---|---|
| bins one by one | {np.median(alone):.4f} |
| decoded as one path | {np.median(together):.4f} |
| bar | {RUN_ERROR:.3f} |

Bursts of the population, while the animal pauses on the track and while it rests, decoded in bins of 2 ms. Coherence is
the nats an event gains when places go on from bin to bin, over places drawn anew in every bin. P is the share of
{chosen.repeats} shuffles that are as coherent, the recording counted among them; of a kind of shuffle means are shown.
Classified are events in which dynamics, or a mixture of neighbours, reach .8 at any time; coherent are those where
these are {", ".join(COHERENT[:-1])} or {COHERENT[-1]}.

| events | number | | coherence | P | classified | coherent |
|---|---|---|---|---|---|---|
{chr(10).join(real)}

## Simulated events

19 cells on 180 cm, {chosen.events} events of 300 ms drawn from the model. Rates in events are those of running, times a
gain. Known: all parameters are. Fitted: gains, walk and persistence are inferred from the events alone.

| gain | spikes an event | parameters | accuracy of dynamics | right where P > .8 | share of bins where it is |
|---|---|---|---|---|---|
{chr(10).join(lines)}

| | measured | bar |
|---|---|---|
{chr(10).join(f"| {what} | {measured} | {bar} |" for what, measured, bar in rows)}

In 60 ms a place that is held and a walk of 2.4 cm a bin tell apart only if a cell fires in nearly every bin.
"""
    print(text)
    TABLE.write_text(text)
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
