"""Prompts of other programs: what is an instruction there and a word here."""

import pytest

from tgol_trainer.data.prompts import foreign_syntax


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("(masterpiece:1.3), a cat", "weight"),
        ("a cat (fluffy fur : .8)", "weight"),
        ("a cat <lora:ink:0.8>", "network"),
        ("a cat BREAK a dog", "BREAK"),
        ("a cat,BREAK", "BREAK"),
        ("a [cat:dog:0.5]", "change"),
        ("a [:hat:10]", "change"),
        ("a cat\nNegative prompt: a dog", "negative"),
        ("a cat\nSteps: 20, Sampler: Euler a", "negative"),
    ],
)
def test_instructions_for_other_programs_are_seen(prompt, kind):
    assert kind in foreign_syntax(prompt)


@pytest.mark.parametrize(
    "prompt",
    ["a cat (asleep)", "a clock at 12:30 (noon)", "BREAKING NEWS", "take a break", "a [red] hat", "ratio 16:9"],
)
def test_plain_prompts_are_left_alone(prompt):
    assert foreign_syntax(prompt) is None
