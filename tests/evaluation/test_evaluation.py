"""Generation with fixed seeds, paired comparison, tables, metrics and plots."""

import json
import math
import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from tests.tiny import stable_diffusion
from tgol_trainer.evaluation import (
    compare_scores,
    format_table,
    generate_images,
    save_before_after_grid,
    save_score_distributions,
    save_score_histogram,
    write_metrics,
)
from tgol_trainer.evaluation.plots import _edges

PROMPTS = ["a cat", "a dog", "a red house by the sea", "", "étoile 星"]
SEEDS = [3, 1, 4, 1, 5]
BLUE, ORANGE = (0, 114, 178), (230, 159, 0)


@pytest.fixture(scope="module")
def pipeline():
    return stable_diffusion()


def generate(pipeline, prompts=PROMPTS, seeds=SEEDS, **options):
    options = {"batch_size": 2, "num_inference_steps": 2, "progress": False, **options}
    return [np.asarray(image) for image in generate_images(pipeline, prompts, seeds, **options)]


def largest_difference(images, others):
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(images, others, strict=True))


def global_random_states():
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), (name, keys.tolist(), *rest), random.getstate()


class TestGeneration:
    def test_equals_one_plain_call_of_the_pipeline_an_image_within_a_grey_level(self, pipeline):
        expected = []
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
            generator = torch.Generator().manual_seed(seed)
            image = pipeline(prompt, num_inference_steps=2, generator=generator, output_type="pil").images[0]
            expected.append(np.asarray(image))
        assert largest_difference(generate(pipeline), expected) <= 1

    def test_the_same_call_gives_the_same_images_whatever_came_before(self):
        first = generate(stable_diffusion())
        later = stable_diffusion()
        torch.manual_seed(123)
        later(["something else"], num_inference_steps=3, output_type="np")
        assert largest_difference(generate(later), first) == 0
        assert largest_difference(generate(later), first) == 0

    @pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
    def test_chunks_of_any_size_agree_within_a_grey_level(self, pipeline, batch_size):
        assert largest_difference(generate(pipeline, batch_size=batch_size), generate(pipeline)) <= 1

    def test_prompt_and_seed_both_matter(self, pipeline):
        images = generate(pipeline, ["a cat", "a cat", "a dog", "a cat"], [0, 1, 0, 0], batch_size=4)
        assert np.array_equal(images[0], images[3])
        assert not np.array_equal(images[0], images[1])
        assert not np.array_equal(images[0], images[2])

    def test_leaves_the_global_random_states_alone(self, pipeline):
        before = global_random_states()
        generate(pipeline)
        assert global_random_states() == before

    def test_a_scheduler_that_ignores_the_generators_still_repeats_and_leaves_the_global_state(self):
        class CarelessScheduler(DDIMScheduler):
            def step(self, model_output, timestep, sample, **options):
                result = super().step(model_output, timestep, sample, **{**options, "return_dict": False})
                return (result[0] + 0.1 * torch.randn_like(sample),)

        pipeline = stable_diffusion()
        pipeline.scheduler = CarelessScheduler.from_config(pipeline.scheduler.config)
        first = generate(pipeline)
        torch.manual_seed(99)
        before = global_random_states()
        assert largest_difference(generate(pipeline), first) == 0
        assert global_random_states() == before

    def test_options_left_none_are_not_passed_and_the_others_are(self, pipeline, monkeypatch):
        calls = []
        original = type(pipeline).__call__

        def spy(self, **options):
            calls.append(options)
            return original(self, **{**options, "num_inference_steps": 1})

        monkeypatch.setattr(type(pipeline), "__call__", spy)
        generate_images(pipeline, ["p"], [0], progress=False)
        given = {"guidance_scale": 1.0, "height": 24, "width": 32}
        images = generate_images(pipeline, ["p"], [0], **given, progress=False)
        assert set(calls[0]) == {"prompt", "generator", "output_type"}
        assert {key: calls[1][key] for key in given} == given
        assert images[0].size == (32, 24) and images[0].mode == "RGB"

    @pytest.mark.parametrize("fails", [False, True])
    def test_modes_scheduler_and_progress_bar_are_as_before_also_after_an_error(self, monkeypatch, fails):
        pipeline = stable_diffusion()
        pipeline.unet.train()
        pipeline.unet.mid_block.eval()
        pipeline.scheduler.set_timesteps(7)
        pipeline.set_progress_bar_config(desc="mine", leave=False)
        scheduler, tables = pipeline.scheduler, pipeline.scheduler.timesteps.clone()
        modes = {name: module.training for name, module in pipeline.unet.named_modules()}
        original, calls = pipeline.unet.forward, []

        def forward(*args, **kwargs):
            calls.append((pipeline.unet.training, pipeline.vae.training, torch.is_grad_enabled()))
            if fails and len(calls) == 3:
                raise RuntimeError("in the middle")
            return original(*args, **kwargs)

        monkeypatch.setattr(pipeline.unet, "forward", forward)
        states = global_random_states()
        if fails:
            with pytest.raises(RuntimeError, match="in the middle"):
                generate(pipeline)
        else:
            generate(pipeline)
        assert len(calls) >= 3 and set(calls) == {(False, False, False)}
        assert {name: module.training for name, module in pipeline.unet.named_modules()} == modes
        assert not pipeline.vae.training
        assert pipeline.scheduler is scheduler and torch.equal(scheduler.timesteps, tables)
        assert pipeline._progress_bar_config == {"desc": "mine", "leave": False}
        assert global_random_states() == states

    def test_shows_one_bar_over_the_images(self, pipeline, capsys):
        generate(pipeline, progress=True, description="Before training")
        shown = capsys.readouterr().err
        assert shown.count("Before training:") >= 2 and "5/5" in shown and "2/2" not in shown

    def test_nan_is_an_error_that_names_the_prompt(self):
        pipeline = stable_diffusion()
        original = pipeline.unet.forward

        def forward(sample, *args, **kwargs):
            prediction = original(sample, *args, **kwargs)[0].clone()
            prediction[1::2] = math.nan  # the second prompt of each chunk, with and without guidance
            return (prediction,)

        pipeline.unet.forward = forward
        with pytest.raises(ValueError, match=r"returned NaN.* for 1 of 2 prompts; the first is prompt 1, 'a dog'"):
            generate(pipeline)

    def test_a_pipeline_without_images_is_named(self, pipeline, monkeypatch):
        monkeypatch.setattr(type(pipeline), "__call__", lambda self, **options: object())
        with pytest.raises(TypeError, match="StableDiffusionPipeline returned object, which holds no images"):
            generate(pipeline)

    def test_arguments_that_do_not_fit_are_refused(self, pipeline):
        with pytest.raises(ValueError, match="no prompts"):
            generate(pipeline, [], [])
        with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
            generate(pipeline, ["a", "b"], [0])
        with pytest.raises(ValueError, match="`batch_size` is 0"):
            generate(pipeline, batch_size=0)
        with pytest.raises(TypeError, match="is one string"):
            generate(pipeline, "ab", [0, 1])


