"""The report: one file that asks for nothing, takes any prompt as text, keeps to its limit, and works in a browser."""

import base64
import dataclasses
import hashlib
import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from tests.browser import NAMES, PROGRAM, Browser
from tgol_trainer.evaluation import ModelRows, ReportOptions, compare_models, make_gallery, write_report

HOSTILE = '</script><script>document.title="taken"</script><img src=x onerror=alert(1)> "quoted" & {{ 7*7 }}'
COUNT = 120


def image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def written(path, large=0, **options):
    """Two adapters; the change of the score `s` by x is row - 60, so that row 0 fell most and row 119 rose most."""
    prompts = [HOSTILE, *(f"prompt {row}" for row in range(1, COUNT))]
    zeros = [0.0] * COUNT
    base = ModelRows("base", {"s": zeros, HOSTILE: zeros})
    changes = [float(row - 60) for row in range(COUNT)]
    changes[77] = None
    x = ModelRows("x", {"s": changes, HOSTILE: [1.0] * COUNT}, trained=frozenset({HOSTILE}))
    y = ModelRows("y", {"s": [-float(row) for row in range(COUNT)], HOSTILE: zeros}, trained=frozenset())
    categories = ["even", "odd"] * (COUNT // 2)
    gallery = make_gallery(prompts, [[image(row) for row in range(COUNT)]] * 3, categories=categories)
    if large:  # of what images hold, the report asks nothing
        gallery = dataclasses.replace(gallery, previews=[[b"RIFF" + bytes(large)] * COUNT] * 3)
    evaluation = compare_models(prompts, base, [x, y], categories=categories)
    options = ReportOptions(settings={"key": HOSTILE}, **options)
    note = write_report(path, evaluation, [base, x, y], gallery, options)
    return path.read_text(encoding="utf-8"), note


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    return path, written(path)[0]


def embedded(text, name):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)[1])


def test_prompts_and_names_stay_text(report):
    _, text = report
    assert text.count("<script") == 3 and text.count("<img") == 0
    assert "49" not in re.sub(r"\d*\.\d+|\d{3,}", "", embedded(text, "rows")["rows"][0]["prompt"])
    assert embedded(text, "rows")["rows"][0]["prompt"] == HOSTILE
    assert "&lt;/script&gt;&lt;script&gt;" in text  # the name of a score and a setting, in tables


def test_the_page_forbids_itself_every_request_and_every_script_but_its_own(report):
    _, text = report
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest.replace('+', '&#43;')}'" in policy or f"script-src 'sha256-{digest}'" in policy
    assert not re.search(r'(?:src|href)="(?!data:|#)', text) and "url(" not in text and "@import" not in text


def test_every_image_is_there_below_the_limit_and_those_that_changed_most_above(tmp_path, report):
    _, text = report
    assert len(embedded(text, "images")["thumbnails"]) == COUNT
    small, note = written(tmp_path / "small.html", megabytes=len(text.encode()) * 0.5 / 1e6)
    kept = sorted(map(int, embedded(small, "images")["thumbnails"]))
    assert 10 < len(kept) < COUNT and len(small.encode()) <= 0.5 * len(text.encode())
    assert {0, 1, 118, 119} <= set(kept) and not {55, 60, 65} & set(kept)  # both ends of x and of y
    assert f"small copies of {len(kept)} of {COUNT} pairs" in note and note in small
    assert len(embedded(small, "rows")["rows"]) == COUNT  # numbers are complete


def test_small_images_come_before_large_ones(tmp_path):
    full, _ = written(tmp_path / "full.html", large=3000)
    room = len(full.encode()) - 4000 * 3 * 100  # base64; of 120 rows, about 20 keep their large images
    text, note = written(tmp_path / "less.html", large=3000, megabytes=room / 1e6)
    images = embedded(text, "images")
    assert len(images["thumbnails"]) == COUNT and 10 < len(images["previews"]) < 30
    assert "large ones of" in note


# ---- In a browser ----

