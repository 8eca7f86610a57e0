"""Videos on the page of `tgol rate`: played as they are or as WebM, rated, and read as a dataset of videos."""

import io
import json
import urllib.request

import av
import datasets
import numpy as np
import pytest
from PIL import Image

from tests.browser import NAMES, PROGRAM
from tests.clips import encoded, frames_of
from tests.helpers import until
from tgol_trainer.data import Columns, prepare_dataset
from tgol_trainer.data.videos import encode_video, read_video
from tgol_trainer.rating.server import Session
from tgol_trainer.rating.tasks import Pictures, make_tasks
from tgol_trainer.sources import load_scored_dataset
from tgol_trainer.sources.ratings import RateSettings, write_settings

needs_browser = pytest.mark.skipif(
    PROGRAM is None, reason=f"Chromium is not installed: none of {', '.join(NAMES)} is on the PATH"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A WebM, an MP4 of an old codec, and one without loss as `tgol generate` writes it, each with its caption."""
    folder = tmp_path_factory.mktemp("clips")
    for seed, kind in enumerate(("webm", "mp4")):
        (folder / f"{seed}.{kind}").write_bytes(encoded(frames_of(seed=seed), kind))
    (folder / "2.mp4").write_bytes(encode_video([Image.fromarray(frame) for frame in frames_of(seed=2)], 16))
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"clip {number}")
    return folder


def session_of(folder, output, kind="ratings"):
    pictures = Pictures(load_scored_dataset(str(folder)), folder=folder)
    write_settings(output, RateSettings(kind, str(folder), medium="video"))
    return Session(pictures, make_tasks(list(pictures.by_id.values()), kind, 0), output, kind)


def mean(content):
    return np.mean(read_video(content, None, lambda frame: np.asarray(frame, dtype=float)), axis=(1, 2, 3))


def test_a_browser_gets_webm_of_what_it_does_not_play_with_the_same_frames(folder, tmp_path):
    pictures = session_of(folder, tmp_path).pictures
    assert pictures.medium == "video"
    for name, picture in pictures.by_id.items():
        content, kind = pictures.for_browser(name)
        assert kind == "video/webm"
        same = content == (folder / "0.webm").read_bytes()
        assert same == (picture.prompt == "clip 0")
        stored = next(folder.glob(f"{picture.prompt[-1]}.[mw]*")).read_bytes()
        assert np.abs(mean(content) - mean(stored)).max() < 3
    with av.open(io.BytesIO(content)) as made:
        assert made.streams.video[0].codec_context.name == "vp8" and made.streams.video[0].average_rate == 16


def test_a_large_video_becomes_smaller_and_keeps_its_shape(tmp_path):
    stills = [Image.new("RGB", (1600, 400), (90, 9, 9))] * 3
    rows = {"prompt": ["a"], "video": [{"bytes": encode_video(stills, 8), "path": None}]}
    features = datasets.Features({"prompt": datasets.Value("string"), "video": datasets.Video(decode=False)})
    found = Pictures(datasets.Dataset.from_dict(rows, features=features))
    (name,) = found.by_id
    assert read_video(found.for_browser(name)[0], 1, lambda frame: frame.size) == [(1280, 320)]
    assert found.keep(name, tmp_path).endswith(".mp4")


def test_a_part_of_a_video_is_sent_where_one_is_asked_for(folder, tmp_path, serving):
    session = session_of(folder, tmp_path)
    address = serving(session)
    name = next(name for name, picture in session.pictures.by_id.items() if picture.prompt == "clip 0")
    whole = (folder / "0.webm").read_bytes()
    for asked, status, expected in (
        (None, 200, whole),
        ("bytes=0-1", 206, whole[:2]),
        ("bytes=10-", 206, whole[10:]),
        (f"bytes=5-{len(whole) + 9}", 206, whole[5:]),
        (f"bytes={len(whole)}-", 200, whole),
        ("lines=1-2", 200, whole),
    ):
        request = urllib.request.Request(f"{address}/image/{name}", headers={"Range": asked} if asked else {})
        with urllib.request.urlopen(request, timeout=20) as reply:
            assert (reply.status, reply.read()) == (status, expected)
            if status == 206:
                start = int(asked[6:].partition("-")[0])
                length = f"bytes {start}-{start + len(expected) - 1}/{len(whole)}"
                assert reply.headers["Content-Range"] == length


@needs_browser
def test_videos_play_muted_in_a_loop_are_rated_by_keys_and_train(browser, folder, tmp_path, serving):
    browser.open(f"{serving(session_of(folder, tmp_path))}/?rater=anna")
    for done, key in enumerate("524", 1):
        until(browser, "document.querySelector('#pictures video')?.currentTime > 0")
        assert browser.run("(v => v.muted && v.loop && !v.paused)(document.querySelector('#pictures video'))")
        browser.key(key)
        until(browser, f"document.querySelector('#end').hidden === {str(done < 3).lower()}")
        until(browser, f"document.querySelector('#count').innerText === '{min(done, 2)} of 3'")
    assert "3 videos rated" in browser.run("document.querySelector('#summary').innerText")
    dataset = load_scored_dataset(str(tmp_path))
    assert set(dataset.column_names) == {"prompt", "video", "score", "num_ratings", "score_std"}
    kept, _ = prepare_dataset(dataset, Columns(video="video", num_frames=9), (32, 32))
    lines = (tmp_path / "ratings.jsonl").read_text().splitlines()
    given = {line["prompt"]: line["rating"] for line in map(json.loads, lines)}
    assert sorted(kept.scores.tolist()) == sorted(given.values()) == [2.0, 4.0, 5.0]
    assert {row["prompt"]: row["score"] for row in dataset.select_columns(["prompt", "score"])} == given


@needs_browser
def test_a_video_is_enlarged_and_its_neighbours_stand_still(browser, folder, tmp_path, serving):
    for number in range(3):
        (folder / f"{number}.txt").write_text("one prompt")
    session = session_of(folder, tmp_path)
    browser.open(f"{serving(Session(session.pictures, session.tasks, tmp_path, 'ratings', by_prompt=True))}/?rater=b")
    until(browser, "document.querySelector('#pictures video')?.currentTime > 0")
    until(browser, "document.querySelectorAll('#strip video').length === 3")
    assert browser.run("[...document.querySelectorAll('#strip video')].every(v => v.paused)")
    browser.key("z")
    until(browser, "document.querySelector('#zoom').open && document.querySelector('#large')?.clientWidth > 300")
    browser.key("Escape", 27)
    until(browser, "!document.querySelector('#zoom').open && !document.querySelector('#large')")
