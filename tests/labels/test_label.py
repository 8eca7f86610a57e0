"""`tgol label`: what it shows is what the trainer does on the same data; its reading is that of training."""

import json
import re
import subprocess
import sys
from collections import Counter
from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.tiny import stable_diffusion
from tgol_trainer import TGOLTrainer
from tgol_trainer.cli import main
from tgol_trainer.data import Columns, DataError, prepare_dataset
from tgol_trainer.data.scores import read_scores
from tgol_trainer.sources import load_scored_dataset
from tgol_trainer.sources.loading import load_columns

RATINGS = [1, 2, 4, 4, 4, 5, 3, 4, 2, 5, 4, 1]
WINS = [0, 0, 0, 3, 0, 0, 1, 0, 0, 2, 0, 0]


def label(folder, *options):
    """Run the command in this process; what it wrote."""
    assert main(["label", *map(str, options), "--output_dir", str(folder / "out")]) == 0
    return json.loads((folder / "out" / "label.json").read_text())


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def with_images(scores, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (len(scores), 16, 16, 3), dtype=np.uint8)
    return datasets.Dataset.from_dict(
        {
            "prompt": [f"prompt {index % 5}" for index in range(len(scores))],
            "image": [Image.fromarray(image) for image in images],
            "score": scores,
        }
    )


# ---- The trainer's own ----


