"""The dataset doctor: what it finds in a folder of known flaws, however it reads it, and an exit code for scripts."""

import io
import json
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tgol_trainer.checking.duplicates import MARK_BYTES, group_marks, image_mark
from tgol_trainer.checking.findings import diagnose
from tgol_trainer.checking.limits import ModelLimits
from tgol_trainer.cli import main
from tgol_trainer.data import Columns, DataError, prepare_dataset
from tgol_trainer.families import wrap_pipeline
from tgol_trainer.families.skeleton import load_skeleton
from tgol_trainer.sources import load_scored_dataset


def cloudy(seed, side=64):
    """An image with the spectrum of a photograph."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1 / side
    planes = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) / frequency).real for _ in range(3)]
    pixels = np.stack(planes, -1)
    return Image.fromarray(np.clip(128 + 40 * (pixels - pixels.mean()) / pixels.std(), 0, 255).astype(np.uint8))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def flawed(tmp_path_factory):
    """20 good rows of 5 prompts with the scores 0 to 19, then 15 rows with a flaw each."""
    folder = tmp_path_factory.mktemp("flawed")
    rows = []

    def add(file, prompt, score, content=None):
        if content is not None:
            (folder / file).write_bytes(content)
        rows.append({"file_name": file, "prompt": prompt, "score": score})

    for index in range(20):
        add(f"{index}.png", f"prompt {index % 5}", float(index), encoded(cloudy(index)))
    add("copy.png", "prompt 0", 19.0, encoded(cloudy(0), compress_level=0))  # 20: other bytes, same pixels, was 0
    add("near.jpg", "prompt 1", 18.5, encoded(cloudy(1), "JPEG", quality=60))  # 21: was 1
    add("2.png", "prompt 2", 2.0)  # 22: the same row again
    add("absent.png", "a", 3.0)  # 23
    add("broken.png", "a", 3.0, encoded(cloudy(30))[:600])  # 24
    add("3.png", "  ", 3.0)  # 25
    add("3.png", "a", None)  # 26
    add("3.png", "a", float("nan"))  # 27
    add("4.png", "word " * 40, 3.0)  # 28: also prompt 4's image
    add("small.png", "b", 3.0, encoded(cloudy(31, 16)))  # 29
    add("wide.png", "c", 3.0, encoded(Image.new("RGBA", (300, 40), (9, 9, 9, 99))))  # 30
    add("grey.png", "d", 3.0, encoded(cloudy(32).convert("L")))  # 31
    frames = {"save_all": True, "append_images": [cloudy(34)]}
    add("moving.webp", "e", 3.0, encoded(cloudy(33), "WEBP", lossless=True, **frames))  # 32
    add("pages.png", "f", 3.0, encoded(cloudy(35), "TIFF", **frames))  # 33: whatever its name says
    add("5.png", "a (red:1.3) kite", 3.0)  # 34: also prompt 0's image
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


FOUND = {
    ("empty prompt", "problem", 1): [25],
    ("image file not found", "problem", 1): [23],
    ("truncated image", "problem", 1): [24],
    ("missing score", "problem", 1): [26],
    ("NaN score", "problem", 1): [27],
    ("prompt length", "warning", 1): [28],
    ("prompt syntax", "warning", 1): [34],
    ("small", "warning", 1): [29],
    ("extreme crop", "warning", 1): [30],
    ("duplicates with different scores", "warning", 1): [0, 20],
    ("near duplicates", "warning", 1): [1, 21],
    ("several frames", "warning", 2): [32, 33],
    ("colour mode", "note", 2): [30, 31],
    ("duplicates", "note", 1): [2, 22],
    ("several prompts", "note", 2): [5, 34, 4, 28],
}


def check(capsys, *arguments):
    """Exit code, the JSON report, and what was printed as text."""
    capsys.readouterr()
    code = main(["check", *map(str, arguments), "--num_proc", "1"])
    return code, capsys.readouterr().out


def test_every_flaw_of_a_folder_is_found_in_its_row_and_nothing_else(flawed, tmp_path, capsys):
    file = tmp_path / "reports" / "check.json"
    code, text = check(capsys, flawed, "--model_name_or_path", "shapes", "--json", file)
    report = json.loads(file.read_text())
    assert code == report["exit_code"] == 1
    assert (report["num_rows"], report["num_usable"]) == (35, 30)
    assert {(item["check"], item["level"], item["count"]): item["rows"] for item in report["findings"]} == FOUND
    assert "rows 0 and 20 (scores 0 and 19)" in text and "rows 1 and 21 (scores 1 and 18.5)" in text
    assert "skip` leaves the 5 unusable rows out" in text
    assert report["facts"]["modes"] == {"RGB": 28, "RGBA": 1, "L": 1}
    assert report["facts"]["sizes"]["most_common"][0] == {"width": 64, "height": 64, "count": 28}
    assert report["facts"]["scores"]["score"]["min"] == 0 and report["facts"]["scores"]["score"]["max"] == 19


def test_a_stream_and_several_processes_find_the_same(flawed):
    columns = Columns()
    one = diagnose(load_scored_dataset(str(flawed)), columns, progress=False)
    two = diagnose(load_scored_dataset(str(flawed)), columns, num_proc=2, progress=False)
    stream = diagnose(load_scored_dataset(str(flawed), streaming=True), columns, num_proc=2, progress=False)
    assert one.num_usable == 30
    assert one.to_dict() == two.to_dict() == stream.to_dict()


def test_what_training_refuses_is_a_problem_with_the_same_count_and_rows(flawed):
    dataset = load_scored_dataset(str(flawed))
    with pytest.raises(DataError) as refused:
        prepare_dataset(dataset, Columns(), (32, 32))
    problems = diagnose(dataset, Columns(), progress=False).of_level("problem")
    listed = [line for line in str(refused.value).splitlines() if line.startswith("  column ")]
    assert len(problems) == len(listed) == 5
    for finding in problems:
        assert any(f", {finding.check}: {finding.count} (row {finding.rows[0]}: " in line for line in listed)
        assert finding.remedy in str(refused.value)


def rows(**more):
    columns = {"prompt": list("abcd"), "image": [cloudy(i) for i in range(4)], "score": [1.0, 2.0, 3.0, 4.0]}
    return datasets.Dataset.from_dict({**columns, **more})


@pytest.mark.parametrize(
    ("dataset", "arguments", "code", "said"),
    [
        (rows(), (), 0, "no problems, no warnings"),
        (rows(), ("--resolution", "128"), 0, "no problems, 1 warning."),
        (rows(), ("--resolution", "128", "--strict"), 1, "no problems, 1 warning."),
        (rows(score=[2.0] * 4), (), 1, "All 4 scores equal 2.0"),
        (rows(score=[1.0, 2.0, 3.0, 1e39]), ("--strict",), 1, "weights that float32 cannot hold"),
        (rows().rename_column("score", "stars"), (), 1, "`--score_column stars`"),
        (rows().rename_column("score", "stars"), ("--score_column", "stars"), 0, "no problems"),
        (rows(score=[2.0, 2.0, 2.0, 3.0]), (), 0, "moves the threshold to 2.5: 1 positive, 3 negative"),
        (
            rows(score=["bad", "good", "bad", "best"]).cast_column(
                "score", datasets.ClassLabel(names=["good", "bad", "best"])
            ),
            ("--strict",),
            1,
            "from 0 for 'good' to 2 for 'best'",
        ),
    ],
)
def test_the_exit_code_is_1_for_what_stops_training_and_for_warnings_if_strict(
    tmp_path, capsys, dataset, arguments, code, said
):
    dataset.save_to_disk(tmp_path / "data")
    found, text = check(capsys, tmp_path / "data", *arguments)
    assert found == code
    assert said in text


def test_several_columns_are_checked_in_one_pass_as_training_takes_them_together(tmp_path, capsys):
    """Rows 0 and 1 are one image: `a` agrees, `b` has both labels; row 3 lacks `b`, so training cannot use it."""
    image = cloudy(0)
    several = {"a": [1.0, 1.0, 2.0, 3.0, 0.0], "b": [5.0, 1.0, 2.0, None, 4.0], "c": [7.0] * 5}
    images = [image, image, cloudy(1), cloudy(2), cloudy(3)]
    data = datasets.Dataset.from_dict({"prompt": ["p"] * 5, "image": images, **several})
    data.save_to_disk(tmp_path / "data")
    code, out = check(capsys, tmp_path / "data", "--score_columns", "a", "b", "c", "--json", "-")
    report = json.loads(out)
    found = {item["check"]: item for item in report["findings"]}
    assert code == 1 and report["num_usable"] == 4
    assert found["missing score"]["rows"] == [3] and "column 'b', row 3" in found["missing score"]["text"]
    assert found["constant scores"]["text"].startswith("column 'c': All 4")
    assert "rows 0 and 1 (b 5 and 1)" in found["duplicates with different scores"]["text"]
    assert report["facts"]["scores"]["a"]["median"] == 1 and report["facts"]["scores"]["b"]["median"] == 3
    alone = {name: diagnose(data, Columns(score=name), progress=False).facts["scores"] for name in "ac"}
    assert alone["a"]["a"]["num_distinct"] == 4 and alone["c"]["c"]["num_distinct"] == 1
    assert check(capsys, tmp_path / "data", "--score_columns", "a", "d")[1].count("no column 'd'") == 1


def test_columns_of_a_stream_are_looked_for_before_its_rows_are_read(flawed):
    stream = load_scored_dataset(str(flawed), streaming=True).map(lambda row: row)
    assert stream.features is None
    [finding] = diagnose(stream, Columns(), score_columns=["score", "stars"], progress=False).findings
    assert finding.check == "columns" and "no column 'stars'" in finding.text


def stopped(chunk, num_frames):
    os._exit(9)


def test_a_process_that_was_stopped_ends_the_check_with_what_to_change(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tgol_trainer.checking.survey._examine", stopped)
    rows().save_to_disk(tmp_path / "data")
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path / "data"), "--num_proc", "2"])
    error = capsys.readouterr().err
    assert "for want of memory" in error and "--num_proc 1" in error and "Traceback" not in error


def test_a_report_that_cannot_be_written_is_printed_all_the_same(tmp_path, capsys):
    rows().save_to_disk(tmp_path / "data")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"--json.*cannot be written"):
        main(["check", str(tmp_path / "data"), "--num_proc", "1", "--json", str(tmp_path / "file" / "report.json")])
    assert "no problems, no warnings." in capsys.readouterr().out


def test_scores_near_the_largest_number_give_valid_json(tmp_path, capsys):
    rows(score=[1e308, -1e308, 1.0, 2.0]).save_to_disk(tmp_path / "data")
    _, out = check(capsys, tmp_path / "data", "--json", "-")

    def refuse(constant):
        raise AssertionError(constant)

    facts = json.loads(out, parse_constant=refuse)["facts"]["scores"]["score"]
    assert facts["std"] is None and facts["max"] == 1e308


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model_name_or_path", "no/such/model"), "no/such/model does not exist, and it is not a Hub id"),
        (("--model_name_or_path", "{data}"), "holds no model_index.json"),
        (("--video_column", "clip"), "Give `--num_frames`, or a video model"),
    ],
)
def test_a_wrong_command_line_is_one_message_with_the_remedy(tmp_path, capsys, arguments, said):
    rows().save_to_disk(tmp_path / "data")
    with pytest.raises(SystemExit) as stopped:
        check(capsys, tmp_path / "data", *(argument.format(data=tmp_path) for argument in arguments))
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and said in error and "Traceback" not in error


def test_videos_without_a_model_are_met_with_the_flags_that_read_them(tmp_path, capsys):
    (tmp_path / "metadata.csv").write_text("file_name,prompt,score\n0.mp4,a,1\n1.mp4,b,2\n")
    with pytest.raises(SystemExit):
        check(capsys, tmp_path)
    assert "--video_column video --num_frames N" in capsys.readouterr().err


def test_a_dataset_without_rows_is_a_problem():
    assert [item.check for item in diagnose(rows().select([]), Columns(), progress=False).findings] == ["rows"]


def test_json_on_standard_output_is_all_that_is_printed_there(tmp_path, capsys):
    rows().save_to_disk(tmp_path / "data")
    code, text = check(capsys, tmp_path / "data", "--json", "-")
    report = json.loads(text)
    assert code == report["exit_code"] == 0
    note = next(item for item in report["findings"] if item["check"] == "prompt length")
    assert note["level"] == "note" and "not checked" in note["text"]
    assert report["facts"]["prompts"]["num_too_long"] is None


def test_a_size_is_written_as_in_training(tmp_path, capsys):
    rows().save_to_disk(tmp_path / "data")
    _, text = check(capsys, tmp_path / "data", "--json", "-", "--resolution", "48x32")
    assert json.loads(text)["facts"]["sizes"]["resolution"] == [48, 32]
    with pytest.raises(SystemExit):
        check(capsys, tmp_path / "data", "--resolution", "48x")
    assert "a number of pixels, or height and width as in '480x832', got '48x'" in capsys.readouterr().err


def test_videos_are_checked_with_the_frames_they_need():
    clips = [
        np.full((frames, 8, 8, 3), level, np.uint8).tolist() for frames, level in ((4, 1), (4, 1), (2, 2), (4, 3))
    ]
    dataset = datasets.Dataset.from_dict({"prompt": ["a"] * 4, "video": clips, "score": [1.0, 5.0, 2.0, 3.0]})
    diagnosis = diagnose(dataset, Columns(video="video", num_frames=3), limits=ModelLimits((8, 8)), progress=False)
    found = {(item.check, item.level): item.rows for item in diagnosis.findings}
    assert found[("too few frames", "problem")] == [2]
    assert found[("duplicates with different scores", "warning")] == [0, 1]
    assert diagnosis.facts["modes"] == {"RGB": 3}


# ---- Nearly the same ----


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda image: Image.open(io.BytesIO(encoded(image, "JPEG", quality=75))), True),
        (lambda image: image.resize((63, 63)), True),
        (lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), False),
        (lambda image: image.point(lambda level: min(255, level + 40)), False),  # gradients stay, colour does not
    ],
    ids=["jpeg", "half size", "mirrored", "brighter"],
)
def test_a_mark_survives_what_a_saved_copy_goes_through_and_sees_colour(change, same):
    images = [cloudy(seed, 128) for seed in range(6)]
    marks = [image_mark(image) for image in images] + [image_mark(change(image)) for image in images]
    groups = group_marks(np.array([np.frombuffer(mark, np.uint8) for mark in marks]))
    assert len(set(groups[:6])) == 6
    assert all(bool(groups[i] == groups[i + 6]) == same for i in range(6))


@pytest.mark.parametrize("limit", [0, 6, 20])
def test_groups_are_those_of_comparing_every_pair(limit):
    rng = np.random.default_rng(limit)
    marks = rng.integers(0, 256, (40, MARK_BYTES), dtype=np.uint8)
    family = []
    for mark in marks[:30]:  # chains: each differs from the one before
        for _ in range(rng.integers(0, 5)):
            bits = np.unpackbits(mark[:32])
            bits[rng.choice(256, rng.integers(0, limit + 4), replace=False)] ^= 1
            mark = np.concatenate([np.packbits(bits), mark[32:] // 2 * 2])
            family.append(mark)
    marks = np.concatenate([marks, family, marks[:3]])
    expected = np.arange(len(marks))
    near = [
        (i, j)
        for i in range(len(marks))
        for j in range(i)
        if bin(int.from_bytes((marks[i, :32] ^ marks[j, :32]).tobytes(), "big")).count("1") <= limit
        and max(abs(int(a) - int(b)) for a, b in zip(marks[i, 32:], marks[j, 32:], strict=True)) <= 12
    ]
    for _ in range(len(marks)):
        for i, j in near:
            expected[i] = expected[j] = min(expected[i], expected[j])
    found = group_marks(marks, limit)
    assert ((found[:, None] == found) == (expected[:, None] == expected)).all()
    assert len(set(expected)) < len(marks) - 10


# ---- The model's limits without its weights ----


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_3, tiny.wan, tiny.amused])
def test_a_skeleton_knows_the_limits_of_a_model_whose_weights_are_not_there(make, tmp_path):
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    weights = list(tmp_path.rglob("*.safetensors"))
    assert weights
    for file in weights:
        file.unlink()
    loaded, skeleton = wrap_pipeline(pipeline), load_skeleton(tmp_path)
    prompts = ["a dog", "x" * 90, "y" * 600]
    assert skeleton.count_long_prompts(prompts) == loaded.count_long_prompts(prompts)
    assert skeleton.native_size == loaded.native_size
    assert skeleton.num_frames == loaded.num_frames


def test_without_a_model_prompts_are_held_against_the_clip_tokenizer_of_the_hubs_cache(tmp_path, capsys, monkeypatch):
    """Here a token is a byte: 75 letters with start and end are 77 tokens, 76 letters are one too many."""
    repository = tmp_path / "cache" / "models--openai--clip-vit-large-patch14"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "vocab.json").write_text(json.dumps(tiny.clip_tokenizer().get_vocab()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    rows(prompt=["a" * 75, "b" * 76, "c", "c"]).save_to_disk(tmp_path / "data")
    assert "not checked against the limit" in check(capsys, tmp_path / "data")[1]  # half a tokenizer is none
    (snapshot / "merges.txt").write_text("#version: 0.2\n")
    report = json.loads(check(capsys, tmp_path / "data", "--json", "-")[1])
    [found] = [item for item in report["findings"] if item["check"] == "prompt length"]
    assert (found["count"], found["rows"], report["facts"]["prompts"]["token_limit"]) == (1, [1], 77)


# ---- Spreadsheets ----


@pytest.mark.parametrize(
    ("separator", "comma", "end", "start"),
    [(",", ".", "\n", b""), (";", ",", "\r\n", b"\xef\xbb\xbf"), ("\t", ",", "\r\n", b"")],
    ids=["plain", "European with a byte order mark", "tabs"],
)
def test_a_spreadsheet_export_with_ties_blanks_and_a_missing_file_is_read_as_meant(
    tmp_path, capsys, separator, comma, end, start
):
    def line(*cells):
        return separator.join(f'"{cell}"' if separator in cell else cell for cell in cells) + end

    scores = ["1.5", "4", "4", "2.5", "4", "", "3"]
    text = line("image", "prompt", "rating")
    for index, value in enumerate(scores):
        Image.new("RGB", (16, 16), (index * 30, 0, 0)).save(tmp_path / f"{index}.png")
        text += line(f"{index if index < 6 else 'absent'}.png", "a dog, running", value.replace(".", comma))
    (tmp_path / "ratings.csv").write_bytes(start + text.encode())
    code, out = check(capsys, tmp_path / "ratings.csv", "--score_column", "rating", "--json", "-")
    report = json.loads(out)
    problems = {item["check"]: item["rows"] for item in report["findings"] if item["level"] == "problem"}
    assert code == 1
    assert problems == {"image file not found": [6], "missing score": [5]}
    assert report["facts"]["scores"]["rating"]["min"] == 1.5 and report["facts"]["scores"]["rating"]["mean"] == 3.2
    assert report["facts"]["prompts"]["num_distinct"] == 1


def test_decimal_commas_that_are_text_are_named_and_the_code_keeps_those_rows():
    dataset = rows(score=["1,5", "2,5", None, "3"])
    finding = diagnose(dataset, Columns(), progress=False).findings[0]
    assert finding.check == "columns" and "decimal commas" in finding.text
    names = {"dataset": dataset, "datasets": datasets}
    exec(finding.text.split("To mend it:\n")[1], names)
    assert names["dataset"]["score"][:] == [1.5, 2.5, 3.0]
