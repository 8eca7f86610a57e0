"""Several score columns as one score: by hand, the rows of the trainer, its card and its resume."""

import json
import math

import datasets
import numpy as np
import pytest
from peft import LoraConfig

from tests.conftest import scored_dataset
from tests.tiny import stable_diffusion
from tgol_trainer import TGOLTrainer
from tgol_trainer.cli import main
from tgol_trainer.data import DataError
from tgol_trainer.thresholds import ThresholdError, fit_combination

LORA = LoraConfig(r=4, lora_alpha=8)
COLUMNS = {"score_columns": ["looks", "match"]}


# ---- By hand ----


def test_a_sum_adds_standardised_columns_by_their_weights():
    """
    a = 1, 2, 3: mean 2, standard deviation √(2/3), z = -√1.5, 0, √1.5. b = 10, 40, 10: mean 20, standard deviation
    √200, z = -1/√2, √2, -1/√2. With weights 2 and -1: -2√1.5 + 1/√2, -√2, 2√1.5 + 1/√2.
    """
    scores = np.array([[1.0, 10.0], [2.0, 40.0], [3.0, 10.0]])
    found = fit_combination(scores, ["a", "b"], [2.0, -1.0])
    assert found.formula == "2·z(a) - 1·z(b)"
    expected = [-2 * 1.5**0.5 + 0.5**0.5, -(2**0.5), 2 * 1.5**0.5 + 0.5**0.5]
    np.testing.assert_allclose(found(scores), expected, rtol=1e-14)
    # Other rows are standardised by these: (5 - 2)/√(2/3) is 3√1.5, and (20 - 20) is 0.
    np.testing.assert_allclose(found(np.array([[5.0, 20.0]])), [6 * 1.5**0.5], rtol=1e-14)


def test_the_smallest_margin_is_positive_where_every_column_reaches_its_threshold():
    """
    a = 1..5 has the median 3 and the standard deviation √2; b = 5, 0, 5, 10, 10 has the median 5, the mean 6 and the
    standard deviation √14. Margins to the medians: (-2, -1, 0, 1, 2)/√2 and (0, -5, 0, 5, 5)/√14. With weights 1 and
    0.5 the smaller are -2/√2, -1/√2 (-2.5/√14 is -0.67, above), 0, min(0.707, 0.668), min(1.414, 0.668).
    """
    scores = np.stack([np.arange(1.0, 6.0), [5.0, 0.0, 5.0, 10.0, 10.0]], axis=1)
    found = fit_combination(scores, ["a", "b"], [1.0, 0.5], "min")
    expected = [-(2**0.5), -(0.5**0.5), 0.0, 2.5 / 14**0.5, 2.5 / 14**0.5]
    np.testing.assert_allclose(found(scores), expected, atol=1e-14)
    assert (found(scores) >= 0).tolist() == [False, False, True, True, True]
    np.testing.assert_allclose(found.raw_thresholds, [3.0, 5.0], rtol=1e-14)


def test_a_column_of_ties_at_its_smallest_score_gets_a_threshold_above_it():
    """The median of 0, 0, 0, 1 is their minimum, which every row reaches; 0.5 is halfway to the next score."""
    scores = np.stack([[0.0, 0.0, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0]], axis=1)
    found = fit_combination(scores, ["wins", "b"], None, "min")
    assert found.raw_thresholds[0] == pytest.approx(0.5)
    assert (found(scores) >= 0).tolist() == [False, False, False, True]


def test_labels_of_min_are_those_of_comparing_every_column_with_its_own_percentile():
    scores = np.random.default_rng(0).integers(0, 6, (500, 3)) * np.array([0.1, 1.0, 1e6])
    found = fit_combination(scores, list("abc"), [0.3, 2.0, 1.0], "min", percentile=30)
    assert ((found(scores) >= 0) == (scores >= np.percentile(scores, 30, axis=0)).all(axis=1)).all()


# ---- Through the trainer ----


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(1)
    looks = rng.normal(5.0, 2.0, 32)
    columns = scored_dataset().remove_columns("score").add_column("looks", looks)
    return columns.add_column("match", 0.01 * (looks + rng.normal(0.0, 2.0, 32)))


def table(rows):
    return np.stack([np.asarray(rows[name]) for name in COLUMNS["score_columns"]], axis=1)


def standardised(values, by=None):
    by = values if by is None else by
    return (values - by.mean(axis=0)) / by.std(axis=0)


def margins(trainer, dataset):
    return trainer.collator([dataset[row] for row in range(len(dataset))])["margin"].numpy()


def build(config, dataset, *others, **settings):
    return TGOLTrainer(stable_diffusion(), config(**{**COLUMNS, **settings}), dataset, *others, peft_config=LORA)


