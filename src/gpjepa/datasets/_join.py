from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa._checks import raw_counts


def join(
    datasets: Mapping[str, ad.AnnData | str | Path], *, layer: str | None = None
) -> ad.AnnData:
    """Put data sets that measured different genes together, for pretraining.

    Parameters
    ----------
    datasets
        AnnData, or paths of ``.h5ad`` files, by name.
    layer
        Layer with raw counts; by default ``layers["counts"]`` of a data set if there, else ``X``.

    Returns
    -------
    anndata.AnnData
        Counts in ``X``; genes that all data sets measured first, then those of some. ``obs`` has
        ``dataset`` and ``library_size`` (that of the data set if it has one, else the sum over its
        genes), and the columns that all data sets have; ``varm["measured"]`` says which data set
        measured which gene. :meth:`gpjepa.GPJEPA.setup_anndata` takes these as ``dataset_key`` and
        ``library_size_key``.

    Raises
    ------
    ValueError
        If there is no data set, values are not counts, gene names repeat, or a data set shares no
        gene with the others.

    Examples
    --------
    >>> both = gpjepa.datasets.join({"first": "first.h5ad", "second": second})
    >>> gpjepa.GPJEPA.setup_anndata(
    ...     both, perturbation_key=None, dataset_key="dataset", library_size_key="library_size"
    ... )
    """
    if not datasets:
        raise ValueError("No data set was given.")
    read = {str(name): _read(name, data, layer) for name, data in datasets.items()}
    for name, data in read.items():
        others = set().union(*(d.var_names for n, d in read.items() if n != name))
        if others and not others & set(data.var_names):
            raise ValueError(
                f"{name!r} shares no gene with the other data sets: it has "
                f"{list(data.var_names[:3])} ..., they have {sorted(others)[:3]} ...: are all gene "
                "symbols, of one species?"
            )
    joined = ad.concat(read, join="outer", label="dataset", index_unique="-", fill_value=0)
    joined.X = sp.csr_matrix(joined.X).astype(np.float32)
    shared = set.intersection(*(set(d.columns) for d in (r.obs for r in read.values())))
    joined.obs = joined.obs[[c for c in joined.obs if c in shared or c == "dataset"]]
    genes = pd.Index(dict.fromkeys(g for data in read.values() for g in data.var_names))
    measured = pd.DataFrame({n: genes.isin(data.var_names) for n, data in read.items()}, genes)
    first = measured.all(axis=1)
    measured = pd.concat([measured[first], measured[~first]])
    joined = joined[:, measured.index].copy()
    joined.varm["measured"] = measured
    return joined


def _read(name: str, data: ad.AnnData | str | Path, layer: str | None) -> ad.AnnData:
    if not isinstance(data, ad.AnnData):
        path = Path(data)
        if not path.is_file():
            raise FileNotFoundError(f"{name!r}: there is no file {path}.")
        data = ad.read_h5ad(path)
    try:
        counts = raw_counts(data, layer)
    except (KeyError, ValueError) as error:
        raise type(error)(f"{name!r}: {error.args[0]}") from error
    obs = data.obs.copy()
    if "library_size" not in obs:
        obs["library_size"] = np.asarray(counts.sum(1)).ravel()
    return ad.AnnData(counts, obs, pd.DataFrame(index=data.var_names))
