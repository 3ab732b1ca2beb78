from __future__ import annotations

import inspect
import logging
import warnings
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import EarlyStopping
from scvi.train import TrainRunner
from sklearn.exceptions import NotFittedError

from gpjepa.effects import (
    SCALES,
    Additive,
    EffectAnchor,
    EffectTable,
    MeanEffect,
    Scale,
    effect_table,
    fit_gate,
    gene_loadings,
    library_shifts,
    noise_corrected_error,
)
from gpjepa.nn import ComponentEncoder, ResidualEncoder
from gpjepa.objectives import gene_blocks
from gpjepa.perturbations import Perturbation
from gpjepa.splits import MIN_UNITS, Holdout, exclude, hold_out

from . import _random
from ._arguments import check_plan, check_training
from ._cells import Batches, Cells, CoherentBatches, RandomBatches, SetBatches
from ._components import fit_components, worth_keeping
from ._fields import BATCH_KEY
from ._held_out import HeldOut
from ._module import MATCHINGS
from ._plans import ActionPlan, finish_on_interrupt
from ._prediction import Predicting
from ._pretrain import MASK_OPTIONS, PretrainPlan, masked_genes
from ._progress import ANCHOR, STAGE_A, STAGES_BC, Stage, StageBar, quiet

logger = logging.getLogger(__name__)

_N_REFERENCE = 256  # control cells of a context behind the network's mean effect
_N_MAP = 2_000  # cells behind the latent image of the anchor
_CELLS_PER_ROW = 32
_BATCHES_PER_EPOCH = 25


