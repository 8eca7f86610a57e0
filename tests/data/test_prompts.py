"""Prompts of other programs: what is an instruction there and a word here."""

import datasets
import pytest
from PIL import Image

from tgol_trainer.data import Columns, DataError, ScoredStream, prepare_dataset
from tgol_trainer.data.prompts import foreign_syntax, strip_syntax, warn_of_prompts
from tgol_trainer.data.scores import read_scores
from tgol_trainer.sources import load_prompts

SIZE = (8, 8)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("(masterpiece:1.3), a cat", "weight"),
        ("a cat (fluffy fur : .8)", "weight"),
        ("a cat <lora:ink:0.8>", "network"),
        ("a cat BREAK a dog", "BREAK"),
        ("a cat,BREAK", "BREAK"),
        ("a cat AND a dog", "AND"),
        ("a cat :1.2 AND The dog :0.5", "AND"),
        ("a [cat|dog] asleep", "alternatives"),
        ("a {red|dark blue|} hat", "alternatives"),
        ("a {2$$red|blue} hat", "alternatives"),
        ("a __colours/warm__ hat", "wildcard"),
        ("a [cat:dog:0.5]", "change"),
        ("a [:hat:10]", "change"),
        ("a cat\nNegative prompt: a dog", "negative"),
        ("a cat\nSteps: 20, Sampler: Euler a", "negative"),
        ("((masterpiece)), a cat", "emphasis"),
        ("{{best}}, a cat", "emphasis"),
        ("a cat \\(animal\\)", "emphasis"),
        ("1.3::a cat::, a dog", "1.3::word::"),
        ("embedding:Easy, a cat", "network"),
    ],
)
def test_instructions_for_other_programs_are_seen(prompt, kind):
    assert any(kind in found for found in foreign_syntax(prompt))


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat (asleep)",
        "a clock at 12:30 (noon)",
        "BREAKING NEWS",
        "take a break",
        "a [red] hat",
        "a street in the [1920s]",
        "a sign that says BLACK AND WHITE",
        "ROCK AND ROLL, a poster",
        "a cat and a dog, AND",
        "a dark|light theme",
        "file__name__old",
        "a line ____ to fill in",
        "ratio 16:9",
        "(16:9)",
        '{"a": 1}',
        "(seen at 12:30)",
    ],
)
def test_plain_prompts_are_left_alone(prompt):
    assert not foreign_syntax(prompt)


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("(masterpiece:1.3), a cat", "masterpiece, a cat"),
        ("(a big, (red:1.2) cat:0.8) asleep", "a big, red cat asleep"),
        ("((masterpiece)), [[blurry]], {{one}}", "masterpiece, blurry, one"),
        ("1.3::a cat::, -2::a dog::", "a cat, a dog"),
        ("a cat \\(animal\\), (red:1.1)", "a cat (animal), red"),
        ("a cat <lora:ink:0.8>, a dog <LYCO:x:1>", "a cat, a dog"),
        ("a cat BREAK a dog, BREAK", "a cat, a dog"),
        ("a [cat:dog:0.5] and [:a hat:10], [sun::3]", "a dog and a hat, sun"),
        ("a cat\nNegative prompt: a dog\nSteps: 3, Sampler: x", "a cat"),
        ("a cat :1.2 AND a dog :0.5", "a cat, a dog"),
        ("a clock at 12:30 AND a cat", "a clock at 12:30, a cat"),
        ("a [cat|dog] asleep, {red|0.5::dark blue|} hat", "a cat dog asleep, red or dark blue hat"),
        ("a {2$$ and $$(red:1.2)|blue} hat", "a red or blue hat"),
        ("a __colours/warm__ hat, __place__", "a hat"),
        ("<lora:ink:1>", ""),
        ("Negative prompt: a dog", ""),
    ],
)
def test_the_plain_text_of_a_prompt_keeps_its_words_and_nothing_else(prompt, plain):
    assert strip_syntax(prompt) == plain
    assert not foreign_syntax(plain)


@pytest.mark.parametrize("prompt", ["a cat (asleep),  two blanks ", "a clock at 12:30 (noon)", "a [red] hat , {x"])
def test_a_plain_prompt_stays_to_the_letter(prompt):
    assert strip_syntax(prompt) == prompt


@pytest.mark.parametrize(
    "sign", ["(", "[", "{", "(a:", "1::", "\\(", " ", "[a:", "[a|", "{a|", "__a-", "a AND ", "a AND a :"]
)
def test_prompts_of_a_hundred_thousand_signs_do_not_stop_a_run(sign):
    strip_syntax(sign * 20_000 + "(a:1.2)")


def scored(*prompts):
    rows = [{"prompt": prompt, "score": float(i)} for i, prompt in enumerate(prompts)]
    image = Image.new("RGB", SIZE)
    return datasets.Dataset.from_list([{**row, "image": image} for row in rows])


PLAIN = Columns(prompt_syntax="strip", group="prompt")


def test_datasets_streams_and_scores_give_the_plain_text_and_group_by_it():
    dataset = scored("(cat:1.3)", "cat", "<lora:x:1> dog")
    rows, report = prepare_dataset(dataset, PLAIN, SIZE)
    assert rows.prompts == [rows[i]["prompt"] for i in range(3)] == ["cat", "cat", "dog"]
    assert rows.written_prompts == ["(cat:1.3)", "cat", "<lora:x:1> dog"]
    assert report.num_unique_prompts == 2 and rows.groups == ["cat", "cat", "dog"]
    assert rows[0]["group"] == rows[1]["group"] == rows.group_ids[0] != rows[2]["group"]
    stream = list(ScoredStream(dataset.to_iterable_dataset(), PLAIN))
    assert [row["prompt"] for row in stream] == ["cat", "cat", "dog"]
    read = read_scores(dataset, PLAIN, group_column="prompt")
    assert read.texts("prompt", read.row_ids) == ["cat", "cat", "dog"]
    assert len(set(read.pop_groups("prompt").tolist())) == 2
    assert prepare_dataset(dataset, Columns(), SIZE)[0].prompts[0] == "(cat:1.3)"


def test_a_prompt_without_plain_text_is_an_empty_one():
    dataset = scored("<lora:x:1>", "a", "b")
    with pytest.raises(DataError, match="empty prompt: 1"):
        prepare_dataset(dataset, PLAIN, SIZE)
    with pytest.raises(DataError, match="empty prompt: 1"):
        read_scores(dataset, PLAIN)
    assert prepare_dataset(dataset, Columns(), SIZE)[1].num_kept == 3


def test_prompts_to_generate_from_are_stripped_on_request(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("(cat:1.3)\na dog BREAK\n")
    assert load_prompts(str(file)).texts == ["(cat:1.3)", "a dog BREAK"]
    assert load_prompts(str(file), prompt_syntax="strip").texts == ["cat", "a dog"]
    file.write_text("<lora:x:1>\n")
    with pytest.raises(DataError, match="without instructions for other programs"):
        load_prompts(str(file), prompt_syntax="strip")


def test_prompts_with_blanks_around_them_are_counted(caplog):
    warn_of_prompts("train_dataset", ["a cat", " a cat", "a dog\n", "a  dog"])
    assert "train_dataset: 2 of 4 different prompts begin or end with blanks, such as ' a cat'" in caplog.text
    caplog.clear()
    warn_of_prompts("train_dataset", ["a cat", "a  dog"])
    assert not caplog.text
