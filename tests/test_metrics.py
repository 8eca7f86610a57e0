"""What is logged about a batch, held against plain Python averages."""

import math
import statistics

import pytest
import torch

from tgol_trainer.metrics import LOGGED_METRICS, RECORD, MetricSums, stack_record, temperature_advice


def record(rows):
    columns = {name: torch.tensor([row[name] for row in rows]) for name in RECORD}
    return stack_record(**columns)


def row(reward, label, weight=1.0, score=0.0, error=1.0, reference_error=1.0, change=0.0, noise_level=0.5):
    return {
        "loss": 0.0,
        "implicit_reward": reward,
        "label": label,
        "weight": weight,
        "score": score,
        "error": error,
        "reference_error": reference_error,
        "change": change,
        "noise_level": noise_level,
    }


ROWS = [
    row(0.5, True, weight=2.0, score=3.0, error=0.9, reference_error=1.0),
    row(-0.2, True, weight=1.0, score=1.0, error=1.2, reference_error=1.1, noise_level=0.51),
    row(0.0, False, weight=4.0, score=-1.0, error=1.0, reference_error=1.0),
    row(-3.0, False, weight=1.0, score=-2.0, error=2.0, reference_error=1.5, change=0.4, noise_level=1.0),
]


def test_averages_by_hand_with_a_zero_reward_counted_one_half():
    sums = MetricSums()
    sums.add(record(ROWS))
    logs = sums.pop()
    expected = {
        "rewards/positive": 0.15,
        "rewards/negative": -1.5,
        "rewards/margins": 1.65,
        "rewards/accuracies": (1 + 0 + 0.5 + 1) / 4,
        "rewards/std": statistics.pstdev([0.5, -0.2, 0.0, -3.0]),
        "rewards/std_low_noise": statistics.pstdev([0.5, 0.0]),
        "rewards/std_high_noise": statistics.pstdev([-0.2, -3.0]),
        "rewards/large_share": 0.25,
        "rewards/large_share_positive": 0.0,
        "rewards/large_share_negative": 0.5,
        "drift": 0.1,
        "drift_low_noise": 0.0,
        "drift_high_noise": 0.2,
        "errors/positive": 1.05,
        "errors/negative": 1.5,
        "errors/positive_change": 0.0,
        "errors/negative_change": 0.25,
        "labels/positive_share": 0.5,
        "weights/mean": 2.0,
        "weights/max": 4.0,
        "scores/mean": 0.25,
    }
    assert logs == pytest.approx(expected, abs=1e-6)
    assert set(expected) == set(LOGGED_METRICS)


def test_batches_of_unequal_size_are_averaged_over_rows_not_over_batches():
    together, apart = MetricSums(), MetricSums()
    together.add(record(ROWS))
    apart.add(record(ROWS[:1]))
    apart.add(record(ROWS[1:]))
    assert apart.pop() == pytest.approx(together.pop())


def test_reading_starts_the_averages_again():
    sums = MetricSums()
    sums.add(record(ROWS[:1]))
    sums.pop()
    assert sums.pop() == {}


def test_a_batch_of_one_class_has_the_same_state_shape_and_logs_no_key_of_the_other():
    one_class, both = MetricSums(), MetricSums()
    one_class.add(record(ROWS[:2]))
    both.add(record(ROWS))
    assert one_class._state.shape == both._state.shape
    logs = one_class.pop()
    assert "rewards/negative" not in logs and "rewards/margins" not in logs
    assert all(math.isfinite(value) for value in logs.values())


def test_two_processes_of_which_each_saw_one_class_give_the_averages_of_all_rows():
    ranks = [MetricSums(), MetricSums()]
    ranks[0].add(record(ROWS[:2]))
    ranks[1].add(record(ROWS[2:]))
    gathered = torch.cat([rank._state.unsqueeze(0) for rank in ranks])
    alone = MetricSums()
    alone.add(record(ROWS))
    assert ranks[0].pop(lambda rows: gathered) == pytest.approx(alone.pop())


@pytest.mark.parametrize(
    ("std", "large", "last", "expected"),
    [
        (8.0, 0.6, False, "about 0.008"),
        (1.0, 0.05, True, None),
        (0.01, 0.0, False, None),  # every run begins so
        (0.01, 0.0, True, "towards 1e-05"),
        (0.0, 0.0, True, None),
    ],
)
def test_a_temperature_that_does_not_suit_is_named_with_one_that_does(std, large, last, expected):
    """Rewards go as 1/T: at T·std their standard deviation is 1."""
    found = temperature_advice({"rewards/std": std, "rewards/large_share": large}, 0.001, last=last)
    assert found is None if expected is None else expected in found
    assert temperature_advice({"loss": 1.0}, 0.001, last=last) is None


def test_without_the_references_predictions_there_is_no_drift():
    sums = MetricSums()
    sums.add(record([row(0.5, True, change=math.nan), row(0.5, False)]))
    assert not {"drift", "drift_low_noise"} & set(sums.pop())


def test_draws_of_one_noise_level_or_of_none_log_no_key_of_the_other():
    sums = MetricSums()
    sums.add(record([row(0.5, True, noise_level=0.2), row(-0.5, False, noise_level=math.nan)]))
    logs = sums.pop()
    assert logs["rewards/std"] == 0.5 and logs["rewards/std_low_noise"] == 0.0
    assert not {"rewards/std_high_noise", "drift_high_noise"} & set(logs)
