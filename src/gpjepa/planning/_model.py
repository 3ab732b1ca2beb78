"""What planning asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from gpjepa._checks import check_anndata, raw_counts
from gpjepa.effects import Baseline, EffectAnchor, EffectTable, PairSums, Scale, log1p_rates
from gpjepa.perturbations import Perturbation
from gpjepa.response import ResponsePredictor

Pair = tuple[Perturbation, str]


class Joint(Protocol):
    """Effects of some pairs of perturbation and context together."""

    def draws(self, n: int, seed: int = 0) -> Iterator[np.ndarray]:
        """Draws of all effects, each of shape (n_pairs, n_genes)."""

    def shares(self) -> dict[str, np.ndarray]:
        """Share of each source of doubt in the variance, shape (n_pairs,) each."""


class Predicted(Protocol):
    """Effects of some perturbations."""

    @property
    def mean(self) -> np.ndarray:
        """Shape (n, n_genes)."""

    @property
    def variance(self) -> np.ndarray:
        """Shape (n, n_genes)."""

    @property
    def regime(self) -> list[str]:
        """What was known of each."""


@runtime_checkable
class EffectModel(Protocol):
    """A model of mean effects, as planning sees it.

    Attributes
    ----------
    genes
        Names of the genes, shape (n_genes,).
    unit
        Scale of the effects, such as ``"mean_log1p"``.
    contexts
        Contexts that can be asked for.
    """

    genes: np.ndarray
    unit: str
    contexts: list[str]

    def control(self, context: str) -> np.ndarray | None:
        """Profile of the control, shape (n_genes,); None if it is not known."""

    def measured(self, context: str) -> list[Perturbation]:
        """What was measured in a context."""

    def parse(self, wanted: Sequence[str | Perturbation]) -> dict[Perturbation, str]:
        """Perturbations that can be predicted, and what results call them; others are refused."""

    def predict(self, perturbations: Sequence[Perturbation], context: str) -> Predicted:
        """Mean effects and their variance."""

    def joint(self, pairs: Sequence[Pair]) -> Joint:
        """Effects with errors that go together."""

    def pair_sums(self, targets: Sequence[Perturbation], context: str) -> PairSums | None:
        """The linear part of all pairs of some targets; None if the model has none."""

    def log1p_counts(self, cells: AnnData) -> sp.csr_matrix:
        """Log1p counts per 10,000 of the model's genes in some cells, shape (n_cells, n_genes)."""


class OfPredictor:
    """A response predictor, or an anchor alone, for planning.

    Parameters
    ----------
    predictor
        Fitted.
    parse
        Reads what was asked for; by default labels such as ``"A+B"``.
    log1p_counts
        Reads cells; by default ``layers["counts"]`` if there, else ``X``, over the sum of the
        model's genes.
    scale
        Scale of the effects; the table's first by default.
    """

    def __init__(
        self,
        predictor: ResponsePredictor | EffectAnchor,
        parse: Callable[[Sequence[str | Perturbation]], dict[Perturbation, str]] | None = None,
        log1p_counts: Callable[[AnnData], sp.csr_matrix] | None = None,
        scale: Scale | None = None,
    ) -> None:
        self._predictor = predictor
        self._anchor = predictor if isinstance(predictor, EffectAnchor) else predictor.anchor_
        self.effects: EffectTable = self._anchor.effects_
        self.genes = self.effects.genes.astype(str)
        self.unit = self.effects.scales[0] if scale is None else self.effects.check_scale(scale)
        self.contexts = self.effects.contexts
        self._parse, self._log1p_counts = parse, log1p_counts

    def control(self, context: str) -> np.ndarray | None:
        if not self.effects.has_controls:
            return None
        return self.effects.control[self.unit][context].astype(float)

    def measured(self, context: str) -> list[Perturbation]:
        return [p for c, p in self.effects.rows if c == context]

    def parse(self, wanted: Sequence[str | Perturbation]) -> dict[Perturbation, str]:
        found = _read(wanted) if self._parse is None else self._parse(wanted)
        self._anchor.check(list(found))
        return found

    def predict(self, perturbations: Sequence[Perturbation], context: str) -> Predicted:
        contexts = [context] * len(perturbations)
        return self._predictor.predict(perturbations, contexts, self.unit)

    def joint(self, pairs: Sequence[Pair]) -> Joint:
        perturbations, contexts = [p for p, _ in pairs], [c for _, c in pairs]
        return self._predictor.joint(perturbations, contexts, self.unit)

    def pair_sums(self, targets: Sequence[Perturbation], context: str) -> PairSums | None:
        return self._anchor.pair_sums(targets, context, self.unit)

    def unknown(
        self, perturbations: Sequence[Perturbation], context: str
    ) -> tuple[np.ndarray, float]:
        """See :meth:`gpjepa.effects.EffectAnchor.unknown`."""
        return self._anchor.unknown(perturbations, context, self.unit)

    def cell_variance(self, context: str) -> np.ndarray:
        """Sampling variance of one cell around the mean of its perturbation, shape (n_genes,)."""
        rows = [i for i, (c, _) in enumerate(self.effects.rows) if c == context]
        variance = self.effects.variance[self.unit][rows].astype(float)
        return np.average(variance * self.effects.n_cells[rows, None], axis=0)

    def log1p_counts(self, cells: AnnData) -> sp.csr_matrix:
        read = self._log1p_counts or (lambda cells: _log1p(cells, self.genes))
        return read(cells)


