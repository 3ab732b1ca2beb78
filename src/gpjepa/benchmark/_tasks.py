"""A task: what a method may see of one split, and what its predictions are held against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa._checks import check_counts, check_gene_names, check_library, text_of
from gpjepa.datasets import prepare
from gpjepa.effects import EffectAnchor, EffectTable, MeanEffect, Scale, effect_table, log1p_rates
from gpjepa.perturbations import LabelReader, Perturbation
from gpjepa.splits import Row, Split

if TYPE_CHECKING:
    from sklearn.decomposition import PCA

MIN_CELLS = 8
"""A held-out perturbation is tested with at least this many cells: its halves need some each."""
E_TEST_CELLS, E_TEST_PERMUTATIONS = 200, 500  # a group's cells at most, and the test's permutations
SCALE: Scale = "mean_log1p"
_read = Perturbation.parse


def standard_cells(
    adata: ad.AnnData,
    *,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | None = None,
    library_size_key: str | None = None,
    cell_type_key: str | None = None,
    **labels: Any,
) -> ad.AnnData:
    """Cells in the one form that every method gets.

    Parameters
    ----------
    adata
        Cells with raw counts.
    layer, perturbation_key, context_key, library_size_key
        As in :meth:`gpjepa.GPJEPA.setup_anndata`.
    cell_type_key
        Column of ``obs`` with cell types, which no method sees and the metric ``avg_bio`` needs; a
        cell without one is left out there.
    **labels
        How labels are written: arguments of :class:`gpjepa.perturbations.LabelReader`.

    Returns
    -------
    anndata.AnnData
        Counts in ``X``; ``obs`` ``perturbation`` (``"A+B"``, ``"control"``), ``context``
        (``"all"`` if there is one), ``library_size``, and ``cell_type`` if it was named; cells
        sorted by name.

    Raises
    ------
    ValueError, KeyError
        If values are not counts, a column is missing, names repeat, or labels look as if they were
        written in another way.
    """
    columns = [perturbation_key, context_key, library_size_key, cell_type_key]
    missing = [c for c in columns if c is not None and c not in adata.obs]
    if missing:
        raise KeyError(f"{missing} are not columns of adata.obs: {list(adata.obs.columns)}.")
    if layer is None and "counts" in adata.layers:
        layer = "counts"
    matrix = adata.X if layer is None else adata.layers[layer]
    where = "X" if layer is None else f"layers[{layer!r}]"
    check_counts(matrix, where)
    check_gene_names(adata.var_names)
    if not adata.obs_names.is_unique:
        raise ValueError("Names of cells repeat; call adata.obs_names_make_unique() first.")
    counts = sp.csr_matrix(matrix).astype(np.float32)
    column = adata.obs[perturbation_key]
    read = LabelReader(**labels).read_column(column, genes=adata.var_names)
    library = np.asarray(counts.sum(1)).ravel()
    if library_size_key is not None:
        library = adata.obs[library_size_key].to_numpy(float)
        check_library(library, counts, f"obs[{library_size_key!r}]")
    context = ["all"] * adata.n_obs if context_key is None else text_of(adata.obs[context_key])
    obs = pd.DataFrame(
        {"perturbation": [str(p) for p in read], "context": list(context), "library_size": library},
        index=adata.obs_names.astype(str),
    )
    if cell_type_key is not None:
        types = adata.obs[cell_type_key]
        obs["cell_type"] = types.astype(str).where(types.notna(), "").to_numpy()
    some = (library > 0) & np.array([p is not None for p in read])
    order = np.argsort(obs.index.to_numpy()[some], kind="stable")
    keep = np.flatnonzero(some)[order]
    return ad.AnnData(counts[keep], obs.iloc[keep], pd.DataFrame(index=adata.var_names.astype(str)))


def measured_rows(cells: ad.AnnData) -> dict[Row, int]:
    """Cells of each (context, perturbation) that is not control, sorted."""
    pairs = cells.obs.groupby(["context", "perturbation"], observed=True).size()
    found = {(str(c), _read(str(p))): int(n) for (c, p), n in pairs.items()}
    return {row: found[row] for row in sorted(found) if not row[1].is_control}


def too_small(cells: ad.AnnData, split: Split) -> dict[Row, int]:
    """Held-out rows with fewer than ``MIN_CELLS`` cells, and how many they have."""
    n_cells = measured_rows(cells)
    return {r: n_cells.get(r, 0) for r in split.test if n_cells.get(r, 0) < MIN_CELLS}


def data_hash(cells: ad.AnnData) -> str:
    """Hash of counts, labels and gene names, whatever order the genes and cells come in."""
    order = np.argsort(cells.var_names.to_numpy(), kind="stable")
    counts = sp.csr_matrix(cells.X[:, order])
    counts.sort_indices()
    found = sha256("\n".join(cells.var_names[order]).encode())
    for column in cells.obs:
        found.update("\n".join(cells.obs[column].astype(str)).encode())
    for part in (counts.indptr.astype(np.int64), counts.indices.astype(np.int64), counts.data):
        found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class CellSet:
    """Cells, and the row of the task that each belongs to; -1 marks control cells."""

    counts: sp.csr_matrix
    library: np.ndarray
    row: np.ndarray
    context: np.ndarray
    cell_type: np.ndarray | None = None

    def to_anndata(self, genes: np.ndarray) -> ad.AnnData:
        """The cells without their labels, as methods embed them."""
        obs = pd.DataFrame({"context": self.context, "library_size": self.library})
        obs.index = obs.index.astype(str)
        return ad.AnnData(self.counts, obs, pd.DataFrame(index=genes))

    def of(self, context: str) -> CellSet:
        """The cells of one context."""
        here = np.flatnonzero(self.context == context)
        return CellSet(self.counts[here], self.library[here], self.row[here], self.context[here])

    @cached_property
    def log1p(self) -> sp.csr_matrix:
        """log1p counts per 10,000, shape (n_cells, n_genes)."""
        return sp.csr_matrix(log1p_rates(self.counts, self.library))


@dataclass(frozen=True)
class Truth:
    """One half of the held-out cells, with control cells of its own.

    Attributes
    ----------
    table
        Measured effects of the task's rows, in their order.
    cells
        The cells of this half.
    """

    table: EffectTable
    cells: CellSet

    @cached_property
    def cache(self) -> TemporaryDirectory:
        """Where cell-eval2 keeps what it computes of these cells, for as long as they are used."""
        return TemporaryDirectory(prefix="gpjepa-")

    @property
    def effect(self) -> np.ndarray:
        """Measured effects, shape (n_rows, n_genes)."""
        return self.table.effect[SCALE]


@dataclass(frozen=True)
class Task:
    """One split of one data set, as methods see it and as they are scored.

    Control cells of every tested context are split: half for training, a quarter for each half of
    the truth, so that no prediction is rewarded for knowing the noise of the controls, and a
    replicate has controls of its own. Other contexts keep theirs for training.

    Attributes
    ----------
    split
        What is held out.
    rows
        Held-out rows with enough cells; ``dropped`` are the others, with their numbers of cells.
    train
        Cells to learn from, those of the training rows and half of the controls.
    control
        The control cells among them, of the held-out contexts: predictions start from them.
    truths
        The two halves of the held-out cells.
    training
        Effects of the training cells.
    gene_sets
        Name → genes, for the agreement of enrichment; None for none.
    """

    split: Split
    rows: tuple[Row, ...]
    dropped: dict[Row, int]
    train: ad.AnnData
    control: ad.AnnData
    truths: tuple[Truth, Truth]
    training: EffectTable
    gene_sets: dict[str, set[str]] | None = None

    @classmethod
    def of(
        cls, cells: ad.AnnData, split: Split, n_genes: int | None = None,
        gene_sets: dict[str, set[str]] | None = None,
    ) -> Task:  # fmt: skip
        """Prepare a task from :func:`standard_cells`.

        Parameters
        ----------
        cells
            All cells.
        split
            What is held out.
        n_genes
            Highly variable genes to keep, chosen on the training cells; all genes by default.
        gene_sets
            Gene sets for the agreement of enrichment.

        Raises
        ------
        ValueError
            If a context has too few control cells to be split, or no row enough cells.
        """
        dropped = too_small(cells, split)
        rows = tuple(r for r in split.test if r not in dropped)
        if not rows:
            raise ValueError(
                f"No held-out perturbation of split {split.name!r} has {MIN_CELLS} cells: "
                "nothing can be tested."
            )
        part = _parts(_keys(cells), split, set(rows))
        if n_genes is not None:
            chosen = prepare(cells, part == 0, n_genes=n_genes, min_counts=1)
            part = part[cells.obs_names.get_indexer(chosen.obs_names)]  # some have no counts left
            cells = chosen
        keys = _keys(cells)
        contexts, perturbations = np.array([c for c, _ in keys]), [p for _, p in keys]
        held = sorted({c for c, _ in rows})
        library = cells.obs["library_size"].to_numpy(float)

        def table(keep: np.ndarray) -> EffectTable:
            return effect_table(cells.X, library, perturbations, list(contexts),
                                cells.var_names, keep)  # fmt: skip

        typed = "cell_type" in cells.obs
        index = {row: i for i, row in enumerate(rows)}
        row = np.array([index.get(k, -1) for k in keys])
        truths = []
        for half in (1, 2):
            mine = (part == half) & np.isin(contexts, held)
            measured = table(mine)
            where = {r: i for i, r in enumerate(measured.rows)}
            truths.append(
                Truth(
                    measured.subset(np.array([where[r] for r in rows])),
                    CellSet(
                        cells.X[mine],
                        library[mine],
                        row[mine],
                        contexts[mine],
                        cells.obs["cell_type"].to_numpy(str)[mine] if typed else None,
                    ),
                )
            )
        train = cells[part == 0].copy()
        train.obs = train.obs[["perturbation", "context", "library_size"]]
        is_control = (train.obs["perturbation"] == "control").to_numpy()
        control = train[is_control & train.obs["context"].isin(held).to_numpy()].copy()
        return cls(split, rows, dropped, train, control, (truths[0], truths[1]), table(part == 0),
                   gene_sets)  # fmt: skip

    @property
    def genes(self) -> np.ndarray:
        """Names of the genes, shape (n_genes,)."""
        return self.train.var_names.to_numpy().astype(str)

    @cached_property
    def scored(self) -> np.ndarray:
        """Mask of the genes that count for each row: not its targets, shape (n_rows, n_genes)."""
        return np.array([~np.isin(self.genes, p.targets) for _, p in self.rows])

    @cached_property
    def controls(self) -> CellSet:
        """The control cells that predictions start from."""
        n = self.control.n_obs
        return CellSet(
            sp.csr_matrix(self.control.X), self.control.obs["library_size"].to_numpy(float),
            np.full(n, -1), self.control.obs["context"].to_numpy(str),
        )  # fmt: skip

    @cached_property
    def trained(self) -> CellSet:
        """The training cells."""
        obs = self.train.obs
        return CellSet(
            sp.csr_matrix(self.train.X), obs["library_size"].to_numpy(float),
            np.full(len(obs), -1), obs["context"].to_numpy(str),
        )  # fmt: skip

    @cached_property
    def control_profiles(self) -> np.ndarray:
        """Training control profile of each row's context, shape (n_rows, n_genes)."""
        return np.stack([self.training.control[SCALE][c] for c, _ in self.rows]).astype(float)

    @cached_property
    def mean_response(self) -> np.ndarray:
        """Mean training effect for each row, shape (n_rows, n_genes)."""
        mean = MeanEffect(SCALE).fit(self.training)
        return mean.predict([p for _, p in self.rows], [c for c, _ in self.rows]).astype(float)

    @cached_property
    def regimes(self) -> list[str]:
        """Regime of each row, by what training measured."""
        anchor = EffectAnchor().fit(self.training)
        return [anchor.regime(p, c) for c, p in self.rows]

    @cached_property
    def e_test(self) -> np.ndarray:
        """Adjusted p-value of each row's cells against the control, by pertpy's E-test."""
        found = np.ones(len(self.rows))
        rng = np.random.default_rng(0)
        for context in sorted({c for c, _ in self.rows}):
            parts, labels = [], []
            for row in (-1, *(i for i, (c, _) in enumerate(self.rows) if c == context)):
                cells = sp.vstack([
                    t.cells.log1p[(t.cells.row == row) & (t.cells.context == context)]
                    for t in self.truths
                ]).tocsr()  # fmt: skip
                some = np.sort(rng.permutation(cells.shape[0])[:E_TEST_CELLS])
                parts.append(self.pca.transform(cells[some]))
                labels += ["control" if row < 0 else str(row)] * len(some)
            for label, p in _e_test(np.vstack(parts), labels).items():
                found[int(label)] = p
        return found

    @cached_property
    def pca(self) -> PCA:
        """Principal components of log1p counts per 10,000 of the training cells."""
        from sklearn.decomposition import PCA

        values = self.trained.log1p
        n = min(50, *(d - 1 for d in values.shape))
        solver = "arpack" if n < min(values.shape) - 1 else "full"
        return PCA(n, svd_solver=solver, random_state=0).fit(
            values if solver == "arpack" else values.toarray()
        )

    @cached_property
    def trained_components(self) -> np.ndarray:
        """The training cells on the components, once for all methods without states of their own."""
        return self.pca.transform(self.trained.log1p)


