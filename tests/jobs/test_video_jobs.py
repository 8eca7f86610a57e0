"""Videos through `generate`, `score` and training: lossless clips, the same rows however the work is cut."""

import io
import json
import math
import re

import av
import datasets
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tgol_trainer import TGOLTrainer, cli
from tgol_trainer.data import DataError, encode_video, frame_rate, read_video
from tgol_trainer.evaluation import generate_videos
from tgol_trainer.jobs import GenerationSettings, ScoringSettings, generate_dataset, image_seed, score_dataset
from tgol_trainer.rewards import Clip, MeanOverFrames, RewardFacts, score_images
from tgol_trainer.sources import load_scored_dataset

PROMPTS = ["a red circle", "a blue cross"]
SAMPLING = {"num_inference_steps": 2, "height": 32, "width": 48, "num_frames": 5}


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "model"
    tiny.wan().save_pretrained(folder)
    return folder


def command(model, prompts, output, *more):
    (output.parent / "prompts.txt").write_text("\n".join(prompts) + "\n")
    arguments = ["generate", "--prompts", str(output.parent / "prompts.txt"), "--model_name_or_path", str(model)]
    arguments += ["--output_dir", str(output), "--use_cpu", "--images_per_prompt", "2", "--shard_size", "1", *more]
    for name, value in SAMPLING.items():
        arguments += [f"--{name}", str(value)]
    return cli.main(arguments)


@pytest.fixture(scope="module")
def clips(wan_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("clips") / "out"
    assert command(wan_folder, PROMPTS, output, "--fps", "8") == 0
    return output


def rows(folder):
    return datasets.load_dataset("parquet", data_files=str(folder / "data" / "*.parquet"), split="train")[:]


def pixels(value):
    return np.stack(read_video(value, None, np.asarray))


def noise(frames, width, height, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(frames)]


# ---- Clips ----


@pytest.mark.parametrize(("frames", "width", "height"), [(1, 16, 16), (7, 33, 17), (12, 48, 32)])
def test_an_encoded_clip_holds_every_pixel_frame_and_its_rate(frames, width, height):
    clip = noise(frames, width, height)
    encoded = encode_video(clip, 12)
    assert encoded == encode_video(clip, 12)
    with av.open(io.BytesIO(encoded)) as container:  # decoded here without our reader
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (frames, 12)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert all(np.array_equal(a, b) for a, b in zip(decoded, clip, strict=True))
    assert np.array_equal(pixels(encoded), np.stack(decoded))
    assert frame_rate({"bytes": encoded, "path": None}) == 12 and frame_rate(clip) is None


# ---- Generate ----


def test_a_video_model_writes_the_frames_it_drew_with_their_number_and_rate(clips, wan_folder):
    table = rows(clips)
    assert table["prompt"] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert table["num_frames"] == [5] * 4 and table["fps"] == [8.0] * 4 and table["video_index"] == [0, 1, 0, 1]
    assert json.loads(table["settings"][0]) | SAMPLING == json.loads(table["settings"][0])
    seeds = [image_seed(0, prompt, index) for prompt in PROMPTS for index in range(2)]
    drawn = generate_videos(tiny.wan(), table["prompt"], seeds, progress=False, **SAMPLING)
    for value, frames in zip(table["video"], drawn, strict=True):
        assert np.array_equal(pixels(value), np.stack([np.asarray(frame) for frame in frames]))
    assert len({value["bytes"] for value in table["video"]}) == 4


def test_two_processes_and_a_restart_make_the_clips_of_one(clips, wan_folder, tmp_path, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert command(wan_folder, PROMPTS, tmp_path / "out", "--fps", "8") == 0
    shards = sorted((tmp_path / "out" / "data").iterdir())
    assert len(shards) == 4
    shards[2].unlink()
    assert command(wan_folder, PROMPTS, tmp_path / "out", "--fps", "8") == 0
    assert {**rows(tmp_path / "out"), "model": None} == {**rows(clips), "model": None}


def test_generated_clips_are_trained_on_as_they_are(clips, config, tmp_path):
    def brightness(videos, prompts):
        return [float(np.mean([np.asarray(frame) for frame in video])) for video in videos]

    brightness.takes = "videos"
    dataset = load_scored_dataset(str(clips))
    score_dataset(dataset, {"score": lambda: brightness}, tmp_path / "scored", progress=False)
    scored = load_scored_dataset(str(tmp_path / "scored"))
    expected = [pixels(value).mean() for value in rows(clips)["video"]]
    np.testing.assert_allclose(scored["score"][:], expected)
    settings = {"per_device_train_batch_size": 2, "max_steps": 1, "num_frames": 5, "resolution": "32x48"}
    trainer = TGOLTrainer(tiny.wan(), config(**settings), scored)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_frames", "6"], "4·k [+] 1"),
        (["--fps", "0"], "`fps` is 0"),
        (["--dtype", "float31"], "not a torch dtype"),
    ],
)
def test_numbers_that_a_video_model_does_not_take_are_refused_before_anything_is_drawn(
    wan_folder, tmp_path, capsys, arguments, message
):
    (tmp_path / "p.txt").write_text("a\n")
    fixed = ["generate", "--prompts", str(tmp_path / "p.txt"), "--model_name_or_path", str(wan_folder), "--use_cpu"]
    with pytest.raises(SystemExit):
        cli.main([*fixed, "--output_dir", str(tmp_path / "out"), *arguments])
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_number_of_frames_means_nothing_to_a_model_of_images(tmp_path, capsys):
    with pytest.raises(TypeError, match="`num_frames` is given, but StableDiffusionPipeline makes images"):
        generate_dataset(tiny.stable_diffusion(), ["a"], tmp_path / "out", GenerationSettings(num_frames=5))
    assert not (tmp_path / "out").exists()


