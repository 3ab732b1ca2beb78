"""A task: one split of one data set, as methods see it and as they are scored."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import scipy.sparse as sp

from gpjepa.datasets import prepare
from gpjepa.effects import EffectAnchor, EffectTable, MeanEffect, Scale, effect_table
from gpjepa.perturbations import Perturbation
from gpjepa.splits import Row, Split

from ._cells import CellSet, measured_rows
from ._tables import no_cells, parts_of_rows, starts, table_of, truth_of

if TYPE_CHECKING:
    from sklearn.decomposition import PCA

VERSION = "2.0.0"
"""Of what methods get and of what they are held against: another one recomputes everything."""
MIN_CELLS = 8
"""A held-out perturbation is tested with at least this many cells: its halves need some each."""
E_TEST_CELLS, E_TEST_PERMUTATIONS = 200, 999  # a group's cells at most, and the permutations
SCALE: Scale = "mean_log1p"


def too_small(cells: ad.AnnData, split: Split) -> dict[Row, int]:
    """Held-out rows with fewer than ``MIN_CELLS`` cells, and how many they have.

    Of effects without cells one row will do, or two, for halves, where any has two.
    """
    n_cells = measured_rows(cells)
    least = MIN_CELLS
    if "unit" in cells.uns:
        least = min(2, max((n_cells.get(r, 0) for r in split.test), default=0))
    return {r: n_cells.get(r, 0) for r in split.test if n_cells.get(r, 0) < least}


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
        return self.table.effect[self.table.scales[0]]


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
    replicated
        Whether the halves of the truth are measurements of their own.
    """

    split: Split
    rows: tuple[Row, ...]
    dropped: dict[Row, int]
    train: ad.AnnData
    control: ad.AnnData
    truths: tuple[Truth, Truth]
    training: EffectTable
    gene_sets: dict[str, set[str]] | None = None
    replicated: bool = True

    @classmethod
    def of(
        cls,
        cells: ad.AnnData,
        split: Split,
        n_genes: int | None = None,
        gene_sets: dict[str, set[str]] | None = None,
    ) -> Task:
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
        if "unit" in cells.uns:
            return cls._of_effects(cells, split, gene_sets)
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
        train = cells[part == 0].copy()
        shown = ["perturbation", "context", "library_size", "batch", "replicate"]
        train.obs = train.obs[[c for c in shown if c in train.obs]]
        is_control = (train.obs["perturbation"] == "control").to_numpy()
        held = train.obs["context"].isin([c for c, _ in rows]).to_numpy()
        return cls(
            split,
            rows,
            dropped,
            train,
            train[is_control & held].copy(),
            (_truth(cells, keys, rows, part == 1), _truth(cells, keys, rows, part == 2)),
            _effects(cells, keys, part == 0),
            gene_sets,
        )

    @classmethod
    def _of_effects(
        cls, values: ad.AnnData, split: Split, gene_sets: dict[str, set[str]] | None
    ) -> Task:
        """As :meth:`of`, of values as :func:`standard_effects` makes them."""
        keys, dropped = _keys(values), too_small(values, split)
        rows = tuple(r for r in split.test if r not in dropped)
        train, *halves = parts_of_rows(keys, split, set(rows), MIN_CELLS)
        training = table_of(values[train])
        if unknown := sorted({c for c, _ in rows} - set(training.contexts)):
            raise ValueError(
                f"Nothing is left to learn from in context {', '.join(map(repr, unknown))}: without "
                "control rows, a context is known by its effects alone."
            )
        truths, whole = [], table_of(values)
        for half in halves:
            table = truth_of(values, keys, half, whole)
            where = {r: i for i, r in enumerate(table.rows)}
            truths.append(Truth(table.subset(np.array([where[r] for r in rows])), no_cells()))
        control = starts(training, rows)
        one, other = truths
        return cls(
            split,
            rows,
            dropped,
            values[train].copy(),
            control,
            (one, other),
            training,
            gene_sets,
            replicated=Counter(keys)[rows[0]] > 1,
        )

    @property
    def scale(self) -> Scale:
        """Scale of the effects: the unit of data without cells."""
        return self.training.scales[0]

    @property
    def has_cells(self) -> bool:
        """Whether it is made of cells, or of effects alone."""
        return "unit" not in self.train.uns

    @property
    def genes(self) -> np.ndarray:
        """Names of the genes, shape (n_genes,)."""
        return self.train.var_names.to_numpy().astype(str)

    @cached_property
    def scored(self) -> np.ndarray:
        """Mask of the genes that count for each row: not its targets, shape (n_rows, n_genes)."""
        return np.array([~np.isin(self.genes, p.targets) for _, p in self.rows])

    @cached_property
    def targeted(self) -> np.ndarray:
        """Mask of the genes that any tested perturbation targets, shape (n_genes,).

        They count nowhere that cells of several perturbations share a space.
        """
        return np.asarray(~self.scored.all(0))

    @cached_property
    def controls(self) -> CellSet:
        """The control cells that predictions start from."""
        return _cell_set(self.control)

    @cached_property
    def trained(self) -> CellSet:
        """The training cells."""
        return _cell_set(self.train)

    @cached_property
    def control_profiles(self) -> np.ndarray:
        """Training control profile of each row's context, shape (n_rows, n_genes)."""
        return np.stack([self.training.control[self.scale][c] for c, _ in self.rows]).astype(float)

    @cached_property
    def mean_response(self) -> np.ndarray:
        """Mean training effect for each row, shape (n_rows, n_genes)."""
        mean = MeanEffect(self.scale).fit(self.training)
        return mean.predict([p for _, p in self.rows], [c for c, _ in self.rows]).astype(float)

    @cached_property
    def regimes(self) -> list[str]:
        """Regime of each row, by what training measured."""
        anchor = EffectAnchor().fit(self.training)
        return [anchor.regime(p, c) for c, p in self.rows]

    @cached_property
    def e_test(self) -> np.ndarray:
        """Adjusted p-value of each row's cells against the control of its context: the E-test.

        Permutations of the energy distance (Peidli et al. 2024) on principal components, without
        the targeted genes; Benjamini–Hochberg over the rows.
        """
        from scipy.stats import false_discovery_control

        rng = np.random.default_rng(0)

        def some(row: int, context: str) -> np.ndarray:
            sets = [
                t.cells.take((t.cells.row == row) & (t.cells.context == context))
                for t in self.truths
            ]
            values = CellSet.stacked(sets).log1p
            few = np.sort(rng.permutation(values.shape[0])[:E_TEST_CELLS])
            return self.components(values[few], self.targeted)

        control = {c: some(-1, c) for c in sorted({c for c, _ in self.rows})}
        p = [_e_test(control[c], some(i, c), rng) for i, (c, _) in enumerate(self.rows)]
        return false_discovery_control(p)

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

    def components(self, values: sp.csr_matrix, without: np.ndarray) -> np.ndarray:
        """Principal components of cells with nothing of some genes, shape (n_cells, n_components).

        Parameters
        ----------
        values
            log1p counts per 10,000.
        without
            Mask of the genes that must not count, shape (n_genes,).
        """
        return self.pca.transform(sp.csr_matrix(values @ sp.diags((~without).astype(np.float32))))

    @cached_property
    def trained_components(self) -> np.ndarray:
        """The training cells on the components, once for all methods without states of their own."""
        return self.components(self.trained.log1p, self.targeted)


