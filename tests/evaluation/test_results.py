"""Base against adapters: the numbers, diversity and damage, the trained scores of an adapter, and the tables."""

import itertools
import json
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tgol_trainer.evaluation import (
    ModelRows,
    ReportOptions,
    compare_models,
    compare_scores,
    format_markdown,
    make_gallery,
    measure_image,
    pixel_descriptor,
    score_model,
    seed_spread,
    trained_scores,
    verdict,
    write_results,
)

PROMPTS = [f"prompt {i // 3}" for i in range(90)]


def noise(seed, side=24, mean=128, spread=40):
    values = np.random.default_rng(seed).normal(mean, spread, (side, side, 3))
    return Image.fromarray(np.uint8(np.clip(values, 0, 255)))


def random_rows(name="model", shift=0.0, seed=0, **options):
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(99).normal(size=(2, 90))
    scores = base + shift + 0.5 * rng.normal(size=(2, 90)) * (name != "base")
    rows = {"a": scores[0].tolist(), "b": (scores[1] - 2 * shift).tolist()}
    images = {"saturation": (0.5 + 0.1 * rng.random(90)).tolist()}
    return ModelRows(name, rows, images, **options)


# ---- Sign test ----


@pytest.mark.parametrize(
    "wins, losses, ties", [(8, 2, 0), (2, 8, 3), (5, 5, 0), (0, 0, 4), (1, 0, 0), (1900, 1300, 0)]
)
def test_the_sign_test_is_that_of_scipy_and_leaves_ties_out(wins, losses, ties):
    stats = pytest.importorskip("scipy.stats")
    after = [1.0] * wins + [-1.0] * losses + [0.0] * ties
    found = compare_scores("s", [0.0] * len(after), after, list(map(str, range(len(after)))), trained=False)
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert found.sign_test == pytest.approx(expected, rel=1e-9)
    assert (found.wins, found.losses, found.ties) == (wins, losses, ties)


def test_the_sign_test_counts_prompts_not_their_images():
    """Nine images up and three down, but by prompt: up, up, up and a balance of 0; 3 of 3 gives p = 2·(1/2)³."""
    after = [1, 1, 1, -1, 1, 1, 1, -1, 1, 1, -1, 0]
    found = compare_scores("s", [0] * 12, after, list("aaaabbbbccdd"), trained=False)
    # a: 3 up, 1 down; b: 3 up, 1 down; c: 2 up; d: 1 down and a tie
    assert (found.wins, found.losses, found.ties) == (8, 3, 1)
    assert found.sign_test == 2 * (1 + 4) / 16  # three gains, one fall


# ---- Models ----


def test_the_numbers_by_hand_for_two_adapters_with_categories():
    """
    Base (1, 2, 3, 4). X gains, ties, falls, gains: (2 + 1/2)/4. Y falls four times. In category u (rows 0, 1) X has
    (1 + 1/2)/2, in v (rows 2, 3) 1/2. Y against X: row 0 falls, 1 falls, 2 ties (2 and 2), 3 falls: (1/2)/4.
    """
    base = ModelRows("base", {"s": [1, 2, 3, 4]})
    x = ModelRows("x", {"s": [2, 2, 2, 9]}, trained=frozenset({"s"}))
    y = ModelRows("y", {"s": [0, 1, 2, 3]}, trained=frozenset())
    found = compare_models(list("abcd"), base, [x, y], categories=["u", "u", "v", "v"])
    assert [adapter.scores[0].win_rate for adapter in found.adapters] == [0.625, 0.0]
    assert [adapter.scores[0].trained for adapter in found.adapters] == [True, False]
    assert found.adapters[0].scores[0].median_after == 2 and found.adapters[0].scores[0].mean_after == 3.75
    parts = {name: scores[0].win_rate for name, scores in found.adapters[0].categories.items()}
    assert parts == {"u": 0.75, "v": 0.5}
    ((one, two, (against,)),) = found.head_to_head
    assert (one, two, against.win_rate, against.trained) == ("x", "y", 0.125, True)


