"""Mean effects from anchor and network, with a gate and intervals; with or without cells."""

from ._judge import METHODS, Judged
from ._predictor import GateOption, ResponsePrediction, ResponsePredictor
from ._pretrain import pretrain
from ._weights import load_network, save_network

__all__ = [
    "METHODS",
    "GateOption",
    "Judged",
    "ResponsePrediction",
    "ResponsePredictor",
    "load_network",
    "pretrain",
    "save_network",
]
