"""Comparisons of any images in any order, found by hypothesis."""

import datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from tgol_trainer.converters import PairColumns, pairs_to_scores

IMAGE = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
CHOICES = {"first": "second", "second": "first", "tie": "tie"}
COMPARISONS = st.lists(
    st.tuples(st.sampled_from("pq"), st.integers(0, 4), st.integers(0, 4), st.sampled_from(sorted(CHOICES))).filter(
        lambda row: row[1] != row[2]
    ),
    min_size=1,
    max_size=12,
)


def scores(rows, method):
    columns = {
        "prompt": [row[0] for row in rows],
        "image_0": [{"bytes": b"image %d" % row[1], "path": None} for row in rows],
        "image_1": [{"bytes": b"image %d" % row[2], "path": None} for row in rows],
        "choice": [row[3] for row in rows],
    }
    image = datasets.Image(decode=False)
    text = datasets.Value("string")
    features = datasets.Features({"prompt": text, "image_0": image, "image_1": image, "choice": text})
    dataset = datasets.Dataset.from_dict(columns, features=features)
    named = PairColumns("prompt", "image_0", "image_1", "choice")
    made = pairs_to_scores(dataset, named, method=method).cast_column("image", datasets.Image(decode=False))
    return {(row["prompt"], row["image"]["bytes"]): (row["score"], row["num_comparisons"]) for row in made}


@given(COMPARISONS, st.randoms())
@settings(max_examples=20)
def test_wins_add_up_to_the_comparisons_whatever_their_order_and_side(rows, random):
    found = scores(rows, "wins")
    assert sum(score for score, _ in found.values()) == len(rows)
    assert sum(count for _, count in found.values()) == 2 * len(rows)
    assert all(0 <= score <= count for score, count in found.values())
    mixed = rows.copy()
    random.shuffle(mixed)
    assert scores(mixed, "wins") == found
    assert scores([(p, b, a, CHOICES[choice]) for p, a, b, choice in rows], "wins") == found
    rates = scores(rows, "win_rate")
    assert rates == {key: (score / count, count) for key, (score, count) in found.items()}