def test_an_adapter_that_changes_nothing_is_at_exactly_one_half_and_its_intervals_hold_that():
    images = [noise(i) for i in range(6)]
    prompts = [str(i // 2) for i in range(6)]
    rewards = {"brightness": lambda images, texts: [float(np.mean(image)) for image in images]}
    base, same = (score_model(name, images, prompts, rewards, trained=frozenset()) for name in ("base", "same"))
    adapter = compare_models(prompts, base, [same]).adapters[0]
    assert adapter.scores[0].win_rate == 0.5 and adapter.scores[0].interval == (0.5, 0.5)
    assert adapter.scores[0].sign_test == 1 and verdict(adapter.scores[0]) == "no clear difference"
    assert {measure.name for measure in adapter.measures} == {
        "seed_spread",
        "saturation",
        "contrast",
        "high_frequency",
    }
    for measure in adapter.measures:
        assert measure.relative_change_interval == (0, 0) and measure.mean_before > 0


def test_swapping_base_and_adapter_mirrors_the_result():
    one, two = random_rows("base"), random_rows("x", shift=0.4, seed=1)
    there = compare_models(PROMPTS, one, [two]).adapters[0]
    back = compare_models(PROMPTS, two, [one]).adapters[0]
    for a, b in zip(there.scores, back.scores, strict=True):
        assert b.win_rate == pytest.approx(1 - a.win_rate, abs=1e-12)
        assert b.interval == pytest.approx((1 - a.interval[1], 1 - a.interval[0]), abs=1e-12)
        assert (b.wins, b.losses, b.sign_test) == (a.losses, a.wins, a.sign_test)
    for a, b in zip(there.measures, back.measures, strict=True):
        low, high = a.mean_change_interval
        assert b.mean_change == pytest.approx(-a.mean_change, abs=1e-12)
        assert b.mean_change_interval == pytest.approx((-high, -low), abs=1e-12)


def test_verdicts_follow_the_interval():
    base = random_rows("base")
    better, *_ = compare_models(PROMPTS, base, [random_rows("x", shift=1.0, seed=2)]).adapters
    assert [verdict(comparison) for comparison in better.scores] == ["better", "worse"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "`adapters` is empty"),
        ([random_rows("base")], "not distinct"),
        ([ModelRows("x", {"a": [0.0] * 90})], r"'x' has the scores \['a'\]"),
        ([ModelRows("x", {"a": [0.0] * 90, "b": [0.0] * 9})], "'b' of 'x' does not have one value for each of 90"),
    ],
)
def test_models_that_do_not_fit_together_are_refused(models, message):
    with pytest.raises(ValueError, match=message):
        compare_models(PROMPTS, random_rows("base"), models)


# ---- Diversity and damage ----


def test_the_spread_of_a_prompt_is_the_mean_over_its_pairs():
    """Grey levels 0, 30 and 60 differ by 30, 60 and 30: mean 40, of 255."""
    images = [Image.new("RGB", (20, 20), (level,) * 3) for level in (0, 30, 60, 200, 10)]
    descriptors = [pixel_descriptor([image]) for image in images]
    assert seed_spread(descriptors, list("aaabc")) == {"a": pytest.approx(40 / 255)}
    assert seed_spread([descriptors[0], None, descriptors[2]], list("aaa")) == {"a": pytest.approx(60 / 255)}


def test_the_spread_of_features_is_that_of_a_loop_over_pairs():
    features = np.random.default_rng(0).normal(size=(5, 7))
    expected = [
        1 - np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b)) for a, b in itertools.combinations(features, 2)
    ]
    assert seed_spread(list(features), ["p"] * 5, cosine=True) == {"p": pytest.approx(np.mean(expected))}


def test_measures_are_known_for_images_made_for_it():
    half = Image.new("RGB", (20, 20), (255, 255, 255))
    half.paste((0, 0, 0), (0, 0, 10, 20))
    values = measure_image([half])
    assert values["saturation"] == 0 and values["contrast"] == pytest.approx(0.5)
    red = measure_image([Image.new("RGB", (8, 8), (255, 0, 0))])
    assert red == {"saturation": 1, "contrast": pytest.approx(0, abs=1e-12), "high_frequency": pytest.approx(0)}
    # Of independent luma noise with variance v, taking away the mean of nine leaves 8/9 of it.
    grey = np.random.default_rng(0).normal(128, 20, (200, 200)).round().clip(0, 255).astype(np.uint8)
    found = measure_image([Image.fromarray(grey).convert("RGB")])
    assert found["high_frequency"] == pytest.approx(found["contrast"] * math.sqrt(8 / 9), rel=0.02)
    blurred = measure_image([Image.fromarray(grey).filter(ImageFilter.GaussianBlur(2))])
    assert blurred["high_frequency"] < 0.1 * found["high_frequency"]


def test_motion_is_measured_on_videos_alone_and_is_nothing_for_a_still():
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (0, 51, 102)]
    assert measure_image(frames)["motion"] == pytest.approx(0.2)
    assert measure_image(frames[:1] * 3)["motion"] == 0
    assert "motion" not in measure_image(frames[:1])


