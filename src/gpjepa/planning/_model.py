"""What planning asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from zlib import crc32

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from sklearn.exceptions import NotFittedError

from gpjepa._checks import check_anndata, check_columns, check_library, raw_counts
from gpjepa.effects import (
    PER,
    Baseline,
    EffectAnchor,
    EffectTable,
    PairSums,
    Regimes,
    log1p_rates,
)
from gpjepa.perturbations import Perturbation
from gpjepa.response import ResponsePredictor

Pair = tuple[Perturbation, str]
_ROUNDING = 0.02  # pooled rates and their logarithms are kept in single precision


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

    :func:`design` without a goal and :func:`power` ask for more, which :class:`OfPredictor` has.

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
        Reads cells; by default ``layers["counts"]`` if there, else ``X``.
    library_size_key
        Column of ``obs`` with the counts of the whole cell, if effects were measured with these; by
        default the sum of the model's genes.
    """

    def __init__(
        self,
        predictor: ResponsePredictor | EffectAnchor,
        parse: Callable[[Sequence[str | Perturbation]], dict[Perturbation, str]] | None = None,
        log1p_counts: Callable[[AnnData], sp.csr_matrix] | None = None,
        library_size_key: str | None = None,
    ) -> None:
        self._predictor = predictor
        self._anchor = predictor if isinstance(predictor, EffectAnchor) else predictor.anchor_
        if not hasattr(self._anchor, "effects_"):
            raise NotFittedError(
                f"The {type(predictor).__name__} is not fitted yet: call fit() first."
            )
        self.effects: EffectTable = self._anchor.effects_
        self.genes = self.effects.genes.astype(str)
        self.unit = self.effects.scales[0]
        self.contexts = self.effects.contexts
        self._parse, self._log1p_counts, self._key = parse, log1p_counts, library_size_key

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
        if not rows:
            raise ValueError(
                f"Nothing was measured in {context}: how much cells vary is not known."
            )
        variance = self.effects.variance[self.unit][rows].astype(float)
        return np.average(variance * self.effects.n_cells[rows, None], axis=0)

    def log1p_counts(self, cells: AnnData) -> sp.csr_matrix:
        if self._log1p_counts is not None:
            return self._log1p_counts(cells)
        if self._key is None and not self._of_sums:
            raise ValueError(
                "The effects were measured with other library sizes than the sums of the model's "
                "genes. Say where these are: planning.OfPredictor(model, library_size_key=...)."
            )
        return _log1p(cells, self.genes, self._key)

    @property
    def _of_sums(self) -> bool:
        """Whether rates of the controls add up to the whole: library sizes are sums of these genes."""
        pooled = self.effects.control.get("log1p_mean")
        if pooled is None:
            return True
        totals = [np.expm1(p.astype(float)).sum() / PER for p in pooled.values()]
        return bool(np.allclose(totals, 1, atol=_ROUNDING))


@dataclass(frozen=True)
class _Stated:
    """Effects as stated, with errors that are independent of each other."""

    mean: np.ndarray
    variance: np.ndarray
    regime: list[str]
    names: list[str]

    def draws(self, n: int, seed: int = 0) -> Iterator[np.ndarray]:
        # Streams belong to names: a draw does not depend on what it is drawn with.
        streams = [np.random.default_rng([seed, crc32(name.encode())]) for name in self.names]
        sd = np.sqrt(self.variance)
        for _ in range(n):
            yield self.mean + sd * np.stack([s.normal(size=sd.shape[1]) for s in streams])

    def shares(self) -> dict[str, np.ndarray]:
        return {}


class OfFunction:
    """Any function from perturbations to mean effects, for planning.

    Parameters
    ----------
    function
        Called with a list of perturbations and a context. Gives effects, shape (n, n_genes), or a
        pair of these and their standard deviations, of errors that are independent of each other.
        Without, nothing is said of what is unknown.
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
        known = Regimes([(context, p) for p in self.measured(context)])
        regime = [known.of(p, context) for p in perturbations]
        names = [f"{p} in {context}" for p in perturbations]
        return _Stated(np.asarray(mean, float), np.asarray(sd, float) ** 2, regime, names)

    def joint(self, pairs: Sequence[Pair]) -> _Stated:
        mean, variance = (np.zeros((len(pairs), len(self.genes))) for _ in range(2))
        regime, names = [""] * len(pairs), [f"{p} in {c}" for p, c in pairs]
        for context in {c for _, c in pairs}:
            mine = [i for i, (_, c) in enumerate(pairs) if c == context]
            found = self.predict([pairs[i][0] for i in mine], context)
            mean[mine], variance[mine] = found.mean, found.variance
            for i, said in zip(mine, found.regime, strict=True):
                regime[i] = said
        return _Stated(mean, variance, regime, names)

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
    if hasattr(type(model), "mean_effects"):  # a GPJEPA, which is not imported for this
        return OfPredictor(model.mean_effects, model.parse, model.log1p_counts)
    raise TypeError(
        f"{type(model).__name__} is not a model that planning can use: give a trained GPJEPA, a fitted "
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


def _log1p(cells: AnnData, genes: np.ndarray, library_size_key: str | None = None) -> sp.csr_matrix:
    check_anndata(cells)
    at = pd.Index(cells.var_names.astype(str)).get_indexer(pd.Index(genes))
    if (at < 0).any():
        missing = genes[at < 0]
        raise ValueError(
            f"The cells lack {len(missing)} of the model's {len(genes)} genes, such as "
            f"{', '.join(missing[:5])}."
        )
    counts = raw_counts(cells, "counts" if "counts" in cells.layers else None)[:, at]
    if library_size_key is not None:
        check_columns(cells, {"library_size_key": library_size_key})
        library = cells.obs[library_size_key].to_numpy(float)
        check_library(library, counts, f"obs[{library_size_key!r}]")
    else:
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