@dataclass(frozen=True)
class _Stated:
    """Effects as stated, with errors that are independent of each other."""

    mean: np.ndarray
    variance: np.ndarray
    regime: list[str]

    def draws(self, n: int, seed: int = 0) -> Iterator[np.ndarray]:
        rng, sd = np.random.default_rng(seed), np.sqrt(self.variance)
        return (self.mean + sd * rng.normal(size=self.mean.shape) for _ in range(n))

    def shares(self) -> dict[str, np.ndarray]:
        return {}


class OfFunction:
    """Any function from perturbations to mean effects, for planning.

    Parameters
    ----------
    function
        Called with a list of perturbations and a context. Gives effects, shape (n, n_genes), or a
        pair of these and their standard deviations. Without, nothing is said of what is unknown.
    genes
        Names of the genes.
    measured
        What was measured, by context; the default candidates are made of it.
    control
        Profiles of the control by context, shape (n_genes,) each, for goals that are given as cells.
    unit
        Scale of the effects.
    """

    def __init__(
        self,
        function: Callable[[list[Perturbation], str], Any],
        genes: Sequence[str] | np.ndarray,
        measured: Mapping[str, Sequence[str | Perturbation]],
        control: Mapping[str, np.ndarray] | None = None,
        unit: str = "mean_log1p",
    ) -> None:
        self._function, self._control = function, control
        self._measured = {c: list(_read(mine)) for c, mine in measured.items()}
        self.genes, self.unit, self.contexts = np.asarray(genes).astype(str), unit, list(measured)

    @classmethod
    def of_baseline(cls, baseline: Baseline) -> OfFunction:
        """One of the fitted baselines of :mod:`gpjepa.effects`."""
        effects = baseline.effects_

        def function(perturbations: list[Perturbation], context: str) -> np.ndarray:
            return baseline.predict(perturbations, [context] * len(perturbations))

        measured = {c: [p for d, p in effects.rows if d == c] for c in effects.contexts}
        control = effects.control[baseline.scale] if effects.has_controls else None
        return cls(function, effects.genes, measured, control, baseline.scale)

    def control(self, context: str) -> np.ndarray | None:
        return None if self._control is None else np.asarray(self._control[context], float)

    def measured(self, context: str) -> list[Perturbation]:
        return self._measured[context]

    def parse(self, wanted: Sequence[str | Perturbation]) -> dict[Perturbation, str]:
        return _read(wanted)

    def predict(self, perturbations: Sequence[Perturbation], context: str) -> _Stated:
        found = self._function(list(perturbations), context)
        mean, sd = found if isinstance(found, tuple) else (found, np.zeros(np.shape(found)))
        if np.shape(mean) != (len(perturbations), len(self.genes)) or np.shape(sd) != np.shape(
            mean
        ):
            raise ValueError(
                f"The function gave effects of shape {np.shape(mean)} and standard deviations of "
                f"shape {np.shape(sd)}, for {len(perturbations)} perturbations and "
                f"{len(self.genes)} genes."
            )
        known = set(self.measured(context))
        targets = {t for p in known for t in p.targets}
        regime = [
            "seen" if p in known else "seen2" if targets.issuperset(p.targets) else "unseen"
            for p in perturbations
        ]
        return _Stated(np.asarray(mean, float), np.asarray(sd, float) ** 2, regime)

    def joint(self, pairs: Sequence[Pair]) -> _Stated:
        mean, variance = (np.zeros((len(pairs), len(self.genes))) for _ in range(2))
        regime = [""] * len(pairs)
        for context in {c for _, c in pairs}:
            mine = [i for i, (_, c) in enumerate(pairs) if c == context]
            found = self.predict([pairs[i][0] for i in mine], context)
            mean[mine], variance[mine] = found.mean, found.variance
            for i, said in zip(mine, found.regime, strict=True):
                regime[i] = said
        return _Stated(mean, variance, regime)

    def pair_sums(self, targets: Sequence[Perturbation], context: str) -> None:
        return None

    def log1p_counts(self, cells: AnnData) -> sp.csr_matrix:
        return _log1p(cells, self.genes)