def test_collapse_and_damage_are_pointed_out_beside_a_perfect_win_rate():
    prompts = [f"p{i // 4}" for i in range(120)]
    before = [noise(i, spread=30) for i in range(120)]
    after = [noise(i // 4, spread=60) for i in range(120)]  # one image a prompt, and harsher
    rewards = {"wins": lambda images, texts: [float(np.std(image)) for image in images]}
    base = score_model("base", before, prompts, rewards)
    found = compare_models(prompts, base, [score_model("x", after, prompts, rewards, trained=frozenset({"wins"}))])
    assert found.adapters[0].scores[0].win_rate == 1
    assert found.adapters[0].measures[0].mean_after == 0
    text = "\n".join(found.notices)
    assert "x was trained on every score here" in text
    assert "seed_spread changed by -100.0 % [-100.0, -100.0]" in text and "become alike" in text
    assert "x: contrast changed by +9" in text and "x: high_frequency changed by +9" in text


def test_what_cannot_be_known_is_said():
    base = ModelRows("base", {"s": [1.0, 2.0]})
    notices = "\n".join(compare_models(["a", "b"], base, [ModelRows("x", {"s": [2.0, None]})]).notices)
    for part in ("Only 2 prompts", "not known which scores", "1 of 2 pairs have no s", "One image per prompt"):
        assert part in notices


def test_rows_of_videos_are_named_so_whatever_was_measured():
    base, x = (ModelRows(name, {"s": [1.0, 2.0]}, medium="video") for name in ("base", "x"))
    evaluation = compare_models(["a", "b"], base, [x])
    assert evaluation.medium == "video"
    assert "One video per prompt" in "\n".join(evaluation.notices)


def test_the_interval_of_a_relative_change_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    before = rng.uniform(0.2, 0.8, 100)
    after = before * rng.uniform(0.6, 1.1, 100)
    scores = {"s": [0.0] * 100}
    base, x = (ModelRows(name, scores, {"contrast": list(side)}) for name, side in (("base", before), ("x", after)))
    (found,) = compare_models(list(map(str, range(100))), base, [x], num_resamples=4000).adapters[0].measures
    expected = stats.bootstrap(
        (before, after),
        lambda a, b, axis: b.mean(axis) / a.mean(axis) - 1,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        random_state=1,
    ).confidence_interval
    assert found.relative_change_interval == pytest.approx(tuple(expected), abs=0.004)


# ---- Trained scores ----


def test_the_trained_score_is_read_from_the_files_beside_the_adapter(tmp_path):
    (tmp_path / "training_args.json").write_text(json.dumps({"score_column": "hpsv2.1"}))
    assert trained_scores(str(tmp_path), ["clip", "hpsv2.1"]) == {"hpsv2.1"}
    assert trained_scores(str(tmp_path), ["clip"]) is None  # it may be a copy of anything
    (tmp_path / "training_args.json").unlink()
    assert trained_scores(str(tmp_path), ["hpsv2.1"]) is None
    facts = {
        "hyperparameters": [{"name": "score_column", "value": "clip"}, {"name": "score_columns", "value": None}],
        "evaluations": [{"name": "hpsv2.1", "trained": True}, {"name": "clip", "trained": False}],
    }
    (tmp_path / "card_facts.json").write_text(json.dumps(facts))
    assert trained_scores(str(tmp_path), ["clip", "hpsv2.1"]) == {"clip"}
    facts["hyperparameters"][0]["value"] = "score"
    (tmp_path / "card_facts.json").write_text(json.dumps(facts))
    assert trained_scores(str(tmp_path), ["clip", "hpsv2.1"]) == {"hpsv2.1"}
    facts["hyperparameters"][1]["value"] = ["hpsv2.1", "clip", "other"]
    (tmp_path / "card_facts.json").write_text(json.dumps(facts))
    assert trained_scores(str(tmp_path), ["clip", "hpsv2.1"]) == {"clip", "hpsv2.1"}


@pytest.mark.parametrize(
    "content", ["no JSON", "[1]", '{"hyperparameters": [1]}', '{"evaluations": [{"trained": true}]}']
)
def test_files_of_another_program_beside_an_adapter_say_nothing(content, tmp_path):
    for name in ("training_args.json", "card_facts.json"):
        (tmp_path / name).write_text(content)
    assert trained_scores(str(tmp_path), ["clip"]) is None


# ---- Files ----


def test_the_files_hold_what_was_compared_in_the_agreed_form(tmp_path):
    base, x, y = random_rows("base"), random_rows("x", 0.5, 1, trained=frozenset({"a"})), random_rows("y", 0.2, 2)
    gallery = make_gallery(PROMPTS, [[noise(i, 8) for i in range(90)]] * 3)
    evaluation = compare_models(PROMPTS, base, [x, y])
    write_results(
        tmp_path, evaluation, [base, x, y], gallery, ReportOptions(prompt_set="mine | <b>"), seconds={"total": 1.0}
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["scores"] == metrics["adapters"]["x"]["scores"] and metrics["adapter"] == "x"
    assert {"trained", "win_rate", "interval", "mean_before", "mean_after"} <= metrics["scores"]["a"].keys()
    assert metrics["scores"]["a"]["trained"] is True and metrics["adapters"]["y"]["trained_known"] is False
    assert metrics["head_to_head"][0]["before"] == "x" and metrics["seconds"] == {"total": 1.0}
    tables = (tmp_path / "tables.md").read_text()
    assert tables == format_markdown(evaluation, prompt_set="mine | <b>")
    mean = np.mean(base.scores["a"]), np.mean(x.scores["a"]), np.mean(y.scores["a"])
    assert f"| mine \\| &lt;b&gt; | a | {mean[0]:.4f} | {mean[1]:.4f} † | {mean[2]:.4f} |" in tables
    for name in ("score_distributions-x.png", "score_distributions-y.png"):
        assert min(Image.open(tmp_path / name).size) > 300
