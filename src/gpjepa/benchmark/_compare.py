"""Hold perturbations or a context out, train, predict, and set the baselines beside it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd

from gpjepa._checks import check_anndata, check_columns, check_layer, text_of
from gpjepa.effects import (
    Additive,
    EffectTable,
    MeanEffect,
    NoChange,
    Scale,
    effect_table,
    noise_corrected_error,
)
from gpjepa.perturbations import LabelReader, LabelWarning, Perturbation

from ._measures import correlation, r2_top

if TYPE_CHECKING:
    from gpjepa.model import GPJEPA

REPLICATE = "replicate"
MODEL = "GP-JEPA"
COMPARED = ("pearson_delta", "r2_top20")
"""Metrics beside the squared error; their declarations are in ``METRICS``."""


@dataclass(frozen=True)
class Comparison:
    """What a held-out comparison found.

    Attributes
    ----------
    model
        The model, trained without what was held out.
    predicted
        Predicted cells of the held-out perturbations.
    scores
        One row per method × context × held-out perturbation, with every metric.
    effects
        Per method, predicted effects, shape (n_rows, n_genes); ``"measured"`` is the truth.
    sd
        Standard deviation of the model's mean effects, shape (n_rows, n_genes).
    rows
        The held-out (context, perturbation) of each row.
    genes
        Names of the genes.
    """

    model: GPJEPA
    predicted: ad.AnnData
    scores: pd.DataFrame
    effects: dict[str, np.ndarray]
    sd: np.ndarray
    rows: list[tuple[str, str]]
    genes: np.ndarray

    def effects_of(self, row: int) -> pd.DataFrame:
        """Effects of one held-out perturbation, for :mod:`gpjepa.plotting`.

        Parameters
        ----------
        row
            Which of ``rows``.

        Returns
        -------
        pandas.DataFrame
            One row per gene: ``gene``, the effect by each method and ``measured``, and the model's
            ``sd``.
        """
        each = {name: effect[row] for name, effect in self.effects.items()}
        return pd.DataFrame({"gene": self.genes, **each, "sd": self.sd[row]})

    def title(self, row: int) -> str:
        """What figures call one of the held-out rows."""
        context, perturbation = self.rows[row]
        return perturbation + ("" if context == "all" else f" in {context}")

    @property
    def table(self) -> pd.DataFrame:
        """One row per method: error relative to no change (ratio of sums), means of the others."""
        by_method = self.scores.groupby("method", sort=False)
        error = by_method["squared_error"].sum()
        table = by_method[list(COMPARED)].mean()
        table.insert(0, "relative_error", error / error["no change"])
        return table


def compare(
    adata: ad.AnnData,
    hold_out: Sequence[str] | None = None,
    *,
    hold_out_context: str | None = None,
    seed: int = 0,
    setup: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
) -> Comparison:
    """Train without some perturbations, predict them, and set simple baselines beside it.

    Control cells are split in half: training sees one half, what was measured is a difference
    from the other, so that no method is rewarded for knowing the noise of the controls. Targeted
    genes are left out of the scores.

    Parameters
    ----------
    adata
        Cells with raw counts.
    hold_out
        Labels of the perturbations to hold out, in all contexts.
    hold_out_context
        Context whose perturbed cells are held out instead; half of its controls stay.
    seed
        Seed of the halves and of training.
    setup
        Arguments of :meth:`gpjepa.GPJEPA.setup_anndata`.
    model
        Arguments of :class:`gpjepa.GPJEPA`, such as ``target_features``.
    train
        Arguments of :meth:`gpjepa.GPJEPA.train`.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        If a label or the context does not occur, or nothing is left to train on.
    """
    import scvi

    from gpjepa.model import GPJEPA

    setup = setup or {}
    if isinstance(hold_out, str):
        raise TypeError(f"hold_out={hold_out!r} is one label; give a list of labels.")
    hold_out = None if hold_out is None else list(hold_out)
    check_anndata(adata)
    check_layer(adata, setup.get("layer"))
    adata, labels, contexts, reader, said = _labels(adata, setup)
    setup = {**setup, "targets": sorted(reader.declared)}  # also those that only test cells have
    test = _held_out(labels, contexts, reader, hold_out, hold_out_context, said)
    rng = np.random.default_rng(seed)
    kept, other = _control_halves(labels, contexts, rng)
    scvi.settings.seed = seed
    trained = adata[~test & ~other].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LabelWarning)  # the whole data were warned of
        GPJEPA.setup_anndata(trained, **setup)
    fitted = GPJEPA(trained, **(model or {}))
    wanted = sorted({labels[i] for i in np.flatnonzero(test)})
    for perturbation in wanted:
        fitted.vocabulary.check(perturbation)
    alone = {p.targets[0] for p, out in zip(labels, test, strict=True)
             if len(p.targets) == 1 and not out}  # fmt: skip
    fitted.new_anchor().check(wanted, alone)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        fitted.train(**(train or {}))

    held_contexts = sorted({contexts[i] for i in np.flatnonzero(test)})
    cells = adata[test | other].copy()
    measured = _table(fitted, cells)
    keep = np.array([(c in held_contexts and p in set(wanted)) for c, p in measured.rows])
    measured = measured.subset(keep)
    effects, sd = _predictions(fitted, measured)
    effects[REPLICATE], replicate = _replicate(fitted, cells, measured, rng)
    predicted = fitted.predict_perturbation(
        adata[kept].copy(), [said[p] for p in wanted], context=held_contexts, seed=seed
    )
    return Comparison(
        fitted, predicted, _scores(fitted, effects, measured, replicate, said),
        {**effects, "measured": measured.effect["mean_log1p"]}, sd,
        [(c, said[p]) for c, p in measured.rows], fitted.genes,
    )  # fmt: skip


def _labels(
    adata: ad.AnnData, setup: dict
) -> tuple[ad.AnnData, list[Perturbation], list[str], LabelReader, dict[Perturbation, str]]:
    """The cells that can be used, their perturbations and contexts, and what reads and says them."""
    key, context = setup.get("perturbation_key", "perturbation"), setup.get("context_key")
    if key is None:
        raise ValueError("A comparison needs perturbations: perturbation_key=None has none.")
    dosage = setup.get("dosage_key")
    check_columns(adata, {"perturbation_key": key, "context_key": context, "dosage_key": dosage})
    reader = LabelReader.from_setup(setup).checked(adata.obs[key], genes=adata.var_names)
    read = reader.read_cells(adata.obs[key], None if dosage is None else adata.obs[dosage])
    use = np.array([p is not None for p in read])
    if setup.get("library_size_key") is None:
        layer = setup.get("layer") or ("counts" if "counts" in adata.layers else None)
        total = np.asarray((adata.X if layer is None else adata.layers[layer]).sum(1)).ravel()
        use &= total > 0  # as set-up does, which tells of them
    said = reader.spellings(adata.obs[key], None if dosage is None else adata.obs[dosage])
    adata = adata if use.all() else adata[use]
    labels = [p for p, keep in zip(read, use, strict=True) if p is not None and keep]
    contexts = ["all"] * adata.n_obs if context is None else text_of(adata.obs[context]).tolist()
    return adata, labels, contexts, reader, said


def _held_out(
    labels: list[Perturbation], contexts: list[str], reader: LabelReader,
    hold_out: Sequence[str] | None, context: str | None, said: dict[Perturbation, str],
) -> np.ndarray:  # fmt: skip
    if (not hold_out) == (context is None):
        raise ValueError("Say what to hold out: either perturbations or one context.")
    perturbed = np.array([not p.is_control for p in labels])
    if context is not None:
        test = perturbed & np.array([c == str(context) for c in contexts])
        if not test.any():
            raise ValueError(
                f"No perturbed cells in context {context!r}; contexts are {sorted(set(contexts))}."
            )
    else:
        by_text = {text: p for p, text in said.items()}
        asked = {label: by_text.get(label) or reader.read(label) for label in hold_out or ()}
        wanted = set(asked.values())
        missing = [label for label, p in asked.items() if p not in set(labels)]
        if missing:
            raise ValueError(f"Cannot hold out {missing}: no cell has that perturbation.")
        if any(p is None or p.is_control for p in wanted):
            raise ValueError("Cannot hold out the control: every effect is measured against it.")
        test = np.array([p in wanted for p in labels])
    n_cells = Counter((labels[i], contexts[i]) for i in np.flatnonzero(test))
    lone = sorted(f"{said[p]} in {c}" for (p, c), n in n_cells.items() if n < 2)
    if lone:
        raise ValueError(f"Cannot hold out {lone}: a single cell shows no sampling error.")
    if not (perturbed & ~test).any():
        raise ValueError("Nothing is left to train on: every perturbed cell is held out.")
    return test


def _control_halves(
    labels: list[Perturbation], contexts: list[str], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the control cells that training sees, and of those it does not."""
    halves = np.zeros((2, len(labels)), bool)
    control = np.array([p.is_control for p in labels])
    context = np.array(contexts, dtype=object)
    for name in sorted(set(contexts)):
        mine = rng.permutation(np.flatnonzero(control & (context == name)))
        if len(mine) < 4:
            raise ValueError(f"Context {name!r} has {len(mine)} control cells; at least 4 needed.")
        halves[0, mine[: len(mine) // 2]] = True
        halves[1, mine[len(mine) // 2 :]] = True
    return halves[0], halves[1]


def _table(model: GPJEPA, cells: ad.AnnData) -> EffectTable:
    read = model._query_cells(cells)
    return effect_table(
        read.counts, read.library, read.each_perturbation, read.contexts, model.genes
    )


def _predictions(model: GPJEPA, measured: EffectTable) -> tuple[dict[str, np.ndarray], np.ndarray]:
    contexts, perturbations = [c for c, _ in measured.rows], [p for _, p in measured.rows]
    training = model.anchor.effects_
    own = [model.predict_effects(p, c) for c, p in measured.rows]
    effects = {MODEL: np.stack([frame["effect"].to_numpy() for frame in own])}
    for name, baseline in (
        ("additive", Additive()), ("mean", MeanEffect()), ("no change", NoChange())
    ):  # fmt: skip
        effects[name] = baseline.fit(training).predict(perturbations, contexts)
    return effects, np.stack([frame["sd"].to_numpy() for frame in own])


def _replicate(
    model: GPJEPA, cells: ad.AnnData, measured: EffectTable, rng: np.random.Generator
) -> tuple[np.ndarray, EffectTable]:
    """Half of the held-out cells as a prediction of the other half."""
    read = model._query_cells(cells)
    perturbations = read.each_perturbation
    keys = pd.Series(list(zip(read.contexts, perturbations, strict=True)))
    order = rng.permutation(len(keys))
    rank = keys.iloc[order].groupby(keys.iloc[order]).cumcount().sort_index().to_numpy()
    tables = []
    for half in (0, 1):
        table = effect_table(
            read.counts, read.library, perturbations, read.contexts, model.genes, rank % 2 == half
        )
        where = {row: i for i, row in enumerate(table.rows)}
        tables.append(table.subset(np.array([where[row] for row in measured.rows])))
    return tables[0].effect["mean_log1p"], tables[1]


def _scores(
    model: GPJEPA,
    effects: dict[str, np.ndarray],
    measured: EffectTable,
    replicate: EffectTable,
    said: dict[Perturbation, str],
) -> pd.DataFrame:
    scale: Scale = "mean_log1p"
    rows = []
    for method, predicted in effects.items():
        truth = replicate if method == REPLICATE else measured
        noise = truth.noise(scale)
        for i, (context, perturbation) in enumerate(truth.rows):
            scored = ~np.isin(model.genes, perturbation.targets)
            own, true = predicted[i][scored], truth.effect[scale][i][scored]
            sampling = noise[i][scored]
            error = noise_corrected_error(own[None], true[None], sampling[None])
            control = truth.control[scale][context][scored]
            rows.append(
                {
                    "method": method, "context": context, "perturbation": said[perturbation],
                    "regime": model.anchor.regime(perturbation, context),
                    "squared_error": float(error[0]), "pearson_delta": correlation(own, true),
                    "r2_top20": r2_top(own, true, sampling, control),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)
