"""What a score means to training: threshold, label and weight of each row, with a report and advice."""

from .labeler import Labelling, LabelSettings, fit_labelling

__all__ = ["LabelSettings", "Labelling", "fit_labelling"]
