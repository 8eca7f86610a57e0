"""
Compare losses on small models: how much a score gains at a given drift from the base model, and at what cost.

Every run has the same learning rate, warm-up, number of updates, batches and noise; it differs in the loss alone.
After training, the adapter is scaled until the drift is 2, 5 and 10, and images are sampled at each of these, so that
nothing is interpolated at equal drift. Drift is 1000 times the mean squared change of the network's output. The
divergence of sampling paths, which weights early and late times differently, stands beside it.

Every method has several settings of its one strength. They are compared on the tuning seed, and the best one for a
score is run on the reporting seeds, which have training images, noise and evaluation images of their own. The recipe
and the same loss without its baseline have one strength for all scores. A quarter of the prompts are never trained on.
The report calls a method no worse than another where the 95 % interval of the difference, seed by seed, lies above
-0.05 standard deviations of the base model's score. This margin was fixed before the runs.

Each run is one line of JSON. Runs that the file already holds are skipped, so the program can be stopped and started
again, and a file kept in git grows.

    python scripts/benchmarks/alignment.py --tune               # every setting of each method on the tuning seed
    python scripts/benchmarks/alignment.py --compare            # the best setting of each on the reporting seeds
    python scripts/benchmarks/alignment.py --quick              # four methods, one seed, one score, 32 updates
    python scripts/benchmarks/alignment.py --report docs        # write tables from the results file
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE))

from alignment_meter import Meter, scale_adapter  # noqa: E402
from alignment_methods import CSFT_SUFFIXES, GROUP, METHODS, Passed, arguments  # noqa: E402
from alignment_value import baseline_values  # noqa: E402
from alignment_worlds import WORLDS, Pictures, World, encoded, measured, stored, world  # noqa: E402

RATE, WARMUP, UPDATES, BATCH = 2e-4, 10, 128, 32
DRIFTS = (2.0, 5.0, 10.0)
TUNED_AT = 5.0
TUNING, REPORTING = (0,), tuple(range(2, 10))
IMAGES_PER_PROMPT, EVALUATED_PER_PROMPT = 40, 3
SAMPLING = {"num_inference_steps": 10, "guidance_scale": 1.5, "batch_size": 72}
REGIMES = ("dense", "stars", "single")
"""Scores as they are; ratings from 1 to 5; one threshold for all with a tenth of the scores wrong."""
FIXED = {"anchored, value": 0.25, "anchored": 0.25}
"""Strength of the recipe, one for all scores, and of the same loss without its baseline."""
QUICK = ("tgo, w=d", "anchored", "dpo", "kto")


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of one run."""

    method: str
    strength: float
    score: str
    seed: int
    regime: str = "dense"
    world: str = "shapes"
    updates: int = UPDATES

    def key(self) -> str:
        """Return a text that is equal for equal runs."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def pictures(place: World, folder: Path, seed: int, *, training: bool) -> Pictures:
    """Return the training or the evaluation images of a seed, sampled from the base model once."""
    from tgol_trainer.evaluation import generate_images
    from tgol_trainer.families import wrap_pipeline

    def make() -> Pictures:
        names = [name for name in place.prompts if not (training and name in place.held_out)]
        count = IMAGES_PER_PROMPT if training else EVALUATED_PER_PROMPT
        prompts, family = names * count, wrap_pipeline(place.load())
        first = (2 * seed + training) * 100_000
        images = generate_images(
            family.pipeline, prompts, range(first, first + len(prompts)), progress=False, **SAMPLING
        )
        with torch.no_grad():
            return Pictures(prompts, encoded(family, images), measured(place, images, prompts))

    kind = "train" if training else "base"
    return stored(folder / f"{kind}_{seed}.safetensors", make)


def training_scores(run: Run, values: np.ndarray) -> np.ndarray:
    """Return the scores of a run: as they are, as stars, or with a tenth of them taken from other images."""
    if run.regime == "stars":
        return 1.0 + np.searchsorted(np.quantile(values, [0.1, 0.35, 0.65, 0.9]), values, side="right")
    if run.regime == "single":
        rng = np.random.default_rng(run.seed)
        return np.where(rng.random(values.size) < 0.1, rng.permutation(values), values)
    return values


class Training:
    """One run's rows, network and batches. The reference's predictions are computed once for all runs of a seed."""

    def __init__(self, run: Run, folder: Path) -> None:
        from peft import LoraConfig

        from tgol_trainer import adapters
        from tgol_trainer.families import wrap_pipeline
        from tgol_trainer.labels import fit_labels
        from tgol_trainer.labels.training import label_settings

        self.run, self.method, self.place = run, METHODS[run.method], world(run.world)
        self.folder = folder / run.world
        self.family = wrap_pipeline(self.place.load())
        self.rows = pictures(self.place, self.folder, run.seed, training=True)
        self.args = arguments(self.method, run.strength)
        # As with one image a prompt, each row is a group of its own; the batches stay as they are.
        names = self.rows.prompts if run.regime != "single" else list(map(str, range(len(self.rows.prompts))))
        self.groups = np.unique(self.rows.prompts, return_inverse=True)[1]
        scores = training_scores(run, self.rows.values[run.score])
        fitted = fit_labels(scores, label_settings(self.args), groups=names)
        self.labels, self.labeler = fitted.labels, fitted.labeler
        modules = ["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out"]
        config = LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=modules)
        adapters.attach(self.family.denoiser, config, seed=run.seed, probe=self.family.probe)
        suffixes = ["", *CSFT_SUFFIXES] if self.method.suffixed else [""]
        texts = [name + suffix for name in self.place.prompts for suffix in suffixes]
        embedded = self.family.encode_prompts(texts)["encoder_hidden_states"]
        self.embedded = dict(zip(texts, embedded, strict=True))

    def conditioning(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return what the denoiser is conditioned on for some prompts."""
        return {"encoder_hidden_states": torch.stack([self.embedded[text] for text in texts])}

    @functools.cached_property
    def order(self) -> np.ndarray:
        """(updates, BATCH) rows; the images of a prompt stand side by side, in blocks of GROUP."""
        from tgol_trainer.data import GroupSampler

        sampler = GroupSampler(self.groups, GROUP, self.run.seed)
        found: list[int] = []
        while len(found) < self.run.updates * BATCH:
            found += list(sampler)
            sampler.set_epoch(sampler.epoch + 1)
        return np.array(found[: self.run.updates * BATCH]).reshape(-1, BATCH)

    def rows_of(self, step: int) -> np.ndarray:
        """Return the (BATCH / draws,) rows of a step; with several draws, blocks are images of different prompts."""
        rows = self.order[step].reshape(-1, GROUP).T.ravel() if self.method.draws > 1 else self.order[step]
        return rows[: BATCH // self.method.draws]

    def draw(self, step: int) -> Any:
        """Return the noised latents of a step, the same for all runs of a seed that share noise, or do not."""
        from tgol_trainer.likelihoods import RowGenerators

        if self.method.draws > 1:
            return self.stratified_draw(step)
        rows = self.order[step]
        # Blocks have a number of their own: two blocks of a prompt differ in noise.
        keys = np.arange(BATCH) // GROUP if self.method.shared else rows
        generators = RowGenerators(self.run.seed, step, keys.tolist())
        return self.family.likelihood.draw(self.rows.latents[rows], generators)

    def stratified_draw(self, step: int) -> Any:
        """Return several noised versions of each image of a step, their times one in each of as many equal parts."""
        from tgol_trainer.likelihoods import RowGenerators

        draws = self.method.draws
        part = torch.arange(BATCH) % draws

        class Stratified(RowGenerators):
            def integers(self, purpose: str, high: int) -> torch.Tensor:
                return ((part + self.uniform(purpose)) / draws * high).long()

        rows = np.repeat(self.rows_of(step), draws)
        keys = np.arange(BATCH) + step * BATCH
        return self.family.likelihood.draw(self.rows.latents[rows], Stratified(self.run.seed, step, keys.tolist()))

    @functools.cached_property
    def references(self) -> torch.Tensor:
        """(updates, BATCH, C, h, w) predictions of the reference, from a file where a run made them before."""
        from safetensors.torch import load_file, save_file

        from tgol_trainer import adapters

        kind = "shared" if self.method.shared else "own"
        kind = f"{self.method.draws}_draws" if self.method.draws > 1 else kind
        file = self.folder / f"reference_{kind}_{self.run.seed}_{self.run.updates}.safetensors"
        if not file.exists():
            found = []
            with torch.no_grad(), adapters.reference_policy(self.family.denoiser):
                for step in range(self.run.updates):
                    texts = [self.rows.prompts[row] for row in np.repeat(self.rows_of(step), self.method.draws)]
                    found.append(self.family.predict(self.family.denoiser, self.draw(step), self.conditioning(texts)))
            save_file({"predictions": torch.stack(found)}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        return load_file(file)["predictions"]

    @functools.cached_property
    def scales(self) -> torch.Tensor:
        """(updates, draws) √(ē(t)·ē): the reference's mean error in 20 equal bins of time, and its mean over them."""
        draws = [self.draw(step) for step in range(self.run.updates)]
        pairs = zip(self.references, draws, strict=True)
        errors = torch.cat([self.family.likelihood.error(prediction, draw) for prediction, draw in pairs]).double()
        times = torch.cat([draw.timesteps for draw in draws])
        bins = (times.double() / len(self.family.likelihood.alphas_cumprod) * 20).long().clamp(max=19)
        count, total = torch.bincount(bins, minlength=20), torch.bincount(bins, errors, minlength=20)
        means = torch.where(count > 0, total / count.clamp(min=1), errors.mean())
        return (means[bins] * means.mean()).sqrt().float().view(self.run.updates, -1)

    @functools.cached_property
    def values(self) -> torch.Tensor:
        """(updates, rows) what the noised latents of each step tell of the advantages; 0 without a baseline."""
        if not self.args.value_baseline:
            return torch.zeros(self.run.updates, BATCH // self.method.draws)
        return baseline_values(self)

    def loss(self, step: int) -> torch.Tensor:
        """Return the loss of a batch, with gradient."""
        rows, draw = self.rows_of(step), self.draw(step)
        margin = self.labels.margin[rows]
        texts = [self.rows.prompts[row] for row in np.repeat(rows, self.method.draws)]
        if self.method.suffixed:
            texts = [text + CSFT_SUFFIXES[int(value < 0)] for text, value in zip(texts, margin, strict=True)]
        batch = {name: torch.from_numpy(getattr(self.labels, name)[rows]) for name in ("score", "margin", "weight")}
        batch["group"] = torch.arange(len(rows)) // GROUP
        prediction = self.family.predict(self.family.denoiser, draw, self.conditioning(texts))
        passed = Passed(
            prediction,
            self.references[step],
            draw.target,
            batch,
            self.labeler.score_std,
            self.labeler.weighting,
            self.scales[step],
            self.values[step],
            self.method.draws,
        )
        return self.method.loss(passed, self.args, self.run.strength).mean()

    def train(self) -> None:
        """
        Make all updates: AdamW, linear warm-up and decay.

        Each gradient is scaled to norm 1. This is what clipping at 1 does to the gradients of log-ratios, which are
        far larger, and it makes the scale of a loss irrelevant.
        """
        parameters = [parameter for parameter in self.family.denoiser.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        for step in range(self.run.updates):
            share = min((step + 1) / WARMUP, (self.run.updates - step) / (self.run.updates - WARMUP))
            optimizer.param_groups[0]["lr"] = RATE * share
            self.loss(step).backward()
            norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
            if not torch.isfinite(norm):
                raise FloatingPointError(f"The gradient of {self.run} is not finite at update {step}.")
            for each in parameters:
                each.grad /= norm.clamp(min=1e-30)
            optimizer.step()
            optimizer.zero_grad()


def differences(after: np.ndarray, before: np.ndarray, prompts: Sequence[str], held_out: Sequence[str]) -> dict:
    """Return the gain in standard deviations of the base model's values, its standard error, and that of held-out."""
    change = (after - before) / before.std()
    unseen = np.isin(prompts, held_out)
    return {
        "gain": round(float(change.mean()), 5),
        "error": round(float(change.std(ddof=1) / np.sqrt(change.size)), 5),
        "held_out": round(float(change[unseen].mean()), 5),
    }


def likelihood_values(family: Any, latents: torch.Tensor, conditioning: dict[str, torch.Tensor]) -> np.ndarray:
    """Return minus the base model's error on images noised to t = 100 and 300: how likely it finds them."""
    from tgol_trainer.likelihoods import Draw, RowGenerators

    total = 0.0
    alphas = family.likelihood.alphas_cumprod
    scale_adapter(family.denoiser, 0.0)
    for time_ in (100, 300):
        noise = RowGenerators(0, time_, range(len(latents))).normal("likelihood", latents)
        kept = alphas[time_]
        draw = Draw(kept.sqrt() * latents + (1 - kept).sqrt() * noise, torch.full((len(latents),), time_), noise)
        with torch.no_grad():
            total = total - family.likelihood.error(family.predict(family.denoiser, draw, conditioning), draw)
    return total.numpy()


def point(training: Training, meter: Meter, drift: float) -> dict[str, Any]:
    """Scale the adapter to a drift, sample, and compare with the base model's images of the same noise."""
    from tgol_trainer.evaluation import generate_images

    run, place = training.run, training.place
    scale, found, nats = meter.scale_to(drift)
    base = pictures(place, training.folder, run.seed, training=False)
    suffix = CSFT_SUFFIXES[0] if training.method.suffixed else ""
    first = 2 * run.seed * 100_000
    images = generate_images(
        training.family.pipeline,
        [prompt + suffix for prompt in base.prompts],
        range(first, first + len(base.prompts)),
        progress=False,
        **SAMPLING,
    )
    with torch.no_grad():
        latents = encoded(training.family, images)
    after = measured(place, images, base.prompts)
    plain = [prompt + suffix for prompt in base.prompts] if suffix else base.prompts
    conditioning = training.conditioning(plain)
    after["likelihood"] = likelihood_values(training.family, latents, conditioning)
    before = {**base.values, "likelihood": likelihood_values(training.family, base.latents, conditioning)}
    return {
        "drift": round(found, 4),
        "nats": round(nats, 4),
        "scale": round(scale, 4),
        "gains": {
            name: differences(after[name], before[name], base.prompts, place.held_out) for name in sorted(after)
        },
    }


def perform(run: Run, folder: Path) -> dict[str, Any]:
    """Train and measure; return the line of the results file."""
    torch.set_num_threads(1)
    start = time.process_time()
    training = Training(run, folder)
    training.train()
    trained = time.process_time() - start
    meter = Meter(training)
    own = meter()[0]
    drifts = DRIFTS if run.seed in REPORTING else (TUNED_AT,)
    points = [point(training, meter, drift) for drift in drifts]
    seconds = {"training": round(trained, 1), "all": round(time.process_time() - start, 1)}
    return {**dataclasses.asdict(run), "own_drift": round(own, 4), "points": points, "cpu_seconds": seconds}


def best_strength(lines: Sequence[dict[str, Any]], method: str, score: str | None) -> float | None:
    """
    Return the strength that gained most on the tuning seed of the shapes world; `None` where none was run. Methods in
    `FIXED` have the one that stands there.

    Without a score it is the one that gained most on average over the scores, of those that were run on all scores.
    Only runs of the usual number of updates count: longer ones take their strengths over.
    """
    if method in FIXED:
        return FIXED[method]
    gains: dict[float, list[float]] = {}
    for line in lines:
        kind = tuple(line[name] for name in ("method", "world", "regime", "updates"))
        if kind == (method, "shapes", "dense", UPDATES) and line["seed"] in TUNING and score in (None, line["score"]):
            gains.setdefault(line["strength"], []).append(line["points"][0]["gains"][line["score"]]["gain"])
    most = max(map(len, gains.values()), default=0)
    complete = {strength: float(np.mean(found)) for strength, found in gains.items() if len(found) == most}
    return max(complete, key=lambda strength: complete[strength], default=None)


def planned(args: argparse.Namespace, lines: Sequence[dict[str, Any]]) -> list[Run]:
    """Return the runs that are asked for; one seed of everything comes before the next."""
    if args.quick:
        score = "background_darkness"
        return [Run(name, METHODS[name].strengths[1], score, 0, updates=32) for name in QUICK]
    names = [name for name in METHODS if args.methods is None or name in args.methods]
    scores = [score for score in world(args.world).trained if args.scores is None or score in args.scores]
    seeds = args.seeds or (TUNING if args.tune else REPORTING)
    if args.tune:
        return [
            Run(name, strength, score, seed, args.regime, args.world, args.updates)
            for seed in seeds
            for name in names
            for strength in (args.strengths or METHODS[name].strengths)
            for score in scores
        ]
    found = []
    for seed in seeds:
        for score in scores:
            for name in names:
                strength = best_strength(lines, name, score if args.world == "shapes" else None)
                if strength is not None:
                    found.append(Run(name, strength, score, seed, args.regime, args.world, args.updates))
    return found


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the results in a file; an absent file has none."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def described(line: dict[str, Any]) -> str:
    """Return one line of text about a run."""
    gains = ", ".join(f"{each['gains'][line['score']]['gain']:.2f} at {each['drift']:.1f}" for each in line["points"])
    setting = f"{line['method']}, {line['strength']:g}, {line['regime']} {line['score']}, seed {line['seed']}"
    setting += f", {line['updates']} updates"
    return f"{setting}: gain {gains} (drift {line['own_drift']:.1f}); {line['cpu_seconds']['all']:.0f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Do the runs that are missing in the results file, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tune", action="store_true", help="run every setting on the tuning seed")
    what.add_argument("--compare", action="store_true", help="run the best setting of each method on other seeds")
    what.add_argument("--quick", action="store_true", help="run four methods with one seed for 32 updates")
    what.add_argument("--report", type=Path, help="only write benchmarks_alignment.md into this folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these methods")
    parser.add_argument("--strengths", nargs="+", type=float, help="only these settings, with --tune")
    parser.add_argument("--scores", nargs="+", help="only these scores")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--regime", choices=REGIMES, default="dense", help="kind of scores (default: %(default)s)")
    parser.add_argument("--world", choices=WORLDS, default="shapes", help="model and scores (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=UPDATES, help="updates of a run (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="results file (default: results/alignment.jsonl here)")
    parser.add_argument("--data", type=Path, default=Path("alignment_data"), help="folder of images and references")
    parser.add_argument("--workers", type=int, default=2, help="number of one-thread processes (default: %(default)s)")
    parser.add_argument("--max_runs", type=int, help="stop after this number of runs")
    args = parser.parse_args(argv)
    if args.updates <= WARMUP:
        parser.error(f"--updates {args.updates}: use more than {WARMUP}, the warm-up.")
    results = args.results or HERE / "results" / ("alignment_quick.jsonl" if args.quick else "alignment.jsonl")
    lines = read_lines(results)
    if args.report is not None:
        from alignment_report import write_report

        print(write_report(lines, args.report))
        return 0
    fields = [field.name for field in dataclasses.fields(Run)]
    done = {Run(**{name: line[name] for name in fields}).key() for line in lines}
    runs = [run for run in planned(args, lines) if run.key() not in done][: args.max_runs]
    print(f"{len(done)} runs are done, {len(runs)} follow in {args.workers} processes", flush=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(perform, run, args.data): run for run in runs}
        failed = False
        for number, future in enumerate(as_completed(futures), 1):
            if error := future.exception():  # the others go on, and their lines are kept
                failed = True
                print(f"{number}/{len(runs)}  {futures[future]} failed", flush=True)
                traceback.print_exception(error)
                continue
            line = future.result()
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{number}/{len(runs)}  {described(line)}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
