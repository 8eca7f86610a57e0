"""The page of `tgol rate`: in a browser at two sizes, against its server, and as a command that is killed."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.browser import NAMES, PROGRAM
from tests.helpers import until
from tgol_trainer.cli import main
from tgol_trainer.cli.quickstart import Quickstart
from tgol_trainer.rating.server import Session
from tgol_trainer.rating.tasks import Pictures, make_tasks
from tgol_trainer.shapes import background_darkness, load_pipeline
from tgol_trainer.sources import load_scored_dataset
from tgol_trainer.sources.ratings import JOURNAL, SETTINGS

HOSTILE = '</p><script>document.title="taken"</script> "quoted"'
needs_browser = pytest.mark.skipif(
    PROGRAM is None, reason=f"Chromium is not installed: none of {', '.join(NAMES)} is on the PATH"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of six images of two prompts."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(6):
        Image.new("RGB", (300, 200), (40 * number, 90, 200 - 30 * number)).save(folder / f"secret_{number}.png")
        rows.append({"file_name": f"secret_{number}.png", "prompt": HOSTILE if number % 2 else "a cat"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def serve(source, tmp_path, serving):
    """Serve the images for a kind of rating; returns the address and the folder of the ratings."""

    def start(kind="ratings", **options):
        dataset = datasets.load_dataset("imagefolder", data_dir=str(source), split="train")
        pictures = Pictures(dataset, folder=source)
        tasks = make_tasks(list(pictures.by_id.values()), kind, 0)
        commands = ("tgol label --dataset_name here", "tgol train --model_name_or_path MODEL --dataset_name here")
        return serving(Session(pictures, tasks, tmp_path, kind, commands=commands, **options)), tmp_path

    return start


def ask(address, body=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers} if data else headers
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=20) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def tasks_of(address, rater="anna"):
    return json.loads(ask(f"{address}/tasks?rater={rater}")[1])


def test_the_page_tells_nothing_of_files_and_forbids_itself_other_servers(serve):
    address, _ = serve()
    with urllib.request.urlopen(f"{address}/", timeout=20) as reply:
        policy, text = reply.headers["Content-Security-Policy"], reply.read().decode()
    assert policy.startswith("default-src 'none';") and "http" not in policy
    assert not re.search(r"https?://", text)
    assert b"secret" not in ask(f"{address}/tasks?rater=anna")[1]


def test_another_site_gets_neither_images_nor_ratings_in(serve):
    address, folder = serve()
    task = tasks_of(address)["tasks"][0]["id"]
    body = {"rater": "anna", "task": task, "answer": 5}
    assert ask(f"{address}/tasks?rater=anna", Host="evil.example")[0] == 400
    assert ask(f"{address}/answer", body, **{"Content-Type": "text/plain"})[0] == 400  # as a form sends it
    assert ask(f"{address}/image/..%2F..%2Fmetadata.jsonl")[0] == 404
    assert not (folder / JOURNAL).exists()
    assert ask(f"{address}/answer", body)[0] == 200 and (folder / JOURNAL).exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 6}, "must be one of (1, 2, 3, 4, 5)"),
        ({"answer": True}, "must be one of"),
        ({"answer": [1]}, "must be one of"),
        ({"task": "none"}, "no such task"),
        ({"rater": "  "}, "a rater's name"),
        ({"rater": "x" * 61}, "a rater's name"),
        ({"rater": "a\x00b"}, "a rater's name"),
        ({"more": "x" * 20_000}, "too long"),
    ],
)
def test_what_is_no_rating_is_refused_and_not_written(serve, change, said):
    address, folder = serve()
    body = {"rater": "anna", "task": tasks_of(address)["tasks"][0]["id"], "answer": 3, **change}
    status, reply = ask(f"{address}/answer", body)
    assert status == 400 and said in json.loads(reply)["error"]
    assert not (folder / JOURNAL).exists()


def test_a_full_disk_is_an_error_that_the_page_shows(serve, monkeypatch):
    address, _ = serve()
    task = tasks_of(address)["tasks"][0]["id"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tgol_trainer.sources.ratings.os.fsync", full)
    status, reply = ask(f"{address}/answer", {"rater": "anna", "task": task, "answer": 3})
    assert status == 500 and "not saved" in json.loads(reply)["error"]
    assert tasks_of(address)["answers"] == {}


# ---- In a browser ----


def text(browser, selector):
    return browser.run(f"document.querySelector({selector!r}).innerText")


def open_as(browser, address, rater, **size):
    browser.open(f"{address}/?rater={rater}", **size)
    until(browser, "document.querySelector('#pictures img')?.naturalWidth")


def press(browser, key, done, code=0):
    browser.key(key, code)
    until(browser, f"document.querySelector('#count').innerText === '{done} of 6'")


def stored(folder):
    lines = map(json.loads, (folder / JOURNAL).read_text().splitlines())
    return [line.get("rating", line.get("choice", "skip" if line.get("skipped") else "undo")) for line in lines]


@needs_browser
def test_keys_rate_skip_and_undo_and_each_is_on_the_disk(browser, serve):
    address, folder = serve()
    browser.open(f"{address}/")
    assert browser.run("document.activeElement.id") == "name"
    browser.run("document.querySelector('#name').value = 'Anna'")
    browser.key("Enter", 13)
    until(browser, "document.querySelector('#pictures img')?.naturalWidth")
    press(browser, "4", 1)
    press(browser, "s", 2)
    press(browser, "u", 1)
    press(browser, "1", 2)
    press(browser, "7", 2)  # no key of this page
    assert stored(folder) == [4, "skip", "undo", 1]
    shown = browser.run("document.querySelector('#pictures img').src")
    browser.key("z")
    until(browser, "document.querySelector('#zoom').open && document.querySelector('#large').naturalWidth")
    assert browser.run("document.querySelector('#large').src") == shown
    until(browser, "document.querySelector('#large').clientWidth > 300")  # larger than it is
    browser.key("5")  # rates nothing that is covered
    browser.key("Escape", 27)
    until(browser, "!document.querySelector('#zoom').open")
    assert len(stored(folder)) == 4
    open_as(browser, address, "Anna")  # after a reload it goes on
    assert text(browser, "#count") == "2 of 6"
    for done in (3, 4, 5):
        press(browser, "3", done)
    browser.key("5")
    until(browser, "!document.querySelector('#end').hidden")
    assert "6 pictures rated, 0 skipped" in text(browser, "#summary")
    assert "tgol train --model_name_or_path MODEL --dataset_name here" in text(browser, "#next")
    # Over http from another machine there is no clipboard.
    browser.run("Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})")
    browser.click("#next .command:last-child button")
    until(browser, "document.querySelector('#next .command:last-child button').innerText === 'Marked'")
    marked = browser.run("getSelection().toString()")
    assert marked == "tgol train --model_name_or_path MODEL --dataset_name here"
    outside = [url for url in browser.requests() if not url.startswith(f"{address}/")]
    assert outside == [] and browser.errors() == []
    assert browser.run("document.title") == "Rate"  # the prompt is text


@needs_browser
@pytest.mark.parametrize(
    "size", [{"width": 1280, "height": 800}, {"width": 390, "height": 844}], ids=["desk", "phone"]
)
@pytest.mark.parametrize("kind", ["ratings", "thumbs", "pairs"])
def test_all_fits_the_screen_and_is_large_enough_for_a_thumb(browser, serve, kind, size):
    address, folder = serve(kind, by_prompt=True)
    open_as(browser, address, "Anna", **size)
    wide, high = size["width"], size["height"]
    assert browser.run("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]") == [wide, high]
    boxes = browser.run(
        "[...document.querySelectorAll('#rate button')].filter(node => node.getClientRects().length)"
        ".map(node => node.getBoundingClientRect()).map(box => [box.left, box.top, box.right, box.bottom])"
    )
    assert len(boxes) >= 6
    assert all(left >= 0 and top >= 0 and right <= wide and bottom <= high for left, top, right, bottom in boxes)
    assert all(right - left >= 40 and bottom - top >= 40 for left, top, right, bottom in boxes)
    picture = browser.run("document.querySelector('.picture').getBoundingClientRect().height")
    assert picture > high * (0.25 if kind == "pairs" else 0.4)
    assert browser.run("document.querySelectorAll('#strip .thumb').length") == (0 if kind == "pairs" else 3)
    hints = browser.run(
        "[...document.querySelectorAll('.hints span')].filter(node => node.getClientRects().length)"
        ".map(node => node.innerText).join('')"
    )
    assert "S skip, U undo, Z zoom" in hints if wide > 600 else hints == "Tap to enlarge"
    browser.click("#choices button:last-child")
    until(browser, "document.querySelector('#count').innerText === '1 of 6'")
    assert stored(folder) == [{"ratings": 5, "thumbs": "up", "pairs": "second"}[kind]]


@needs_browser
def test_pictures_of_a_prompt_are_shown_together_and_can_be_rated_again(browser, serve):
    address, folder = serve(by_prompt=True)
    open_as(browser, address, "Anna")
    press(browser, "2", 1)
    assert browser.run("[...document.querySelectorAll('.thumb')].map(node => node.innerText)") == ["2", "", ""]
    browser.click(".thumb:first-child")
    until(browser, "document.querySelector('#choices .given')?.innerText === '2'")
    browser.key("5")
    until(browser, "document.querySelector('.thumb b').innerText === '5'")
    assert stored(folder) == [2, 5]


@needs_browser
def test_a_server_that_is_gone_is_said_and_nothing_moves_on(browser, serve):
    address, folder = serve()
    open_as(browser, address, "Anna")
    browser.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    browser.key("4")
    until(browser, "!document.querySelector('#problem').hidden")
    assert "Not saved" in text(browser, "#problem") and text(browser, "#count") == "0 of 6"
    browser.call(
        "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
    )
    press(browser, "4", 1)
    assert browser.run("document.querySelector('#problem').hidden") and stored(folder) == [4]


# ---- The command ----


COMMAND = "import sys; from tgol_trainer.cli import main; sys.exit(main())"


def start(*options, cwd):
    command = [sys.executable, "-c", COMMAND, "rate", *map(str, options), "--port", "0"]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert " to rate at http://127.0.0.1:" in line, line + process.stderr.read()
    return process, line.split(" at ")[1].strip()


def test_a_killed_command_goes_on_where_it_was_and_ends_with_the_lines_for_training(source, tmp_path, monkeypatch):
    process, address = start(source, "--output_dir", "rated", cwd=tmp_path)
    for number, task in enumerate(tasks_of(address)["tasks"][:4]):
        assert ask(f"{address}/answer", {"rater": "anna", "task": task["id"], "answer": 1 + number})[0] == 200
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process, address = start(source, "--output_dir", "rated", "--model_name_or_path", "shapes", cwd=tmp_path)
    found = tasks_of(address)
    assert [found["answers"].get(task["id"]) for task in found["tasks"]] == [1, 2, 3, 4, None, None]
    process.send_signal(signal.SIGINT)
    said, problems = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in problems
    assert "rated: 4 ratings by 1 person." in said
    monkeypatch.chdir(tmp_path)
    (program, *label), (_, *train) = (line.split() for line in said.splitlines()[-2:])
    assert program == "tgol" or Path(program).samefile(Path(sys.executable).with_name("tgol"))
    assert label == ["label", "--dataset_name", "rated", "--recipe", "anchored"]
    flags = "--recipe anchored --max_steps 200 --learning_rate 2e-4 --lr_scheduler_type constant"
    said = f"train --model_name_or_path shapes --dataset_name rated {flags} --output_dir rated_adapter"
    assert " ".join(train) == said
    assert main([*label, "--output_dir", "label"]) == 0
    assert json.loads((tmp_path / "label" / "label.json").read_text())["settings"]["dataset_name"] == "rated"
    assert load_scored_dataset("rated")["score"][:] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("prompt", "stripped"), [("a (red:1.2) cat", True), ("a red cat (2024)", False)])
def test_prompts_of_other_programs_are_trained_as_plain_text_by_the_lines_for_training(
    prompt, stripped, tmp_path, monkeypatch
):
    said = []
    monkeypatch.setattr("tgol_trainer.rating.server.serve", lambda *_: said.append("served"))
    monkeypatch.setattr("tgol_trainer.cli.rate.signal.signal", lambda *_: None)
    made = []
    monkeypatch.setattr("tgol_trainer.rating.server.make_app", lambda session, *_: made.append(session))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(prompt)
    assert main(["rate", str(tmp_path), "--output_dir", str(tmp_path / "rated"), "--model_name_or_path", "any"]) == 0
    assert said == ["served"]
    assert [" --prompt_syntax strip" in line for line in made[0].commands] == [stripped, stripped]
    assert not any("--learning_rate" in line for line in made[0].commands)  # that of a small network


@pytest.mark.slow
def test_a_hundred_ratings_of_the_quickstarts_images_are_trained_by_the_printed_line_and_seen(tmp_path, monkeypatch):
    """A rater who likes dark backgrounds, with noise of half a standard deviation."""
    monkeypatch.chdir(tmp_path)
    quickstart = Quickstart(tmp_path)
    quickstart.sample_dataset(load_pipeline())
    process, address = start("dataset", "--model_name_or_path", "shapes", cwd=tmp_path)
    tasks = tasks_of(address)["tasks"][:100]
    contents = [ask(f"{address}/image/{task['images'][0]}")[1] for task in tasks]
    liked = np.array(background_darkness([Image.open(io.BytesIO(content)) for content in contents], [""] * 100))
    liked += np.random.default_rng(0).normal(0, liked.std() / 2, len(liked))
    ratings = 1 + np.searchsorted(np.quantile(liked, [0.2, 0.4, 0.7, 0.85]), liked)
    for task, rating in zip(tasks, ratings.tolist(), strict=True):
        ask(f"{address}/answer", {"rater": "anna", "task": task["id"], "answer": rating})
    process.send_signal(signal.SIGINT)
    label, train = [line.split() for line in process.communicate(timeout=60)[0].splitlines()[-2:]]
    assert main(label[1:]) == 0
    start_of_training = time.process_time()
    assert main(train[1:]) == 0
    assert time.process_time() - start_of_training < 120
    before = quickstart.evaluation_images(load_pipeline(), "before")
    trained = load_pipeline()
    trained.load_lora_weights(tmp_path / "dataset_adapter")
    after = quickstart.evaluation_images(trained, "after")
    before, after = (np.array(background_darkness(images, [])) for images in (before, after))
    assert (after - before).mean() > 0.5 * before.std()


def test_ratings_of_other_images_or_of_another_kind_are_not_mixed(source, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(["rate", str(source), "--output_dir", str(tmp_path / "other")])
    assert "exists and holds something else" in capsys.readouterr().err
    (tmp_path / "rated").mkdir()
    (tmp_path / "rated" / SETTINGS).write_text(
        json.dumps({"kind": "thumbs", "source": os.path.relpath(source, tmp_path / "rated")})
    )
    with pytest.raises(SystemExit):
        main(["rate", str(source), "--output_dir", str(tmp_path / "rated")])
    assert "holds ratings with kind 'thumbs', now it is 'ratings'" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        main(["rate", str(source), "--output_dir", str(tmp_path / "new"), "--port", str(taken.getsockname()[1])])
    assert "nothing can listen on 127.0.0.1" in capsys.readouterr().err
