"""
Collect what is logged about batches: per-example rows, sums and counts of fixed shape, one reduction over processes.

A batch without one of the classes is normal and changes no shape: sums and counts of both classes always travel
together. A ratio whose count is 0 on every process is left out of the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

RECORD = ("loss", "implicit_reward", "label", "weight", "score", "error", "reference_error", "change", "noise_level")
"""Columns of the (B, 9) float32 matrix that [`stack_record`] makes and [`MetricSums`] adds up."""

LOGGED_METRICS: dict[str, str] = {
    "rewards/positive": "mean implicit reward β·log(π_θ/π_ref) of samples labelled positive; rises",
    "rewards/negative": "the same for samples labelled negative; falls",
    "rewards/margins": "rewards/positive - rewards/negative",
    "rewards/accuracies": "share of samples whose implicit reward has the sign of their label; 0 counts one half",
    "rewards/std": "standard deviation of the implicit rewards; near 1 by the end where T suits the model",
    "rewards/std_low_noise": "rewards/std of draws with a noise level up to ½: t/T, σ or the share of masked tokens",
    "rewards/std_high_noise": "the same of the draws above ½",
    "rewards/large_share": "share of samples whose implicit reward is beyond ±2, where the sigmoid is nearly flat",
    "rewards/large_share_positive": "the same among samples labelled positive",
    "rewards/large_share_negative": "the same among samples labelled negative",
    "drift": "distance of predictions from the reference's on the same draws: mean square, or KL of tokens",
    "drift_low_noise": "drift on the draws with a noise level up to ½",
    "drift_high_noise": "drift on the draws above ½",
    "errors/positive": "mean denoising error of the policy on positive samples, in squared network-output units",
    "errors/negative": "the same on negative samples",
    "errors/positive_change": "errors/positive minus the reference's error on the same draws; falls",
    "errors/negative_change": "errors/negative minus the reference's error on the same draws; rises",
    "labels/positive_share": "share of samples labelled positive",
    "weights/mean": "mean confidence weight w",
    "weights/max": "largest confidence weight w",
    "scores/mean": "mean score, after score normalisation",
}
"""Every key that training logs beside Trainer's own, with its meaning; evaluation adds the prefix `eval_`."""


def stack_record(**columns: torch.Tensor) -> torch.Tensor:
    """
    Stack per-example values into one float32 matrix, detached.

    Args:
        columns (`torch.Tensor`): (B,) tensors, one for each name in `RECORD`.

    Returns:
        `torch.Tensor`: (B, len(RECORD)) float32.
    """
    return torch.stack([columns[name].detach().float() for name in RECORD], dim=1)


