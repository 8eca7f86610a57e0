"""Videos to training pixels: real files written by PyAV, every form a column may hold, and every way a clip is bad."""

import builtins
import io
import json
import logging
import re

import av
import numpy as np
import pytest
import torch
from datasets import Array4D, Dataset, Features, Image, List, Value, Video
from PIL import Image as Pillow

from tests.clips import HEIGHT, WIDTH, encoded, frames_of, write
from tgol_trainer.data import (
    Collator,
    Columns,
    DataError,
    ScoredStream,
    VideoError,
    check_columns,
    open_video,
    prepare_dataset,
    read_video,
    sample_frames,
    video_pixels,
)
from tgol_trainer.sources import load_scored_dataset

COLUMNS = Columns(video="video", num_frames=5)
SIZE = (16, 24)


def rows(values, scores=None, features=None):
    columns = {"prompt": [f"clip {i}" for i in range(len(values))], "video": values}
    columns["score"] = scores or [float(i) for i in range(len(values))]
    return Dataset.from_dict(columns, features=features)


# ---- Which frames ----


def test_frames_are_spread_evenly_and_begin_and_end_with_the_clips():
    """12 frames to 5: 0, 2.75, 5.5, 8.25, 11, rounded half up."""
    assert sample_frames(12, 5) == [0, 3, 6, 8, 11]
    assert sample_frames(5, 5) == [0, 1, 2, 3, 4]
    assert sample_frames(9, 1) == [4]
    for total in range(2, 40):
        for wanted in range(2, total + 1):
            chosen = sample_frames(total, wanted)
            assert (chosen[0], chosen[-1], len(set(chosen))) == (0, total - 1, wanted)
            assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1


def test_a_clip_with_fewer_frames_than_are_needed_is_refused():
    with pytest.raises(VideoError, match="it has 4 frames, 5 are needed") as caught:
        sample_frames(4, 5)
    assert caught.value.cause == "too few frames"


@pytest.mark.parametrize("kind", ["mp4", "webm", "avi"])
def test_the_chosen_frames_of_a_file_are_those_that_were_written(kind):
    written = frames_of()
    read = read_video(encoded(written, kind), 5, np.asarray)
    for image, number in zip(read, [0, 3, 6, 8, 11], strict=True):
        assert image.shape == (HEIGHT, WIDTH, 3)
        assert np.abs(image.astype(int) - written[number].astype(int)).mean() < 4  # compression, and YUV


def test_the_frame_rate_plays_no_part():
    slow, fast = (read_video(encoded(frames_of(), rate=rate), 5, np.asarray) for rate in (4, 60))
    assert np.abs(np.stack(slow).astype(int) - np.stack(fast)).mean() < 2


# ---- The values of the column ----


def test_every_form_of_a_clip_gives_the_same_pixels(tmp_path):
    pixels = frames_of(9)
    images = [Pillow.fromarray(frame) for frame in pixels]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    forms = {
        "array": pixels,
        "floats": pixels / 255,
        "images": images,
        "arrays": list(pixels),
        "paths": [str(tmp_path / f"{number}.png") for number in range(9)],
        "nested lists": pixels.tolist(),
    }
    expected, geometry, _ = video_pixels(pixels, 5, SIZE)
    assert (expected.shape, expected.dtype, geometry) == ((3, 5, *SIZE), torch.float32, (HEIGHT, WIDTH, 0, 0))
    assert expected.is_contiguous()
    assert -1 <= expected.min() < expected.max() <= 1
    for name, value in forms.items():
        assert torch.equal(video_pixels(value, 5, SIZE)[0], expected), name


def test_a_file_is_read_from_bytes_a_path_and_an_undecoded_video(tmp_path):
    data = encoded(frames_of())
    (tmp_path / "clip.mp4").write_bytes(data)
    path = tmp_path / "clip.mp4"
    expected = video_pixels(data, 5, SIZE)[0]
    for value in (path, str(path), {"bytes": data, "path": "gone.mp4"}, {"bytes": None, "path": str(path)}):
        assert torch.equal(video_pixels(value, 5, SIZE)[0], expected)


