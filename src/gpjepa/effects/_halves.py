"""Two versions of an effect table whose controls have independent errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ._scales import Scale
from ._table import EffectTable


def control_halves(
    effects: EffectTable, scale: Scale, rng: np.random.Generator
) -> tuple[EffectTable, EffectTable]:
    r"""Split the noise of the controls, as if each table had half of the control cells.

    To a control profile *y* with errors of variance *v*, noise :math:`z \sim N(0, v)` is added in one
    table and subtracted in the other: errors of :math:`y + z` and :math:`y - z` are independent, each
    of variance 2 *v* (data fission: Leiner et al. 2023; exact for Gaussian errors). Perturbed profiles
    stay as they are. It needs no cells.

    Parameters
    ----------
    effects, scale
        The table, and the scale on which it is split.
    rng
        Where the noise comes from.

    Returns
    -------
    tuple of EffectTable
        With that scale alone.
    """
    of = np.asarray(effects.compared[1].argmax(axis=0)).ravel()
    variance = effects.profile_variance(scale)[len(effects.rows) :]
    noise = np.stack(
        [
            np.sqrt(each) * _unit(effects, scale, effects.contexts[context], rng)
            for each, context in zip(variance, of, strict=True)
        ]
    )
    return _moved(effects, scale, noise), _moved(effects, scale, -noise)


def _unit(effects: EffectTable, scale: Scale, context: str, rng: np.random.Generator) -> np.ndarray:
    """Noise of variance 1 that varies together between genes as that of the controls."""
    draws = effects.draws.get(scale, {}).get(context)
    if draws is None:
        return rng.normal(size=len(effects.genes))
    return rng.normal(size=len(draws)) @ draws


def _moved(effects: EffectTable, scale: Scale, by: np.ndarray) -> EffectTable:
    """The table against controls that are moved, and twice as noisy."""
    weights, shares = effects.compared
    effect = effects.effect[scale] - weights @ by
    names, moved = effects.contexts, shares @ by
    floor = 0.0 if effects.has_controls else -np.inf
    control = {
        c: np.maximum(effects.control[scale][c] + m, floor) if effects.has_controls else m * 0
        for c, m in zip(names, moved, strict=True)
    }
    twice = {c: 2 * effects.control_variance[scale][c] for c in names}
    strata = effects.strata
    if strata is not None:
        strata = replace(strata, variance={scale: 2 * strata.variance[scale]})
    few = {scale: effects.few[scale]} if scale in effects.few else {}
    draws = {scale: effects.draws[scale]} if scale in effects.draws else {}
    return replace(
        effects,
        effect={scale: effect.astype(effects.effect[scale].dtype)},
        variance={scale: effects.variance[scale]},
        control={scale: control},
        control_variance={scale: twice},
        strata=strata,
        few=few,
        draws=draws,
    )
