"""The alignment benchmark: its runs train as the trainer does, and its drift is set exactly."""

import argparse
import importlib
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests import ROOT


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))
    yield importlib.import_module("alignment")
    sys.path.pop(0)


@pytest.fixture(scope="module")
def folder(benchmark, tmp_path_factory):
    """Few images a prompt and few steps, so that sampling takes a second."""
    found = tmp_path_factory.mktemp("alignment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "IMAGES_PER_PROMPT", 4)
        patch.setattr(benchmark, "EVALUATED_PER_PROMPT", 1)
        patch.setitem(benchmark.SAMPLING, "num_inference_steps", 2)
        patch.setattr("alignment_meter.METER_ROWS", 16)
        yield found


def of(benchmark, folder, method, **settings):
    strength = benchmark.METHODS[method].strengths[1]
    run = benchmark.Run(method, strength, "background_darkness", 0, updates=2, **settings)
    return benchmark.Training(run, folder)


def test_each_method_has_four_settings_and_no_seed_tunes_and_reports(benchmark):
    assert min(len(set(method.strengths)) for method in benchmark.METHODS.values()) == 4
    assert not set(benchmark.TUNING) & set(benchmark.REPORTING)


def test_methods_of_a_seed_see_the_same_images_in_the_same_order_and_no_held_out_prompt(benchmark, folder):
    one, other = of(benchmark, folder, "tgo, w=d"), of(benchmark, folder, "kto")
    assert np.array_equal(one.order, other.order)
    assert torch.equal(one.draw(0).inputs, other.draw(0).inputs)
    assert not set(one.rows.prompts) & set(one.place.held_out) and len(one.place.held_out) == 6
    for block in one.order.reshape(-1, benchmark.GROUP):
        assert len({one.rows.prompts[row] for row in block}) == 1


def test_several_draws_of_an_image_have_one_time_in_each_part_and_one_loss(benchmark, folder):
    training = of(benchmark, folder, "tgo, w=d, 4 draws")
    times = training.draw(0).timesteps.reshape(8, 4)
    assert (times // 250).tolist() == [[0, 1, 2, 3]] * 8  # of 1000 times
    assert len({training.rows.prompts[row] for row in training.rows_of(0)}) == 8
    expected = training.labels.weight[training.rows_of(0)].mean() * np.log(2)
    assert training.loss(0).item() == pytest.approx(expected, rel=1e-5)


def test_the_first_loss_of_tgo_is_the_mean_weight_times_ln_2(benchmark, folder):
    training = of(benchmark, folder, "tgo, w=d")
    expected = training.labels.weight[training.order[0]].mean() * np.log(2)
    assert training.loss(0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        "dpo",
        "kto",
        "nft",
        "dspo",
        "sft",
        "csft",
        "anchored",
        "anchored, value",
        "anchored, even",
        "tilted",
        "pairs, w=d",
    ],
)
def test_each_kind_of_loss_moves_the_adapter(benchmark, folder, method):
    training = of(benchmark, folder, method)
    training.loss(0).backward()
    assert (training.values.abs().max() > 0) == method.endswith("value")
    norms = [each.grad.norm() for each in training.family.denoiser.parameters() if each.grad is not None]
    assert torch.isfinite(torch.stack(norms)).all() and torch.stack(norms).max() > 0


def test_a_method_with_the_label_in_the_prompt_can_make_the_references_that_others_use(benchmark, folder):
    training = of(benchmark, folder, "csft")
    assert len(training.conditioning(training.rows.prompts[:2])["encoder_hidden_states"]) == 2


def test_a_run_that_fails_leaves_the_lines_of_the_others(benchmark, monkeypatch, tmp_path, capsys):
    def perform(run, folder):
        if run.score == "left_darkness":
            raise KeyError("a orange cross")
        return {**vars(run), "points": [], "own_drift": 1.0, "cpu_seconds": {"all": 1.0}}

    monkeypatch.setattr(benchmark, "perform", perform)
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    results = tmp_path / "rows.jsonl"
    given = ["--tune", "--methods", "soft", "--strengths", "0.002", "--results", str(results), "--workers", "1"]
    assert benchmark.main(given) == 1
    assert {line["score"] for line in benchmark.read_lines(results)} == {"background_darkness", "grey_centre"}
    assert "left_darkness" in capsys.readouterr().out


def test_the_drift_is_set_by_the_scale_of_the_adapter_and_is_zero_without_it(benchmark, folder):
    """Twice the scale of a small update is about four times the drift."""
    training = of(benchmark, folder, "tgo, w=d")
    training.train()
    meter = benchmark.Meter(training)
    first = meter()[0]
    scale, drift, nats = meter.scale_to(2.0)
    assert drift == pytest.approx(2.0, rel=0.01) and scale > 1 and nats > 0
    benchmark.scale_adapter(training.family.denoiser, 1.0)
    assert meter()[0] == pytest.approx(first)
    benchmark.scale_adapter(training.family.denoiser, 0.0)
    assert meter()[0] == 0


def test_the_second_world_is_run_with_the_strength_that_is_best_over_all_scores_of_the_first(benchmark):
    def line(strength, score, gain, world="shapes", seed=0, updates=benchmark.UPDATES):
        point = {"gains": {score: {"gain": gain}}}
        return {"method": "nft", "strength": strength, "score": score, "seed": seed, "regime": "dense"} | {
            "world": world,
            "updates": updates,
            "points": [point],
        }

    lines = [line(0.1, "a", 1.0), line(0.1, "b", 1.0), line(0.2, "a", 1.5), line(0.2, "b", 0.8), line(0.5, "a", 2.0)]
    lines += [line(0.1, "a", 9.0, world="digits"), line(0.1, "b", 9.0, seed=2)]  # neither is tuned on
    lines += [line(0.1, "a", 9.0, updates=512), line(0.1, "b", 9.0, updates=512)]  # nor are longer runs
    assert benchmark.best_strength(lines, "nft", None) == 0.2  # 2.3 over both, and 0.5 was run on one alone
    assert benchmark.best_strength(lines, "nft", "a") == 0.5 and benchmark.best_strength(lines, "nft", "b") == 0.1
    assert benchmark.best_strength(lines, "kto", None) is None


def test_the_recipe_has_one_strength_for_all_scores_and_a_rival_the_best_for_each(benchmark):
    def line(method, strength, gain, score):
        settings = {"method": method, "strength": strength, "score": score, "seed": 0, "regime": "dense"}
        point = {"gains": {score: {"gain": gain}}}
        return settings | {"world": "shapes", "updates": benchmark.UPDATES, "points": [point]}

    names = ("anchored, value", "nft")
    lines = [line(name, strength, strength, "left_darkness") for name in names for strength in (0.25, 0.5)]
    options = {"quick": False, "tune": False, "methods": names, "scores": ["left_darkness"], "seeds": [2]}
    settings = {"regime": "dense", "world": "shapes", "updates": 128}
    runs = benchmark.planned(argparse.Namespace(**options, **settings), lines)
    assert {run.method: run.strength for run in runs} == {"anchored, value": 0.25, "nft": 0.5}


@pytest.fixture(scope="module")
def optimum(benchmark):
    return importlib.import_module("alignment_optimum")


def test_the_optimum_moves_a_normal_score_by_beta_and_what_correlates_with_it_by_its_share(optimum):
    rng = np.random.default_rng(0)
    scores, other = rng.normal(size=(2, 200_000))
    groups = np.arange(scores.size) % 2
    beta = optimum.strength_of(scores, groups, 0.5)
    assert beta == pytest.approx(0.5, abs=0.01)  # a normal density times exp(βs) is the same density, β farther
    weights = optimum.tilted_weights(scores, groups, beta)
    assert weights @ (0.6 * scores + 0.8 * other) == pytest.approx(0.3, abs=0.01)
    assert weights.sum() == pytest.approx(1) and weights[groups == 0].sum() == pytest.approx(0.5)


def test_a_gain_beyond_the_best_image_of_each_prompt_has_no_optimum(optimum):
    assert optimum.strength_of(np.array([0.0, 1.0, 0.0, 2.0]), np.array([0, 0, 1, 1]), 0.76) is None
    assert optimum.strength_of(np.array([0.0, 1.0, 0.0, 2.0]), np.array([0, 0, 1, 1]), 0.74) > 0


def test_the_mean_distance_counts_pairs_of_different_images_of_one_prompt_by_their_weights(optimum):
    distances = np.array([[0.0, 1.0, 4.0], [1.0, 0.0, 9.0], [4.0, 9.0, 0.0]])
    weights = np.array([0.5, 0.25, 0.25])
    expected = (0.125 * 1 + 0.125 * 4 + 0.0625 * 9) / (0.125 + 0.125 + 0.0625)
    assert optimum.mean_distance(weights, distances, np.zeros(3)) == pytest.approx(expected)
    assert optimum.mean_distance(weights[:2] * 0 + 0.5, distances[:2, :2], np.zeros(2)) == pytest.approx(1.0)
