"""Rows of anything at all, found by hypothesis: a row is read, or its causes are named."""

import math
from decimal import Decimal

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tgol_trainer.data.prompts import foreign_syntax, strip_syntax
from tgol_trainer.data.rows import CAUSES, read_row, read_score

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.decimals(),
    st.fractions(),
    st.text(),
    st.binary(max_size=64),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.sampled_from(["path", "bytes", "x"]), st.one_of(st.none(), st.text(), st.binary()), max_size=3),
    st.sampled_from([np.float16(1.5), np.int8(-3), np.array([1.0]), np.nan, 10**400, Decimal("sNaN"), object()]),
)


@given(ANYTHING)
@settings(max_examples=300)
def test_a_score_is_a_finite_number_or_has_a_cause(value):
    score, cause = read_score(value)
    assert (cause is None) == math.isfinite(score)
    assert cause is None or CAUSES[cause][0] == "score"
    if cause is None:
        assert score == float(value)


@given(ANYTHING, ANYTHING, ANYTHING)
@settings(max_examples=300)
def test_a_row_of_anything_is_read_or_its_causes_are_named_and_nothing_is_raised(prompt, visual, score):
    row = read_row(prompt, visual, score)
    assert all(cause in CAUSES and isinstance(text, str) for cause, text in row.problems)
    assert row.problems or (isinstance(row.prompt, str) and isinstance(row.visual, Image.Image))


@given(st.text(alphabet="ab (){}[]:<>.,\\|0123lorBREAKN", max_size=60))
@settings(max_examples=300)
def test_the_plain_text_of_any_prompt_holds_no_word_that_was_not_there(prompt):
    plain = strip_syntax(prompt)
    assert len(plain) <= len(prompt) + 2 * prompt.count("BREAK")
    if not foreign_syntax(prompt):
        assert plain == prompt