class Trainable(Predicting):
    """Stage A, then the closed form, then stages B and C."""

    # Training

    def pretrain(
        self,
        max_epochs: int | None = None,
        *,
        batch_size: int = 256,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        plan_kwargs: dict | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Stage A alone: learn cell states by predicting the embedding of hidden genes.

        Works on unlabelled cells (``perturbation_key=None``). Of labelled ones, those that
        :meth:`train` holds out are left out here too. :meth:`train` then starts from here. What was
        learned before (``pretrained``) is gone on from; where genes are new and components fitted
        to half of these cells say more of the other half than those brought along, the components
        are fitted again, and the network starts with adding nothing to them.

        Parameters
        ----------
        max_epochs
            Epochs; by default as many as make about 1,000 steps.
        batch_size
            Cells in a mini-batch.
        accelerator, devices
            As in scvi-tools.
        plan_kwargs
            Options of :class:`gpjepa.model.PretrainPlan`. Also ``masks``: which genes are hidden
            together, ``"random"`` ones, ``"gene_sets"`` (with ``gene_sets``: GMT files, or a dict of
            names to genes), ``"regulons"`` (with ``regulons``: a table or CSV with columns
            ``source`` and ``target``), or ``"adversarial"`` (those that tell most of the
            perturbation, by a linear probe on the training cells).
        **trainer_kwargs
            Options of :class:`scvi.train.Trainer`.
        """
        check_plan(PretrainPlan, plan_kwargs, *MASK_OPTIONS)
        check_training(
            "pretrain",
            trainer_kwargs,
            inspect.signature(self.pretrain).parameters,
            max_epochs=max_epochs,
            batch_size=batch_size,
        )
        cells = self._training_cells()
        out = self._hold_out(cells)[1] if self.labelled else np.zeros(len(cells), bool)
        self._pretrain(
            cells,
            np.flatnonzero(~out),
            max_epochs,
            batch_size,
            plan_kwargs,
            accelerator=accelerator,
            devices=devices,
            **trainer_kwargs,
        )

    def train(
        self,
        max_epochs: int | None = None,
        pretrain_epochs: int | None = None,
        *,
        matching: str = "prototype",
        batch_size: int = 256,
        early_stopping: bool = True,
        early_stopping_patience: int = 8,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        plan_kwargs: dict | None = None,
        pretrain_kwargs: dict | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Fit the anchor, then the encoder (stage A), then predictor and decoder (stages B, C).

        A share of the perturbations is held out from the network (fewer than fifteen: a context,
        else cells) for early stopping and for the gate; the anchor that predictions use is fitted
        on everything. Ctrl-C ends training early and leaves a model that predicts.

        Parameters
        ----------
        max_epochs
            Epochs of stages B and C, 25 steps each; 40 by default.
        pretrain_epochs
            Epochs of stage A; by default as many as make about 1,000 steps, and none if
            :meth:`pretrain` was called.
        matching
            How unpaired control and perturbed cells are compared: ``"prototype"`` (means),
            ``"energy"``, ``"mmd"``, ``"sliced_wasserstein"`` (sets), or ``"ot"`` (entropic optimal
            transport pairs after removing the mean shift).
        batch_size
            Cells in a mini-batch of stage A, and perturbed cells in one of stages B and C.
        early_stopping, early_stopping_patience
            Stop when the error on what is held out has not improved for so many epochs; the best
            epoch is kept in any case.
        accelerator, devices
            As in scvi-tools.
        plan_kwargs, pretrain_kwargs
            Options of :class:`gpjepa.model.ActionPlan`, and of stage A as in :meth:`pretrain`.
        **trainer_kwargs
            Options of :class:`scvi.train.Trainer`.
        """
        check_plan(ActionPlan, plan_kwargs)
        check_plan(PretrainPlan, pretrain_kwargs, *MASK_OPTIONS)
        check_training(
            "train",
            trainer_kwargs,
            inspect.signature(self.train).parameters,
            max_epochs=max_epochs,
            pretrain_epochs=pretrain_epochs,
            batch_size=batch_size,
            early_stopping_patience=early_stopping_patience,
        )
        if not self.labelled:
            raise ValueError(
                "The cells have no perturbations (perturbation_key=None): call pretrain(), or set "
                "the AnnData up with perturbation_key."
            )
        if matching not in MATCHINGS:
            raise ValueError(f"matching={matching!r} is not known; choose one of {MATCHINGS}.")
        cells = self._training_cells()
        if cells.measured is not None:
            raise ValueError(
                "Cells of several data sets with genes of their own can be pretrained on, not "
                "trained on. Save this model, and start from it with one data set: "
                "GPJEPA(adata, pretrained=PATH)."
            )
        for perturbation in set(cells.each_perturbation):  # data that were loaded may hold new ones
            self.vocabulary.check(perturbation)
        trainer_kwargs |= {"accelerator": accelerator, "devices": devices}
        shown = trainer_kwargs.get("enable_progress_bar", True)
        holdout, out = self._hold_out(cells)
        self._fit_closed_form(cells, out)
        interrupted = False
        if pretrain_epochs is not None or not self.is_pretrained_:
            interrupted = self._pretrain(
                cells,
                np.flatnonzero(~out),
                pretrain_epochs,
                batch_size,
                pretrain_kwargs,
                **trainer_kwargs,
            )
        elif not self.history_:  # the encoder was trained elsewhere, the decoder is not yet
            self._standardise(cells, np.flatnonzero(~out))
        state = self._prepare_action(cells, out)
        history = self.history_ or {}
        stage = _ActionStage(self, cells, out, holdout, state)
        self.held_out_ = HeldOut(holdout.reason, None, {})
        if not interrupted and stage.rows:
            plan = stage.plan(matching, plan_kwargs or {}, shown)
            callbacks = list(trainer_kwargs.pop("callbacks", []))
            if early_stopping:
                callbacks.append(
                    EarlyStopping(
                        "holdout_error",
                        patience=early_stopping_patience,
                        check_on_train_epoch_end=True,
                    )
                )
            epochs = 40 if max_epochs is None else max_epochs
            batches = stage.batches(batch_size)
            self._run(STAGES_BC, plan, batches, epochs, callbacks=callbacks, **trainer_kwargs)
            if plan.best is not None:
                self.module.load_state_dict(plan.best[1])
            self.module.eval()
            if stage.independent:
                network = stage.networks("mean_log1p")
                self.gate_ = stage.gates(network)
                gates = {regime: found["gate"] for regime, found in self.gate_.items()}
                self.held_out_ = HeldOut(holdout.reason, stage.errors(network, gates), gates)
            else:
                self.gate_ = {}
        self.library_shifts_ = library_shifts(
            cells.library, cells.each_perturbation, cells.contexts
        )
        self.history_ = {**history, **(self.history_ or {})}
        self.is_trained_ = True

    def summary(self) -> str:
        """What training held out, how well it was predicted, and what to expect of predictions.

        Errors are those of the mean effect, freed of sampling noise, against control cells that
        training has not seen, and without the targeted genes. The gate was set on the same
        perturbations, so that the first number is a little too good; ``gpjepa.benchmark`` measures
        perturbations that nothing was chosen on.

        Returns
        -------
        str
            Three lines.
        """
        if self.held_out_ is None:
            raise NotFittedError(
                "The model was saved by an older version, which did not keep what was held out."
                if self.effects_ is not None
                else "The model is not trained on perturbations yet: call train()."
            )
        return self.held_out_.text()

    def _run(
        self, name: str, plan: Any, batches: Batches, epochs: int, **trainer_kwargs: Any
    ) -> bool:
        """Run a plan; True if it was interrupted."""
        self.module.train()
        trainer_kwargs = {"log_every_n_steps": 1, **trainer_kwargs}
        if trainer_kwargs.pop("enable_progress_bar", True):
            callbacks = [*trainer_kwargs.pop("callbacks", []), StageBar(name)]
            trainer_kwargs["callbacks"] = callbacks
        self.is_trained_ = False  # or scvi-tools would keep only the metrics that it knows already
        with quiet("lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
            runner = TrainRunner(
                self, plan, batches, max_epochs=epochs, enable_progress_bar=False, **trainer_kwargs
            )
            with finish_on_interrupt(runner.trainer) as interrupted:
                runner()
        self.module.eval()
        self.module.requires_grad_(True)
        if interrupted:
            warnings.warn(
                "Training was interrupted; the model keeps what it has learned so far.",
                UserWarning,
                stacklevel=3,
            )
        return bool(interrupted)

    def _pretrain(
        self,
        cells: Cells,
        where: np.ndarray,
        max_epochs: int | None,
        batch_size: int,
        plan_kwargs: dict | None,
        **trainer_kwargs: Any,
    ) -> bool:
        if batch_size < 2:
            raise ValueError(f"batch_size={batch_size}: cells are compared, so 2 are needed.")
        plan = PretrainPlan(
            self.module, **masked_genes(plan_kwargs or {}, cells, self.genes, where)
        )
        groups = [where[mine] for _, mine in cells.by_dataset(where)]
        if min(map(len, groups)) < 2:
            raise ValueError(
                "A single cell, or the only one of its data set, cannot be compared with anything: "
                "at least 2 are needed, better 50. Add cells or remove it."
            )
        sampler: RandomBatches | SetBatches = RandomBatches(groups, batch_size)
        if plan.set_size:
            sampler = self._sets(cells, where, plan.set_size, batch_size)
        with torch.random.fork_rng(
            devices=[]
        ):  # as they will be drawn, or an error before the work
            for measured, _ in cells.by_dataset(where):
                gene_blocks(len(self.genes), among=torch.from_numpy(measured), **plan.blocks)
        epochs = max(2, round(1_000 / len(sampler))) if max_epochs is None else max_epochs
        interrupted = False
        self._standardise(cells, where)
        closed_form = next(self.module.encoder.parameters(), None) is None
        learns = bool(epochs) or closed_form
        self._fit_components(cells, where, again=closed_form, learns=learns)
        if learns:
            self.module.known.fill_(True)
        if epochs and not closed_form:
            batches = Batches(cells, sampler)
            interrupted = self._run(STAGE_A, plan, batches, epochs, **trainer_kwargs)
            plan.finish()
        self.is_pretrained_ = self.is_trained_ = True
        return interrupted

    def _fit_components(
        self, cells: Cells, where: np.ndarray, *, again: bool, learns: bool
    ) -> None:
        """For an encoder that has components; a network that learned to add to them keeps them.

        But not if there are genes to be learned with which other components say more.
        """
        encoder = self.module.encoder
        if isinstance(encoder, ComponentEncoder) and (again or not encoder.axes.any()):
            fit_components(cells, where, encoder)
        elif isinstance(encoder, ResidualEncoder) and learns and not self.module.known.all():
            if not worth_keeping(cells, where, encoder):
                logger.info("Components are fitted again: with the new genes they say more.")
                fit_components(cells, where, encoder)
                encoder.add_nothing()
        self.module.target_encoder.load_state_dict(encoder.state_dict())

    def _sets(self, cells: Cells, where: np.ndarray, set_size: int, batch_size: int) -> SetBatches:
        """Sets of cells that share context and perturbation."""
        if cells.perturbations is None:
            raise ValueError("set_size needs perturbations: the cells have none.")
        if cells.measured is not None:
            raise ValueError("set_size needs cells of one data set, and dataset_key was given.")
        if set_size < 4 or set_size % 2:
            raise ValueError(f"set_size={set_size}: expected an even number from 4.")
        groups: dict[tuple[str, Perturbation], list[int]] = {}
        perturbations = cells.each_perturbation
        for i in where:
            groups.setdefault((cells.contexts[i], perturbations[i]), []).append(int(i))
        rows = [np.array(g) for g in groups.values() if len(g) >= set_size]
        if len(rows) < 2:
            raise ValueError(
                f"set_size={set_size}: {len(rows)} groups of cells with one context and perturbation "
                "have so many; at least 2 are needed."
            )
        n_batches = max(1, len(where) // batch_size)
        return SetBatches(rows, max(2, batch_size // set_size), set_size, n_batches)

    def _hold_out(self, cells: Cells) -> tuple[Holdout, np.ndarray]:
        holdout = hold_out(sorted(set(zip(cells.contexts, cells.each_perturbation, strict=True))))
        groups = pd.Series(list(zip(cells.contexts, cells.each_perturbation, strict=True)))
        rank = groups.groupby(groups).cumcount().to_numpy()
        if holdout.kind == "cells":
            return holdout, rank % 10 == 9
        out = exclude(cells.each_perturbation, cells.contexts, holdout)
        control = pd.Series(cells.contexts)[cells.is_control].value_counts()
        if holdout.kind == "perturbations" and control.min() >= 4:
            # Half of the controls, so that what is held out is measured against controls that the
            # network has not seen: noise that both shared would pass for skill.
            out |= cells.is_control & (rank % 2 == 1)
        return holdout, out

    def _fit_closed_form(self, cells: Cells, out: np.ndarray) -> None:
        """Effects of all cells; library shifts without what is held out, until training ends."""
        self.effects_ = self._effects_of(cells)
        self._anchor = None
        self._warn_of_coverage()
        self.library_shifts_ = library_shifts(
            cells.library, cells.each_perturbation, cells.contexts, ~out
        )

    def _effects_of(self, cells: Cells, keep: np.ndarray | None = None) -> EffectTable:
        """Effects of training cells, or of some of them, within batches."""
        known = self.adata_manager.get_state_registry(BATCH_KEY)["values"]
        return effect_table(
            cells.counts,
            cells.library,
            cells.each_perturbation,
            cells.contexts,
            self.genes,
            keep,
            batches=[str(known[b]) for b in cells.batch] if len(known) > 1 else None,
            replicates=None if cells.replicate is None else [str(r) for r in cells.replicate],
        )

    def _warn_of_coverage(self) -> None:
        """Features can only be judged by perturbed targets that they cover."""
        assert self.effects_ is not None
        targets = {p.targets[0] for p in self.effects_.perturbations if len(p.targets) == 1}
        for features in self.anchor.features:
            covered = sum(features.covers(t) for t in targets)
            if covered < MIN_UNITS:
                warnings.warn(
                    f"{features.name}: covers {covered} of the {len(targets)} targets perturbed "
                    f"alone, of which {MIN_UNITS} are needed to judge it; it gets no weight. Are "
                    "its names written as the targets are?",
                    UserWarning,
                    stacklevel=4,
                )

    def _prepare_action(self, cells: Cells, out: np.ndarray) -> torch.Tensor:
        """States of all cells, the latent image of the anchor, features, reference controls."""
        state = self._encode(cells, np.arange(len(cells)))
        inside = np.flatnonzero(~out)
        some = inside[_random.stream("map").permutation(len(inside))[:_N_MAP]]
        values = cells.tensors(some)["values"].numpy()
        self.module.anchor_map.copy_(_ridge(values, state[some].numpy()))
        features = _gene_loadings(values, self.module.perturbation_encoder.features.shape[1])
        table = torch.zeros_like(self.module.perturbation_encoder.features)
        for g, gene in enumerate(self.genes):
            table[self.vocabulary.index[gene]] = features[g]
        self.module.perturbation_encoder.features.copy_(table)

        is_control = cells.is_control
        contexts = np.array(cells.contexts, dtype=object)
        self.reference_ = {}
        for context in sorted(set(cells.contexts)):
            mine = np.flatnonzero(is_control & ~out & (contexts == context))
            chosen, _ = _random.choose(cells.names[mine], min(_N_REFERENCE, len(mine)), 0)
            mine = mine[chosen]
            self.reference_[context] = {
                "state": state[mine].numpy(),
                "library": cells.library[mine],
                "batch": cells.batch[mine],
            }
        return state


class _ActionStage:
    """Stages B and C on the training rows, and what is decided on the held-out ones."""

    def __init__(
        self, model: Trainable, cells: Cells, out: np.ndarray, holdout: Holdout, state: torch.Tensor
    ) -> None:
        assert model.effects_ is not None
        self.model, self.cells, self.holdout, self.state = model, cells, holdout, state
        keys = list(zip(cells.contexts, cells.each_perturbation, strict=True))
        members: dict[tuple[str, Perturbation], list[int]] = {}
        for i in np.flatnonzero(~out):
            members.setdefault(keys[i], []).append(int(i))
        self.members = {key: np.array(found) for key, found in members.items()}
        # Whether what is held out has control cells of its own.
        self.independent = bool((out & cells.is_control).any()) and holdout.kind != "cells"
        self.inside = self._table(~out)
        # A context of which only controls are known is trained on as it is: the decoder would else
        # never have seen its cells.
        perturbed = {c for c, _ in self.inside.rows}
        lone = sorted(c for c, p in self.members if p.is_control and c not in perturbed)
        self.rows = [*self.inside.rows, *((c, Perturbation()) for c in lone)] if perturbed else []
        if holdout.kind == "cells":
            self.outside = self._table(out)
            if not self.outside.rows:
                self.outside = self.inside
        else:
            held = {keys[i] for i in np.flatnonzero(out)}
            measured = self._table(out) if self.independent else model.effects_
            self.outside = measured.subset(np.array([r in held for r in measured.rows], bool))
        # What the anchor would have said had the held-out rows never been measured.
        features = model.new_anchor().features
        self.anchor = EffectAnchor(features, "mean").fit(self.inside)
        pairs = [p for _, p in self.outside.rows], [c for c, _ in self.outside.rows]
        self.predicted = {s: self.anchor.predict(*pairs, s) for s in SCALES}
        # A perturbation that hits its target is no success of a prediction.
        self.scored = ~self.outside.targeted(range(len(self.outside.rows)))

    def _table(self, keep: np.ndarray) -> EffectTable:
        cells = self.cells
        control = pd.Series(cells.contexts)[keep & cells.is_control].value_counts()
        enough = set(control.index[control > 1])
        keep = keep & np.fromiter((c in enough for c in cells.contexts), bool, len(cells))
        with warnings.catch_warnings():  # which batches have no controls is said of all cells
            warnings.simplefilter("ignore", UserWarning)
            return self.model._effects_of(cells, keep)

    def plan(self, matching: str, plan_kwargs: dict, shown: bool) -> ActionPlan:
        module = self.model.module
        perturbations = [p for _, p in self.rows]
        targets, doses = self.model._target_indices(perturbations)
        trained = torch.zeros_like(module.perturbation_encoder.trained)
        trained[targets[targets >= 0].unique()] = 1
        module.perturbation_encoder.trained.copy_(trained)
        bar = Stage(ANCHOR, len(SCALES) * self.anchor.n_folds, shown)
        left_out = {s: self.anchor.out_of_fold(s, progress=bar.advance) for s in SCALES}
        bar.close()
        anchor = self._padded(left_out["mean_log1p"])
        shift = anchor.to(module.anchor_map.device) @ module.anchor_map
        missed = self._padded(self.inside.effect["log1p_mean"] - left_out["log1p_mean"])
        return ActionPlan(
            module, targets, doses, shift, missed, self.error, matching=matching, **plan_kwargs
        )

    def _padded(self, effect: np.ndarray) -> torch.Tensor:
        """Effects of the measured rows, and none of the others, shape (n_rows, n_genes)."""
        padded = torch.zeros(len(self.rows), effect.shape[1])
        padded[: len(effect)] = torch.from_numpy(effect)
        return padded

    def batches(self, batch_size: int) -> Batches:
        controls = {c: self.members[c, Perturbation()] for c, _ in self.rows}
        sampler = CoherentBatches(
            [self.members[row] for row in self.rows],
            [controls[c] for c, _ in self.rows],
            max(1, batch_size // _CELLS_PER_ROW),
            _CELLS_PER_ROW,
            _BATCHES_PER_EPOCH,
        )
        return Batches(self.cells, sampler, self.state)

    def networks(self, scale: Scale) -> np.ndarray:
        """N of the held-out rows, shape (n_rows, n_genes)."""
        rows = zip(self.outside.rows, self.predicted["mean_log1p"].mean, strict=True)
        added = [self.model._network_effect(p, c, a, [scale])[scale] for (c, p), a in rows]
        return self.predicted[scale].mean + np.stack(added)

    def error(self) -> float:
        """Squared error of the network on the held-out rows, over that of no change."""
        measured = self.outside.effect["log1p_mean"]
        wrong = ((self.networks("log1p_mean") - measured) ** 2)[self.scored].sum()
        return float(wrong / max((measured**2)[self.scored].sum(), 1e-12))

    def gates(self, network: np.ndarray) -> dict[str, dict[str, Any]]:
        """Gate of each regime, on held-out perturbations."""
        scale: Scale = "mean_log1p"
        predicted = self.predicted[scale]
        regimes = np.array(predicted.regime)
        gates = {}
        for regime in sorted(set(regimes)):
            mine = np.flatnonzero(regimes == regime)
            gate = fit_gate(network[mine], predicted.mean[mine], self.outside, mine, scale)
            gates[str(regime)] = asdict(gate)
        return gates

    def errors(self, network: np.ndarray, gates: dict[str, float]) -> pd.DataFrame:
        """Noise-corrected squared error of each method on the held-out rows, by regime."""
        scale: Scale = "mean_log1p"
        table, anchor = self.outside, self.predicted[scale].mean
        regimes = self.predicted[scale].regime
        gate = np.array([gates[r] for r in regimes])[:, None]
        pairs = [p for _, p in table.rows], [c for c, _ in table.rows]
        predicted = {
            "GP-JEPA": anchor + gate * (network - anchor),
            "anchor": anchor,
            "network": network,
            "additive": Additive().fit(self.inside).predict(*pairs),
            "mean effect": MeanEffect().fit(self.inside).predict(*pairs),
            "no change": np.zeros_like(anchor),
        }
        noise, measured = table.noise(scale), table.effect[scale]
        found = {
            name: noise_corrected_error(effect, measured, noise, self.scored)
            for name, effect in predicted.items()
        }
        return pd.DataFrame(found, index=pd.Index(regimes, name="regime"))


def _ridge(values: np.ndarray, state: np.ndarray) -> torch.Tensor:
    """Ridge regression of states on expression, in its dual, shape (n_genes, n_latent)."""
    x = values - values.mean(0)
    z = state - state.mean(0)
    gram = (x @ x.T).astype(float)
    gram[np.diag_indices_from(gram)] += max(0.1 * np.trace(gram) / len(gram), 1e-6)
    return torch.from_numpy((x.T @ np.linalg.solve(gram, z)).astype(np.float32))


def _gene_loadings(values: np.ndarray, n: int) -> torch.Tensor:
    """Loadings of genes on the first principal components of cells, unit spread per component."""
    loadings = gene_loadings(values, n)
    loadings = loadings / np.maximum(loadings.std(0), 1e-8)
    padded = np.zeros((values.shape[1], n), np.float32)
    padded[:, : loadings.shape[1]] = np.clip(loadings, -5, 5)
    return torch.from_numpy(padded)
