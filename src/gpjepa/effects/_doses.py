"""Other doses of a target than those measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from gpjepa.perturbations import Perturbation

from ._baselines import Additive
from ._denoise import Denoiser
from ._measured import Measured
from ._scales import Scale
from ._stack import Experts, Stack, fit_stack
from ._weighted import SPREAD, Estimate, Terms, Weights, total

Form = Literal["nearest", "log_linear", "hill"]
_FOR_HILL = 4
"""Doses that a curve with a half-maximal dose and a steepness needs."""
_STEEPNESS = (0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
_PER_DECADE = 4  # half-maximal doses that are tried
_DOUBT = {"between": 0.1, "beyond": 0.5}
"""Share of the spread of effects that stays unknown of a dose between, or beyond, measured ones."""


class OtherDose(Additive):
    """A dose that was not measured, from measured doses of the same target.

    Parameters
    ----------
    form
        ``"nearest"``: as the nearest dose in log dose. ``"log_linear"``: linear in log dose between
        neighbours; in proportion to the dose below the lowest, as the highest beyond. ``"hill"``: a
        direction of effects whose size is a Hill function of the dose, from four doses; of fewer,
        ``"log_linear"``.
    scale
        Scale of the effects.
    """

    def __init__(self, form: Form = "log_linear", scale: Scale = "mean_log1p") -> None:
        super().__init__(scale)
        if form not in get_args(Form):
            raise ValueError(f"form={form!r} is not known; choose one of {get_args(Form)}.")
        self.form = form

    def _fit(self) -> None:
        self._doses = measured_doses(self.measured_)

    def _single(self, single: Perturbation, context: str) -> Weights:
        points = self._doses.get((context, single.targets[0]))
        if (context, single) in self._row or not points:
            return super()._single(single, context)
        doses, rows = np.array([d for d, _ in points]), np.array([i for _, i in points])
        values = self.measured_.values[rows]
        curve = Curve(doses, values @ values.T, self.measured_.totals[rows])
        return Weights.of(curve.weights(self.form, single.doses[0]), rows=rows)


def measured_doses(measured: Measured) -> dict[tuple[str, str], list[tuple[float, int]]]:
    """Doses of each context and target, ascending, with their rows."""
    found: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for context, rows in measured.alone.items():
        for i in rows:
            single = measured.effects.rows[i][1]
            found.setdefault((context, single.targets[0]), []).append((single.doses[0], i))
    return {key: sorted(points) for key, points in found.items()}


class Curve:
    r"""What measured doses of a target say of another dose, as weights of their effects.

    The Hill curve is that of a common direction, :math:`d_i = f(x_i)\,u + \varepsilon_i` with
    :math:`f(x) = x^h / (x^h + c^h)`: for each half-maximal dose *c* and steepness *h* of a grid the
    direction follows by least squares, and the pair is taken that explains most (Hill 1910).

    Parameters
    ----------
    doses
        Ascending, shape (n_doses,).
    square
        Products of the effects, shape (n_doses, n_doses).
    noise
        Sampling variance of each effect, shape (n_doses,).
    """

    def __init__(self, doses: np.ndarray, square: np.ndarray, noise: np.ndarray) -> None:
        self.doses, self.square = doses, square
        self.precision = 1 / np.maximum(noise, 1e-9 * np.trace(square) + 1e-300)

    def weights(self, form: Form, dose: float) -> np.ndarray:
        """Weights of the measured effects, shape (n_doses,)."""
        if form == "hill" and len(self.doses) >= _FOR_HILL:
            return self.hill(dose)
        return self._nearest(dose) if form == "nearest" else self._log_linear(dose)

    def _nearest(self, dose: float) -> np.ndarray:
        return np.eye(len(self.doses))[np.argmin(np.abs(np.log(self.doses / dose)))]

    def _log_linear(self, dose: float) -> np.ndarray:
        found, above = np.zeros(len(self.doses)), int(np.searchsorted(self.doses, dose))
        if above == len(self.doses):
            found[-1] = 1.0
        elif above == 0:
            found[0] = dose / self.doses[0]
        else:
            low, high = self.doses[above - 1 : above + 1]
            found[above] = np.log(dose / low) / np.log(high / low)
            found[above - 1] = 1 - found[above]
        return found

    def hill(self, dose: float) -> np.ndarray:
        """Weights by the Hill curve, of however many doses."""
        low, high = np.log10(self.doses[0]) - 1, np.log10(self.doses[-1]) + 1
        half = np.logspace(low, high, 1 + int(_PER_DECADE * (high - low)))[:, None, None]
        steep = np.array(_STEEPNESS)[None, :, None]
        share = 1 / (1 + (half / self.doses) ** steep)  # (n_half, n_steep, n_doses)
        along = share * self.precision
        size = (along * share).sum(-1)
        explained = np.einsum("hsi,ij,hsj->hs", along, self.square, along) / size
        best = np.unravel_index(np.argmax(explained), explained.shape)
        there = 1 / (1 + (half[best[0], 0, 0] / dose) ** steep[0, best[1], 0])
        return there * along[best] / size[best]


class Doses:
    """What measured doses of targets say of others, on one scale.

    Straight lines in log dose and Hill curves of denoised effects, stacked by how well they predict
    doses left out: one stack for doses between measured ones, one for those beyond. Doses below the
    lowest go with the former, although none is left out there.
    """

    def __init__(self, measured: Measured, denoiser: Denoiser) -> None:
        self.measured, self.denoiser = measured, denoiser
        self.of = measured_doses(measured)
        self._stacks = {where: self._fit(where) for where in _DOUBT}

    def _fit(self, where: str) -> Stack:
        return fit_stack(self.measured, self.experts(where), np.array([1.0, 0.0]))

    def experts(self, where: str) -> Experts:
        """What a line, and a Hill curve, say of measured doses without them."""
        rows = []
        for points in self.of.values():
            if len(points) >= _FOR_HILL:
                rows += [i for _, i in (points[1:-1] if where == "between" else points[-1:])]
        units = [self.measured.effects.rows[i][1].targets for i in rows]

        def of(k: int) -> list[Terms]:
            context, single = self.measured.effects.rows[rows[k]]
            said = self._curves(single, context, [rows[k]], bias=False)
            return [each.terms for each in said]

        return Experts(rows, units, of)

    def _curves(
        self, single: Perturbation, context: str, without: Sequence[int], bias: bool
    ) -> list[Estimate]:
        """What a line, and a Hill curve, say of a dose."""
        points = [p for p in self.of[context, single.targets[0]] if p[1] not in without]
        doses, rows = np.array([d for d, _ in points]), [i for _, i in points]
        at = np.searchsorted(self.denoiser.rows[context], rows)
        square = self.denoiser.products(context)[np.ix_(at, at)]
        curve = Curve(doses, square, self.denoiser.noise(context, at).diagonal())
        denoised = self.denoiser.estimates(rows, without, bias)
        dose, found = single.doses[0], []
        for weights in (curve.weights("log_linear", dose), curve.hill(dose)):
            parts = zip(weights, rows, strict=True)
            found.append(total([denoised[i].times(float(w)) for w, i in parts if w]))
        return found

    def estimate(
        self, single: Perturbation, context: str, without: Sequence[int], bias: bool = True
    ) -> Estimate | None:
        """A dose that was not measured, or is left out; None if no other dose was."""
        points = self.of.get((context, single.targets[0]), [])
        doses = [d for d, i in points if i not in without]
        if not doses:
            return None
        where = "beyond" if single.doses[0] > doses[-1] else "between"
        weights = self._stacks[where].weights if len(doses) >= _FOR_HILL else np.array([1.0, 0.0])
        said = self._curves(single, context, without, bias)
        parts = [each.times(float(w)) for w, each in zip(weights, said, strict=True) if w]
        return total(parts).less_sure(SPREAD, _DOUBT[where])
