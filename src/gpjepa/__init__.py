"""Predict how single cells respond to perturbations, and say how sure the prediction is.

``import gpjepa`` is light: torch, scvi-tools and pertpy are imported when something needs them.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        benchmark,
        datasets,
        effects,
        model,
        nn,
        objectives,
        perturbations,
        planning,
        plotting,
    )
    from .model import GPJEPA

__version__ = version("gpjepa")
__all__ = [
    "GPJEPA",
    "benchmark",
    "datasets",
    "effects",
    "model",
    "nn",
    "objectives",
    "perturbations",
    "planning",
    "plotting",
    "splits",
]


def __getattr__(name: str) -> Any:
    if name == "GPJEPA":
        return import_module("gpjepa.model").GPJEPA
    if name in __all__:
        return import_module(f"gpjepa.{name}")
    raise AttributeError(f"module 'gpjepa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
