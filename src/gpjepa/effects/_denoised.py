"""Measured effects freed of noise, as a table for users."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ._denoise import Denoiser
from ._measured import Measured, blocks
from ._own import OwnGenes
from ._scales import Scale
from ._table import EffectTable

if TYPE_CHECKING:
    from anndata import AnnData


def denoise(
    effects: EffectTable, scale: Scale | None = None, context: str | None = None
) -> AnnData:
    """Measured effects freed of noise by what the effects of a context have in common.

    The directions that effects share are kept as far as they stand out from noise (matrix
    James–Stein), and the rest of each effect is shrunk as a whole vector.

    Parameters
    ----------
    effects
        The measured effects.
    scale
        Scale of the effects; the table's first by default.
    context
        The context to take; all of them by default. Each is denoised by itself.

    Returns
    -------
    anndata.AnnData
        As :meth:`EffectTable.to_anndata`: denoised effects in ``X``, measured ones in
        ``layers["measured"]``, the variance of what remains unknown of each in
        ``layers["variance"]`` in place of the sampling noise.

    References
    ----------
    Efron and Morris (1972), Gavish and Donoho (2017), Johnstone (2001), James and Stein (1961).
    """
    scale = effects.check_scale(effects.scales[0] if scale is None else scale)
    found = effects.to_anndata(scale, context)
    rows = [i for i, (c, _) in enumerate(effects.rows) if context in (None, c)]
    measured = Measured(effects, scale)
    denoiser = Denoiser(measured)
    n_controls = found.n_obs - len(rows)
    mean, variance = np.zeros(found.shape, np.float32), found.layers.pop("noise")
    for block in blocks(len(rows)):
        at = slice(n_controls + block.start, n_controls + block.stop)
        said = denoiser.estimates([rows[i] for i in block])
        mine = [said[rows[i]] for i in block]
        sums = measured.assemble([e.terms for e in mine])
        mean[at] = measured.mean(sums)
        variance[at] = measured.noise(sums, interval=True) + measured.left(mine)
    at = slice(n_controls, None)
    pairs = [effects.rows[i][::-1] for i in rows]
    OwnGenes(denoiser).put_right(pairs, mean[at], variance[at], np.zeros_like(mean[at]))
    found.layers["measured"], found.layers["variance"] = found.X, variance
    found.X = mean
    return found