def _keys(cells: ad.AnnData) -> list[Row]:
    """Context and perturbation of each cell."""
    pairs = zip(cells.obs["context"], cells.obs["perturbation"], strict=True)
    return [(str(c), _read(str(p))) for c, p in pairs]


def _parts(keys: list[Row], split: Split, rows: set[Row]) -> np.ndarray:
    """0 for training, 1 and 2 for the halves of the truth, -1 for cells nobody sees."""
    rng = np.random.default_rng([split.seed, 7])
    part = np.full(len(keys), -1)
    trained = set(split.train)
    groups: dict[Row, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    used, tested = {c for c, _ in (*split.train, *split.test)}, {c for c, _ in rows}
    for key in sorted(groups):
        mine = rng.permutation(groups[key])
        if key in trained:
            part[mine] = 0
        elif key in rows:
            part[mine[::2]], part[mine[1::2]] = 1, 2
        elif key[1].is_control and key[0] in used - tested:
            part[mine] = 0
        elif key[1].is_control and key[0] in tested:
            if len(mine) < MIN_CELLS:
                raise ValueError(
                    f"Context {key[0]!r} has {len(mine)} control cells; at least {MIN_CELLS} are "
                    "needed: half for training, a quarter for each half of the truth."
                )
            part[mine[::2]], part[mine[1::4]], part[mine[3::4]] = 0, 1, 2
    without = sorted(used - {c for c, p in groups if p.is_control})
    if without:
        raise ValueError(
            f"No control cells in context {without}: an effect is a difference from the control "
            "of the same context."
        )
    return part


def _e_test(embedding: np.ndarray, labels: list[str]) -> dict[str, float]:
    """Adjusted p-value of each label but the control's."""
    import pertpy

    cells = ad.AnnData(obs=pd.DataFrame({"row": labels}, index=[str(i) for i in range(len(labels))]),
                       obsm={"X_pca": embedding})  # fmt: skip
    test = pertpy.tl.DistanceTest("edistance", n_perms=E_TEST_PERMUTATIONS, obsm_key="X_pca")
    with _seeded_generators():
        table = test(cells, groupby="row", contrast="control", show_progressbar=False)
    return table["pvalue_adj"].drop("control").to_dict()


@contextmanager
def _seeded_generators() -> Iterator[None]:
    """Pertpy's test takes no seed: it draws every permutation from a new generator."""
    original, stream = np.random.default_rng, np.random.default_rng(0)
    np.random.default_rng = lambda seed=None: stream if seed is None else original(seed)
    try:
        yield
    finally:
        np.random.default_rng = original


def moved(
    cells: CellSet, control: np.ndarray, profile: np.ndarray, rng: np.random.Generator
) -> sp.csr_matrix:
    """Control cells moved by a mean effect: what a prediction of means says about cells.

    Each count is thinned where the rate falls, and joined by Poisson counts where it rises, by the
    ratio of the profiles' rates, so that counts stay integers and cells keep what sets them apart.

    Parameters
    ----------
    cells
        Control cells.
    control, profile
        Control profile and predicted profile, ``mean_log1p``, shape (n_genes,).
    rng
        Where the thinning and the added counts come from.

    Returns
    -------
    scipy.sparse.csr_matrix
        Counts, shape (n_cells, n_genes).
    """
    before, after = np.expm1(control), np.expm1(np.maximum(profile, 0))
    ratio = np.divide(after, before, out=np.ones_like(before), where=before > 0)
    counts = sp.csr_matrix(cells.counts, copy=True)
    kept = np.minimum(ratio, 1)[counts.indices]
    counts.data = rng.binomial(counts.data.astype(np.int64), kept).astype(np.float32)
    # Pooled rates: a profile of zeros in the controls says nothing about a ratio.
    pooled = np.asarray(cells.counts.sum(0)).ravel() / cells.library.sum()
    added = np.where(before > 0, pooled * np.maximum(ratio - 1, 0), after / 1e4)
    rising = np.flatnonzero(added > 0)
    extra = rng.poisson(cells.library[:, None] * added[rising])
    new = sp.csr_matrix(extra.astype(np.float32))
    placed = sp.csr_matrix(
        (new.data, rising[new.indices], new.indptr), shape=counts.shape, dtype=np.float32
    )
    total = sp.csr_matrix(counts + placed)
    total.eliminate_zeros()
    return total
