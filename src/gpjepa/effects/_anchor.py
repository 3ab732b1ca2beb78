"""The closed-form prediction of a mean effect, to which networks may add."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import numpy as np
import pandas as pd

from gpjepa.perturbations import (
    MissingFeatures,
    Perturbation,
    TargetFeatures,
    UnknownTargetError,
    Vocabulary,
)
from gpjepa.splits import MIN_UNITS

from ._estimates import ScaleFit
from ._experts import ExpertPredictions, expert_predictions
from ._explanation import Explanation
from ._joint import JointEffects
from ._measured import blocks
from ._pairs import PairSums
from ._regression import check_no_leak
from ._scales import SCALES, Scale
from ._table import EffectTable
from ._weighted import Estimate

MANY_UNITS = 40
"""Targets, and combinations, from which on one of them hardly moves the weights of experts."""


@dataclass(frozen=True)
class AnchorPrediction:
    """Predicted mean effects.

    Attributes
    ----------
    mean, variance
        Shape (n_pairs, n_genes).
    noise
        The part of the variance that is sampling noise of the measured effects; the rest is what
        shrinkage, kriging and interactions leave unknown. Shape (n_pairs, n_genes).
    regime
        Regime of each pair: ``control``, ``seen``, ``seen2``/``seen1``/``seen0`` (a combination of
        which both, one or none of two targets were measured alone; of more: all, some, none),
        ``in combinations`` (a target measured in combinations alone), ``unseen`` (in no
        perturbation, or in those of one other context alone, where this one has effects of its
        own, but fewer than five that the other has too), ``new dose`` or ``new context``.
    """

    mean: np.ndarray
    variance: np.ndarray
    noise: np.ndarray
    regime: list[str]

    def rows(self, chosen: Sequence[int] | np.ndarray) -> AnchorPrediction:
        """Some of the predictions."""
        values = (self.mean[chosen], self.variance[chosen], self.noise[chosen])
        return AnchorPrediction(*values, [self.regime[i] for i in chosen])


P = TypeVar("P", bound=AnchorPrediction)


class EffectAnchor:
    r"""Closed-form prediction of mean effects from everything that simple baselines know.

    Every prediction is a weighted sum of measured effects, chosen by the regime of the pair:

    * a *measured* effect is denoised by what the effects of its context have in common
      (:func:`gpjepa.effects.denoise`); all else is made of denoised effects;
    * a *targeted gene* keeps what no other perturbation does to it, where that was measured;
    * a *combination* is the sum of its singles, the larger of them, a saturating sum, the mean of
      the other combinations, and what a Gaussian process over all perturbations predicts, stacked;
    * *another dose* lies on lines in log dose and on a Hill curve, stacked;
    * a target *never perturbed* takes the mean effect and, with features, that process, stacked
      (:class:`gpjepa.effects.UnseenTargets`);
    * in a *new context*, the mean effect elsewhere, equally or by how alike the controls are, and
      the difference of the control profiles, stacked; a quarter of the effect in a single other
      context, unless this one has effects of its own: then these predict it. Where five of them
      were measured elsewhere too, they and what is special to the target elsewhere are stacked.

    Stacking weights (Breiman 1996) are fitted out of fold, freed of the control noise that the
    effects of a context share, drawn towards a prior by three pseudo-units, and go as far as rows
    left out gain from it. With fewer than five independent rows (two contexts) the prior stands
    alone: half sum, half process for a combination of known targets, the process for other
    combinations, half of the mean without its noise for targets never perturbed.

    Parameters
    ----------
    features
        Kinds of target features, for targets never perturbed.
    missing_features
        What to do with a target never perturbed alone that no features know, where features were given:
        ``"error"`` refuses it by name, ``"mean"`` lets it take the shrunken mean effect.

    Attributes
    ----------
    effects_
        The table it was fitted on.
    """

    def __init__(
        self,
        features: TargetFeatures | Sequence[TargetFeatures] = (),
        missing_features: MissingFeatures = "error",
    ) -> None:
        self.features = (features,) if isinstance(features, TargetFeatures) else tuple(features)
        if missing_features not in ("error", "mean"):
            raise ValueError(
                f"missing_features={missing_features!r} is not known; choose 'error' or 'mean'."
            )
        self.missing_features = missing_features
        wrong = [type(f).__name__ for f in self.features if not isinstance(f, TargetFeatures)]
        if wrong:
            raise TypeError(
                f"Target features are gpjepa.perturbations.TargetFeatures, not {wrong[0]}; make "
                "them with TargetFeatures.from_gene_sets, from_table or another of its methods."
            )
        self._measured: set[Perturbation] = set()

    def fit(self, effects: EffectTable) -> Self:
        """Fit on measured effects; each scale when it is first asked for."""
        for features in self.features:
            check_no_leak(features.name, features.source, effects)
        self.effects_ = effects
        self._fits: dict[Scale, ScaleFit] = {}
        self._measured = {p for _, p in effects.rows}
        return self

    def predict(
        self,
        perturbations: Sequence[Perturbation],
        contexts: Sequence[str],
        scale: Scale,
        *,
        own_genes: bool = True,
    ) -> AnchorPrediction:
        """Predict the mean effect of each pair of perturbation and context.

        Parameters
        ----------
        perturbations, contexts
            The pairs.
        scale
            Scale of the effects.
        own_genes
            Whether targeted genes are treated by themselves (:meth:`with_own_genes`).

        Raises
        ------
        KeyError
            If a context has no control cells in the table.
        UnknownTargetError
            If no features know a target that was never perturbed, and ``missing_features="error"``.
        """
        pairs = self._checked(perturbations, contexts)
        found = self._predicted(pairs, scale, interactions=False)
        if own_genes:
            return self.with_own_genes(found, pairs, scale)
        return replace(found, mean=self._not_below_0(found, pairs, scale))

    def _not_below_0(
        self, found: AnchorPrediction, pairs: Sequence[tuple[Perturbation, str]], scale: Scale
    ) -> np.ndarray:
        # What was measured within batches was measured against the controls of these.
        within = self.effects_.strata is not None
        seen = np.array([within and r == "seen" for r in found.regime], bool)[:, None]
        return np.where(seen, found.mean, self._floored(found.mean, pairs, scale))

    def with_own_genes(
        self, found: P, pairs: Sequence[tuple[Perturbation, str]], scale: Scale
    ) -> P:
        """Predictions in which targeted genes keep what no other perturbation does to them.

        Where they were measured: as far as this screen shows that they differ from what effects
        share. In combinations of measured targets: their sum.
        """
        mean, variance, noise = (np.array(x) for x in (found.mean, found.variance, found.noise))
        self._fit_of(scale).own.put_right(pairs, mean, variance, noise)
        found = replace(found, mean=mean, variance=variance, noise=noise)
        return replace(found, mean=self._not_below_0(found, pairs, scale))

    def _floored(
        self, mean: np.ndarray, pairs: Sequence[tuple[Perturbation, str]], scale: Scale
    ) -> np.ndarray:
        """Not less than no expression, for which sums of effects may ask."""
        if scale not in SCALES or not self.effects_.has_controls:
            return mean
        floor = np.reshape([-self.effects_.control[scale][c] for _, c in pairs], mean.shape)
        return np.maximum(mean, floor)

    def predict_interactions(
        self, perturbations: Sequence[Perturbation], contexts: Sequence[str], scale: Scale
    ) -> AnchorPrediction:
        """Predict what of each combination's effect is not the sum of its singles' effects.

        Returns
        -------
        AnchorPrediction
            Of the interaction; its noise is that of a combination minus its singles.
        """
        pairs = self._checked(perturbations, contexts)
        single = [str(p) for p, _ in pairs if len(p.targets) < 2]
        if single:
            raise ValueError(f"Only combinations interact; {single[:5]} have fewer than 2 targets.")
        return self._predicted(pairs, scale, interactions=True)

    def experts(
        self, perturbations: Sequence[Perturbation], contexts: Sequence[str], scale: Scale
    ) -> list[ExpertPredictions]:
        """What each expert says of each pair, beside :meth:`predict`, which weighs them."""
        return expert_predictions(self._fit_of(scale), self._checked(perturbations, contexts))

    def joint(
        self, perturbations: Sequence[Perturbation], contexts: Sequence[str], scale: Scale
    ) -> JointEffects:
        """Predict pairs of perturbation and context together, with errors that go together.

        For some hundred pairs: all of them are drawn at once.
        """
        pairs = self._checked(perturbations, contexts)
        found = self.predict(perturbations, contexts, scale)
        floor = None
        if scale in SCALES and self.effects_.has_controls:
            control = np.reshape(
                [self.effects_.control[scale][c] for c in contexts], found.mean.shape
            )
            # Effects within batches were not measured against this profile.
            floor = np.minimum(-control, found.mean)
        return JointEffects.of(
            self._fit_of(scale), pairs, found.mean, found.variance, found.regime, floor
        )

    def pair_sums(self, singles: Sequence[Perturbation], context: str, scale: Scale) -> PairSums:
        """The part of predicted pairs of some targets that is linear in what is said of these.

        Parameters
        ----------
        singles
            Perturbations of one target each, of two different targets at least.
        context, scale
            Where, and on which scale.
        """
        if len({p.targets for p in singles}) < 2 or any(len(p.targets) != 1 for p in singles):
            raise ValueError("Pairs need two different targets, each given alone.")
        self._checked(singles, [context] * len(singles))
        fit = self._fit_of(scale)
        return replace(
            fit.combinations.pair_sums(singles, context), own=fit.own.alone(singles, context)
        )

    def unknown(
        self, perturbations: Sequence[Perturbation], context: str, scale: Scale
    ) -> tuple[np.ndarray, float]:
        """What is unknown of perturbations together, and how noisy one more cell is.

        By the Gaussian process over perturbations, given everything measured in the context.

        Returns
        -------
        tuple
            Covariance, shape (n, n), and the sampling variance of the mean effect of one cell; both
            summed over genes, with weights.
        """
        pairs = self._checked(perturbations, [context] * len(perturbations))
        unseen = self._fit_of(scale).singles.unseen
        if context not in unseen.denoiser.rows:
            raise ValueError(f"Nothing was measured in {context}, so that nothing is known there.")
        return unseen.unknown([p for p, _ in pairs], context)

    def covers(self, target: str) -> bool:
        """Whether some of its features know a target."""
        return any(kind.covers(target) for kind in self.features)

    def shrunken_mean(self, context: str, scale: Scale) -> np.ndarray:
        """What it says of targets of which nothing is known, in a context where some were perturbed.

        Shape (n_genes,).
        """
        fit = self._fit_of(scale)
        weights = fit.singles.unseen.of_nothing(context)
        return fit.measured.mean(fit.measured.assemble([[(1.0, weights)]]))[0]

    def explain(
        self,
        perturbation: str | Perturbation,
        context: str | None = None,
        scale: Scale = "mean_log1p",
        vocabulary: Vocabulary | None = None,
    ) -> Explanation:
        """Which expert says what of a mean effect, and with which weight.

        It speaks of the sum of what the experts say. Predictions are that sum, but for the targeted
        genes (:meth:`with_own_genes`), and not less than no expression.

        Parameters
        ----------
        perturbation
            Such as ``"KLF1+MAP2K6"``.
        context
            Where; may be left out if there is only one.
        scale
            Scale of the effect.
        vocabulary
            Targets that may be asked for; by default those perturbed, measured or with features.

        Returns
        -------
        Explanation
            Tables of experts and measured effects; ``plot()`` draws them.
        """
        if isinstance(perturbation, str):
            perturbation = Perturbation.parse(perturbation)
        if vocabulary is None:
            vocabulary = Vocabulary(
                self.effects_.regimes.perturbed, map(str, self.effects_.genes), self.features
            )
        vocabulary.check(perturbation)
        if context is None:
            if len(self.effects_.contexts) > 1:
                raise ValueError(f"Say in which context: {self.effects_.contexts}.")
            context = self.effects_.contexts[0]
        fit = self._fit_of(scale)
        pairs = self._checked([perturbation], [context])
        predicted = self._predicted(pairs, scale, interactions=False)
        estimate = fit.estimates(pairs)[0]
        shares = estimate.shares
        effects = fit.mean([Estimate((share,)) for share in shares])
        table = pd.DataFrame(
            {
                "part": [s.part for s in shares],
                "expert": [s.expert for s in shares],
                "weight": [s.weight for s in shares],
                "size": np.linalg.norm(effects, axis=1),
            }
        )
        sources = pd.DataFrame(
            {
                "context": [c for c, _ in self.effects_.rows],
                "perturbation": [str(p) for _, p in self.effects_.rows],
                "weight": fit.weights(estimate),
            }
        )
        used = sources[sources["weight"] != 0]
        used = used.iloc[np.argsort(-used["weight"].abs(), kind="stable")].reset_index(drop=True)
        return Explanation(
            str(perturbation),
            context,
            predicted.regime[0],
            scale,
            self.effects_.genes,
            table,
            used,
            effects,
            predicted.mean[0],
            np.sqrt(predicted.variance[0]),
            self._features_of(perturbation, predicted.regime[0], scale),
        )

    def _features_of(self, perturbation: Perturbation, regime: str, scale: Scale) -> pd.DataFrame:
        found = self.feature_weights(scale)
        target = perturbation.targets[0] if perturbation.targets else ""
        covers = [f.covers(target) for f in self.features]
        found = found.assign(covered=covers, weight=np.where(covers, found["weight"], 0.0))
        return found if regime == "unseen" else found[:0]

    def feature_weights(self, scale: Scale = "mean_log1p") -> pd.DataFrame:
        """How many targets each kind of features covers, and the weight that it earned.

        Returns
        -------
        pandas.DataFrame
            Indexed by the name of the features. ``covered``: how many of the perturbed targets.
            ``weight``: in predictions of targets never perturbed; that of the process times the
            share of its covariance between targets that rests on these features.
        """
        targets = self.effects_.regimes.perturbed
        return pd.DataFrame(
            {
                "covered": [sum(map(f.covers, targets)) for f in self.features],
                "weight": self._fit_of(scale).singles.unseen.feature_weights(),
            },
            pd.Index([f.name for f in self.features], name="features"),
        )

    def _fit_of(self, scale: Scale) -> ScaleFit:
        if scale not in self._fits:
            self._fits[scale] = ScaleFit(
                self.effects_, self.effects_.check_scale(scale), self.features
            )
        return self._fits[scale]

    def _checked(
        self, perturbations: Sequence[Perturbation], contexts: Sequence[str]
    ) -> list[tuple[Perturbation, str]]:
        unknown = sorted(set(contexts) - set(self.effects_.contexts))
        if unknown:
            raise KeyError(f"Contexts without control cells in training: {unknown}.")
        self.check(perturbations)
        return list(zip(perturbations, contexts, strict=True))

    def check(
        self, perturbations: Sequence[Perturbation], alone: Collection[str] | None = None
    ) -> None:
        """Refuse targets that were never perturbed alone and that no features know.

        Parameters
        ----------
        perturbations
            What is to be predicted.
        alone
            Targets perturbed alone in training; those of the fitted table by default.

        Raises
        ------
        UnknownTargetError
            Naming them, where features were given and ``missing_features="error"``.
        """
        if not self.features or self.missing_features == "mean":
            return
        known = self.effects_.regimes.alone if alone is None else set(alone)
        never = {t for p in perturbations if p not in self._measured for t in p.targets} - known
        unknown = sorted(t for t in never if not any(f.covers(t) for f in self.features))
        if unknown:
            names = ", ".join(f.name for f in self.features)
            raise UnknownTargetError(
                f"Never perturbed alone, and without any feature in {names}: {', '.join(unknown[:10])}. "
                "Give features that cover them, or choose missing_features='mean' to predict the "
                "shrunken mean effect for them."
            )

    def _predicted(
        self, pairs: list[tuple[Perturbation, str]], scale: Scale, interactions: bool
    ) -> AnchorPrediction:
        fit = self._fit_of(scale)
        shape = len(pairs), len(self.effects_.genes)
        mean, variance, noise = (np.zeros(shape, np.float32) for _ in range(3))
        for block in blocks(len(pairs)):
            mine, at = pairs[block.start : block.stop], slice(block.start, block.stop)
            estimates = fit.estimates(mine)
            size = fit.mean(estimates)
            if interactions:
                estimates = fit.combinations.interactions(mine)
            mean[at] = fit.mean(estimates) if interactions else size
            noise[at], left = fit.variances(estimates, size)
            variance[at] = noise[at] + left
        return AnchorPrediction(mean, variance, noise, [self.regime(p, c) for p, c in pairs])

    def regime(self, perturbation: Perturbation, context: str) -> str:
        """What training knew of the perturbation in the context."""
        return self.effects_.regimes.of(perturbation, context)

    @property
    def n_folds(self) -> int:
        """Steps of :meth:`out_of_fold`."""
        return 1 if self._many else len(self.folds(10))

    @property
    def _many(self) -> bool:
        """Whether one target, or combination, hardly moves the weights of experts."""
        units = {p.targets for p in self._measured}
        combined = sum(len(targets) > 1 for targets in units)
        return min(n for n in (len(units) - combined, combined, MANY_UNITS + 1) if n) >= MANY_UNITS

    def out_of_fold(
        self, scale: Scale, n_folds: int = 10, *, progress: Callable[[], object] = lambda: None
    ) -> np.ndarray:
        """Predict every training row without it, shape (n_rows, n_genes).

        Singles are left out of all contexts at once, with the combinations that they are part of,
        and become unseen; combinations are left out while their singles stay. With fewer than five
        perturbations the rows of one context are left out instead. From 40 targets, and as many
        combinations if there are any, the weights of the experts are those of all rows, and each
        row is left out of what they say in closed form. ``progress`` is called after each step.
        """
        rows = self.effects_.rows
        result = np.zeros((len(rows), len(self.effects_.genes)), np.float32)
        every = np.ones(len(rows), bool)
        for out, hidden in [(every, every)] if self._many else self.folds(n_folds):
            rest = self
            if not self._many:
                rest = EffectAnchor(self.features, "mean").fit(self.effects_.subset(~hidden))
            where = np.flatnonzero(out)
            fit = rest._fit_of(scale)
            said = fit.left_out if self._many else fit.estimates
            for block in blocks(len(where)):
                at = where[block]
                pairs = [(rows[i][1], rows[i][0]) for i in at]
                result[at] = rest._floored(fit.mean(said(pairs)), pairs, scale)
            progress()
        return result

    def folds(self, n_folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Masks of the rows that are predicted together, and of those that are hidden then.

        First of targets, with the combinations that they are part of, then of combinations.
        """
        rows, perturbations = self.effects_.rows, self.effects_.perturbations
        if len({p.targets for p in perturbations}) < MIN_UNITS:
            contexts = sorted({c for c, _ in rows})
            return [(out, out) for out in (np.array([c == o for c, _ in rows]) for o in contexts)]
        folds = []
        for singles in (True, False):
            # All doses of the same targets leave together.
            members = [p for p in perturbations if (len(p.targets) == 1) == singles]
            units = sorted({p.targets for p in members})
            k = min(n_folds, len(units))
            for i in range(k):
                chosen = set(units[i::k])
                out = np.array([p.targets in chosen for _, p in rows])
                # What is to be a target never perturbed is hidden in combinations, too.
                hidden = np.array(
                    [singles and any((t,) in chosen for t in p.targets) for _, p in rows]
                )
                folds.append((out, out | hidden))
        return folds
