"""What a perturbation is: a set of targets with doses, its label, and the vocabulary of targets."""

from ._perturbation import LabelReader, Perturbation
from ._vocabulary import UnknownTargetError, Vocabulary

__all__ = ["LabelReader", "Perturbation", "UnknownTargetError", "Vocabulary"]
