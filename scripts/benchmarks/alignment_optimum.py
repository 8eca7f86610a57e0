"""
Show what the optimum of a score under a KL penalty changes in the other scores, from the base model's images alone.

The optimum has the density p·exp(β·s)/Z at each prompt, with p of the base model. A mean over it is a weighted mean
over images of the base model. β is set so that the score gains as much as a method of the benchmark does at a drift.
What the optimum loses of another score there is the price of the aim; what a method loses beyond it is damage.

The images are those that the reporting seeds train on, all seeds together, and gains are those of the prompts that are
trained on. The interval is that of leaving out one seed at a time, by Student's t. With fewer than five images a
prompt, counted by their weights, nothing is said. Distances between images are taken from decoded latents. The rows
are written beside those of the benchmark.

    python scripts/benchmarks/alignment_optimum.py              # for the methods and drifts of the committed rows
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE))

from alignment import DRIFTS, UPDATES, best_strength, likelihood_values, pictures, read_lines  # noqa: E402
from alignment_worlds import world  # noqa: E402

SEEDS = range(2, 7)
METHODS = ("anchored, value", "nft")
"""Methods whose gains are matched."""
FEWEST = 5
"""Images a prompt, counted by their weights, from which on an optimum is shown."""
WATCHED = ("colour", "jpeg_size", "diversity", "likelihood")


def tilted_weights(scores: np.ndarray, groups: np.ndarray, beta: float) -> np.ndarray:
    """Return weights (N,) proportional to exp(β·s), whose sum is the same for each of the groups, and 1 in all."""
    names, members = np.unique(groups, return_inverse=True)
    most = np.full(len(names), -np.inf)
    np.maximum.at(most, members, scores)
    weights = np.exp(beta * (scores - most[members]))
    return weights / np.bincount(members, weights)[members] / len(names)


def strength_of(scores: np.ndarray, groups: np.ndarray, gain: float) -> float | None:
    """Return β at which the weighted mean of scores lies `gain` above their mean; `None` where no β up to 100 does."""
    low, high = 0.0, 100.0
    if tilted_weights(scores, groups, high) @ scores - scores.mean() < gain:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        short = tilted_weights(scores, groups, middle) @ scores - scores.mean() < gain
        low, high = (middle, high) if short else (low, middle)
    return low


def mean_distance(weights: np.ndarray, distances: np.ndarray, groups: np.ndarray) -> float:
    """Return the mean distance of two different images of a group that are drawn by weight, mean over groups."""
    means = []
    for name in np.unique(groups):
        rows = np.flatnonzero(groups == name)
        pairs = np.outer(weights[rows], weights[rows])
        np.fill_diagonal(pairs, 0.0)
        means.append((pairs * distances[np.ix_(rows, rows)]).sum() / pairs.sum())
    return float(np.mean(means))


class BaseImages:
    """The images of the base model that the reporting seeds train on, with every score in its standard deviations."""

    def __init__(self, folder: Path) -> None:
        from tgol_trainer.families import wrap_pipeline

        place = world("shapes")
        family = wrap_pipeline(place.load())
        found = [pictures(place, folder / "shapes", seed, training=True) for seed in SEEDS]
        evaluated = [pictures(place, folder / "shapes", seed, training=False) for seed in SEEDS]
        self.seeds = np.repeat(list(SEEDS), [len(each.prompts) for each in found])
        self.groups = np.concatenate([np.array(each.prompts) for each in found])
        latents = torch.cat([each.latents for each in found])
        self.values = {name: np.concatenate([each.values[name] for each in found]) for name in found[0].values}
        self.values["likelihood"] = self._likelihood(family, latents, self.groups)
        spreads = {name: np.mean([each.values[name].std() for each in evaluated]) for name in found[0].values}
        likely = [self._likelihood(family, each.latents, each.prompts).std() for each in evaluated]
        spreads["likelihood"] = np.mean(likely)
        for name, spread in spreads.items():
            self.values[name] = self.values[name] / spread
        with torch.no_grad():
            parts = [family.decode_images(part) for part in latents.split(256)]
        flat = (torch.cat(parts) / 2 + 0.5).clamp(0, 1).flatten(1)
        self.distances = (torch.cdist(flat, flat) / flat.shape[1] ** 0.5).numpy() / spreads["diversity"]

    @staticmethod
    def _likelihood(family: Any, latents: torch.Tensor, prompts: Sequence[str]) -> np.ndarray:
        """Return the (N,) likelihood of images."""
        texts, places = np.unique(prompts, return_inverse=True)
        embedded = torch.stack(list(family.encode_prompts(list(map(str, texts)))["encoder_hidden_states"]))
        found = []
        for rows in torch.arange(len(latents)).split(256):
            conditioning = {"encoder_hidden_states": embedded[torch.from_numpy(places)[rows]]}
            found.append(likelihood_values(family, latents[rows], conditioning))
        return np.concatenate(found)

    def changes(self, score: str, gain: float, kept: np.ndarray) -> dict[str, float] | None:
        """Return what the optimum that gains so much changes, and its divergence in nats; `None` where none does."""
        groups, scores = self.groups[kept], self.values[score][kept]
        beta = strength_of(scores, groups, gain)
        if beta is None:
            return None
        weights = tilted_weights(scores, groups, beta)
        even = tilted_weights(scores, groups, 0.0)
        found = {name: float((weights - even) @ self.values[name][kept]) for name in WATCHED}
        distances = self.distances[np.ix_(kept, kept)]
        found["diversity"] = mean_distance(weights, distances, groups) - mean_distance(even, distances, groups)
        # The divergence from the base model: the mean of log(w/v), with v the even weights.
        nats = float(weights @ np.log(np.maximum(weights / even, 1e-300)))
        return found | {"nats": nats, "images": float(1 / np.square(weights).sum())}

    def with_intervals(self, score: str, gain: float) -> dict[str, Any] | None:
        """Return [`changes`] of all images, each a pair with half its 95 % interval; `None` with too few images."""
        whole = self.changes(score, gain, np.flatnonzero(self.seeds > 0))
        parts = [self.changes(score, gain, np.flatnonzero(self.seeds != seed)) for seed in SEEDS]
        fewest = FEWEST * len(set(self.groups))
        if whole is None or any(part is None or part["images"] < fewest for part in parts):
            return None
        count = len(parts)
        wide = stats.t.ppf(0.975, count - 1) * np.sqrt(count - 1)
        return {name: (value, float(wide * np.std([part[name] for part in parts]))) for name, value in whole.items()}


def measured_changes(lines: Sequence[dict[str, Any]], method: str, strength: float, score: str) -> list[dict]:
    """Return the mean changes of a method at each drift on prompts that are trained on, and the nats of its paths."""
    rows = [
        line["points"]
        for line in lines
        if (line["method"], line["strength"], line["score"]) == (method, strength, score)
        and (line["regime"], line["world"], line["updates"]) == ("dense", "shapes", UPDATES)
        and line["seed"] in SEEDS
    ]
    names = (score, *WATCHED)
    place = world("shapes")
    share = len(place.held_out) / len(place.prompts)

    def trained(gains: dict[str, float]) -> float:
        return (gains["gain"] - share * gains["held_out"]) / (1 - share)

    return [
        {name: float(np.mean([trained(points[number]["gains"][name]) for points in rows])) for name in names}
        | {"nats": float(np.mean([points[number]["nats"] for points in rows]))}
        for number in range(len(DRIFTS))
    ]


def described(optimum: dict[str, Any] | None, name: str) -> str:
    """Return a change at the optimum and half its interval."""
    return "–" if optimum is None else f"{optimum[name][0]:+.2f} ± {optimum[name][1]:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of what the optimum changes beside what methods do, at the gains of these."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("alignment_data"), help="folder of images of the benchmark")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "alignment.jsonl", help="rows of methods")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "alignment_optimum.jsonl")
    args = parser.parse_args(argv)
    lines, images = read_lines(args.results), BaseImages(args.data)
    print(f"| trained on | gain of | drift | gain | {' | '.join(WATCHED)} | nats | images |")
    print("|---" * (6 + len(WATCHED)) + "|")
    rows = []
    for score in world("shapes").trained:
        for method in METHODS:
            strength = best_strength(lines, method, score)
            if strength is None:
                continue
            for drift, found in zip(DRIFTS, measured_changes(lines, method, strength, score), strict=True):
                optimum = images.with_intervals(score, found[score])
                rows.append({"score": score, "method": method, "drift": drift, "measured": found, "optimum": optimum})
                cells = [f"{found[name]:+.2f} / {described(optimum, name)}" for name in WATCHED]
                nats = f"{found['nats']:.1f} / {described(optimum, 'nats')}"
                count = f"{optimum['images'][0]:.0f}" if optimum else "–"
                print(
                    f"| {score} | {method} | {drift:g} | {found[score]:.2f} | {' | '.join(cells)} | {nats} | {count} |"
                )
    args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