@pytest.mark.parametrize(
    ("scores", "settings"),
    [
        (RATINGS, {}),
        (WINS, {}),
        (np.random.default_rng(0).normal(size=12).tolist(), {"score_normalization": "zscore", "threshold": 0.3}),
        ([*range(11), 1000], {"score_normalization": "robust", "threshold_percentile": 30.0, "confidence_scale": 0.5}),
    ],
    ids=["stars", "win counts", "fixed after z-score", "robust"],
)
def test_threshold_labels_and_weights_are_those_of_a_trainer_on_the_same_file(tmp_path, config, scores, settings):
    with_images(scores).to_parquet(tmp_path / "rows.parquet")
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    shown = label(tmp_path, "--dataset_name", tmp_path / "rows.parquet", *flags)
    trainer = TGOLTrainer(
        stable_diffusion(), config(**settings), load_scored_dataset(str(tmp_path / "rows.parquet"), columns=Columns())
    )
    state = trainer.labeler.to_dict()
    assert {name: shown["threshold"][name] for name in state["threshold"]} == state["threshold"]
    assert shown["normalization"] == state["normalization"]
    assert {name: shown["weights"][name] for name in state["weights"]} == state["weights"]
    # What the loss is given, row by row.
    batch = trainer.collator([trainer.train_dataset[index] for index in range(len(scores))])
    margins = batch["margin"].numpy()
    assert shown["threshold"]["num_positive"] == (margins >= 0).sum()
    for example in shown["examples"]:
        margin = margins[example["row"]]
        assert example["positive"] == (margin >= 0)
        assert example["weight"] == pytest.approx(1 + trainer.args.confidence_scale * abs(margin), rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold_strategy": "group", "confidence_scale": 0.3, "desirable_weight": 2.0},
        {"threshold_strategy": "group", "group_column": "style", "group_statistic": "mean", "dead_zone": 0.4},
        {"threshold_strategy": "oracle", "reference_samples": True, "oracle_beta": 0.5, "weight_form": "abs"},
        {"threshold_strategy": "oracle", "score_normalization": "zscore", "normalize_weights": True},
        {"loss_type": "kto", "undesirable_weight": 1.5, "dead_zone": 0.2, "score_normalization": "robust"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_every_strategy_and_weight_is_that_of_a_trainer_row_by_row(tmp_path, config, settings, capsys):
    rng = np.random.default_rng(1)
    rows = with_images((rng.normal(size=20) + np.arange(20) % 5).tolist())
    rows.add_column("style", ["ink", "oil"] * 10).to_parquet(tmp_path / "rows.parquet")
    oracle = settings.get("threshold_strategy") == "oracle"
    proxy = tmp_path / "proxy.parquet" if oracle and "reference_samples" not in settings else None
    if proxy:
        prompts = [f"prompt {index % 4}" for index in range(16)]  # prompt 4 has none
        parquet(proxy, prompt=prompts, score=rng.normal(size=16) + np.arange(16) % 4)
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *(value if isinstance(value, list) else [value])]
    flags += ["--proxy_dataset_name", proxy] if proxy else []
    shown = label(tmp_path, "--dataset_name", tmp_path / "rows.parquet", *flags)
    train = load_scored_dataset(str(tmp_path / "rows.parquet"), columns=Columns())
    trainer = TGOLTrainer(
        *(stable_diffusion(), config(**settings), train),
        proxy_dataset=load_scored_dataset(str(proxy)) if proxy else None,
    )
    state = trainer.labeler.to_dict()
    assert {name: shown["threshold"][name] for name in state["threshold"]} == state["threshold"]
    assert shown["threshold"]["strategy"] == state["strategy"]
    assert (shown["weights"]["weighting"], shown["normalization"]) == (state["weighting"], state["normalization"])
    assert {name: shown["weights"][name] for name in state["weights"]} == state["weights"]
    batch = trainer.collator([trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])
    tau = trainer.threshold.value if trainer.labeler.rows is None else batch["score"] - batch["margin"]
    place = {row: index for index, row in enumerate(batch["row_id"].tolist())}
    assert {example["row"] for example in shown["examples"]} <= set(place)
    for example in shown["examples"]:
        index = place[example["row"]]
        assert example["positive"] == bool((batch["score"] - tau >= -1e-7)[index])
        assert example["weight"] == pytest.approx(batch["weight"][index].item(), rel=1e-5)
    assert trainer.labeler.weighting.formula in capsys.readouterr().out


def test_the_running_threshold_shown_is_where_the_trainer_starts_and_what_its_rows_meet(tmp_path, config):
    scores = np.random.default_rng(3).normal(size=40)
    with_images(scores.tolist()).to_parquet(tmp_path / "rows.parquet")
    settings = {"threshold_strategy": "running", "threshold_window": 8}
    flags = ["--threshold_strategy", "running", "--threshold_window", 8, "--dataset_streaming"]
    shown = label(tmp_path, "--dataset_name", tmp_path / "rows.parquet", *flags)["threshold"]["uncertainty"]
    # By hand: each row with the seven before it, the first rows after the last eight of the first pass.
    seen = np.concatenate([scores[-8:], scores])
    met = np.sort([np.median(seen[end - 7 : end + 1]) for end in range(8, 48)])
    assert (shown["interval"]["low"], shown["interval"]["high"]) == pytest.approx((met[0], met[38]))
    stream = load_scored_dataset(str(tmp_path / "rows.parquet"), streaming=True)
    trainer = TGOLTrainer(stable_diffusion(), config(**settings), stream)
    assert trainer.labeler.source.tolist() == scores.tolist()


def test_a_proxy_set_and_a_limited_stream_give_the_threshold_that_the_trainer_takes(tmp_path, config):
    with_images(RATINGS).to_parquet(tmp_path / "rows.parquet")
    parquet(tmp_path / "proxy.parquet", score=[1.0, 2.0, 2.5, 3.0])
    rows, proxy = str(tmp_path / "rows.parquet"), str(tmp_path / "proxy.parquet")
    shown = label(tmp_path, "--dataset_name", rows, "--proxy_dataset_name", proxy)
    trainer = TGOLTrainer(
        stable_diffusion(), config(), load_scored_dataset(rows), proxy_dataset=load_scored_dataset(proxy)
    )
    assert {
        name: shown["threshold"][name] for name in trainer.labeler.to_dict()["threshold"]
    } == trainer.labeler.to_dict()["threshold"]
    shown = label(tmp_path, "--dataset_name", rows, "--dataset_streaming", "true", "--max_threshold_samples", 5)
    stream = load_scored_dataset(rows, streaming=True)
    trainer = TGOLTrainer(stable_diffusion(), config(max_threshold_samples=5), stream)
    assert {
        name: shown["threshold"][name] for name in trainer.labeler.to_dict()["threshold"]
    } == trainer.labeler.to_dict()["threshold"]
    assert shown["num_rows"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("per_prompt", [4, 1], ids=["four images a prompt", "every prompt another"])
def test_ten_million_scores_take_seconds_and_less_than_a_gigabyte(tmp_path, per_prompt):
    """
    CPU time of one process stands for wall time, which other work would change; reading runs beside the rest, so
    the wall time of an idle machine is shorter (docs/labelling.md).
    """
    path, rng = tmp_path / "rows.parquet", np.random.default_rng(0)
    schema = pa.schema([("prompt", pa.string()), ("score", pa.float64())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, 10_000_000, 500_000):
            ids = pa.array(np.arange(start, start + 500_000) // per_prompt).cast(pa.string())
            prompts = pc.binary_join_element_wise("a photograph of a castle on a hill, number ", ids, " at dusk", "")
            writer.write_table(pa.table([prompts, rng.normal(size=500_000)], schema=schema), row_group_size=100_000)
    program = (
        "import resource, sys\n"
        "from tgol_trainer.cli import main\n"
        "main(sys.argv[1:])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6)\n"
    )
    arguments = ["label", "--dataset_name", str(path), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    seconds, gigabytes = map(float, done.stdout.splitlines()[-1].split())
    assert json.loads((tmp_path / "out" / "label.json").read_text())["num_rows"] == 10_000_000
    assert gigabytes <= 1.0
    assert seconds <= 18.0


# ---- Reading ----


def odd_rows():
    """Every kind of value that Arrow can hold in the two columns and training refuses, and some it takes."""
    scores = [1.0, None, float("nan"), float("inf"), 2.0, 3.0, -float("inf"), 4.0, 1e-300, 5.0]
    prompts = ["a", "b", "c", "d", "", " \t\u3000\x1f", None, "ü" * 40, "a", "a b"]
    image = Image.new("RGB", (8, 8))
    return datasets.Dataset.from_dict({"prompt": prompts, "image": [image] * 10, "score": scores})


def test_the_same_rows_are_left_out_for_the_same_causes_as_in_training():
    rows, (scored, report) = (
        read_scores(odd_rows(), on_bad_sample="skip"),
        prepare_dataset(odd_rows(), Columns(), (8, 8), on_bad_sample="skip"),
    )
    assert rows.scores.tolist() == scored.scores.tolist()
    assert rows.row_ids.tolist() == scored.row_ids.tolist()
    assert (rows.dropped, rows.num_rows) == (report.dropped, report.num_rows)
    assert rows.texts("prompt", rows.row_ids) == scored.prompts
    with pytest.raises(DataError) as mine:
        read_scores(odd_rows())
    with pytest.raises(DataError) as theirs:
        prepare_dataset(odd_rows(), Columns(), (8, 8))
    assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([True, False, True], pa.bool_()),
        ([2**53 + 1, 1, -7], pa.int64()),
        ([0.1, 0.2, 1e30], pa.float32()),
        ([Decimal("0.1234567890123456789"), Decimal("2.5"), Decimal("-1")], pa.decimal128(30, 19)),
    ],
    ids=str,
)
def test_scores_of_every_type_are_the_numbers_that_python_makes_of_them(tmp_path, values, kind):
    column = pa.array(values, kind)
    path = parquet(tmp_path / "rows.parquet", prompt=["a", "b", "c"], score=column)
    rows = read_scores(load_columns(str(path), ["prompt", "score"]))
    assert rows.scores.tolist() == [float(value) for value in column.to_pylist()]


def test_keys_of_texts_agree_exactly_where_the_texts_do():
    rng = np.random.default_rng(0)
    texts = ["", "a", "a\0", "a\0\0", "aaaaaaaa", "aaaaaaaa\0", "aaaaaaaab", "ä", *(map(chr, range(32, 120)))]
    texts += ["".join(rng.choice(list("ab"), size)) for size in rng.integers(1, 40, 3000)]
    texts += ["x" * size for size in (7, 8, 9, 15, 16, 17, 5000)]
    prompts = ["other start", *texts, *texts, None]
    dataset = datasets.Dataset.from_dict({"prompt": prompts, "score": np.arange(len(prompts))}).select(
        range(1, len(prompts))
    )
    keys = read_scores(dataset, scores_alone=True).keys["prompt"]
    assert len(np.unique(keys)) == len(set(texts))
    assert keys.tolist() == [*keys[: len(texts)], *keys[: len(texts)], keys[0]]  # null counts as the empty text


def test_rows_have_one_group_exactly_where_they_have_one_prompt():
    prompts = np.random.default_rng(0).integers(0, 15, 3000).astype(str).tolist()
    rows = read_scores(datasets.Dataset.from_dict({"prompt": prompts, "image": prompts, "score": range(3000)}))
    groups = rows.pop_groups("prompt").tolist()
    pairs = set(zip(groups, prompts, strict=True))
    assert sorted(group for group, _ in pairs) == list(range(15)) and len({prompt for _, prompt in pairs}) == 15
    assert not rows.keys


def test_of_a_parquet_file_the_images_are_not_even_read(tmp_path):
    with_images(RATINGS).to_parquet(tmp_path / "rows.parquet")
    stream = load_columns(str(tmp_path / "rows.parquet"), ["prompt", "score"])
    assert list(stream.features) == ["prompt", "score"]
    assert [table.column_names for table in stream.tables(5)] == [["prompt", "score"]] * 3


# ---- The report ----


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--score_normalization", "zscore", "--group_column", "prompt"],
        ["--score_columns", "score", "other", "--score_combination", "min"],
    ],
)
def test_a_zero_that_rounding_moved_is_shown_as_zero(tmp_path, capsys, options):
    """Standardised scores, whose mean and median are 0; computed, they are ±1e-17."""
    scores = np.linspace(-1, 1, 40)
    scores = (scores - scores.mean()) / scores.std()
    assert 0 < abs(np.median(scores)) < 1e-15
    parquet(tmp_path / "x.parquet", prompt=list("abcd") * 10, score=scores, other=scores**3)
    label(tmp_path, "--dataset_name", tmp_path / "x.parquet", *options)
    said = capsys.readouterr()
    assert "τ = 0" in said.out and not re.search(r"\de-1\d", said.out + said.err)


def test_prompts_and_groups_are_counted_as_by_hand(tmp_path, capsys):
    """τ = 2.5: prompt a is one-sided up, b down, c mixed, d single; group x 2 of 3 positive, y 1 of 4."""
    path = tmp_path / "rows.csv"
    rows = [("a", 4, "x"), ("a", 5, "x"), ("b", 1, "y"), ("b", 0, "y"), ("c", 2, "x"), ("c", 3, "y"), ("d", 2.5, "z")]
    path.write_text("prompt,score,style\n" + "".join(f"{p},{s},{g}\n" for p, s, g in rows))
    shown = label(tmp_path, "--dataset_name", path, "--group_column", "style")
    prompts = shown["prompts"]
    assert [prompts[k] for k in ("num_groups", "num_several", "num_positive_only", "num_negative_only")] == [
        4,
        3,
        1,
        1,
    ]
    found = {group["name"]: (group["num_rows"], group["num_positive"]) for group in shown["groups"]["largest"]}
    assert found == {"x": (3, 2), "y": (3, 1), "z": (1, 1)}
    assert "4 positive" in capsys.readouterr().out
    assert min(Image.open(tmp_path / "out" / "score_histogram.png").size) > 300


def topics(folder, scores, *options, prompts=None):
    prompts = prompts or [f"prompt {index % 7}" for index in range(len(scores))]
    path = parquet(folder / "rows.parquet", prompt=prompts, score=np.asarray(scores, dtype=float))
    return {item["topic"]: item["flag"] for item in label(folder, "--dataset_name", path, *options)["advice"]}


@pytest.mark.parametrize(
    ("make", "topic", "flag"),
    [
        (lambda rng: rng.uniform(0, 100, 400), "scale too wide", "--score_normalization zscore"),
        (lambda rng: rng.normal(0.25, 0.02, 400), "scale too narrow", "--score_normalization zscore"),
        (lambda rng: rng.normal(size=20), "uncertain threshold", "--proxy_dataset_name"),
        (lambda rng: rng.choice([1, 2, 3, 4, 4, 4, 5], 400), "ties", "--threshold 4.5"),
        (lambda rng: rng.choice([0, 0, 0, 1, 2], 400), "moved", "--threshold_percentile"),
        (lambda rng: np.append(rng.normal(size=396), [900, 900, 900, 900]), "heavy rows", "--confidence_scale"),
        (
            lambda rng: 9 * (np.arange(400) % 7) + rng.normal(size=400),
            "variance between groups",
            "--threshold_strategy group",
        ),
        (
            lambda rng: 9 * (np.arange(400) % 7) + rng.normal(size=400),
            "one-sided groups",
            "--threshold_strategy group",
        ),
    ],
)
def test_what_is_wrong_is_said_with_what_mends_it(tmp_path, make, topic, flag):
    found = topics(tmp_path, make(np.random.default_rng(0)))
    assert flag in found[topic]


def test_healthy_scores_get_no_advice_and_the_flags_advised_mend_what_they_are_for(tmp_path):
    rng, different = np.random.default_rng(0), [f"prompt {index}" for index in range(2000)]
    assert topics(tmp_path, rng.normal(size=2000), prompts=different) == {"recipe": "--recipe anchored"}
    wide = rng.uniform(0, 100, 2000)
    suited = re.search(r"--confidence_scale (\S+)", topics(tmp_path, wide)["scale too wide"])[1]
    assert set(topics(tmp_path, wide, "--confidence_scale", suited, prompts=different)) == {"recipe"}
    assert set(topics(tmp_path, wide, "--score_normalization", "zscore", prompts=different)) == {"recipe"}
    stars = rng.choice([1, 2, 3, 4, 4, 4, 5, 5], 2000)
    assert "ties" not in topics(tmp_path, stars, "--threshold", "4.5")
    assert set(topics(tmp_path, rng.normal(size=2000), prompts=["one"] * 2000)) == {"one group"}


@pytest.mark.parametrize(("images", "advised"), [(1, True), (2, False), (3, False), (4, True)])
def test_numbers_of_images_that_the_benchmark_has_are_advised_the_recipe_and_nothing_more_is_with_it(
    tmp_path, images, advised
):
    scores = np.random.default_rng(0).normal(size=64)
    prompts = [f"prompt {index // images}" for index in range(64)]
    assert (topics(tmp_path, scores, prompts=prompts).get("recipe") == "--recipe anchored") is advised
    assert "recipe" not in topics(tmp_path, scores, "--recipe", "anchored", prompts=prompts)


def test_thresholds_of_groups_are_advised_only_where_scores_differ_inside_of_them(tmp_path):
    """Seven prompts with one score each, then with a second one in three and in four of them."""
    prompt = np.arange(420) % 7
    for number, advised in ((0, False), (3, False), (4, True)):
        scores = 9.0 * prompt
        scores[420 - 7 : 420 - 7 + number] += 1
        found = topics(tmp_path, scores)
        flags = [found["variance between groups"], found["one-sided groups"]]
        assert all(("--threshold_strategy group" in flag) is advised for flag in flags)
        assert all(f"within {7 - number} of these 7 values of 'prompt'" in flag for flag in flags if not advised)
        assert ("recipe" in found) is advised
        plain = label(tmp_path, "--dataset_name", tmp_path / "rows.parquet")["prompts"]
        assert plain["num_differing"] == number
    grouped = label(
        tmp_path,
        *("--dataset_name", parquet(tmp_path / "rows.parquet", prompt=[f"{p}" for p in prompt], score=9.0 * prompt)),
        *("--threshold_strategy", "group", "--group_column", "prompt"),
    )["prompts"]
    assert grouped["num_positive_only"] + grouped["num_negative_only"] == 7  # what the flags would have mended


def test_a_settings_file_of_training_is_understood_and_flags_win(tmp_path):
    path = parquet(tmp_path / "rows.parquet", prompt=list("abcdef"), rating=[1.0, 2, 3, 4, 5, 60])
    settings = {"dataset_name": str(path), "score_column": "rating", "learning_rate": 1e-5, "output_dir": "training"}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**settings, "threshold_percentile": 80, "score_normalization": "robust"}))
    shown = label(tmp_path, "--config", file, "--threshold_percentile", 20)
    assert shown["threshold"]["percentile"] == 20
    assert shown["normalization"]["method"] == "robust"
    file.write_text(yaml.safe_dump({**settings, "score_normalization": "robust", "normalize_weights": True}))
    assert label(tmp_path, "--config", file)["weights"]["mean"] == pytest.approx(1)
    file.write_text(yaml.safe_dump({**settings, "score_colum": "rating"}))
    with pytest.raises(SystemExit, match="Did you mean 'score_column'"):
        label(tmp_path, "--config", file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threshold", "1", "--proxy_dataset_name", "y.csv"), "both set τ"),
        (("--threshold_percentile", "101"), "at most 100"),
        (("--confidence_scale", "-1"), "at least 0"),
        (("--threshold_strategy", "oracle"), "reference_samples"),
        (("--threshold_strategy", "running"), "follows a stream"),
        (("--threshold_strategy", "group", "--dataset_streaming"), "need a dataset with a length"),
    ],
)
def test_flags_that_cannot_work_are_refused_as_by_training(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["label", "--dataset_name", "x.csv", *options])
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--dataset_name is needed"):
        main(["label"])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("prompt,score\na,3\nb,3\n", (), "All 2 scores equal 3"),
        ("prompt,rating\na,3\nb,4\n", (), "--score_column rating"),
        ("prompt,score\na,3\nb,4\n", ("--group_column", "styl"), "no column 'styl'"),
        ("prompt,score\na,3\nb,4\n", ("--threshold", "9"), "leaves the positive side empty"),
        ("prompt,score\na,3\nb,n/a ?\n", (), "row 1: 'n/a ?'"),
    ],
)
def test_data_that_cannot_be_labelled_end_in_one_error(tmp_path, capsys, text, options, message):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(SystemExit):
        label(tmp_path, "--dataset_name", tmp_path / "rows.csv", *options)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_counts_of_the_histogram_are_those_of_the_scores(tmp_path):
    scores = np.random.default_rng(0).standard_t(1, 5000)
    shown = label(tmp_path, "--dataset_name", parquet(tmp_path / "r.parquet", prompt=["a"] * 5000, score=scores))
    bars = shown["histogram"]
    for low, high, count in bars[:-1]:
        assert count == Counter((scores >= low) & (scores < high))[True]
    assert sum(count for *_, count in bars) == 5000