def test_training_and_evaluation_rows_get_the_sum_standardised_by_the_training_rows(config, rows):
    unseen = rows.select(range(8)).map(lambda row: {"looks": row["looks"] + 1})
    trainer = build(config, rows, unseen, score_weights=[1.0, 0.5], per_device_train_batch_size=32, max_steps=1)
    total = standardised(table(rows)) @ [1.0, 0.5]
    np.testing.assert_allclose(margins(trainer, trainer.train_dataset), total - np.median(total), rtol=1e-5, atol=1e-6)
    other = standardised(table(unseen), table(rows)) @ [1.0, 0.5]
    np.testing.assert_allclose(margins(trainer, trainer.eval_dataset), other - np.median(total), rtol=1e-5, atol=1e-6)
    trainer.train()
    first = next(line for line in trainer.state.log_history if "loss" in line)
    expected = (1 + 5 * np.abs(total - np.median(total))).mean() * math.log(2)
    assert first["loss"] == pytest.approx(expected, rel=1e-5)


def test_any_column_below_its_percentile_makes_a_row_negative(config, rows):
    trainer = build(config, rows, score_combination="min", threshold_percentile=40.0)
    values = table(rows)
    all_reached = (values >= np.percentile(values, 40, axis=0)).all(axis=1)
    assert 0 < all_reached.sum() < 32
    assert ((margins(trainer, trainer.train_dataset) >= 0) == all_reached).all()
    assert (trainer.threshold.value, trainer.threshold.num_positive) == (0.0, all_reached.sum())


@pytest.mark.parametrize("method", ["sum", "min"])
def test_a_proxy_set_gives_means_deviations_and_thresholds(config, rows, method):
    proxy = datasets.Dataset.from_dict({"looks": [1.0, 5.0, 6.0, 8.0], "match": [0.01, 0.02, 0.06, 0.07]})
    trainer = build(config, rows, None, proxy, score_combination=method)
    values, source = standardised(table(rows), table(proxy)), standardised(table(proxy))
    if method == "sum":
        expected = values.sum(axis=1) - np.median(source.sum(axis=1))
    else:
        expected = (values - np.median(source, axis=0)).min(axis=1)
    np.testing.assert_allclose(margins(trainer, trainer.train_dataset), expected, rtol=1e-5, atol=1e-6)


def test_groups_of_the_sum_come_from_a_proxy_set_by_its_prompts(config, rows):
    proxy = rows.remove_columns("image")
    trainer = build(
        config, rows, None, proxy, threshold_strategy="oracle", oracle_beta=1e6, group_statistic="percentile"
    )
    total, prompts = standardised(table(rows)).sum(axis=1), np.asarray(rows["prompt"])
    for row in range(5):
        own = total[prompts == rows["prompt"][row]].mean()
        assert trainer.labeler.rows[row] == pytest.approx(own, abs=1e-3)


BAD = {
    "NaN": (float("nan"), r"column 'match', NaN score: 1 \(row 3: nan\)"),
    "missing": (None, r"column 'match', missing score: 1 \(row 3: None\)"),
}


@pytest.mark.parametrize(("value", "words"), BAD.values(), ids=BAD)
def test_a_bad_score_is_reported_in_its_own_column_or_left_out(config, rows, value, words):
    values = [value if row == 3 else score for row, score in enumerate(rows["match"])]
    broken = rows.remove_columns("match").add_column("match", values)
    with pytest.raises(DataError, match=words) as refused:
        build(config, broken)
    assert 'input_columns="match"' in str(refused.value)
    trainer = build(config, broken, on_bad_sample="skip")
    assert [row["row_id"] for row in trainer.train_dataset] == [row for row in range(32) if row != 3]
    assert sum(trainer.data_reports["train_dataset"].dropped.values()) == 1
    rest = standardised(np.delete(table(rows), 3, axis=0)).sum(axis=1)
    np.testing.assert_allclose([row["score"] for row in trainer.train_dataset], rest, rtol=1e-6, atol=1e-6)


def test_text_a_constant_and_a_missing_column_are_named(config, rows):
    with pytest.raises(DataError, match=r"column 'looks' must hold numbers, it holds text"):
        build(config, rows.cast_column("looks", datasets.Value("string")))
    flat = rows.remove_columns("match").add_column("match", [3.0] * 32)
    with pytest.raises(ThresholdError, match=r"Column 'match' of `score_columns`: All 32 scores equal 3"):
        build(config, flat)
    with pytest.raises(DataError, match=r"no column 'match' \(score_columns\).*Did you mean 'matches'"):
        build(config, rows.rename_column("match", "matches"))


def test_columns_that_no_row_meets_together_are_refused_with_the_remedy(config, rows):
    opposite = rows.remove_columns("match").add_column("match", -np.asarray(rows["looks"]))
    with pytest.raises(ThresholdError, match=r"no one of the 32 rows.*lower `threshold_percentile`.*'sum'"):
        build(config, opposite, score_combination="min")


