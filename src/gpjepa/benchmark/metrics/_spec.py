"""The declaration of a metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ._scoring import Need, Scoring


@dataclass(frozen=True)
class Metric:
    """A declared metric.

    Attributes
    ----------
    label
        What figures and tables call it.
    axis
        What it looks at; a report shows all of them.
    direction
        Whether more is better, less is better, or the value closest to ``best``.
    best
        Value of a perfect prediction.
    catches
        What a bad value means, and what the metric cannot see.
    reference
        Paper or package it comes from.
    function
        One value per row of the task; NaN where it is not defined.
    denominator
        Column whose sum divides the sum of this one; means are taken if None.
    needs
        What a prediction or the data must have; without it the metric is not applicable.
    per_task
        Whether all rows of a task, or of a context, share one value, which has no interval then.
    own_space
        Whether it is measured in a space that each method brings: two methods cannot be compared.
    masked
        Whether genes that tested perturbations target count nowhere in it.
    version
        Semantic version of its definition: kept results of another one are computed again.
    """

    label: str
    axis: Literal[
        "effect", "differential expression", "cells", "embedding", "decision", "calibration"
    ]
    direction: Literal["higher", "lower", "closest"]
    best: float
    catches: str
    reference: str
    function: Callable[[Scoring], np.ndarray]
    denominator: str | None = None
    needs: tuple[Need, ...] = ()
    per_task: bool = False
    own_space: bool = False
    masked: bool = True
    version: str = "1.0.0"

    @property
    def of_effects(self) -> bool:
        """Whether it needs no cells, only mean effects and what is stated of them."""
        of_them = self.axis in ("effect", "calibration") or "gene_sets" in self.needs
        return of_them and "counts" not in self.needs

    def applied(self, scoring: Scoring, function: Callable[[Scoring], np.ndarray]) -> np.ndarray:
        """Values of a function, the metric's or its denominator's; NaN if it is not applicable."""
        if not scoring.task.has_cells and not self.of_effects:
            return np.full(len(scoring.task.rows), np.nan)
        if all(scoring.has(need) for need in self.needs):
            return function(scoring)
        return np.full(len(scoring.task.rows), np.nan)

    def goodness(self, value: Any) -> Any:
        """Values turned so that more is better."""
        if self.direction == "closest":
            return -np.abs(value - self.best)
        return value if self.direction == "higher" else -value