def _keys(cells: ad.AnnData) -> list[Row]:
    """Context and perturbation of each cell."""
    read = {p: Perturbation.parse(str(p)) for p in cells.obs["perturbation"].unique()}
    pairs = zip(cells.obs["context"], cells.obs["perturbation"], strict=True)
    return [(str(c), read[p]) for c, p in pairs]


def effects_of(cells: ad.AnnData) -> EffectTable:
    """Mean effects of the training cells of a task, within batches where the data name them."""
    if "unit" in cells.uns:
        return table_of(cells)
    return _effects(cells, _keys(cells), np.ones(cells.n_obs, bool))


def _effects(cells: ad.AnnData, keys: list[Row], keep: np.ndarray) -> EffectTable:
    library = cells.obs["library_size"].to_numpy(float)
    contexts, perturbations = [c for c, _ in keys], [p for _, p in keys]
    batches, replicates = (
        cells.obs[key].astype(str).tolist() if key in cells.obs else None
        for key in ("batch", "replicate")
    )
    with warnings.catch_warnings():  # a half may lack controls of a batch that the data have
        warnings.simplefilter("ignore", UserWarning)
        return effect_table(
            cells.X,
            library,
            perturbations,
            contexts,
            cells.var_names,
            keep,
            batches=batches,
            replicates=replicates,
        )


def _truth(cells: ad.AnnData, keys: list[Row], rows: tuple[Row, ...], part: np.ndarray) -> Truth:
    """A half of the held-out cells, of the tested contexts."""
    mine = part & np.isin([c for c, _ in keys], [c for c, _ in rows])
    measured = _effects(cells, keys, mine)
    where, index = ({r: i for i, r in enumerate(x)} for x in (measured.rows, rows))
    found = _cell_set(cells[mine], np.array([index.get(k, -1) for k in keys])[mine])
    return Truth(measured.subset(np.array([where[r] for r in rows])), found)


def _cell_set(cells: ad.AnnData, row: np.ndarray | None = None) -> CellSet:
    obs = cells.obs
    return CellSet(
        sp.csr_matrix(cells.X),
        obs["library_size"].to_numpy(float),
        np.full(cells.n_obs, -1) if row is None else row,
        obs["context"].to_numpy(str),
        obs["cell_type"].to_numpy(str) if "cell_type" in obs else None,
    )


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


def _e_test(control: np.ndarray, perturbed: np.ndarray, rng: np.random.Generator) -> float:
    """p-value of the energy distance of two samples, shapes (n, d) and (m, d), by permutation."""
    from sklearn.metrics import pairwise_distances

    distance = pairwise_distances(np.vstack([control, perturbed]))
    n, m = len(control), len(perturbed)
    first = np.arange(n + m) < n
    # A column per permutation, that of the labels as they are first.
    labels = np.stack([first, *(rng.permutation(first) for _ in range(E_TEST_PERMUTATIONS))], 1)
    ours, other = labels.astype(float), (~labels).astype(float)
    among, between = distance @ ours, distance @ other
    energy = (
        2 * (other * among).sum(0) / (n * m)
        - (ours * among).sum(0) / n**2
        - (other * between).sum(0) / m**2
    )
    return float((energy >= energy[0] * (1 - 1e-12)).mean())
