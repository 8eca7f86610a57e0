"""Rewards behind an HTTP address: what is asked, answers read back, retries, and what is kept."""

import base64
import io
import json
import logging
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from tgol_trainer.rewards import load_reward, score_images
from tgol_trainer.rewards.served import Judge, ServedScorer


class Server(ThreadingHTTPServer):
    """Answers with what `reply(body)` returns, (status, headers, content), and keeps what it was asked."""

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.asked, self.most, self.now, self.lock = reply, [], 0, 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), body))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        status, headers, content = self.server.reply(body)
        with self.server.lock:
            self.server.now -= 1
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    waited = []
    monkeypatch.setattr("tgol_trainer.rewards.served.time.sleep", waited.append)
    return waited


def answered(text):
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def shown(body):
    """The image and the text of a question."""
    image, text = body["messages"][0]["content"]
    prefix, _, data = image["image_url"]["url"].partition(",")
    assert prefix == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))), text["text"]


def red(body):
    image, text = shown(body)
    return answered(f"The prompt says 1 thing. {text} Score: 3, no: Score: {image.getpixel((0, 0))[0] / 2}")


def images(*levels):
    return [Image.new("RGB", (4, 4), (level, 0, 0)) for level in levels]


def judge(server, tmp_path, **options):
    options = {"template": 'Rate {"a"}: {prompt}', "cache": tmp_path / "answers", **options}
    return Judge(server.url, "a-model", **options)


def test_a_judge_sees_image_and_prompt_and_the_last_match_of_its_answer_is_the_score(serve, tmp_path):
    server = serve(red)
    found = score_images(judge(server, tmp_path), images(0, 11, 200), ["a", "b", "c {x}"])
    assert found == [0.0, 5.5, 100.0]
    assert {path for path, _, _ in server.asked} == {"/v1/chat/completions"}
    assert sorted(shown(body)[1] for _, _, body in server.asked) == [
        *('Rate {"a"}: a', 'Rate {"a"}: b', 'Rate {"a"}: c {x}')
    ]
    assert all((body["model"], body["temperature"]) == ("a-model", 0) for _, _, body in server.asked)
    assert all("Authorization" not in headers for _, headers, _ in server.asked)


def test_an_answer_is_asked_once_for_an_image_and_a_prompt_and_again_for_another_question(serve, tmp_path):
    server = serve(red)
    for _ in range(2):
        assert score_images(judge(server, tmp_path), images(10, 20), ["a", "a"]) == [5.0, 10.0]
    assert len(server.asked) == 2
    assert score_images(judge(server, tmp_path, pattern=r"(\d+) thing"), images(10), ["a"]) == [1.0]
    assert len(server.asked) == 2, "another pattern reads the answers that are there"
    score_images(judge(server, tmp_path), images(10), ["b"])
    score_images(judge(server, tmp_path, template="Now {prompt}?"), images(10), ["a"])
    score_images(judge(server, tmp_path, parameters={"temperature": 1}), images(10), ["a"])
    assert len(server.asked) == 5


def test_a_broken_file_of_an_answer_is_asked_again(serve, tmp_path):
    server = serve(red)
    score_images(judge(server, tmp_path), images(10), ["a"])
    (file,) = (tmp_path / "answers").rglob("*.json")
    file.write_text('{"ans')
    assert score_images(judge(server, tmp_path), images(10), ["a"]) == [5.0]


def test_a_busy_server_is_asked_again_after_what_it_says_and_then_after_longer_times(serve, tmp_path, no_waiting):
    replies = [(429, {"Retry-After": "7"}, b"slow"), (503, {}, b""), (200, {}, b"<html>"), answered("score 2")]
    server = serve(lambda body: replies.pop(0))
    assert score_images(judge(server, tmp_path), images(1), ["a"]) == [2.0]
    assert no_waiting == [7.0, 2.0, 4.0]


def test_a_refusal_is_told_at_once_and_a_server_that_stays_away_after_the_retries(serve, tmp_path, no_waiting):
    server = serve(lambda body: (404, {}, b'{"error": "no model a-model"}'))
    with pytest.raises(ValueError, match=r"HTTP 404: .*no model a-model.*\n.*start the command again") as caught:
        score_images(judge(server, tmp_path), images(1), ["a"])
    assert no_waiting == [] and len(server.asked) == 1 and "Traceback" not in str(caught.value)
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=r"gave no answer.*refused"):
        score_images(judge(server, tmp_path, retries=2), images(1), ["a"])
    assert no_waiting == [1.0, 2.0]


def test_what_was_answered_before_a_failure_is_kept(serve, tmp_path):
    def once(body):
        return red(body) if shown(body)[0].getpixel((0, 0))[0] < 9 else (400, {}, b"too red")

    server = serve(once)
    with pytest.raises(ValueError, match="too red"):
        score_images(judge(server, tmp_path, num_parallel=1), images(2, 4, 9), ["a"] * 3)
    server.reply = red
    assert score_images(judge(server, tmp_path), images(2, 4, 9), ["a"] * 3) == [1.0, 2.0, 4.5]
    assert len(server.asked) == 4


def test_requests_run_in_parallel_and_no_more_than_asked_for(serve, tmp_path):
    barrier = threading.Barrier(3)

    def together(body):
        barrier.wait(timeout=30)  # none is answered before three are there
        return red(body)

    server = serve(together)
    score_images(judge(server, tmp_path, num_parallel=3), images(*range(6)), ["a"] * 6)
    assert server.most == 3


