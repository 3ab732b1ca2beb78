from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa._checks import check_counts

from ._recipes import RECIPES

_MINI_URL = (
    "https://raw.githubusercontent.com/altoslabs/perturbench/4dd6a03c54ef348f6be6e46e21ea7f80eb2daaa2/"
    "src/perturbench/data/resources/devel.h5ad"
)
_MINI_HASH = "sha256:220998f5630c813228c8661c86dd52244b9ac87127511289af90e0d900d8429b"
MINI_FILE = "perturbench_devel.h5ad"
_SUFFIXES = (".h5ad", ".h5mu", ".zarr")


def load(name_or_path: str | Path) -> Any:
    """Load a data set by name, or a file as it is.

    Parameters
    ----------
    name_or_path
        A data set of pertpy (``"norman_2019"``, see :func:`available`), ``"norman_mini"`` (1 MB of
        real cells of Norman 2019), or the path of a ``.h5ad``, ``.h5mu`` or ``.zarr`` file.

    Returns
    -------
    anndata.AnnData or mudata.MuData
        Named data sets have ``obs["perturbation"]`` with ``"control"`` and ``"A+B"``, and raw
        counts in ``layers["counts"]``. Files come as they are.

    Raises
    ------
    ValueError
        If the name is not known; names the nearest.
    FileNotFoundError
        If the path does not exist.
    """
    name = str(name_or_path)
    if name == "norman_mini":
        return _norman_mini()
    if name in RECIPES:
        return _from_pertpy(name)
    path = Path(name_or_path)
    if path.suffix in _SUFFIXES:
        return _read(path)
    near = get_close_matches(name, available(), n=3)
    raise ValueError(
        f"{name!r} is neither a known data set nor a file that ends in {', '.join(_SUFFIXES)}. "
        f"{'Did you mean ' + ' or '.join(near) + '?' if near else ''} Known: "
        f"{', '.join(available())}."
    )


def available() -> list[str]:
    """Names of the data sets that :func:`load` knows."""
    return ["norman_mini", *sorted(RECIPES)]


def _read(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        if path.suffix == ".h5ad":
            return ad.read_h5ad(path)
        if path.suffix == ".zarr":
            return ad.read_zarr(path)
        import mudata

        return mudata.read_h5mu(path)
    except (OSError, KeyError, ValueError) as error:
        raise OSError(
            f"{path} cannot be read: it is truncated, or no {path.suffix} file ({error})."
        ) from error


def _from_pertpy(name: str) -> ad.AnnData:
    import pertpy

    recipe = RECIPES[name]
    with _told_once(name):
        data = getattr(pertpy.data, name)()
    if recipe.modality is not None:
        adata = data[recipe.modality].copy()
        for key in (recipe.column, f"{recipe.modality}:{recipe.column}"):
            if recipe.column not in adata.obs and key in data.obs:
                adata.obs[recipe.column] = data.obs[key].reindex(adata.obs_names)
        data = adata
    adata = recipe.apply(data)
    check_counts(adata.layers["counts"], f"the counts of {name}")
    return adata


def _pertpy_logger() -> logging.Logger:
    try:
        from lamin_utils import logger  # pertpy before 1.4, that is on Python 3.11

        return logger
    except ImportError:
        return logging.getLogger("pertpy.data")


@contextmanager
def _told_once(name: str) -> Iterator[None]:
    """One sentence when a download fails, in the place of a line for every try."""
    import scanpy as sc
    from requests.exceptions import RequestException

    logger = _pertpy_logger()  # it writes a line for each of its tries
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except RequestException as error:
        url = str(error.request.url) if error.request is not None else None
        file = MINI_FILE if name == "norman_mini" else Path(url or f"{name}.h5ad").name
        raise ConnectionError(
            f"{name} could not be downloaded ({type(error).__name__}): is there a network? It can "
            f"also be fetched elsewhere{f' from {url}' if url else ''} and put at "
            f"{sc.settings.datasetdir / file}; or give the path of a .h5ad file of your own."
        ) from error
    finally:
        logger.setLevel(level)


def _norman_mini() -> ad.AnnData:
    """The Norman half of PerturBench's development file, its counts recovered.

    The file holds log1p of counts scaled per cell to about 10,000, so that within a cell every
    expm1 is a multiple of one count. The smallest value of a cell is one count, in two cells two:
    which, the library size tells.
    """
    import pooch
    import scanpy as sc

    with _told_once("norman_mini"):
        file = pooch.retrieve(
            _MINI_URL, known_hash=_MINI_HASH, fname=MINI_FILE, path=sc.settings.datasetdir
        )
    adata = ad.read_h5ad(file)
    adata = adata[adata.obs["dataset"] == "norman19"].copy()
    scaled = sp.csr_matrix(adata.X, dtype=float)
    scaled.data = np.expm1(scaled.data)
    n = np.diff(scaled.indptr)
    if (n == 0).any():
        raise ValueError(f"{int((n == 0).sum())} cells of {MINI_FILE} have no counts.")
    smallest = np.minimum.reduceat(scaled.data, scaled.indptr[:-1])
    units = np.rint(smallest * adata.obs["ncounts"].to_numpy() / 1e4)
    counts = scaled.data * np.repeat(units / smallest, n)
    if np.abs(counts - np.rint(counts)).max() > 1e-6:
        raise ValueError(f"The counts of {MINI_FILE} cannot be recovered: it is another file.")
    scaled.data = np.rint(counts).astype(np.float32)
    obs = pd.DataFrame(
        {
            "perturbation": adata.obs["perturbation"].cat.remove_unused_categories(),
            "cell_line": adata.obs["cell_type"].cat.remove_unused_categories(),
            "library_size": adata.obs["ncounts"].astype(float),
        }
    )
    matrix = sp.csr_matrix(scaled, dtype=np.float32)
    var = pd.DataFrame(index=adata.var_names)
    return ad.AnnData(matrix, obs=obs, var=var, layers={"counts": matrix.copy()})