@pytest.mark.parametrize(
    "form", ["video", "undecoded", "path", "bytes", "images", "arrays", "array4d", "paths of frames"]
)
@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_a_dataset_with_any_of_the_column_types_gives_the_same_batch(form, stream, tmp_path):
    pixels = [frames_of(6), frames_of(7, seed=1)]
    for index, clip in enumerate(pixels):
        (tmp_path / f"{index}.mp4").write_bytes(encoded(clip))
        for number, frame in enumerate(clip):
            Pillow.fromarray(frame).save(tmp_path / f"{index}-{number}.png")
    paths = [str(tmp_path / f"{index}.mp4") for index in range(2)]
    files = [[str(tmp_path / f"{i}-{number}.png") for number in range(len(clip))] for i, clip in enumerate(pixels)]
    scalar = {"prompt": Value("string"), "score": Value("float64")}
    dataset = {
        "video": lambda: rows(paths).cast_column("video", Video()),
        "undecoded": lambda: rows(paths).cast_column("video", Video(decode=False)),
        "path": lambda: rows(paths),
        "bytes": lambda: rows([(tmp_path / f"{index}.mp4").read_bytes() for index in range(2)]),
        "images": lambda: rows(files).cast_column("video", List(Image())),
        "arrays": lambda: rows([clip.tolist() for clip in pixels]),
        "array4d": lambda: rows(
            [clip[:6] for clip in pixels],
            features=Features(**scalar, video=Array4D((6, HEIGHT, WIDTH, 3), "uint8")),
        ),
        "paths of frames": lambda: rows(files),
    }[form]()
    if stream:
        read = list(ScoredStream(dataset.to_iterable_dataset(), COLUMNS))
        assert len({row["row_id"] for row in read}) == 2
        assert read[0]["row_id"] == next(iter(ScoredStream(dataset.to_iterable_dataset(), COLUMNS)))["row_id"]
    else:
        read, report = prepare_dataset(dataset, COLUMNS, SIZE)
        read = [read[0], read[1]]
        assert (report.num_kept, report.num_smaller) == (2, 0)
    batch = Collator(SIZE, num_frames=5)(read)
    assert batch["pixel_values"].shape == (2, 3, 5, *SIZE)
    assert batch["geometry"].tolist() == [[HEIGHT, WIDTH, 0, 0]] * 2
    whole = [pixels[0], pixels[1][:6] if form == "array4d" else pixels[1]]
    expected = torch.stack([video_pixels(clip, 5, SIZE)[0] for clip in whole])
    lossy = form in ("video", "undecoded", "path", "bytes")
    assert (batch["pixel_values"] - expected).abs().mean() <= (0.04 if lossy else 0)


