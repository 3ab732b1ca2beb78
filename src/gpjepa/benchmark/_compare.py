"""Hold perturbations or a context out, train, predict, and set the baselines beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd

from gpjepa.effects import EffectAnchor
from gpjepa.perturbations import LabelReader, Perturbation, Vocabulary, choose_features
from gpjepa.splits import Row, Split

from .methods import METHODS, Prediction, make_method, oracle, predict_rows
from .metrics import Scoring, score
from .tasks import MIN_CELLS, Task, measured_rows, standard_cells

if TYPE_CHECKING:
    from gpjepa.model import GPJEPA

MODEL, REPLICATE = "GP-JEPA", "replicate"
BASELINES = ("additive", "mean", "no change")
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
        One row per method × context × held-out perturbation, with every metric: the mean over both
        halves of the held-out cells.
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

    One split of the benchmark, with its protocol: half of the control cells are for training, a
    quarter for each half of the held-out cells, and targeted genes do not count.

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
        If a label or the context does not occur, too few cells are held out, or nothing is left to
        train on.
    UnknownTargetError
        If nothing is known of a target that is held out.
    """
    setup = setup or {}
    if isinstance(hold_out, str):
        raise TypeError(f"hold_out={hold_out!r} is one label; give a list of labels.")
    if setup.get("perturbation_key", "perturbation") is None:
        raise ValueError("A comparison needs perturbations: perturbation_key=None has none.")
    cells = standard_cells(adata, **setup)
    task = Task.of(cells, _split(adata, cells, setup, hold_out, hold_out_context, seed))
    _check_size(task)
    defaults = {"targets": (), "target_features": "auto", "missing_features": None}
    model = {**defaults, **(model or {})}
    _check_known(task, model, setup.get("targets") or ())
    fitted = make_method(MODEL, (), seed, {"gates": ["auto"], "model": model, "train": train})
    fitted.fit(task.train.copy(), task.split)
    found = {MODEL: predict_rows(fitted, task, MODEL)[MODEL]}
    for name in BASELINES:
        method = METHODS[name].make((), seed, {})
        method.fit(task.train, task.split)
        found[name] = predict_rows(method, task, name)[name]
    halves = {name: (one, one) for name, one in found.items()}
    halves[REPLICATE] = (oracle(REPLICATE, task, 0), oracle(REPLICATE, task, 1))
    inner: GPJEPA = fitted.model_  # type: ignore[attr-defined]
    predicted = inner.predict_perturbation(
        task.control,
        sorted({p for _, p in task.rows}),
        context=sorted({c for c, _ in task.rows}),
        seed=seed,
    )
    effects = {name: each[0].effect for name, each in halves.items()}
    sd = found[MODEL].sd
    assert sd is not None
    return Comparison(
        inner,
        predicted,
        _scores(task, halves),
        {**effects, "measured": _measured(task)},
        sd,
        [(c, str(p)) for c, p in task.rows],
        task.genes,
    )


def _split(
    adata: ad.AnnData,
    cells: ad.AnnData,
    setup: dict[str, Any],
    hold_out: Sequence[str] | None,
    context: str | None,
    seed: int,
) -> Split:
    """What is asked to be held out, as a split of the benchmark."""
    if (not hold_out) == (context is None):
        raise ValueError("Say what to hold out: either perturbations or one context.")
    rows = list(measured_rows(cells))
    if context is not None:
        test = [r for r in rows if r[0] == str(context)]
        if not test:
            known = sorted(cells.obs["context"].unique())
            raise ValueError(f"No perturbed cells in context {context!r}; contexts are {known}.")
    else:
        wanted = _wanted(adata, setup, list(hold_out or ()), rows)
        test = [r for r in rows if r[1] in wanted]
    train = [r for r in rows if r not in set(test)]
    if not train:
        raise ValueError("Nothing is left to train on: every perturbed cell is held out.")
    return Split("compared", "compared", tuple(train), tuple(test), seed)


def _wanted(
    adata: ad.AnnData, setup: dict[str, Any], labels: list[str], rows: list[Row]
) -> set[Perturbation]:
    """The perturbations of labels, as the data or we write them."""
    column = adata.obs[setup.get("perturbation_key", "perturbation")]
    reader = LabelReader.from_setup(setup).checked(column, genes=adata.var_names)
    known, found = {p for _, p in rows}, {}
    for label in labels:
        read = reader.read(label)
        found[label] = read if read in known or read is None else Perturbation.parse(label)
        if found[label] is None or (read is not None and read.is_control):
            raise ValueError("Cannot hold out the control: every effect is measured against it.")
    missing = [label for label, p in found.items() if p not in known]
    if missing:
        raise ValueError(f"Cannot hold out {missing}: no cell has that perturbation.")
    return {p for p in found.values() if p is not None}


def _check_size(task: Task) -> None:
    if task.dropped:
        few = [f"{p} in {c} ({n} cells)" for (c, p), n in sorted(task.dropped.items())]
        raise ValueError(
            f"Cannot hold out {few}: at least {MIN_CELLS} cells are needed, as each half of them "
            "is held against a prediction."
        )


def _check_known(task: Task, model: dict[str, Any], declared: Sequence[str]) -> None:
    """Refuse targets of which nothing is known, as predictions would after the training."""
    trained = [p for _, p in task.split.train]
    perturbed = [t for p in trained for t in p.targets]
    chosen = choose_features(model["target_features"], model["missing_features"], perturbed)
    anchor = EffectAnchor(*chosen)
    named = [*map(str, task.genes), *model["targets"], *declared]
    known = Vocabulary(perturbed, named, anchor.features)
    wanted = sorted({p for _, p in task.rows})
    for perturbation in wanted:
        known.check(perturbation)
    anchor.check(wanted, {p.targets[0] for p in trained if len(p.targets) == 1})


def _measured(task: Task) -> np.ndarray:
    """Effects of all held-out cells: those of the two halves, weighted by their cells."""
    n = np.stack([t.table.n_cells for t in task.truths]).astype(float)
    return np.einsum("hr,hrg->rg", n / n.sum(0), np.stack([t.effect for t in task.truths]))


def _scores(task: Task, halves: dict[str, tuple[Prediction, Prediction]]) -> pd.DataFrame:
    frames = []
    for name, each in halves.items():
        both = [
            score(Scoring(task, truth, predicted), ("squared_error", *COMPARED))
            for truth, predicted in zip(task.truths, each, strict=True)
        ]
        about = {"method": name, "context": [c for c, _ in task.rows]}
        about |= {"perturbation": [str(p) for _, p in task.rows], "regime": task.regimes}
        frames.append(
            pd.concat([pd.DataFrame(about), pd.concat(both).groupby(level=0).mean()], axis=1)
        )
    return pd.concat(frames, ignore_index=True)
