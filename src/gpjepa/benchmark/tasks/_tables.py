"""Data of effects instead of cells: published tables, signatures, wells."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa._checks import check_anndata, check_columns, check_gene_names, check_layer, text_of
from gpjepa.effects import EffectTable
from gpjepa.perturbations import LabelReader, Perturbation
from gpjepa.splits import Row, Split

from ._cells import CellSet


def standard_effects(
    adata: ad.AnnData,
    *,
    unit: str,
    layer: str | None = None,
    sd_layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | None = None,
    batch_key: str | None = None,
    **labels: Any,
) -> ad.AnnData:
    """Measured values in the one form that methods of effects get.

    Parameters
    ----------
    adata
        One row per perturbation, or replicate of it: effects, or profiles with control rows among
        them (:meth:`gpjepa.effects.EffectTable.from_frame`).
    unit
        What the values are.
    layer, sd_layer, perturbation_key, context_key, batch_key
        Where they are, and their standard errors and labels.
    **labels
        How labels are written: arguments of :class:`gpjepa.perturbations.LabelReader`.

    Returns
    -------
    anndata.AnnData
        Values in ``X``; ``obs`` ``perturbation``, ``context`` and ``batch`` if it was named;
        ``layers["sd"]``; ``uns["unit"]``. Rows without a value are left out.
    """
    check_anndata(adata)
    for name in (layer, sd_layer):
        check_layer(adata, name)
    keys = {"perturbation_key": perturbation_key, "context_key": context_key}
    check_columns(adata, {**keys, "batch_key": batch_key})
    check_gene_names(adata.var_names)
    column = adata.obs[perturbation_key]
    # Published effects are differences already, and have no rows of a control, unless it is named.
    named = labels.get("control", "control") != "control"
    reader = LabelReader(**labels).checked(column, genes=adata.var_names, need_control=named)
    read = reader.read_cells(column)
    obs = pd.DataFrame(
        {
            "perturbation": [str(p) for p in read],
            "context": "all" if context_key is None else list(text_of(adata.obs[context_key])),
        },
        index=adata.obs_names.astype(str),
    )
    if batch_key is not None:
        obs["batch"] = list(text_of(adata.obs[batch_key]))
    some = np.array([p is not None for p in read])
    keep = np.flatnonzero(some)[np.argsort(obs.index.to_numpy()[some], kind="stable")]
    values = adata[keep].to_df(layer).to_numpy(float)
    made = ad.AnnData(values, obs.iloc[keep], pd.DataFrame(index=adata.var_names.astype(str)))
    made.uns["unit"] = unit
    if sd_layer is not None:
        made.layers["sd"] = adata[keep].to_df(sd_layer).to_numpy(float)
    return made


def table_of(rows: ad.AnnData, sd: np.ndarray | None = None) -> EffectTable:
    """Effects of rows as :func:`standard_effects` makes them."""
    obs = rows.obs
    return EffectTable.from_frame(
        rows.to_df(),
        [Perturbation.parse(p) for p in obs["perturbation"]],
        obs["context"].tolist(),
        sd=rows.layers.get("sd") if sd is None else sd,
        batch=obs["batch"].tolist() if "batch" in obs else None,
        unit=rows.uns["unit"],
    )


def truth_of(
    values: ad.AnnData, keys: list[Row], half: np.ndarray, whole: EffectTable
) -> EffectTable:
    """Effects of a half of the held-out rows, with the noise that all rows show.

    The few that are held out would show it badly. Noise per row of the data, over the rows behind
    each effect.
    """
    mine = [k for k, chosen in zip(keys, half, strict=True) if chosen]
    often, here = Counter(keys), Counter(mine)
    table, unit = table_of(values[half], np.ones((len(mine), values.n_vars))), values.uns["unit"]
    at = {row: i for i, row in enumerate(whole.rows)}
    own = [whole.variance[unit][at[r]] * (often[r] / here[r]) for r in table.rows]
    control, strata = {}, table.strata
    for context, of_all in whole.control_variance[unit].items():
        key = context, Perturbation()
        if context in table.contexts:
            control[context] = of_all * (often[key] / here[key]) if here[key] else of_all
    if strata is not None:
        shares = strata.shares.tocoo()
        noise = np.empty_like(strata.variance[unit])
        for i, s, share in zip(shares.row, shares.col, shares.data, strict=True):
            noise[s] = control[table.contexts[i]] / share
        strata = replace(strata, variance={unit: noise})
    return replace(
        table,
        variance={unit: np.array(own, np.float32)},
        control_variance={unit: control},
        strata=strata,
    )


def parts_of_rows(keys: list[Row], split: Split, rows: set[Row], least: int) -> list[np.ndarray]:
    """Masks of the rows for training, and for each half of the truth.

    Replicates are dealt out to the halves; what was measured once is in both. Controls of the
    tested contexts go half to training and a quarter to each half.
    """
    rng = np.random.default_rng([split.seed, 7])
    masks = [np.zeros(len(keys), bool) for _ in range(3)]
    tested = {c for c, _ in rows}
    trained, groups = set(split.train), dict[Row, list[int]]()
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    for key in sorted(groups):
        mine = rng.permutation(groups[key])
        if key in rows:
            masks[1][mine[::2]] = True
            masks[2][mine[1::2] if len(mine) > 1 else mine] = True
        elif key[1].is_control and key[0] in tested:
            if len(mine) < least:
                raise ValueError(
                    f"Context {key[0]!r} has {len(mine)} control rows; at least {least} are needed: "
                    "half for training, a quarter for each half of the truth."
                )
            for mask, part in zip(masks, (mine[::2], mine[1::4], mine[3::4]), strict=True):
                mask[part] = True
        elif key[1].is_control or key in trained:
            masks[0][mine] = True
    return masks


def no_cells() -> CellSet:
    """There are none."""
    empty = np.zeros(0)
    return CellSet(None, empty, empty.astype(int), empty.astype(str), values=sp.csr_matrix((0, 0)))


def starts(table: EffectTable, rows: tuple[Row, ...]) -> ad.AnnData:
    """The control profile of each tested context, which methods are asked with."""
    contexts = sorted({c for c, _ in rows})
    values = np.stack([table.control[table.scales[0]][c] for c in contexts])
    obs = pd.DataFrame({"perturbation": "control", "context": contexts}, index=contexts)
    return ad.AnnData(values, obs, pd.DataFrame(index=table.genes.astype(str)))