# ---- Score ----


def length(videos, prompts):
    return [float(len(video)) for video in videos]


length.takes = "videos"


def redness(images, prompts):
    return [np.asarray(image)[..., 0].mean() for image in images]


def dataset_of(values):
    features = datasets.Features({"prompt": datasets.Value("string"), "video": datasets.Video(decode=False)})
    content = {"prompt": [f"p{i}" for i in range(len(values))], "video": values}
    return datasets.Dataset.from_dict(content, features=features)


@pytest.fixture(scope="module")
def encoded():
    return [{"bytes": encode_video(noise(3 + i, 16, 16, i), 4 + i), "path": None} for i in range(5)]


def score(dataset, folder, rewards, **options):
    loaders = {reward.__name__: (lambda reward=reward: reward) for reward in rewards}
    return score_dataset(dataset, loaders, folder, ScoringSettings(shard_size=2, **options), progress=False)


def test_a_reward_of_videos_gets_all_frames_and_the_frame_rate(encoded, tmp_path):
    seen = []

    def rate(videos, prompts):
        assert all(isinstance(video, Clip) and video[0].mode == "RGB" for video in videos)
        seen.extend(np.stack([np.asarray(frame) for frame in video]) for video in videos)
        return [video.fps for video in videos]

    rate.takes = "videos"
    assert score(dataset_of(encoded), tmp_path, [rate, length]) == {"rate": 0, "length": 0}
    table = rows(tmp_path)
    assert table["rate"] == [4, 5, 6, 7, 8] and table["length"] == [3, 4, 5, 6, 7]
    assert table["video"] == encoded
    assert all(np.array_equal(a, pixels(value)) for a, value in zip(seen, encoded, strict=True))


def test_clips_that_cannot_be_decoded_are_none_and_counted(encoded, tmp_path, caplog):
    cut = {"bytes": encoded[1]["bytes"][:-2000], "path": None}
    values = [encoded[0], {"bytes": b"no video", "path": None}, {"bytes": None, "path": "absent.mp4"}, cut, encoded[4]]
    assert score(dataset_of(values), tmp_path, [length]) == {"length": 3}
    assert rows(tmp_path)["length"] == [3, None, None, None, 7]
    assert "3 of 5 rows have no score (a video that cannot be decoded" in caplog.text


