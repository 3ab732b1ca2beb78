"""cell-eval2's metrics, under its names, from its own code."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from gpjepa.benchmark.tasks import CellSet, Task, Truth

CONTROL = "control"


def cell_eval_config(cache: str | None = None) -> Any:
    """cell-eval2's preset ``vcc2026``, for our labels, on the CPU with scanpy's Wilcoxon test.

    Targeted genes are taken out of both files before, so none is declared here. ``cache`` is a
    directory for what is computed of the real cells.
    """
    try:
        import cell_eval2
    except ImportError as error:
        raise ImportError(
            "cell-eval2 is not installed; its metrics need it: pip install 'gpjepa[benchmark]'"
        ) from error
    from dataclasses import replace

    preset = cell_eval2.EvalConfig.from_preset("vcc2026")
    return replace(
        preset,
        pert_col="perturbation",
        control=CONTROL,
        target_gene_map={"*": None},
        device="cpu",
        num_threads=1,
        de=replace(preset.de, backend="scanpy"),
        cache_strict=True,
        cache_real=cache,
    )


def cell_eval_files(
    task: Task, truth: Truth, predicted: CellSet, context: str
) -> tuple[ad.AnnData, ad.AnnData]:
    """Predicted and real cells of one context, as cell-eval2 takes them.

    Both hold the control cells of the truth, and no gene that a scored perturbation targets.
    """
    rows = [i for i, (c, _) in enumerate(task.rows) if c == context]
    genes = np.flatnonzero(task.scored[rows].all(0))
    names = np.array([str(p) for _, p in task.rows] + [CONTROL], dtype=object)

    def cells(source: CellSet, where: np.ndarray, prefix: str) -> ad.AnnData:
        assert source.counts is not None
        labels = names[source.row[where]]
        obs = pd.DataFrame(
            {"perturbation": pd.Categorical(labels)}, index=[f"{prefix}{i}" for i in where]
        )
        return ad.AnnData(
            source.counts[where][:, genes], obs, pd.DataFrame(index=task.genes[genes])
        )

    mine = truth.cells.context == context
    real = cells(truth.cells, np.flatnonzero(mine), "real")
    control = np.flatnonzero(mine & (truth.cells.row < 0))
    own = cells(predicted, np.flatnonzero(np.isin(predicted.row, rows)), "predicted")
    both = ad.concat([own, cells(truth.cells, control, "real")])
    both.obs["perturbation"] = both.obs["perturbation"].astype("category")
    return both, real


def run_cell_eval(task: Task, truth: Truth, predicted: CellSet) -> pd.DataFrame:
    """Values of cell-eval2's preset ``vcc2026``, one row per row of the task.

    Returns
    -------
    pandas.DataFrame
        A column per metric; NaN where cell-eval2 gives none, as for the discrimination of a single
        perturbation.
    """
    import cell_eval2

    found: dict[int, dict[str, float]] = {}
    for context in sorted({c for c, _ in task.rows}):
        pair = cell_eval_files(task, truth, predicted, context)
        with _quiet():
            tidy = cell_eval2.compute_metrics(*pair, config=cell_eval_config(truth.cache.name))
        index = {str(p): i for i, (c, p) in enumerate(task.rows) if c == context}
        for name, metric, value in tidy.iter_rows():
            # The rank of a single perturbation among itself is 1, whatever is predicted.
            if name in index and not (len(index) == 1 and metric.startswith("pds_")):
                found.setdefault(index[name], {})[metric] = value
    table = pd.DataFrame.from_dict(found, orient="index")
    return table.reindex(index=range(len(task.rows)), columns=_columns(table)).astype(float)


def _columns(table: pd.DataFrame) -> list[str]:
    from cell_eval2.run import metric_output_names

    return sorted({*table.columns, *metric_output_names(cell_eval_config())})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' remarks on fragmented frames and omitted perturbations."""
    logger = logging.getLogger("cell_eval2")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def cell_eval_version() -> str:
    """Version of cell-eval2 that gave the numbers."""
    return version("cell-eval2")