needs_browser = pytest.mark.skipif(
    PROGRAM is None, reason=f"Chromium is not installed: none of {', '.join(NAMES)} is on the PATH"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def texts(browser, selector):
    return browser.run(f"[...document.querySelectorAll({selector!r})].map(node => node.textContent)")


def choose(browser, name, value):
    browser.run(
        f"(() => {{ const node = document.getElementById({name!r}); node.value = {value!r}; "
        "node.dispatchEvent(new Event(node.type === 'search' ? 'input' : 'change')); })()"
    )


@needs_browser
def test_images_sort_filter_and_load_as_one_scrolls(browser, report):
    browser.open(report[0])
    assert browser.run("document.title") == "Before and after"
    prompts = texts(browser, "article p")
    assert prompts[0] == HOSTILE and prompts[1:3] == ["prompt 1", "prompt 2"] and len(prompts) == 48
    choose(browser, "order", "best")
    assert texts(browser, "article p")[:2] == ["prompt 119", "prompt 118"]
    choose(browser, "adapter", "1")  # y falls with the row
    assert texts(browser, "article p")[:2] == [HOSTILE, "prompt 1"]
    choose(browser, "order", "worst")
    assert texts(browser, "article p")[0] == "prompt 119"
    choose(browser, "category", "even")
    choose(browser, "search", "PROMPT 11")
    assert texts(browser, "article p") == ["prompt 118", "prompt 116", "prompt 114", "prompt 112", "prompt 110"]
    assert texts(browser, "#count") == ["5 of 120 pairs"]
    choose(browser, "search", "")
    choose(browser, "category", "")
    choose(browser, "adapter", "0")
    for _ in range(600):  # a minute, on a machine that is busy
        browser.run("window.scrollTo(0, document.body.scrollHeight)")
        if browser.run("document.querySelector('#more').hidden"):
            break
        time.sleep(0.1)
    assert texts(browser, "article p")[-1] == "prompt 77"  # without a score: last
    assert len(texts(browser, "article p")) == COUNT and browser.run("document.querySelector('#more').hidden")
    assert browser.requests() == [] and browser.errors() == []


@needs_browser
def test_images_enlarge_by_mouse_and_by_keyboard(browser, report):
    browser.open(report[0])
    browser.click("article:nth-child(2) .model:nth-child(3) button")
    assert browser.run("document.querySelector('#viewer').open")
    assert texts(browser, "#viewer-prompt") == ["prompt 1"] and texts(browser, "#position") == ["2 of 120"]
    assert len(texts(browser, "#viewer-images figure")) == 3
    browser.key("ArrowRight", 39)
    assert texts(browser, "#viewer-prompt") == ["prompt 2"]
    browser.key("ArrowLeft", 37)
    browser.key("ArrowLeft", 37)
    browser.key("ArrowLeft", 37)  # the first stays
    assert texts(browser, "#viewer-prompt") == [HOSTILE]
    browser.key("Escape", 27)
    assert not browser.run("document.querySelector('#viewer').open")
    assert browser.becomes_true("document.activeElement.closest('article') === document.querySelector('article')")
    browser.key("Enter", 13)
    assert browser.becomes_true("document.querySelector('#viewer').open")
    browser.key("Escape", 27)
    alternatives = browser.run("[...document.querySelectorAll('#cards img')].map(node => node.alt)")
    assert alternatives[:3] == [f"{model}: {HOSTILE}, image 1" for model in ("base", "x", "y")]


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_runs_over_on_a_phone_and_text_stands_out_light_and_dark(browser, report, dark):
    browser.open(report[0], width=390, height=844, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") == 390
    ratio = """(() => {
      const light = text => { const c = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return .2126 * c[0] + .7152 * c[1] + .0722 * c[2]; };
      const back = node => { const colour = getComputedStyle(node).backgroundColor;
        return colour.endsWith(', 0)') && node.parentElement ? back(node.parentElement) : colour; };
      return Math.min(...[...document.querySelectorAll('p, td, th, li, small, a, span, label, dd')]
        .filter(node => node.textContent.trim() && node.getClientRects().length).map(node => {
          const pair = [light(getComputedStyle(node).color), light(back(node))].sort((a, b) => b - a);
          return (pair[0] + .05) / (pair[1] + .05); }));
    })()"""
    assert browser.run(ratio) >= 4.5  # WCAG AA