def test_files_and_lists_of_frames_are_scored_as_encoded_clips(encoded, tmp_path):
    for number, value in enumerate(encoded):
        (tmp_path / f"{number}.mp4").write_bytes(value["bytes"])
    lines = [json.dumps({"file_name": f"{i}.mp4", "prompt": f"p{i}"}) for i in range(5)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    score(load_scored_dataset(str(tmp_path)), tmp_path / "a", [length])
    frames = {"prompt": [f"p{i}" for i in range(5)], "clip": [noise(3 + i, 16, 16, i) for i in range(5)]}
    score(datasets.Dataset.from_dict(frames), tmp_path / "b", [length], video_column="clip")
    assert rows(tmp_path / "a")["length"] == rows(tmp_path / "b")["length"] == [3, 4, 5, 6, 7]
    assert [value["bytes"] for value in rows(tmp_path / "a")["video"]] == [value["bytes"] for value in encoded]


def test_a_reward_of_images_is_averaged_over_frames_when_asked_and_refused_when_not(encoded, tmp_path):
    with pytest.raises(
        DataError, match=r"'redness' scores images, and 'video' is a column of videos.*my_reward\.takes"
    ):
        score(dataset_of(encoded), tmp_path / "b", [redness])
    assert score(dataset_of(encoded), tmp_path / "b", [redness, length], mean_over_frames=3) == {
        "redness": 0,
        "length": 0,
    }
    # Of 3 to 7 frames: first, middle (of an even number, to the even one of the two) and last.
    middle = [1, 2, 2, 2, 3]
    for value, mid, mean in zip(encoded, middle, rows(tmp_path / "b")["redness"], strict=True):
        red = pixels(value)[..., 0]
        assert mean == pytest.approx(np.mean([red[0].mean(), red[mid].mean(), red[-1].mean()]))
    facts = json.loads((tmp_path / "b" / "rewards.json").read_text())["redness"]
    assert facts["scale"] == "mean over 3 frames"
    with pytest.raises(DataError, match=r"mean_over_frames: 3 there, 4 now"):
        score(dataset_of(encoded), tmp_path / "b", [redness], mean_over_frames=4)


def test_a_reward_of_videos_is_refused_on_images_and_a_mean_over_frames_too(tmp_path):
    images = datasets.Dataset.from_dict({"prompt": ["a"], "image": noise(1, 8, 8)})
    with pytest.raises(DataError, match="'length' scores videos, and 'image' is a column of images"):
        score(images, tmp_path / "a", [length])
    with pytest.raises(DataError, match="`mean_over_frames`: the column 'image' holds images"):
        score(images, tmp_path / "a", [redness], mean_over_frames=2)
    with pytest.raises(DataError, match="no column 'film'"):
        score(images, tmp_path / "a", [length], video_column="film")


def test_the_mean_over_frames_takes_all_of_a_short_clip_and_none_where_a_frame_has_none():
    def picky(images, prompts):
        return [None if image.getpixel((0, 0))[0] == 9 else float(image.getpixel((0, 0))[0]) for image in images]

    def clip(*levels):
        return [Image.new("RGB", (4, 4), (level, 0, 0)) for level in levels]

    picky.facts = RewardFacts("picky", "owner/model", "abc", "0 to 255")
    mean = MeanOverFrames(picky, 4)
    assert score_images(mean, [clip(1, 2), clip(5, 9), [], clip(0, 1, 2, 30)], ["p"] * 4) == [1.5, None, None, 8.25]
    assert mean.facts == RewardFacts("picky", "owner/model", "abc", "mean over 4 frames, 0 to 255")
    with pytest.raises(ValueError, match="scores videos as they are"):
        MeanOverFrames(length, 2)


def test_a_reward_that_cannot_be_had_is_one_message_with_the_way_out(clips, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["score", str(clips), "--rewards", "videoreward", "--output_dir", str(tmp_path), "--use_cpu"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: The file model_config.json of KlingTeam/VideoReward could not be loaded")
    assert "--reward_options" in error


class Several:
    """Two further numbers from one pass."""

    takes = "videos"
    calls = 0

    def __call__(self, videos, prompts):
        return self.columns(videos, prompts)[""]

    def columns(self, videos, prompts):
        Several.calls += len(videos)
        lengths = [float(len(video)) for video in videos]
        return {"": lengths, "_half": [x / 2 for x in lengths], "_none": [None] * len(lengths)}


def test_a_reward_of_several_numbers_writes_a_column_each_from_one_pass(encoded, tmp_path):
    broken = {"bytes": b"no video", "path": None}
    dataset = dataset_of([encoded[0], encoded[1], broken, broken, encoded[2]])  # the second shard has no good row
    counts = score_dataset(dataset, {"film": Several}, tmp_path, ScoringSettings(shard_size=2), progress=False)
    assert counts == {"film": 2, "film_half": 2, "film_none": 5} and Several.calls == 3
    table = rows(tmp_path)
    assert table["film"] == [3, 4, None, None, 5] and table["film_half"] == [1.5, 2, None, None, 2.5]
    assert all(value is None or math.isfinite(value) for value in table["film_half"])
    taken = dataset.add_column("film_half", [0] * 5)
    with pytest.raises(DataError, match="would write the column 'film_half', which is there"):
        score_dataset(taken, {"film": Several}, tmp_path / "other", progress=False)
