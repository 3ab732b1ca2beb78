from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from sklearn.exceptions import NotFittedError

from gpjepa.effects import (
    PER,
    SCALES,
    EffectAnchor,
    Explanation,
    Scale,
    check_scale,
    enrichment,
    expected_log1p,
    library_shift,
)
from gpjepa.perturbations import Perturbation

from . import _random
from ._cells import Cells
from ._embedding import Embedding
from ._fields import PERTURBATION_KEY
from ._results import PredictedCells, PredictedEffect, Z, assemble

Gate = Literal["auto", 0, 1]


@dataclass(frozen=True)
class _Start:
    """Control cells that predictions start from.

    Attributes
    ----------
    state
        Shape (n_cells, n_latent).
    share
        Share of each gene in the counts, decoded from the state, shape (n_cells, n_genes).
    own, shape
        Mean counts by the state and the cell's own counts. A negative binomial is a Poisson whose
        rate is a gamma variable with shape θ and rate θ/μ; given the cell's own count k it is again
        gamma, with shape θ + k and rate θ/μ + 1, of which these are mean and shape. Genes that the
        data lack have no k, and keep the first. Shape (n_cells, n_genes).
    """

    state: np.ndarray
    share: np.ndarray
    own: np.ndarray
    shape: np.ndarray


