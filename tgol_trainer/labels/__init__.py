"""What a score means to training: threshold, label and weight of each row, with a report and advice."""

from .fitting import FittedLabels, LabelSettings, fit_labels
from .labeler import Labeler, RowLabels

__all__ = ["FittedLabels", "LabelSettings", "Labeler", "RowLabels", "fit_labels"]
