"""Methods: one small protocol, everything of our own behind it, and processes to run them in."""

from ._isolated import Isolated, MethodError
from ._oracles import ORACLES, oracle
from ._peer import Peer, check_peer
from ._predict import Prediction, mean_prediction, predict_rows
from ._protocol import Method
from ._registry import (
    CEILING,
    FLOOR,
    METHODS,
    NEGATIVE,
    Role,
    check_options,
    imported,
    is_seeded,
    make_method,
    role_of,
    takes_features,
)
from ._sources import method_source, package_source

__all__ = [
    "CEILING",
    "FLOOR",
    "METHODS",
    "NEGATIVE",
    "ORACLES",
    "Isolated",
    "Method",
    "MethodError",
    "Peer",
    "Prediction",
    "Role",
    "check_options",
    "check_peer",
    "imported",
    "is_seeded",
    "make_method",
    "mean_prediction",
    "method_source",
    "oracle",
    "package_source",
    "predict_rows",
    "role_of",
    "takes_features",
]