class Predicting(Embedding):
    """From a perturbation to its mean effect, and to cells."""

    # Prediction

    @property
    def anchor(self) -> EffectAnchor:
        """The closed-form predictor of mean effects, fitted on the training cells."""
        if self.effects_ is None:
            # Also an AttributeError, or scvi-tools could not save a model that is only pretrained.
            raise NotFittedError(
                "The model is not trained on perturbations yet: call train() first."
            )
        if self._anchor is None:
            self._anchor = self.new_anchor().fit(self.effects_)
        return self._anchor

    def _parse(
        self, perturbation: str | Perturbation | Sequence[str | Perturbation]
    ) -> dict[Perturbation, str]:
        """What was asked for, and what results call it: as the data do, else as it was written."""
        anchor = self.anchor
        if isinstance(perturbation, str | Perturbation) or not isinstance(perturbation, Iterable):
            perturbation = [perturbation]
        asked_for = list(perturbation)
        if not asked_for:
            raise ValueError("No perturbation was given.")
        said = self._spellings()
        known = {str(p): p for p in said} | {text: p for p, text in said.items()}
        # `strip` is for guide names in the data; a target is asked for by its own name.
        reader = replace(self._label_reader(), strip=None, drop=())
        reader = replace(reader, control=(*reader.controls, "control"))
        wanted: dict[Perturbation, str] = {}
        for asked in asked_for:
            if not isinstance(asked, str | Perturbation):
                raise TypeError(
                    f"A perturbation is text such as 'KLF1+MAP2K6' or a Perturbation, not "
                    f"{asked!r}. A combination of targets: gpjepa.perturbations.Perturbation.of("
                    "['A', 'B'])."
                )
            read = known.get(asked) if isinstance(asked, str) else asked
            if read is None:
                read = reader.read(asked)
                assert read is not None  # nothing is dropped here
            wanted.setdefault(read, said.get(read, str(asked).strip()))
        for p in wanted:
            self.vocabulary.check(p)
        anchor.check(list(wanted))
        return wanted

    def _spellings(self) -> dict[Perturbation, str]:
        """What the training data call each of their perturbations."""
        state = self.get_state_registry(PERTURBATION_KEY)
        found = self._trained_perturbations()
        said = state.get("spelling", [str(p) for p in found])  # models of older versions have none
        return dict(zip(found, said, strict=True))

    def _label(self, perturbation: Perturbation) -> str:
        """What results call a perturbation that nobody wrote down."""
        return self._spellings().get(perturbation, str(perturbation))

    def _contexts(self, wanted: str | Sequence[str] | None, present: Sequence[str]) -> list[str]:
        known = self.anchor.effects_.contexts
        if wanted is not None and not isinstance(wanted, Iterable):
            raise TypeError(f"context={wanted!r}: expected the name of a context, such as {known}.")
        chosen = (
            [wanted] if isinstance(wanted, str) else list(present if wanted is None else wanted)
        )
        if not chosen:
            raise ValueError(f"No context was given; known are {known}.")
        unknown = [c for c in chosen if c not in known]
        if unknown:
            raise ValueError(
                f"Unknown context {', '.join(map(repr, unknown))}; known are {known}. A context is "
                "known once its control cells are in the training data."
            )
        return chosen

    def _gate(self, perturbation: Perturbation, regime: str, gate: Gate) -> float:
        if gate != "auto":
            return float(gate)
        found = [regime]
        if len(perturbation.targets) > 1 and self.anchor.never_perturbed(perturbation):
            found.append("unseen")  # no better judged than its target that was never perturbed
        return min(float(self.gate_.get(r, {}).get("gate", 0)) for r in found)

    def _action(self, perturbations: Sequence[Perturbation]) -> torch.Tensor:
        """Action embeddings, shape (n_perturbations, n_action)."""
        targets, doses = self._target_indices(perturbations)
        like = self.module.anchor_map
        return self.module.perturbation_encoder(targets.to(like.device), doses.to(like))

    def _target_indices(
        self, perturbations: Sequence[Perturbation]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(1, *(len(p.targets) for p in perturbations), 1)
        targets = torch.full((len(perturbations), width), -1)
        doses = torch.zeros(len(perturbations), width)
        for i, p in enumerate(perturbations):
            for k, (target, dose) in enumerate(zip(p.targets, p.doses, strict=True)):
                targets[i, k] = self.vocabulary.index[target]
                doses[i, k] = dose
        return targets, doses

    @torch.inference_mode()
    def _transition(
        self,
        state: np.ndarray,
        noise: np.ndarray,
        perturbation: Perturbation,
        anchor: np.ndarray,
        gate: float = 1.0,
    ) -> np.ndarray:
        """Perturbed states: z_b + W_A A + g (T + σ ε), shape (n_cells, n_latent)."""
        like = self.module.anchor_map
        base = torch.from_numpy(state).to(like)
        shift = (torch.from_numpy(anchor).to(like) @ like).expand_as(base)
        if gate:
            action = self._action([perturbation]).expand(len(base), -1)
            residual, log_variance = self.module.transition(base, action, shift)
            epsilon = torch.from_numpy(noise).to(like)
            shift = shift + gate * (residual + (0.5 * log_variance).exp() * epsilon)
        return (base + shift).cpu().numpy()

    def _network_effect(
        self,
        perturbation: Perturbation,
        context: str,
        anchor: np.ndarray,
        scales: Sequence[Scale] = SCALES,
    ) -> dict[Scale, np.ndarray]:
        """N - A: what the residual changes in the mean of the decoded cells."""
        control = self.reference_[context]
        names = np.arange(len(control["state"])).astype(str)
        noise = _random.normal(
            names, np.zeros(len(names), int), control["state"].shape[1], "reference"
        )
        moved = self._transition(control["state"], noise, perturbation, anchor, 0.0)
        state = self._transition(control["state"], noise, perturbation, anchor)
        before = self._decode(moved, control["batch"])
        after = self._decode(state, control["batch"])
        effect: dict[Scale, np.ndarray] = {}
        if "log1p_mean" in scales:
            effect["log1p_mean"] = np.log1p(PER * after.mean(0)) - np.log1p(PER * before.mean(0))
        if "mean_log1p" in scales:
            library = control["library"]
            library = library * np.exp(library_shift(self.library_shifts_, perturbation))
            effect["mean_log1p"] = np.subtract(
                *(
                    expected_log1p(x * library[:, None], self._dispersion, library).mean(0)
                    for x in (after, before)
                )
            )
        return effect

    def _effect(
        self, perturbation: Perturbation, label: str, context: str, gate: Gate = "auto"
    ) -> PredictedEffect:
        """D = A + g (N - A), on both scales."""
        anchor = self.anchor
        both = {s: anchor.predict([perturbation], [context], s) for s in SCALES}
        regime = both["mean_log1p"].regime[0]
        mean = {s: both[s].mean[0] for s in SCALES}
        g = 0.0 if perturbation.is_control else self._gate(perturbation, regime, gate)
        effect: dict[str, np.ndarray] = {s: mean[s] for s in SCALES}
        if g:
            network = self._network_effect(perturbation, context, mean["mean_log1p"])
            effect = {s: mean[s] + g * network[s] for s in SCALES}
        control = {s: anchor.effects_.control[s][context] for s in SCALES}
        return PredictedEffect(
            perturbation,
            label,
            context,
            regime,
            g,
            {
                s: np.maximum(effect[s], np.minimum(-control[s], mean[s])).astype(np.float32)
                for s in SCALES
            },
            {s: mean[s] for s in SCALES},
            {s: both[s].variance[0] for s in SCALES},
            control,
        )

    def predict_effects(
        self,
        perturbations: str | Perturbation | Sequence[str | Perturbation],
        contexts: str | Sequence[str] | None = None,
        *,
        scale: Scale = "mean_log1p",
        gate: Gate = "auto",
    ) -> pd.DataFrame:
        """Mean effects, with their uncertainty.

        Parameters
        ----------
        perturbations
            One perturbation or several, such as ``["KLF1", "KLF1+MAP2K6"]``.
        contexts
            Contexts; all that training knows by default.
        scale
            ``"mean_log1p"``: mean over cells of log1p counts per 10,000; ``"log1p_mean"``: log1p
            of the pooled rate per 10,000.
        gate
            ``"auto"``, 0 (the anchor alone) or 1 (the network).

        Returns
        -------
        pandas.DataFrame
            One row per perturbation × context × gene: ``perturbation, context, gene, effect, sd,
            lower, upper, anchor, regime``; ``effect`` is the difference from the control of the
            context, ``lower`` and ``upper`` a 95% interval of the mean effect.

        Raises
        ------
        UnknownTargetError
            If nothing is known about a target; names the nearest known names.
        """
        check_scale(scale)
        _check_gate(gate)
        wanted = self._parse(perturbations)
        chosen = self._contexts(contexts, self.anchor.effects_.contexts)
        frames = [
            self._effect(p, label, c, gate).frame(self.genes, scale)
            for p, label in wanted.items()
            for c in chosen
        ]
        return pd.concat(frames, ignore_index=True)

    def explain(
        self,
        perturbation: str | Perturbation,
        context: str | None = None,
        *,
        scale: Scale = "mean_log1p",
    ) -> Explanation:
        """What the anchor's prediction is made of: which expert says what, with which weight.

        Parameters
        ----------
        perturbation
            Such as ``"KLF1+MAP2K6"``.
        context
            Where; may be left out if there is only one.
        scale
            Scale of the effect.

        Returns
        -------
        gpjepa.effects.Explanation
            Tables of experts and measured effects; ``plot()`` draws them.
        """
        ((wanted, label),) = self._parse([perturbation]).items()
        if context is not None:
            self._contexts(context, [])
        found = self.anchor.explain(wanted, context, scale, self.vocabulary)
        said = {str(p): text for p, text in self._spellings().items()} | {str(wanted): label}
        sources = found.sources.replace({"perturbation": said})
        return replace(found, perturbation=label, sources=sources)

    def predict_interactions(
        self,
        perturbations: str | Perturbation | Sequence[str | Perturbation],
        contexts: str | Sequence[str] | None = None,
        *,
        scale: Scale = "mean_log1p",
        gate: Gate = "auto",
    ) -> pd.DataFrame:
        """The part of combinations' mean effects that is not the sum of their singles' effects.

        Parameters
        ----------
        perturbations
            Combinations, such as ``"KLF1+MAP2K6"``.
        contexts, scale, gate
            As in :meth:`predict_effects`.

        Returns
        -------
        pandas.DataFrame
            One row per combination × context × gene: ``perturbation, context, gene, interaction,
            sd, lower, upper, additive, regime``; ``additive`` is the sum of the predicted effects
            of the singles, ``lower`` and ``upper`` a 95% interval of the interaction.

        Raises
        ------
        ValueError
            If a perturbation has fewer than two targets.
        """
        check_scale(scale)
        _check_gate(gate)
        wanted = self._parse(perturbations)
        frames = []
        for p, label in wanted.items():
            for c in self._contexts(contexts, self.anchor.effects_.contexts):
                found = self.anchor.predict_interactions([p], [c], scale)
                whole, *singles = (
                    self._effect(part, label, c, gate).effect[scale] for part in (p, *p.singles)
                )
                additive = np.sum(singles, 0)
                sd = np.sqrt(found.variance[0])
                interaction = whole - additive
                frames.append(
                    pd.DataFrame(
                        {
                            "perturbation": label,
                            "context": c,
                            "gene": self.genes,
                            "interaction": interaction,
                            "sd": sd,
                            "lower": interaction - Z * sd,
                            "upper": interaction + Z * sd,
                            "additive": additive,
                            "regime": found.regime[0],
                        }
                    )
                )
        return pd.concat(frames, ignore_index=True)

    def predict_enrichment(
        self,
        perturbations: str | Perturbation | Sequence[str | Perturbation],
        gene_sets: str | Path | Sequence[str | Path] | Mapping[str, Iterable[str]],
        contexts: str | Sequence[str] | None = None,
        *,
        gate: Gate = "auto",
        min_genes: int = 5,
    ) -> pd.DataFrame:
        """Gene sets that predicted effects raise or lower (:func:`gpjepa.effects.enrichment`).

        Parameters
        ----------
        perturbations, contexts, gate
            As in :meth:`predict_effects`.
        gene_sets
            One or several GMT files, or genes by name of the set.
        min_genes
            Genes of a set that must have been measured.

        Returns
        -------
        pandas.DataFrame
            One row per perturbation × context × set: ``perturbation, context, set, score, pvalue,
            padj, n_genes``. The targeted genes themselves are left out.
        """
        wanted = self._parse(perturbations)
        frame = self.predict_effects(perturbations, contexts, gate=gate)
        targets = {label: p.targets for p, label in wanted.items()}
        return enrichment(frame, gene_sets, targets=targets, min_genes=min_genes)

    def predict_perturbation(
        self,
        adata: AnnData | None,
        perturbation: str | Perturbation | Sequence[str | Perturbation],
        *,
        context: str | Sequence[str] | None = None,
        n_samples: int | None = None,
        return_mean: bool = False,
        seed: int = 0,
        gate: Gate = "auto",
    ) -> AnnData:
        """Predict the cells that a perturbation makes of control cells.

        Each predicted cell is a control cell with other rates: what its own counts say of its
        rates beyond its state (the gamma posterior behind the negative binomial) is kept, the
        network's response of its state and the mean effect are added, and counts are drawn anew.

        Parameters
        ----------
        adata
            Cells; the control cells among them are taken. None for the training cells.
        perturbation
            One perturbation or several, such as ``"KLF1+MAP2K6"``.
        context
            Contexts; by default all whose control cells are in ``adata``.
        n_samples
            Predicted cells per perturbation and context; by default one per control cell.
        return_mean
            Put expected counts into ``X`` instead of sampled ones.
        seed
            Seed; the same seed gives the same cells, in whatever order cells and genes come.
        gate
            ``"auto"``, 0 (control cells moved by the anchor) or 1 (the network).

        Returns
        -------
        anndata.AnnData
            ``X`` sampled counts; ``layers["expected"]`` expected counts per 10,000 and
            ``layers["expected_sd"]`` their standard deviation from that of the mean effect;
            ``obsm["X_gpjepa"]`` states; ``obs`` perturbation, context, control cell, library size;
            ``uns["rank_genes_groups"]`` the predicted differential expression in scanpy's format;
            ``uns["gpjepa"]`` units, regime, gate, shares of anchor and network, seed, versions.

        Raises
        ------
        UnknownTargetError
            If nothing is known about a target; names the nearest known names.
        ValueError
            If ``adata`` has no control cells of a wanted context.
        """
        wanted = self._parse(perturbation)
        if n_samples is not None and not (isinstance(n_samples, Integral) and n_samples > 0):
            raise ValueError(f"n_samples={n_samples}: expected a whole number from 1, or None.")
        _check_gate(gate)
        cells = self._query_cells(adata, decodes=True)
        if cells.perturbations is None:
            key = self.registry_["setup_args"]["perturbation_key"]
            raise ValueError(f"The AnnData has no column obs[{key!r}] that marks control cells.")
        control = np.flatnonzero(cells.is_control & cells.expressed)
        if not len(control):
            raise ValueError(
                "The AnnData has no control cells; predictions start from them. Pass the training "
                "AnnData, or control cells of your own."
            )
        at: dict[str, list[int]] = {}
        for i in control:
            at.setdefault(cells.contexts[i], []).append(int(i))
        chosen = self._contexts(context, sorted(at))
        absent = [c for c in chosen if c not in at]
        if absent:
            raise ValueError(f"The AnnData has no control cells of context {absent}.")
        groups = []
        with self._double_precision():
            for c in chosen:
                mine = cells.take(np.array(at[c]))
                where, draws = _random.choose(mine.names, n_samples, seed)
                mine = mine.take(where)
                start = self._start(mine, c)
                for p, label in wanted.items():
                    effect = self._effect(p, label, c, gate)
                    groups.append(
                        self._predict_cells(mine, start, draws, effect, seed, return_mean)
                    )
        order = {p: i for i, p in enumerate(wanted)}
        groups.sort(key=lambda g: order[g.effect.perturbation])
        units = "expected counts" if return_mean else "sampled counts"
        keys = {self._setup_arguments()[k]: k[:-4] for k in ("context_key", "perturbation_key")}
        return assemble(groups, self.genes, seed, units, keys, self._label(Perturbation()))

    def _start(self, cells: Cells, context: str) -> _Start:
        """Control cells as predictions start from them."""
        state = self._encode(cells, np.arange(len(cells))).numpy()
        share = np.maximum(self._decode(state, cells.batch).astype(float), 1e-12)
        # The decoder's mean over the cells is put right before a cell's own counts are weighed in.
        rate = np.expm1(self.anchor.effects_.control["log1p_mean"][context].astype(float)) / PER
        mean = share * np.maximum(rate, 1e-9) / share.mean(0)
        mean *= cells.library[:, None]
        theta = self._dispersion
        shape = theta + cells.counts.toarray()
        return _Start(state, share, shape / (theta / mean + cells.visible), shape)

    def _predict_cells(
        self,
        cells: Cells,
        start: _Start,
        draws: np.ndarray,
        effect: PredictedEffect,
        seed: int,
        return_mean: bool,
    ) -> PredictedCells:
        perturbation = effect.perturbation
        stream = (seed, str(perturbation))
        noise = _random.normal(cells.names, draws, start.state.shape[1], *stream)
        moved = self._transition(
            start.state, noise, perturbation, effect.anchor["mean_log1p"], effect.gate
        )
        # Without the network, control cells keep their own rates and only the mean is moved.
        expected = PER * start.own / cells.library[:, None]
        if effect.gate:
            expected *= self._decode(moved, cells.batch) / start.share
        expected *= effect.target_rate / np.maximum(expected.mean(0), 1e-12)
        library = cells.library * np.exp(library_shift(self.library_shifts_, perturbation))
        mean = expected * (library / PER)[:, None]
        counts = (
            mean
            if return_mean
            else _random.gamma_poisson(start.shape, mean / start.shape, cells.names, draws, *stream)
        )
        return PredictedCells(
            effect,
            sp.csr_matrix(counts, dtype=np.float32),
            expected.astype(np.float32),
            moved.astype(np.float32),
            library,
            cells.names,
            draws,
            cells.labels if perturbation.is_control else None,
        )

    @torch.inference_mode()
    def get_perturbation_representation(self) -> pd.DataFrame:
        """Action embeddings of the training perturbations.

        Returns
        -------
        pandas.DataFrame
            One row per perturbation, shape (n_perturbations, n_action).
        """
        perturbations = self.anchor.effects_.perturbations
        embedding = self._action(perturbations).cpu().numpy()
        said = self._spellings()
        return pd.DataFrame(embedding, index=[said.get(p, str(p)) for p in perturbations])


def _check_gate(gate: Gate) -> None:
    if gate not in ("auto", 0, 1):
        raise ValueError(f"gate={gate!r}: choose 'auto', 0 (anchor) or 1 (network).")