def test_a_stream_is_refused_with_the_remedy(config, rows):
    with pytest.raises(ValueError, match=r"train_dataset: .*which a stream does not know.*\.map"):
        build(config, rows.to_iterable_dataset())
    with pytest.raises(ValueError, match=r"eval_dataset: .*which a stream does not know"):
        build(config, rows, rows.to_iterable_dataset())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"score_columns": None, "score_weights": [1.0]}, "`score_weights` says how `score_columns`"),
        ({"score_columns": None, "score_combination": "min"}, "`score_combination` says how"),
        ({"score_columns": ["looks"]}, "One alone is `score_column`"),
        ({"score_columns": ["looks", "looks"]}, "different columns"),
        ({"score_weights": [1.0]}, "2 numbers, got 1"),
        ({"score_weights": [1.0, 0.0]}, "'match' is 0.0; it must be finite and not 0"),
        ({"score_weights": [1.0, -1.0], "score_combination": "min"}, "store the negative"),
        ({"score_combination": "min", "threshold": 0.5}, r"`threshold=0.5` and .*use `score_combination='sum'`"),
        ({"score_combination": "min", "threshold_strategy": "group"}, "`threshold_strategy='group'` and"),
        ({"score_combination": "min", "score_normalization": "zscore"}, "`score_normalization='zscore'` and"),
        ({"score_combination": "min", "loss_type": "tgol_pairs", "group_size": 2}, "`loss_type='tgol_pairs'` and"),
        ({"score_column": "other"}, "both name the scores"),
        ({"prompt_column": "looks"}, "which is the `prompt_column`"),
    ],
)
def test_contradictions_are_refused(config, settings, words):
    with pytest.raises(ValueError, match=words):
        config(**{**COLUMNS, **settings})


def test_a_checkpoint_keeps_the_combination_and_resumes_with_it(config, rows, tmp_path, caplog):
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "score_combination": "min"}
    whole = build(config, rows, **settings)
    whole.train()
    state = json.loads((tmp_path / "checkpoint-2" / "tgol_state.json").read_text())["combination"]
    np.testing.assert_allclose(state["centers"], table(rows).mean(axis=0))
    card = (tmp_path / "README.md").read_text() if (tmp_path / "README.md").exists() else ""
    card = card or (tmp_path / "checkpoint-2" / "README.md").read_text()
    assert "Score column `match`: weight 1" in card and "negative if it misses any" in card

    moved = rows.map(lambda row: {"looks": 3 * row["looks"] + 1})
    again = build(config, moved, rows, **settings, allow_changed=["train_dataset"])
    with caplog.at_level("WARNING", logger="tgol_trainer"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "other means, standard deviations or thresholds" in caplog.text
    np.testing.assert_array_equal(margins(again, again.eval_dataset), margins(whole, whole.train_dataset))
    assert again.labeler.combination == whole.labeler.combination
    other = build(config, rows, **{**settings, "score_combination": "sum", "allow_changed": ["all"]})
    with pytest.raises(ValueError, match="this run asks for sum of"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("method", ["sum", "min"])
@pytest.mark.parametrize("with_proxy", [False, True], ids=["own", "proxy"])
def test_tgol_label_shows_what_training_makes_of_several_columns(config, rows, tmp_path, capsys, method, with_proxy):
    proxy = rows.remove_columns("image").select(range(20)) if with_proxy else None
    rows.save_to_disk(tmp_path / "rows")
    flags = ["--dataset_name", str(tmp_path / "rows"), "--output_dir", str(tmp_path / "out")]
    if proxy is not None:
        proxy.save_to_disk(tmp_path / "proxy")
        flags += ["--proxy_dataset_name", str(tmp_path / "proxy")]
    flags += ["--score_columns", "looks", "match", "--score_weights", "1", "2", "--score_combination", method]
    assert main(["label", *flags, "--threshold_percentile", "40"]) == 0
    shown = json.loads((tmp_path / "out" / "label.json").read_text())
    settings = {"score_weights": [1.0, 2.0], "score_combination": method, "threshold_percentile": 40.0}
    trainer = build(config, rows, None, proxy, **settings)
    assert {name: shown["threshold"][name] for name in ("value", "num_positive", "num_ties")} == {
        name: getattr(trainer.threshold, name) for name in ("value", "num_positive", "num_ties")
    }
    assert shown["weights"]["mean"] == pytest.approx(trainer.labeler.weights.mean, rel=1e-12)
    assert shown["combination"]["centers"] == list(trainer.labeler.combination.centers)
    assert f"{method}(looks, match): " in capsys.readouterr().out


def test_tgol_label_refuses_what_training_refuses(capsys):
    flags = ["label", "--dataset_name", "x.csv", "--score_combination", "min"]
    with pytest.raises(SystemExit):
        main(flags)
    assert "error: `score_combination` says how" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*flags, "--score_columns", "a", "b", "--threshold", "1"])
    assert "cannot both decide on labels" in capsys.readouterr().err
