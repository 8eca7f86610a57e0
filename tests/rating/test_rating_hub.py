"""A Space that rates a dataset of the Hub, run here from the files that were pushed: ratings arrive and go on."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest
import yaml
from PIL import Image

from tests import ROOT
from tests.hub import LoopbackHub

COMMAND = "import sys; from tgol_trainer.cli import main; sys.exit(main())"
READ = """
import json, sys
from tgol_trainer.sources import load_scored_dataset
dataset = load_scored_dataset("tester/rated")
print(json.dumps([[row["prompt"], row["score"], row["num_ratings"], row["image"].size] for row in dataset]))
"""


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        files, rows = {}, []
        for number in range(5):
            content = io.BytesIO()
            Image.new("RGB", (20 + number, 10), (50 * number, 0, 0)).save(content, "PNG")
            files[f"{number}.png"] = content.getvalue()
            rows.append({"file_name": f"{number}.png", "prompt": f"prompt {number}"})
        files["metadata.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
        hub.put("tester/pictures", "datasets", files)
        yield hub


def client(hub, folder, *command, code=ROOT, token=None, **environment):
    folder.mkdir(exist_ok=True)
    known = {**os.environ, **hub.environment(folder / "home", token), "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, command)], cwd=folder, env=known | environment, **pipes)


def address(process):
    line = process.stdout.readline()
    assert " to rate at " in line, line + process.stderr.read()
    return line.split(" at ")[1].strip()


def ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=60
    ) as reply:
        return json.loads(reply.read())


def end(process, hub, code=0):
    process.send_signal(signal.SIGTERM)  # as a container is stopped
    said, problems = process.communicate(timeout=300)
    assert process.returncode == code, said + problems
    assert hub.token not in said + problems
    return said


def test_one_command_makes_a_space_whose_ratings_become_a_dataset_that_training_reads(hub, tmp_path):
    options = ["rate", "tester/pictures", "--space", "tester/page", "--hub_dataset_id", "tester/rated", "--by_prompt"]
    process = client(hub, tmp_path / "mine", sys.executable, "-c", COMMAND, *options, SPACE_TOKEN=hub.token)
    said, problems = process.communicate(timeout=300)
    assert process.returncode == 0, said + problems
    assert "Ratings will go to the dataset tester/rated." in said and "One step is left" not in said
    space = hub.repository("tester/page", "spaces")
    assert space.secrets == {"HF_TOKEN": hub.token}

    files = hub.files("tester/page", "spaces")
    assert not [name for name, content in files.items() if hub.token.encode() in content]
    assert not [name for name in files if name.endswith(".safetensors")]
    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (card["sdk"], card["app_port"]) == ("docker", 7860)
    assert re.search(r"^starlette==\d", files["requirements.txt"].decode(), re.MULTILINE)
    app = tmp_path / "app"
    for name, content in files.items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_bytes(content)
    command = json.loads(re.search(r"^CMD (.*)$", files["Dockerfile"].decode(), re.MULTILINE)[1])
    assert command[0] == "python" and "--by_prompt" in command and "0.0.0.0" in command
    command = [sys.executable, *command[1:], "--host", "127.0.0.1", "--port", "0"]

    process = client(hub, tmp_path / "container", *command, code=app, SPACE_ID="tester/page")
    page = address(process)
    tasks = ask(f"{page}/tasks?rater=anna")["tasks"]
    assert len(tasks) == 5
    for rating, task in enumerate(tasks[:4], 1):
        ask(f"{page}/answer", {"rater": "anna", "task": task["id"], "answer": rating})
    ask(f"{page}/answer", {"rater": "bob", "task": tasks[0]["id"], "answer": 4})
    said = end(process, hub)
    assert "5 ratings by 2 people" in said and "Pushed and compared" in said
    assert "tgol label --dataset_name tester/rated" in said
    pushed = hub.files("tester/rated", "datasets")
    assert len([name for name in pushed if name.startswith("images/")]) == 4
    assert "The scores come from 2 people." in pushed["README.md"].decode()

    # The container is gone; another one goes on, and what it adds joins the rest.
    process = client(hub, tmp_path / "another", *command, code=app)
    page = address(process)
    found = ask(f"{page}/tasks?rater=anna")
    assert found["answers"] == {task["id"]: rating for rating, task in enumerate(tasks[:4], 1)}
    ask(f"{page}/answer", {"rater": "anna", "task": tasks[4]["id"], "answer": 5})
    end(process, hub)

    process = client(hub, tmp_path / "reader", sys.executable, "-c", READ)
    said, problems = process.communicate(timeout=300)
    rows = json.loads(said.splitlines()[-1])
    prompts = [task["prompt"] for task in tasks]
    scores = dict(zip(prompts, [(2.5, 2), (2.0, 1), (3.0, 1), (4.0, 1), (5.0, 1)], strict=True))
    assert {prompt: (score, number) for prompt, score, number, _ in rows} == scores, problems
    assert {prompt: tuple(size) for prompt, _, _, size in rows} == {f"prompt {n}": (20 + n, 10) for n in range(5)}


def test_a_push_that_fails_leaves_the_ratings_here_and_says_how_to_go_on(hub, tmp_path):
    options = ["rate", "tester/pictures", "--push_to_hub", "--hub_dataset_id", "tester/later", "--port", "0"]
    process = client(hub, tmp_path / "mine", sys.executable, "-c", COMMAND, *options)
    page = address(process)
    task = ask(f"{page}/tasks?rater=anna")["tasks"][0]["id"]
    ask(f"{page}/answer", {"rater": "anna", "task": task, "answer": 4})
    hub.fail("commit", status=403, times=None)
    process.send_signal(signal.SIGINT)
    said, problems = process.communicate(timeout=300)
    hub.faults.clear()
    assert process.returncode == 3
    assert "`tgol push pictures_ratings --hub_dataset_id tester/later` pushes" in problems
    push = ["push", "pictures_ratings", "--hub_dataset_id", "tester/later"]
    process = client(hub, tmp_path / "mine", sys.executable, "-c", COMMAND, *push)
    said, problems = process.communicate(timeout=300)
    assert process.returncode == 0 and "Pushed and compared" in said, problems
    assert "metadata.jsonl" in hub.files("tester/later", "datasets")


def test_a_space_needs_a_dataset_of_the_hub(tmp_path, capsys):
    from tgol_trainer.cli import main

    with pytest.raises(SystemExit):
        main(["rate", str(tmp_path), "--space", "tester/page"])
    assert "a Space reads a dataset on the Hub" in capsys.readouterr().err