def test_a_turned_video_is_put_upright(monkeypatch):
    """A phone's portrait clip is stored on its side; its matrix says by how much to turn it, counterclockwise."""
    clip = np.zeros((5, HEIGHT, WIDTH, 3), np.uint8)
    clip[:, :, : WIDTH // 2] = 255  # bright left half
    real = av.VideoFrame.to_image
    assert av.VideoFrame.from_ndarray(clip[0], format="rgb24").rotation == 0

    class Turned:
        def __init__(self, frame):
            self.frame, self.rotation = frame, -90

        def to_image(self):
            return real(self.frame)

    class Container:
        def __init__(self, container):
            self.container, self.streams = container, container.streams

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.container.close()

        def __getattr__(self, name):
            return getattr(self.container, name)

        def decode(self, stream):
            return (Turned(frame) for frame in self.container.decode(stream))

    data, opened = encoded(clip), av.open
    monkeypatch.setattr(av, "open", lambda source, *args: Container(opened(source, *args)))
    image = np.asarray(read_video(data, 5, np.asarray)[0])
    assert image.shape == (WIDTH, HEIGHT, 3)
    assert image[: WIDTH // 2 - 4].mean() > 200 > 50 > image[WIDTH // 2 + 4 :].mean()  # left turned to the top


# ---- Bad clips ----


def bad_values(tmp_path):
    good, webm = encoded(frames_of()), encoded(frames_of(32), "webm")
    (tmp_path / "text.mp4").write_text("no video")
    sound = io.BytesIO()
    with av.open(sound, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        "good": (good, None),
        "none": (None, "missing video"),
        "blank": ("  ", "missing video"),
        "no file": (str(tmp_path / "gone.mp4"), "video file not found"),
        "folder": (str(tmp_path), "video file not found"),
        "cut webm": (webm[: len(webm) // 3], "truncated video"),
        "cut mp4": (good[: len(good) // 2], "undecodable video"),
        "text": (str(tmp_path / "text.mp4"), "undecodable video"),
        "empty": (b"", "undecodable video"),
        "sound alone": (sound.getvalue(), "undecodable video"),
        "short": (encoded(frames_of(4)), "too few frames"),
        "still": (encoded(frames_of(1)), "too few frames"),
        "no frames": ([], "too few frames"),
        "frame gone": ([str(tmp_path / "gone.png")] * 5, "video file not found"),
        "frame missing": ([None] * 5, "missing video"),
        "two sizes": ([Pillow.new("RGB", (8 + i, 8)) for i in range(5)], "undecodable video"),
        "channels first": (np.zeros((5, 3, 8, 8), np.uint8), "undecodable video"),
        "image": (np.zeros((8, 8, 3), np.uint8), "undecodable video"),
        "bright": (np.full((5, 8, 8, 3), 1.5), "undecodable video"),
        "ragged": ([[[[0, 0, 0]]], [[[0, 0, 0], [1, 1, 1]]]], "undecodable video"),
        "number": (7, "undecodable video"),
    }


@pytest.mark.parametrize("case", range(21))
def test_every_bad_clip_has_its_cause(case, tmp_path):
    name, (value, cause) = list(bad_values(tmp_path).items())[case]
    if cause is None:
        assert open_video(value, 5).size == (WIDTH, HEIGHT)
        return
    with pytest.raises(VideoError) as caught:
        open_video(value, 5)
    assert caught.value.cause == cause, name


def test_a_damaged_mp4_with_its_header_in_front_is_truncated(tmp_path):
    """With the index first, as for streaming, a cut file still opens; its header states frames that are gone."""
    frames = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    write(str(tmp_path / "clip.mp4"), frames, movflags="faststart")
    data = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    assert open_video(data, 5)
    with pytest.raises(VideoError) as caught:
        open_video(data[: len(data) * 2 // 3], 5)
    assert caught.value.cause == "truncated video"


def test_one_error_lists_every_bad_row_with_column_cause_and_remedy(tmp_path):
    good = encoded(frames_of())
    webm = encoded(frames_of(32), "webm")
    values = [good, None, b"junk", encoded(frames_of(3)), good, webm[: len(webm) // 3]]
    dataset = rows(values).cast_column("video", Video(decode=False)).rename_column("video", "clip")
    dataset = Dataset.from_list([*dataset, {"prompt": "p", "clip": {"bytes": None, "path": "gone.mp4"}, "score": 1.0}])
    columns = Columns(video="clip", num_frames=5)
    with pytest.raises(DataError) as caught:
        prepare_dataset(dataset, columns, SIZE)
    text = str(caught.value)
    assert "train_dataset: 5 of 7 rows cannot be used" in text
    for line in (
        "column 'clip', missing video: 1 (row 1: None)",
        "column 'clip', video file not found: 1 (row 6: 'gone.mp4')",
        "column 'clip', truncated video: 1 (row 5: ",
        "column 'clip', undecodable video: 1 (row 2: <4 bytes>: InvalidDataError",
        "column 'clip', too few frames: 1 (row 3: ",
        "it has 3 frames, 5 are needed",
        "lower `num_frames` (now 5)",
        'dataset.cast_column("clip", datasets.Video(decode=False))',
        "on_bad_sample='skip'",
    ):
        assert line in text, line
    kept, report = prepare_dataset(dataset, columns, SIZE, on_bad_sample="skip")
    assert kept.row_ids.tolist() == [0, 4]
    assert report.dropped == {
        "missing video": 1,
        "undecodable video": 1,
        "too few frames": 1,
        "truncated video": 1,
        "video file not found": 1,
    }
    with pytest.raises(DataError, match=r"(?s)column 'clip', missing video: 1"):
        list(ScoredStream(dataset.to_iterable_dataset(), columns))
    stream = ScoredStream(dataset.to_iterable_dataset(), columns, on_bad_sample="skip")
    assert [row["prompt"] for row in stream] == ["clip 0", "clip 4"]
    assert sum(stream.dropped.values()) == 5


def test_the_remedy_for_missing_files_makes_the_paths_right(tmp_path, monkeypatch):
    import datasets as library

    for index in range(2):
        (tmp_path / f"{index}.mp4").write_bytes(encoded(frames_of(seed=index)))
    dataset = rows(["0.mp4", "1.mp4"])
    with pytest.raises(DataError) as caught:
        prepare_dataset(dataset, COLUMNS, SIZE)
    code = str(caught.value).split("# column 'video':\n")[1].split("\nOr leave")[0]
    assert "import os, datasets" in code
    names = {"dataset": dataset, "datasets": library, "os": __import__("os")}
    exec(code.replace("/folder/of/the/videos", str(tmp_path)), names)
    assert prepare_dataset(names["dataset"], COLUMNS, SIZE)[1].num_kept == 2


def test_small_and_cut_clips_are_reported_as_images_are(caplog):
    caplog.set_level(logging.WARNING)
    _, report = prepare_dataset(rows([encoded(frames_of())]), COLUMNS, (64, 64))
    assert report.num_smaller == 1
    assert report.mean_cropped_share == pytest.approx(1 / 3)  # 48x32 to a square keeps 32 of 48
    assert "1 of 1 videos are smaller than they are trained at (the first one at 64x64" in caplog.text
    assert "cuts away 33 % of the video area" in caplog.text


def test_the_pass_is_cached_and_another_number_of_frames_is_another_pass(tmp_path, monkeypatch):
    from tgol_trainer.data import rows as module

    (tmp_path / "data").mkdir()
    rows([encoded(frames_of()), encoded(frames_of(7))]).save_to_disk(tmp_path / "data")
    opened, real = [], module.open_video
    monkeypatch.setattr(module, "open_video", lambda value, count: (opened.append(count), real(value, count))[1])

    def check(num_frames):
        columns = Columns(video="video", num_frames=num_frames)
        return prepare_dataset(Dataset.load_from_disk(tmp_path / "data"), columns, SIZE, on_bad_sample="skip")[1]

    assert check(5).num_kept == 2
    assert check(5).num_kept == 2
    assert opened == [5, 5]
    assert check(9).num_kept == 1
    assert opened[:4] == [5, 5, 9, 9]


def test_a_clip_that_breaks_after_the_check_names_its_row(tmp_path):
    row = {"prompt": "p", "video": str(tmp_path / "gone.mp4"), "score": 1.0, "row_id": 41}
    with pytest.raises(DataError, match=r"The video of row 41 .*gone\.mp4.*video file not found.*Put the file back"):
        Collator(SIZE, num_frames=5)([row])


def test_without_pyav_the_error_names_the_extra_and_frames_still_work(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *args, **kwargs)

    data = encoded(frames_of())
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=re.escape("pip install 'tgol_trainer[video]'")):
        prepare_dataset(rows([data]), COLUMNS, SIZE)
    assert open_video(frames_of(), 5).size == (WIDTH, HEIGHT)


def test_a_playlist_that_names_other_files_is_no_video(tmp_path):
    """FFmpeg would follow it to wherever it points, on this machine or another."""
    (tmp_path / "secret.mp4").write_bytes(encoded(frames_of()))
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{tmp_path}/secret.mp4'\n",
    ):
        with pytest.raises(VideoError):
            open_video(text.encode(), 5)
    with pytest.raises(VideoError) as caught:
        open_video(f"concat:{tmp_path}/secret.mp4", 5)
    assert caught.value.cause == "video file not found"


# ---- Columns ----


def test_images_for_a_model_of_videos_and_the_reverse_are_named():
    images = Dataset.from_dict({"prompt": ["p"], "image": [Pillow.new("RGB", (8, 8))], "score": [1.0]})
    with pytest.raises(DataError, match=r"train_dataset: the model makes videos, and the column 'image' holds images"):
        check_columns(images, COLUMNS)
    with pytest.raises(DataError, match="column 'image' holds images"):
        check_columns(images, Columns(video="image", image="other", num_frames=5))
    clips = rows([b"x"])
    with pytest.raises(DataError, match=r"the model makes images, and the column 'video' holds videos"):
        check_columns(clips, Columns())
    typed = clips.cast_column("video", Video(decode=False)).rename_column("video", "image")
    with pytest.raises(DataError, match=r"the model makes images, and the column 'image' holds videos"):
        check_columns(typed, Columns())
    check_columns(clips, COLUMNS)


def test_a_missing_video_column_is_named_with_the_line_that_mends_it():
    clips = rows([b"x"]).rename_column("video", "clip")
    with pytest.raises(DataError, match=r'(?s)no column \'video\' \(video\).*rename_column\("clip", "video"\)'):
        check_columns(clips, COLUMNS)


@pytest.mark.parametrize("value", [1, [1, 2], [[1, 2]], [["a"]]])
def test_a_column_that_cannot_hold_videos_is_refused_by_its_type(value):
    with pytest.raises(DataError, match=r"(?s)column 'video' must hold videos.*datasets\.Video\(decode=False\)"):
        check_columns(rows([value]), COLUMNS)


def test_columns_of_videos_must_differ_and_need_a_number_of_frames():
    with pytest.raises(DataError, match="must be three different ones, got prompt='prompt', video='score'"):
        Columns(video="score", num_frames=5)
    with pytest.raises(DataError, match="`num_frames` is None"):
        Columns(video="video")
    assert Columns(image="score", score="score", video="clip", num_frames=1).names == ["prompt", "clip", "score"]


# ---- Files and folders ----


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_videos_with_metadata_loads(tmp_path, streaming):
    lines = []
    for index in range(2):
        (tmp_path / f"{index}.webm").write_bytes(encoded(frames_of(seed=index), "webm"))
        lines.append(json.dumps({"file_name": f"{index}.webm", "prompt": f"p{index}", "score": index}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    dataset = load_scored_dataset(str(tmp_path), streaming=streaming)
    if streaming:
        read = list(ScoredStream(dataset, COLUMNS))
    else:
        assert isinstance(dataset.features["video"], Video)
        assert prepare_dataset(dataset, COLUMNS, SIZE)[1].num_kept == 2
        read = [prepare_dataset(dataset, COLUMNS, SIZE)[0][i] for i in range(2)]
    assert [row["prompt"] for row in read] == ["p0", "p1"]
    assert Collator(SIZE, num_frames=5)(read)["pixel_values"].shape == (2, 3, 5, *SIZE)


def test_paths_in_a_table_count_from_its_folder(tmp_path):
    (tmp_path / "a.mp4").write_bytes(encoded(frames_of()))
    (tmp_path / "t.csv").write_text("prompt,video,score\np,a.mp4,1\n")
    dataset = load_scored_dataset(str(tmp_path / "t.csv"))
    assert prepare_dataset(dataset, COLUMNS, SIZE)[1].num_kept == 1