def as_model(model: Any) -> EffectModel:
    """A model as planning sees it.

    Parameters
    ----------
    model
        A trained :class:`gpjepa.GPJEPA`, a fitted :class:`gpjepa.response.ResponsePredictor`,
        :class:`gpjepa.effects.EffectAnchor` or baseline, or anything with the methods of
        :class:`EffectModel`, such as :class:`OfFunction`.
    """
    if isinstance(model, ResponsePredictor | EffectAnchor):
        return OfPredictor(model)
    if isinstance(model, Baseline):
        return OfFunction.of_baseline(model)
    if isinstance(model, EffectModel):
        return model
    if type(model).__name__ == "GPJEPA":
        return OfPredictor(model.mean_effects, model.parse, model.log1p_counts)
    raise TypeError(
        f"{type(model).__name__} is no model that planning knows: give a trained GPJEPA, a fitted "
        "ResponsePredictor, EffectAnchor or baseline, or planning.OfFunction(...)."
    )


def check_context(model: EffectModel, context: str | None) -> str:
    """The context that was asked for, or the only one."""
    if context is None:
        if len(model.contexts) > 1:
            raise ValueError(f"Say in which context: context= one of {model.contexts}.")
        return model.contexts[0]
    if context not in model.contexts:
        raise ValueError(f"Unknown context {context!r}; known are {model.contexts}.")
    return context


def check_genes(model: EffectModel, genes: Sequence[str], what: str) -> np.ndarray:
    """Places of genes, which must all be known."""
    at = pd.Index(model.genes).get_indexer(pd.Index([str(g) for g in genes]))
    if (at < 0).any():
        unknown = [g for g, i in zip(genes, at, strict=True) if i < 0]
        raise ValueError(
            f"{len(unknown)} of {len(at)} genes of {what} are not among the {len(model.genes)} genes "
            f"of the model: {', '.join(map(str, unknown[:5]))}{' ...' * (len(unknown) > 5)}. Leave "
            "them out, or use the names of the model's genes."
        )
    return at


def _log1p(cells: AnnData, genes: np.ndarray) -> sp.csr_matrix:
    check_anndata(cells)
    at = pd.Index(cells.var_names.astype(str)).get_indexer(pd.Index(genes))
    if (at < 0).any():
        missing = genes[at < 0]
        raise ValueError(
            f"The cells lack {len(missing)} of the model's {len(genes)} genes, such as "
            f"{', '.join(missing[:5])}."
        )
    counts = raw_counts(cells, "counts" if "counts" in cells.layers else None)[:, at]
    library = np.asarray(counts.sum(1), float).ravel()
    if not (library > 0).all():
        raise ValueError("Some cells have no counts of the model's genes; leave them out.")
    return log1p_rates(counts, library)


def _read(wanted: Sequence[str | Perturbation]) -> dict[Perturbation, str]:
    found: dict[Perturbation, str] = {}
    for each in wanted:
        perturbation = Perturbation.parse(each) if isinstance(each, str) else each
        found.setdefault(perturbation, str(each).strip())
    return found