class MetricSums:
    """
    Running sums and counts of per-example records, averaged over all processes once, when they are read.

    The state is one float64 vector of fixed length plus one maximum, so adding a batch never waits for the device and
    reading costs one collective whatever the batches held. A row whose loss is not finite counts nowhere.
    """

    _CLASSES, _LEVELS = ("positive", "negative"), ("low_noise", "high_noise")
    _SUMS = ("rows", "reward", "square", "large", "error", "error_change", "change")

    def __init__(self) -> None:
        self._state: torch.Tensor | None = None

    @classmethod
    def _sums(cls, record: torch.Tensor) -> torch.Tensor:
        """Return the sums of `_SUMS` for each class and noise level, of accuracy, weight and score; and a maximum."""
        counted = torch.isfinite(record[:, :1])
        record = torch.where(counted, record, 0)
        column = {name: record[:, index].double() for index, name in enumerate(RECORD)}
        positive, level, reward = column["label"] > 0.5, column["noise_level"], column["implicit_reward"]
        correct = torch.where(positive, reward > 0, reward < 0).double() + 0.5 * (reward == 0).double()
        error_change = column["error"] - column["reference_error"]
        each = [torch.ones_like(reward), reward, reward.square(), (reward.abs() > 2).double()]
        each += [column["error"], error_change, column["change"]]
        kept = counted[:, 0]
        # Not a product with the mask: NaN of a draw without a noise level times 0 is NaN.
        masks = (positive & kept, ~positive & kept, (level <= 0.5) & kept, (level > 0.5) & kept)
        values = [torch.where(mask, value, 0).sum() for mask in masks for value in each]
        values += [(kept * correct).sum(), column["weight"].sum(), column["score"].sum(), column["weight"].max()]
        return torch.stack(values)

    def add(self, record: torch.Tensor) -> None:
        """Add one batch: a (B, len(RECORD)) matrix from [`stack_record`], B >= 1."""
        # MPS has no float64; the sums of a logging window are small, so the host does them there.
        new = self._sums(record.cpu() if record.device.type == "mps" else record)
        if self._state is None:
            self._state = new
        else:
            self._state = torch.cat([self._state[:-1] + new[:-1], torch.maximum(self._state[-1:], new[-1:])])

    def pop(self, gather: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, float]:
        """
        Return the averages since the last call, keys as in `LOGGED_METRICS`, and start again.

        Args:
            gather (`Callable`, *optional*):
                Concatenates a (1, K) tensor over processes into (processes, K), such as `Accelerator.gather`. Every
                process must call `pop` at the same moment. `None` for one process.

        Returns:
            `dict[str, float]`: empty if nothing was added that counts. A class that no process saw has no keys. A
            loss without a reference, whose implicit rewards are NaN, has none that need one.
        """
        if self._state is None:
            return {}
        rows = self._state.unsqueeze(0)
        self._state = None
        rows = (gather(rows) if gather is not None else rows).cpu()
        totals = rows.sum(0).tolist()
        size = len(self._SUMS)
        groups = {
            name: dict(zip(self._SUMS, totals[index * size : (index + 1) * size], strict=True))
            for index, name in enumerate((*self._CLASSES, *self._LEVELS))
        }
        whole = {name: sum(groups[kind][name] for kind in self._CLASSES) for name in self._SUMS}
        count, (correct, weight, score) = whole["rows"], totals[-4:-1]
        if not count:
            return {}
        logs = {
            "labels/positive_share": groups["positive"]["rows"] / count,
            "weights/mean": weight / count,
            "weights/max": rows[:, -1].max().item(),
            "scores/mean": score / count,
        }
        if not math.isnan(whole["reward"]):
            logs["rewards/accuracies"] = correct / count
            logs["rewards/std"] = _deviation(whole)
            logs["rewards/large_share"] = whole["large"] / count
        if not math.isnan(whole["change"]):
            logs["drift"] = whole["change"] / count
        for name, sums in groups.items():
            members = sums["rows"]
            if members and name in self._CLASSES:
                logs[f"errors/{name}"] = sums["error"] / members
            if members and "rewards/std" in logs and name in self._CLASSES:
                logs[f"rewards/{name}"] = sums["reward"] / members
                logs[f"rewards/large_share_{name}"] = sums["large"] / members
                logs[f"errors/{name}_change"] = sums["error_change"] / members
            if members and "rewards/std" in logs and name in self._LEVELS:
                logs[f"rewards/std_{name}"] = _deviation(sums)
            if members and "drift" in logs and name in self._LEVELS:
                logs[f"drift_{name}"] = sums["change"] / members
        if "rewards/positive" in logs and "rewards/negative" in logs:
            logs["rewards/margins"] = logs["rewards/positive"] - logs["rewards/negative"]
        return {name: logs[name] for name in LOGGED_METRICS if name in logs}


def _deviation(sums: Mapping[str, float]) -> float:
    """Return the standard deviation of implicit rewards, by their number, sum and sum of squares."""
    mean = sums["reward"] / sums["rows"]
    return math.sqrt(max(sums["square"] / sums["rows"] - mean**2, 0.0))


def summarize_records(records: Any, row_ids: Any) -> dict[str, float]:
    """
    Return averages over an evaluation set, each row counted once.

    Args:
        records (`numpy.ndarray`): (N, len(RECORD)) of all processes.
        row_ids (`numpy.ndarray`): (N,); rows that filled up a batch stand twice.

    Returns:
        `dict[str, float]`: `loss`, and what [`MetricSums.pop`] returns.
    """
    _, first = np.unique(row_ids, return_index=True)
    record = torch.as_tensor(np.asarray(records))[np.sort(first)]
    sums = MetricSums()
    sums.add(record)
    return {"loss": record[:, RECORD.index("loss")].double().mean().item(), **sums.pop()}


def temperature_advice(logs: Mapping[str, float], temperature: float, *, last: bool) -> str | None:
    """
    Say that T does not suit the model, and which one would.

    Implicit rewards are differences of errors over T. Where most of them lie beyond ±2, the sigmoid no longer says how
    far to go; where they end near 0, it is straight and the loss holds the policy nowhere.

    Args:
        logs (`Mapping[str, float]`): What training logged of some steps.
        temperature (`float`): T of the run.
        last (`bool`): Whether the run ends with these steps. Small rewards are normal before.

    Returns:
        `str`: the text of a warning, or `None`.
    """
    spread = logs.get("rewards/std")
    if spread is None:
        return None
    fitting = float(f"{temperature * spread:.1g}")
    if logs["rewards/large_share"] > 0.5:
        return (
            f"{logs['rewards/large_share']:.0%} of the implicit rewards lie beyond ±2 (standard deviation "
            f"{spread:.2g}): T = {temperature:g} is small for this model and learning rate, and the loss no longer "
            f"sees how far to go. Set `temperature` to about {fitting:g}, or lower the learning rate."
        )
    if last and 0 < spread < 0.05:
        return (
            f"The implicit rewards ended with a standard deviation of {spread:.2g}: at T = {temperature:g} the loss "
            f"did not hold the policy to the reference. Train longer or at a higher learning rate, or set "
            f"`temperature` towards {fitting:g}."
        )
    return None