def test_a_key_is_sent_and_is_in_no_message_and_no_file(serve, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", "sk-secret-1234")
    caplog.set_level(logging.INFO)
    server = serve(red)
    reward = judge(server, tmp_path, api_key_env="MY_KEY")
    reward.starting(2)
    score_images(reward, images(1), ["a"])
    assert server.asked[0][1]["Authorization"] == "Bearer sk-secret-1234"
    server.reply = lambda body: (401, {}, b"who are you")
    with pytest.raises(ValueError, match="HTTP 401") as caught:
        score_images(reward, images(2), ["a"])
    kept = "".join(file.read_text() for file in tmp_path.rglob("*.json"))
    assert "sk-secret" not in f"{caught.value}{caplog.text}{reward.facts}{kept}"
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ValueError, match="no variable 'MY_KEY'"):
        judge(server, tmp_path, api_key_env="MY_KEY")


def test_a_redirect_is_not_followed_with_the_key(serve, tmp_path):
    other = serve(red)
    server = serve(lambda body: (302, {"Location": other.url}, b""))
    with pytest.raises(ValueError, match="HTTP 302"):
        score_images(judge(server, tmp_path), images(1), ["a"])
    assert not other.asked


def test_an_answer_without_a_number_has_no_score_and_is_shown(serve, tmp_path, caplog):
    server = serve(lambda body: answered("I cannot judge this."))
    assert score_images(judge(server, tmp_path), images(1, 2), ["a", "b"]) == [None, None]
    assert "no score in the answer to the prompt 'a': \"I cannot judge this.\"" in caplog.text
    server.reply = lambda body: (200, {}, b'{"error": "overloaded"}')
    with pytest.raises(ValueError, match=r"in a form that is not known \(KeyError: 'choices'\)"):
        score_images(judge(server, tmp_path), images(3), ["a"])


def test_the_cost_is_said_before_the_first_request(serve, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tgol_trainer")
    server = serve(red)
    judge(server, tmp_path, num_parallel=4).starting(1200)
    assert (
        f"1200 images, so at most 1200 requests to http://127.0.0.1:{server.server_port}, 4 at a time" in caplog.text
    )
    assert not server.asked


def test_a_question_may_stand_in_a_file_and_one_without_the_prompt_is_warned_of(serve, tmp_path, caplog):
    (tmp_path / "question.txt").write_text("Is it {prompt}?", encoding="utf-8")
    server = serve(red)
    score_images(judge(server, tmp_path, template=str(tmp_path / "question.txt")), images(1), ["a cat"])
    assert shown(server.asked[0][2])[1] == "Is it a cat?"
    judge(server, tmp_path, template="Is it nice?")
    assert "the judge does not see the prompts" in caplog.text


def test_a_plain_scorer_gets_image_and_prompt_and_answers_with_a_number(serve, tmp_path):
    def reply(body):
        image = Image.open(io.BytesIO(base64.b64decode(body["image"])))
        level = image.getpixel((0, 0))[0]
        content = {"a": level, "b": {"score": level / 4}, "c": {"score": None}}[body["prompt"]]
        return 200, {}, json.dumps(content).encode()

    server = serve(reply)
    reward = load_reward("http", url=server.url, cache=tmp_path)
    assert score_images(reward, images(8, 8, 8), ["a", "b", "c"]) == [8.0, 2.0, None]
    assert score_images(reward, images(8, 8, 8), ["a", "b", "c"]) == [8.0, 2.0, None]
    assert len(server.asked) == 3
    score_images(ServedScorer(server.url, version="2", cache=tmp_path), images(8), ["a"])
    assert len(server.asked) == 4
    server.reply = lambda body: (200, {}, b'{"score": "high"}')
    with pytest.raises(ValueError, match="a number is expected"):
        score_images(reward, images(9), ["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "`url` is 'localhost:8000'"),
        ({"url": "file:///etc/passwd"}, "must be an address"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": r"\d"}, "must have one group"),
        ({"template": " "}, "`template` is empty"),
        ({"template": "questoin.txt"}, "`template` is 'questoin.txt', and there is no such file"),
        ({"num_parallel": 0}, "`num_parallel` must be at least 1"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_any_request(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Judge(**{"url": "http://127.0.0.1:9/v1", "model": "m", "template": "{prompt}", **options})


def test_options_that_a_judge_does_not_take_are_named_with_those_that_it_takes():
    known = {"url": "http://127.0.0.1:9/v1", "model": "m", "template": "{prompt}"}
    everything = "url, model, template, pattern, parameters, facts, key, num_parallel, retries, timeout"
    with pytest.raises(TypeError, match=f"'judge': got an unexpected keyword argument 'retry'. It takes {everything}"):
        load_reward("judge", **known, retry=1)
    with pytest.raises(TypeError, match=r"missing a required argument: 'url'\. It takes url, version"):
        load_reward("http")
    assert load_reward("judge", **known, retries=1).url == known["url"]


def test_a_retry_date_is_waited_for(serve, tmp_path, no_waiting):
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    replies = [(503, {"Retry-After": date}, b""), (503, {"Retry-After": "soon"}, b""), answered("score 2")]
    server = serve(lambda body: replies.pop(0))
    assert score_images(judge(server, tmp_path), images(1), ["a"]) == [2.0]
    assert 20 < no_waiting[0] <= 30 and no_waiting[1] == 2.0
