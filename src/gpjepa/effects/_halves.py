"""Two versions of an effect table whose controls have independent errors."""

from __future__ import annotations

from dataclasses import replace
from zlib import crc32

import numpy as np

from ._scales import SCALES, Scale
from ._table import EffectTable


def control_halves(
    effects: EffectTable, scale: Scale, seed: int = 0
) -> tuple[EffectTable, EffectTable]:
    r"""Split the noise of the controls, as if each table had half of the control cells.

    To a control profile *y* with errors of variance *v*, noise :math:`z \sim N(0, v)` is added in one
    table and subtracted in the other: errors of :math:`y + z` and :math:`y - z` are independent, each
    of variance 2 *v* (data fission: Leiner et al. 2023; exact for Gaussian errors). Perturbed profiles
    stay as they are. It needs no cells; but where a table does not state the noise of its controls,
    the halves are the same.

    Parameters
    ----------
    effects, scale
        The table, and the scale on which it is split.
    seed
        Of the noise, which does not depend on the order of genes.

    Returns
    -------
    tuple of EffectTable
        With that scale alone.
    """
    of = np.asarray(effects.compared[1].argmax(axis=0)).ravel()
    variance = effects.profile_variance(scale)[len(effects.rows) :]
    noise = np.stack(
        [
            np.sqrt(each) * _unit(effects, scale, effects.contexts[context], [seed, stratum])
            for stratum, (each, context) in enumerate(zip(variance, of, strict=True))
        ]
    )
    return _moved(effects, scale, noise), _moved(effects, scale, -noise)


def _unit(effects: EffectTable, scale: Scale, context: str, seed: list[int]) -> np.ndarray:
    """Noise of variance 1 that varies together between genes as that of the controls."""
    draws = effects.draws.get(scale, {}).get(context)
    if draws is not None:
        return np.random.default_rng(seed).normal(size=len(draws)) @ draws
    own = ([*seed, crc32(str(gene).encode())] for gene in effects.genes)
    return np.array([np.random.default_rng(each).normal() for each in own])


def _moved(effects: EffectTable, scale: Scale, by: np.ndarray) -> EffectTable:
    """The table against controls that are moved, and twice as noisy."""
    weights, shares = effects.compared
    effect = effects.effect[scale] - weights @ by
    control = effects.control[scale]
    if effects.has_controls:
        moved = zip(effects.contexts, shares @ by, strict=True)
        floor = 0.0 if scale in SCALES else -np.inf
        control = {c: np.maximum(control[c] + m, floor) for c, m in moved}
    strata = effects.strata
    if strata is not None:
        strata = replace(strata, variance={scale: 2 * strata.variance[scale]})
    few = {}
    if scale in effects.few:
        n = len(effects.rows)
        few[scale] = np.concatenate([effects.few[scale][:n], 2 * effects.few[scale][n:]])
    return replace(
        effects,
        effect={scale: effect.astype(effects.effect[scale].dtype)},
        variance={scale: effects.variance[scale]},
        control={scale: control},
        control_variance={scale: {c: 2 * v for c, v in effects.control_variance[scale].items()}},
        strata=strata,
        few=few,
        draws={scale: effects.draws[scale]} if scale in effects.draws else {},
    )