def paired_scores(prompts=40, images=3, seed=0):
    """Scores whose difference is shared by the images of a prompt in part, with some ties."""
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(prompts, images))
    after = before + rng.normal(0.2, 1, size=(prompts, 1)) + rng.normal(0, 0.3, size=(prompts, images))
    after[::7, 0] = before[::7, 0]
    names = [f"prompt {i}" for i in range(prompts) for _ in range(images)]
    return before.ravel().tolist(), after.ravel().tolist(), names


class TestComparison:
    def test_win_rate_by_hand_with_ties(self):
        """Two wins, one loss, one tie: (2 + 1/2) / 4 = 0.625; changes 1, 1, -3, 0 have mean -0.25."""
        result = compare_scores("r", [1, 2, 5, 4], [2, 3, 2, 4], ["a", "a", "b", "c"], trained=True)
        assert result.win_rate == 0.625 and result.ties == 1
        assert (result.mean_before, result.mean_after, result.mean_change) == (3.0, 2.75, -0.25)
        assert (result.median_before, result.median_after) == (3.0, 2.5)
        assert (result.num_images, result.num_prompts, result.num_missing) == (4, 3, 0)
        assert result.name == "r" and result.trained is True

    def test_pairs_without_a_score_are_left_out_and_counted(self):
        """Only rows 0 and 3 are complete: one win and one loss, means (1 + 4)/2 and (2 + 1)/2."""
        result = compare_scores("r", [1, None, 3, 4], [2, 5, None, 1], list("abcd"), trained=False)
        assert result.win_rate == 0.5 and result.num_missing == 2
        assert (result.num_images, result.num_prompts) == (2, 2)
        assert (result.mean_before, result.mean_after) == (2.5, 1.5)

    def test_the_intervals_are_those_of_a_plain_loop_over_resampled_prompts(self):
        before, after, prompts = paired_scores()
        rng, rates, changes = random.Random(1), [], []
        rows = {prompt: [i for i, other in enumerate(prompts) if other == prompt] for prompt in prompts}
        for _ in range(4000):
            drawn = [i for prompt in rng.choices(list(rows), k=len(rows)) for i in rows[prompt]]
            outcomes = [1.0 if after[i] > before[i] else 0.5 if after[i] == before[i] else 0.0 for i in drawn]
            rates.append(sum(outcomes) / len(drawn))
            changes.append(sum(after[i] - before[i] for i in drawn) / len(drawn))
        result = compare_scores("r", before, after, prompts, trained=True, num_resamples=4000)
        assert result.interval == pytest.approx((sorted(rates)[100], sorted(rates)[3900]), abs=0.015)
        expected = (sorted(changes)[100], sorted(changes)[3900])
        assert result.mean_change_interval == pytest.approx(expected, abs=0.04)

    def test_the_intervals_are_those_of_scipy_where_every_prompt_has_one_image(self):
        stats = pytest.importorskip("scipy.stats")
        before, after, _ = paired_scores(100, 1)
        change = np.subtract(after, before)
        wins = (np.sign(change) + 1) / 2
        options = {"method": "percentile", "n_resamples": 4000, "random_state": 1}
        result = compare_scores("r", before, after, [str(i) for i in range(100)], trained=True, num_resamples=4000)
        for values, interval in ((wins, result.interval), (change, result.mean_change_interval)):
            expected = stats.bootstrap((values,), np.mean, **options).confidence_interval
            assert interval == pytest.approx(tuple(expected), abs=0.02)

    def test_copies_of_an_image_under_its_prompt_add_no_certainty(self):
        """With k copies of each of n outcomes the standard error stays sqrt(p(1 - p)/n)."""
        rng = np.random.default_rng(0)
        after = np.repeat(rng.random(400) < 0.6, 5).astype(float)
        prompts = [str(i // 5) for i in range(2000)]
        result = compare_scores("r", [0.5] * 2000, after.tolist(), prompts, trained=True)
        half_width = (result.interval[1] - result.interval[0]) / 2
        assert half_width == pytest.approx(1.96 * math.sqrt(0.6 * 0.4 / 400), rel=0.1)

    def test_with_a_single_prompt_images_are_resampled(self):
        """The same 1.96·sqrt(p(1 - p)/n), now over 400 images of one prompt."""
        after = [1.0] * 240 + [0.0] * 160
        result = compare_scores("r", [0.5] * 400, after, ["p"] * 400, trained=True)
        half_width = (result.interval[1] - result.interval[0]) / 2
        assert result.num_prompts == 1
        assert half_width == pytest.approx(1.96 * math.sqrt(0.6 * 0.4 / 400), rel=0.1)

    def test_a_comparison_with_itself_is_exactly_one_half(self):
        before, _, prompts = paired_scores()
        result = compare_scores("r", before, before, prompts, trained=True)
        assert result.win_rate == 0.5 and result.interval == (0.5, 0.5) and result.ties == len(before)
        assert result.mean_change == 0 and result.mean_change_interval == (0, 0)

    def test_swapping_before_and_after_mirrors_every_number(self):
        before, after, prompts = paired_scores()
        before[4] = None
        one = compare_scores("r", before, after, prompts, trained=True)
        two = compare_scores("r", after, before, prompts, trained=True)
        assert two.win_rate == pytest.approx(1 - one.win_rate, abs=1e-12)
        assert two.interval == pytest.approx((1 - one.interval[1], 1 - one.interval[0]), abs=1e-12)
        change = one.mean_change_interval
        assert two.mean_change_interval == pytest.approx((-change[1], -change[0]), abs=1e-12)
        assert (two.mean_before, two.median_after, two.ties) == (one.mean_after, one.median_before, one.ties)

    def test_a_higher_confidence_widens_and_a_seed_repeats(self):
        before, after, prompts = paired_scores()
        wide = compare_scores("r", before, after, prompts, trained=True, confidence=0.99)
        usual = compare_scores("r", before, after, prompts, trained=True)
        assert wide.interval[0] < usual.interval[0] < usual.interval[1] < wide.interval[1]
        assert compare_scores("r", before, after, prompts, trained=True) == usual
        assert compare_scores("r", before, after, prompts, trained=True, seed=1) != usual

    def test_thousands_of_prompts_need_little_memory(self):
        before, after, prompts = paired_scores(3200, 1)
        tracemalloc.start()
        compare_scores("r", before, after, prompts, trained=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40e6  # all draws at once would be 2000 x 3200 x 8 bytes = 51 MB before a score is looked up

    def test_what_cannot_be_compared_is_refused(self):
        with pytest.raises(ValueError, match="'r' has 2 values before, 1 after and 2 prompts"):
            compare_scores("r", [1, 2], [1], ["a", "b"], trained=True)
        with pytest.raises(ValueError, match="nothing is left of 2 pairs"):
            compare_scores("r", [None, 1], [1, None], ["a", "b"], trained=True)
        with pytest.raises(ValueError, match="nothing is left of 0 pairs"):
            compare_scores("r", [], [], [], trained=True)
        with pytest.raises(ValueError, match=r"NaN or infinite in 1 of 2 values after \(row 1: nan\)"):
            compare_scores("r", [1, 2], [1, math.nan], ["a", "b"], trained=True)
        with pytest.raises(ValueError, match="`confidence` is 95"):
            compare_scores("r", [1], [2], ["a"], trained=True, confidence=95)
        with pytest.raises(ValueError, match="`num_resamples` is 0"):
            compare_scores("r", [1], [2], ["a"], trained=True, num_resamples=0)


class TestMetricsAndTable:
    def test_the_file_has_the_agreed_form(self, tmp_path):
        trained = compare_scores("sharpness", [1, 2, None], [2, 3, 1], ["a", "b", "c"], trained=True)
        held_out = compare_scores("jpeg", [1, 2], [1, 2], ["a", "b"], trained=False)
        path = tmp_path / "new" / "metrics.json"
        write_metrics(path, [trained, held_out], seconds={"train": 12.5}, model="m", loss=math.nan, n=np.int64(3))
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
        assert list(content["scores"]) == ["sharpness", "jpeg"]
        first = content["scores"]["sharpness"]
        assert first["trained"] is True and content["scores"]["jpeg"]["trained"] is False
        assert (first["win_rate"], first["interval"]) == (1.0, [1.0, 1.0])
        assert (first["mean_before"], first["mean_after"], first["num_missing"]) == (1.5, 2.5, 1)
        assert content["seconds"] == {"train": 12.5}
        assert (content["model"], content["loss"], content["n"]) == ("m", None, 3)

    def test_a_failed_write_leaves_the_old_file_and_no_other(self, tmp_path, monkeypatch):
        path = tmp_path / "metrics.json"
        path.write_text("old")
        with pytest.raises(TypeError):
            write_metrics(path, [], fact=object())

        def fail(source, target):
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_metrics(path, [])
        assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"] and path.read_text() == "old"

    def test_names_that_would_overwrite_each_other_are_refused(self, tmp_path):
        one = compare_scores("r", [1], [2], ["a"], trained=True)
        with pytest.raises(ValueError, match="share a name"):
            write_metrics(tmp_path / "m.json", [one, one])
        with pytest.raises(ValueError, match="`scores`"):
            write_metrics(tmp_path / "m.json", [one], scores={})

    def test_the_table_shows_what_a_reader_asks_for(self):
        one = compare_scores("HPSv2.1", [0.24, 0.26], [0.26, 0.27], ["a", "b"], trained=True)
        two = compare_scores("jpeg", [-2.0, -2.0, None], [-2.5, -1.0, 1.0], ["a", "b", "c"], trained=False)
        header, _, first, second, note = format_table([one, two]).split("\n")
        assert "win rate [95 % interval]" in header and "trained on" in header
        assert " ".join(first.split()) == "HPSv2.1 yes 2 100.0 % [100.0, 100.0] 0.2500 -> 0.2650"
        assert " ".join(second.split()) == "jpeg no 2 50.0 % [0.0, 100.0] -2.000 -> -1.750"
        assert note == "jpeg: pairs left out because a score is missing: 1"

    @pytest.mark.parametrize("size", [1e-9, 1e-4, 1.0, 123456.789, 9.999999e6, 1e30])
    def test_the_table_is_aligned_and_at_most_100_columns_wide(self, size):
        many = ["p"] * 3
        rows = [
            compare_scores("a score with a name that goes on and on", [-size] * 3, [size] * 3, many, trained=True),
            compare_scores("x", [-size] * 3, [-size * (1 + 1e-9)] * 3, many, trained=False),
        ]
        lines = format_table(rows).split("\n")
        assert max(map(len, lines)) <= 100
        for title in ("score", "trained on", "mean before"):
            column = lines[0].index(title)
            assert all(line[column] != " " and (" " + line)[column] == " " for line in lines)


def pixels(path, colour):
    return int((np.asarray(Image.open(path).convert("RGB")) == colour).all(axis=2).sum())


def drawn_colours(path):
    return {colour for _, colour in Image.open(path).convert("RGB").getcolors(1 << 24)}


class TestPlots:
    def test_star_ratings_get_bars_in_the_ratio_of_their_counts(self, tmp_path):
        """20 negatives and 30 positives; the two swatches of the legend differ by nothing, so areas are 2 to 3."""
        save_score_histogram(tmp_path / "empty.png", [9.0], 9.0)
        swatch = pixels(tmp_path / "empty.png", ORANGE)
        save_score_histogram(tmp_path / "stars.png", [1.0] * 20 + [2.0] * 30, 2.0)
        areas = [pixels(tmp_path / "stars.png", colour) - swatch for colour in (ORANGE, BLUE)]
        assert areas[0] / areas[1] == pytest.approx(2 / 3, rel=0.03)

    def test_no_bar_of_a_continuous_score_lies_on_both_sides_of_the_threshold(self, tmp_path):
        scores = np.random.default_rng(0).normal(size=1000)
        edges, outside = _edges(scores, 0.1234)
        assert 0.1234 in edges and edges[0] <= scores.min() and edges[-1] >= scores.max() and outside == 0
        save_score_histogram(tmp_path / "h.png", scores, 0.1234)
        image = np.asarray(Image.open(tmp_path / "h.png").convert("RGB"))[200:]  # below the legend
        columns = [np.flatnonzero((image == colour).all(axis=2).any(axis=0)) for colour in (ORANGE, BLUE)]
        assert columns[0].max() < columns[1].min()

    def test_outliers_do_not_squeeze_the_rest_and_are_counted(self):
        scores = np.concatenate([np.random.default_rng(0).normal(size=10_000), [1e6, -1e6, 2e6]])
        edges, outside = _edges(scores, 0.0)
        assert edges[0] > -10 and edges[-1] < 10 and outside >= 3

    def test_histograms_of_any_shape_are_drawn(self, tmp_path):
        million = np.random.default_rng(0).gamma(2, 1, 1_000_000)
        half_at_one_value = [0.0] * 500 + list(np.linspace(0, 1, 300))
        few_far_from_the_threshold = [0.1, 0.10001, 7.0, 3.3]
        for scores in (million, [1, 2, 3, 4, 5] * 20, [3.0] * 5, few_far_from_the_threshold, half_at_one_value):
            save_score_histogram(tmp_path / "h.png", scores, 3.0, name="costs $5 and 星")
            assert Image.open(tmp_path / "h.png").size == (960, 540)

    def test_what_cannot_be_drawn_is_refused(self, tmp_path):
        path = tmp_path / "h.png"
        with pytest.raises(ValueError, match="1 of 2 values of 'score' are NaN or infinite, the first at row 1"):
            save_score_histogram(path, [1.0, math.nan], 0.5)
        with pytest.raises(ValueError, match="no values"):
            save_score_histogram(path, [], 0.5)
        with pytest.raises(ValueError, match="threshold is nan"):
            save_score_histogram(path, [1.0], math.nan)
        with pytest.raises(ValueError, match="is empty"):
            save_score_distributions(path, {})
        with pytest.raises(ValueError, match="2 values before and 1 after"):
            save_score_distributions(path, {"r": ([1, 2], [1])})
        with pytest.raises(ValueError, match="no values of 'r'"):
            save_score_distributions(path, {"r": ([1, None], [None, 2])})
        assert not path.exists()

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
    def test_distributions_draw_a_panel_a_score_and_leave_missing_pairs_out(self, tmp_path, count):
        rng = np.random.default_rng(0)
        data = {f"score {i}": ([*rng.normal(size=50), None], [*rng.normal(1, 1, size=50), 1e9]) for i in range(count)}
        data["score 0"] = ([4.0] * 3, [4.0] * 3)
        save_score_distributions(tmp_path / "d.png", data)
        assert BLUE in drawn_colours(tmp_path / "d.png")

    def test_equal_inputs_give_equal_bytes_whatever_the_users_style(self, tmp_path):
        import matplotlib

        scores = np.random.default_rng(0).normal(size=500)
        images = [Image.new("RGB", (32, 32), "red")]
        written = []
        for run, style in enumerate(({}, {"axes.facecolor": "black", "font.size": 30})):
            with matplotlib.rc_context(style):
                save_score_histogram(tmp_path / f"{run}h.png", scores, 0.0)
                save_score_distributions(tmp_path / f"{run}d.png", {"r": (scores, scores + 1)})
                save_before_after_grid(tmp_path / f"{run}g.png", ["p"], images, images)
                written.append([(tmp_path / f"{run}{kind}.png").read_bytes() for kind in "hdg"])
                for key, value in style.items():
                    assert matplotlib.rcParams[key] == value
        assert written[0] == written[1]

    def test_small_images_are_enlarged_pixel_by_pixel_and_large_ones_reduced(self, tmp_path):
        """32 pixels become 4 x 32 = 128 on a side, without mixed colours; 640 pixels become 320."""
        red, blue = Image.new("RGB", (32, 32), (255, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 255))
        blue.paste((0, 255, 0), (0, 0, 1, 1))
        save_before_after_grid(tmp_path / "small.png", [""], [red], [blue])
        assert pixels(tmp_path / "small.png", (255, 0, 0)) == 128 * 128
        assert pixels(tmp_path / "small.png", (0, 255, 0)) == 16
        assert pixels(tmp_path / "small.png", (0, 0, 255)) == 128 * 128 - 16
        save_before_after_grid(tmp_path / "twice.png", [""], [red], [blue], scale=2)
        assert pixels(tmp_path / "twice.png", (255, 0, 0)) == 64 * 64
        large = Image.new("RGB", (640, 320), (255, 0, 0))
        save_before_after_grid(tmp_path / "large.png", [""], [large], [large])
        assert pixels(tmp_path / "large.png", (255, 0, 0)) == 2 * 320 * 160

    def test_before_is_on_the_left_and_every_pair_is_drawn(self, tmp_path):
        before = [Image.new("RGB", (128, 128), (255, 0, 10 * i)) for i in range(5)]
        after = [Image.new("RGB", (128, 128), (10 * i, 0, 255)) for i in range(5)]
        save_before_after_grid(tmp_path / "g.png", list("abcde"), before, after, columns=3)
        image = np.asarray(Image.open(tmp_path / "g.png"))
        corners = []
        for i in range(5):
            left = np.argwhere((image == (255, 0, 10 * i)).all(axis=2))
            right = np.argwhere((image == (10 * i, 0, 255)).all(axis=2))
            assert len(left) == len(right) == 128 * 128
            assert left[0][0] == right[0][0] and left[:, 1].max() < right[:, 1].min()
            corners.append(tuple(left[0]))
        assert corners == sorted(corners) and len({y for y, _ in corners}) == 2
        assert tuple(image[0, 0]) == (255, 255, 255)

    def test_prompts_of_any_script_and_length_and_missing_scores_do_not_crash_or_run_over(self, tmp_path):
        prompts = ["星空 🎉", "\ud800 \x00\n tab\t", "x" * 5000, "word " * 500, "שלום", ""]
        images = [Image.new("RGBA", (32, 32), "red")] * len(prompts)
        scores = {
            "a name that is longer than the image is wide": ([None] * 6, [-123456.789] * 6),
            "r": ([1] * 6,) * 2,
        }
        save_before_after_grid(tmp_path / "g.png", prompts, images, images, columns=2, scores=scores)
        image = np.asarray(Image.open(tmp_path / "g.png"))
        rows, columns = np.nonzero((image != 255).any(axis=2))
        height, width, _ = image.shape
        assert rows.min() >= 4 and rows.max() < height - 4
        assert columns.min() >= 12 and columns.max() < width - 12

    def test_a_grid_that_does_not_fit_together_is_refused(self, tmp_path):
        image = Image.new("RGB", (32, 32))
        with pytest.raises(ValueError, match="prompts has 2, before has 1, after has 1"):
            save_before_after_grid(tmp_path / "g.png", ["a", "b"], [image], [image])
        with pytest.raises(ValueError, match=r"scores\['r'\] after has 0"):
            save_before_after_grid(tmp_path / "g.png", ["a"], [image], [image], scores={"r": ([1], [])})
        with pytest.raises(ValueError, match="no pairs"):
            save_before_after_grid(tmp_path / "g.png", [], [], [])
        with pytest.raises(ValueError, match="`columns` is 0"):
            save_before_after_grid(tmp_path / "g.png", ["a"], [image], [image], columns=0)
        with pytest.raises(ValueError, match="`scale` is 0"):
            save_before_after_grid(tmp_path / "g.png", ["a"], [image], [image], scale=0)


def test_importing_loads_neither_matplotlib_nor_diffusers_and_plotting_no_pyplot(tmp_path):
    code = (
        "import sys; import tgol_trainer.evaluation as e\n"
        "loaded = {name.split('.')[0] for name in sys.modules} & {'matplotlib', 'diffusers', 'transformers'}\n"
        f"e.save_score_histogram({str(tmp_path / 'h.png')!r}, [1.0, 2.0], 1.5)\n"
        "sys.exit(f'{loaded}' if loaded or 'matplotlib.pyplot' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
