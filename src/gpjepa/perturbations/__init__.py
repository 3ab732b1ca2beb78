"""What a perturbation is: a set of targets with doses, its label, and the vocabulary of targets."""

from ._features import TargetFeatures, read_gmt
from ._kinds import LabelError, LabelWarning
from ._knowledge import MissingFeatures, choose_features, human_genes
from ._perturbation import Perturbation
from ._reader import LabelReader
from ._vocabulary import UnknownTargetError, Vocabulary

__all__ = [
    "LabelError",
    "LabelReader",
    "LabelWarning",
    "MissingFeatures",
    "Perturbation",
    "TargetFeatures",
    "UnknownTargetError",
    "Vocabulary",
    "choose_features",
    "human_genes",
    "read_gmt",
]
