from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from lightning.pytorch.callbacks import EarlyStopping
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.data.fields import NumericalObsField
from scvi.model.base import BaseModelClass
from scvi.train import TrainRunner

from gpjepa.effects import (
    PER,
    SCALES,
    EffectAnchor,
    EffectTable,
    Scale,
    effect_table,
    expected_log1p,
    library_shift,
    library_shifts,
)
from gpjepa.effects._scales import check_scale
from gpjepa.perturbations import LabelReader, Perturbation, Vocabulary
from gpjepa.splits import MIN_UNITS, Holdout, exclude, hold_out

from . import _random
from ._cells import Batches, Cells, CoherentBatches, RandomBatches, align, read_cells
from ._fields import (
    BATCH_KEY,
    CONTEXT_KEY,
    LIBRARY_KEY,
    PERTURBATION_KEY,
    CountsField,
    LabelField,
    PerturbationField,
)
from ._module import MATCHINGS, GPJEPAModule
from ._plans import ActionPlan, PretrainPlan, finish_on_interrupt
from ._results import PredictedCells, PredictedEffect, assemble

logger = logging.getLogger(__name__)

MIN_CELLS = 10
"""Perturbations with fewer cells than this are named in a warning."""
_N_REFERENCE = 256  # control cells of a context behind the network's mean effect
_N_MAP = 2_000  # cells behind the latent image of the anchor
_ENCODE = 512  # cells encoded at a time
Gate = Literal["auto", 0, 1]


class GPJEPA(BaseModelClass):
    r"""Predicts how single cells respond to perturbations, and says how sure it is.

    A joint-embedding predictive architecture for perturbations: an encoder that predicts the
    embedding of hidden genes (stage A), a predictor in which the perturbation is the action
    (stage B), and a negative-binomial decoder (stage C), on top of a closed-form anchor
    (:class:`gpjepa.effects.EffectAnchor`). The mean effect is

    .. math:: d = A + g_r\,(N - A),

    with the anchor *A*, the mean effect *N* of the network's decoded cells, and a gate
    :math:`g_r` that is 1 only where held-out perturbations of the regime show that the network
    helps.

    Parameters
    ----------
    adata
        AnnData registered with :meth:`setup_anndata`.
    registry
        Registry of a saved model, instead of ``adata``.
    n_latent
        Dimensions of the state.
    encoder
        ``"mlp"``, or ``"perceiver"``: learned queries that attend to all genes.
    n_hidden
        Width of hidden layers.

    Examples
    --------
    >>> adata = gpjepa.datasets.simulate()
    >>> gpjepa.GPJEPA.setup_anndata(adata)
    >>> model = gpjepa.GPJEPA(adata)
    >>> model.train()
    >>> cells = model.predict_perturbation(adata, "TF001+TF002")
    """

    _module_cls = GPJEPAModule

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        n_latent: int = 64,
        encoder: Literal["mlp", "perceiver"] = "mlp",
        n_hidden: int = 256,
    ) -> None:
        super().__init__(adata, registry)
        fields = self.registry_["field_registries"]
        self.genes = np.asarray(fields[REGISTRY_KEYS.X_KEY]["state_registry"]["column_names"])
        self.labelled = PERTURBATION_KEY in fields
        self.n_batches = len(fields[BATCH_KEY]["state_registry"]["values"])
        known = self._trained_perturbations() if self.labelled else []
        self.vocabulary = Vocabulary([t for p in known for t in p.targets], list(self.genes))
        self.module = GPJEPAModule(
            len(self.genes), len(self.vocabulary.perturbed), len(self.vocabulary), self.n_batches,
            n_latent=n_latent, n_hidden=n_hidden, encoder=encoder,
            rest=bool(fields.get(LIBRARY_KEY, {}).get("data_registry")),
        )  # fmt: skip
        self._model_summary_string = (
            f"GPJEPA with n_latent: {n_latent}, encoder: {encoder}, n_hidden: {n_hidden}, "
            f"genes: {len(self.genes)}, perturbed targets: {len(self.vocabulary.perturbed)}."
        )
        self.is_pretrained_ = False
        self.effects_: EffectTable | None = None
        self.library_shifts_: dict[Perturbation, float] = {}
        self.reference_: dict[str, dict[str, np.ndarray]] = {}
        self.gene_share_ = np.ones(len(self.genes)) / len(self.genes)
        self.gate_: dict[str, dict[str, Any]] = {}
        self._anchor: EffectAnchor | None = None
        self.init_params_ = self._get_init_params(locals())

    def _trained_perturbations(self) -> list[Perturbation]:
        values = self.get_state_registry(PERTURBATION_KEY)["values"]
        return [Perturbation(tuple(t), tuple(d)) for t, d in values]

    # Data

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        *,
        layer: str | None = None,
        perturbation_key: str | None = "perturbation",
        control: str | Sequence[str] = "control",
        context_key: str | None = None,
        batch_key: str | None = None,
        dosage_key: str | None = None,
        library_size_key: str | None = None,
        separator: str | None = "+",
        strip: str | None = None,
        **kwargs: Any,
    ) -> None:
        r"""Say where the counts and the labels are.

        Parameters
        ----------
        adata
            Cells of training: raw counts of perturbed and control cells.
        layer
            Layer with raw counts; by default ``layers["counts"]`` if there, else ``X``.
        perturbation_key
            Column of ``obs`` with the perturbation of each cell, such as ``"KLF1+MAP2K6"``. None
            for unlabelled cells: :meth:`pretrain` and :meth:`embed` only.
        control
            Label or labels of control cells.
        context_key
            Column of ``obs`` with the context: cell line, cell type, donor, treatment. Every
            context needs control cells.
        batch_key
            Column of ``obs`` with the batch; the decoder has an offset for each.
        dosage_key
            Column of ``obs`` with the dose: a number, or one per target (``"0.5+1"``).
        library_size_key
            Column of ``obs`` with the counts of the whole cell, where the genes here are only
            some. By default the sum over the genes.
        separator
            What stands between the targets of a combination; None if labels hold one target.
        strip
            Regular expression removed from targets, for guide suffixes: ``r"_g?\d+$"``.

        Raises
        ------
        ValueError
            If values are not counts, gene names repeat, the control label does not occur, labels
            look as if written in another way, or a context has no control cells.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        if isinstance(control, str):
            control = [control]
        if layer is None and "counts" in adata.layers:
            layer = "counts"
        fields = cls._fields(
            layer, perturbation_key, LabelReader(tuple(control), separator, strip), context_key,
            batch_key, dosage_key, library_size_key,
        )  # fmt: skip
        manager = AnnDataManager(fields=fields, setup_method_args=setup_method_args)
        source_registry = kwargs.pop("source_registry", None)
        manager.register_fields(adata, source_registry, **kwargs)
        if source_registry is None and perturbation_key is not None:
            cls._check_groups(manager)
        cls.register_manager(manager)

    @staticmethod
    def _fields(
        layer: str | None, perturbation_key: str | None, reader: LabelReader,
        context_key: str | None, batch_key: str | None, dosage_key: str | None,
        library_size_key: str | None,
    ) -> list:  # fmt: skip
        fields = [
            CountsField(REGISTRY_KEYS.X_KEY, layer, is_count_data=True),
            LabelField(CONTEXT_KEY, context_key),
            LabelField(BATCH_KEY, batch_key),
        ]
        if perturbation_key is not None:
            fields.append(PerturbationField(perturbation_key, reader, dosage_key))
        if library_size_key is not None:
            fields.append(NumericalObsField(LIBRARY_KEY, library_size_key))
        return fields

    @staticmethod
    def _check_groups(manager: AnnDataManager) -> None:
        """Every context needs control cells; small perturbations are named."""
        values = manager.get_state_registry(PERTURBATION_KEY)["values"]
        contexts = np.array(manager.get_state_registry(CONTEXT_KEY)["values"], dtype=object)
        code = manager.get_from_registry(PERTURBATION_KEY).ravel()
        context = manager.get_from_registry(CONTEXT_KEY).ravel()
        control = [i for i, (targets, _) in enumerate(values) if not targets]
        without = sorted(set(context) - set(context[np.isin(code, control)]))
        if without:
            raise ValueError(
                f"No control cells in context {', '.join(map(repr, contexts[without]))}: an "
                "effect is a difference from the control cells of the same context. Add control "
                "cells, remove the context, or choose another context_key."
            )
        n = np.bincount(code, minlength=len(values))
        small = [
            f"{Perturbation(tuple(t), tuple(d))} ({n[i]})"
            for i, (t, d) in enumerate(values)
            if t and n[i] < MIN_CELLS
        ]
        if small:
            warnings.warn(
                f"{len(small)} perturbations have fewer than {MIN_CELLS} cells and weigh little: "
                f"{', '.join(small[:20])}{' ...' if len(small) > 20 else ''}.",
                UserWarning,
                stacklevel=4,
            )

    def _training_cells(self) -> Cells:
        if self.adata is None:
            raise ValueError("The model was loaded without data: give an AnnData.")
        self._validate_anndata(self.adata)
        return read_cells(self.adata_manager, None, self.n_batches)

    def _query_cells(self, adata: AnnData | None) -> Cells:
        """Cells of any AnnData, aligned by gene name; the AnnData stays as it is."""
        if adata is None or adata is self.adata:
            return self._training_cells()
        if not isinstance(adata, AnnData):
            raise TypeError(f"Expected an AnnData, got {type(adata).__name__}.")
        if adata.n_obs == 0:
            raise ValueError("The AnnData holds no cells: the selection is empty.")
        if not adata.obs_names.is_unique:
            raise ValueError(
                "Names of cells repeat; call adata.obs_names_make_unique() first (random streams "
                "belong to cells by name)."
            )
        args = dict(self.registry_["setup_args"])
        layer = self.registry_["field_registries"][REGISTRY_KEYS.X_KEY]["data_registry"]["attr_key"]
        perturbation_key = args["perturbation_key"]
        if perturbation_key not in adata.obs:
            perturbation_key = None  # unlabelled cells can still be embedded
        keys = [perturbation_key, args["context_key"], args["batch_key"], args["dosage_key"],
                args["library_size_key"]]  # fmt: skip
        light, visible = align(adata, self.genes, layer, keys)
        control = args["control"]
        reader = LabelReader(
            (control,) if isinstance(control, str) else tuple(control),
            args["separator"], args["strip"],
        )  # fmt: skip
        fields = self._fields(
            layer, perturbation_key, reader, args["context_key"], args["batch_key"],
            args["dosage_key"], args["library_size_key"],
        )  # fmt: skip
        manager = AnnDataManager(fields=fields)
        manager.register_fields(light, self.registry_)
        cells = read_cells(manager, visible, self.n_batches)
        if not visible.all() and args["library_size_key"] is None:
            # The missing genes hold part of the library size, which the data do not show.
            share = self.gene_share_[visible].sum() / self.gene_share_.sum()
            cells = Cells(
                cells.counts, cells.library / share, cells.perturbations, cells.contexts,
                cells.batch, cells.names, visible,
            )  # fmt: skip
        return cells

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

        Works on unlabelled cells (``perturbation_key=None``). :meth:`train` then starts from here.

        Parameters
        ----------
        max_epochs
            Epochs; by default as many as make about 1,000 steps.
        batch_size
            Cells in a mini-batch.
        accelerator, devices
            As in scvi-tools.
        plan_kwargs
            Options of :class:`gpjepa.model.PretrainPlan`.
        **trainer_kwargs
            Options of :class:`scvi.train.Trainer`.
        """
        cells = self._training_cells()
        self._pretrain(
            cells, np.arange(len(cells)), max_epochs, batch_size, plan_kwargs,
            accelerator=accelerator, devices=devices, **trainer_kwargs,
        )  # fmt: skip

    def train(
        self,
        max_epochs: int | None = None,
        pretrain_epochs: int | None = None,
        *,
        matching: str = "prototype",
        batch_size: int = 256,
        early_stopping: bool = True,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        plan_kwargs: dict | None = None,
        pretrain_kwargs: dict | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Fit the anchor, then the encoder (stage A), then predictor and decoder (stages B, C).

        A share of the perturbations is held out from the network (fewer than five: a context,
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
        early_stopping
            Stop when the error on what is held out has not improved for 8 epochs; the best epoch
            is kept in any case.
        accelerator, devices
            As in scvi-tools.
        plan_kwargs, pretrain_kwargs
            Options of :class:`gpjepa.model.ActionPlan` and :class:`gpjepa.model.PretrainPlan`.
        **trainer_kwargs
            Options of :class:`scvi.train.Trainer`.
        """
        if not self.labelled:
            raise ValueError(
                "The cells have no perturbations (perturbation_key=None): call pretrain(), or set "
                "the AnnData up with perturbation_key."
            )
        if matching not in MATCHINGS:
            raise ValueError(f"matching={matching!r} is not known; choose one of {MATCHINGS}.")
        cells = self._training_cells()
        trainer_kwargs |= {"accelerator": accelerator, "devices": devices}
        holdout, out = self._hold_out(cells)
        logger.info("Held out for early stopping and the gate: %s.", holdout.reason)
        self._fit_closed_form(cells)
        interrupted = False
        if pretrain_epochs is not None or not self.is_pretrained_:
            interrupted = self._pretrain(
                cells, np.flatnonzero(~out), pretrain_epochs, batch_size, pretrain_kwargs,
                **trainer_kwargs,
            )  # fmt: skip
        state = self._prepare_action(cells, out)
        history = self.history_ or {}
        stage = _ActionStage(self, cells, out, holdout, state)
        if not interrupted and stage.rows:
            plan = stage.plan(matching, plan_kwargs or {})
            callbacks = list(trainer_kwargs.pop("callbacks", []))
            if early_stopping:
                callbacks.append(
                    EarlyStopping("holdout_error", patience=8, check_on_train_epoch_end=True)
                )
            epochs = 40 if max_epochs is None else max_epochs
            self._run(
                plan, stage.batches(batch_size), epochs, callbacks=callbacks, **trainer_kwargs
            )
            if plan.best is not None:
                self.module.load_state_dict(plan.best[1])
            self.module.eval()
            self.gate_ = stage.gates()
        self.history_ = {**history, **(self.history_ or {})}
        self.is_trained_ = True

    def _run(self, plan: Any, batches: Batches, epochs: int, **trainer_kwargs: Any) -> bool:
        """Run a plan; True if it was interrupted."""
        self.is_trained_ = False  # or scvi-tools would keep only the metrics that it knows already
        runner = TrainRunner(self, plan, batches, max_epochs=epochs, **trainer_kwargs)  # type: ignore[arg-type]
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
        self, cells: Cells, where: np.ndarray, max_epochs: int | None, batch_size: int,
        plan_kwargs: dict | None, **trainer_kwargs: Any,
    ) -> bool:  # fmt: skip
        self._fit_standardisation(cells, where)
        sampler = RandomBatches(where, batch_size)
        epochs = max(2, round(1_000 / len(sampler))) if max_epochs is None else max_epochs
        interrupted = False
        if epochs:
            plan = PretrainPlan(self.module, **(plan_kwargs or {}))
            interrupted = self._run(plan, Batches(cells, sampler), epochs, **trainer_kwargs)
            # The teacher is the smoother of the two; from here on it is the encoder.
            self.module.encoder.load_state_dict(self.module.target_encoder.state_dict())
            self._warn_of_collapse()
        self.is_pretrained_ = self.is_trained_ = True
        return interrupted

    def _fit_standardisation(self, cells: Cells, where: np.ndarray) -> None:
        """Mean and spread of each gene over the training cells, and its share of the counts."""
        total = square = share = np.zeros(len(self.genes))
        for start in range(0, len(where), _ENCODE):
            batch = cells.tensors(where[start : start + _ENCODE])
            values = batch["values"].double()
            total = total + values.sum(0).numpy()
            square = square + values.square().sum(0).numpy()
            share = share + (batch["counts"] / batch["library"][:, None]).sum(0).numpy()
        mean = total / len(where)
        spread = np.sqrt(np.maximum(square / len(where) - mean**2, 0))
        self.gene_share_ = np.maximum(share / len(where), 1e-8)
        for encoder in (self.module.encoder, self.module.target_encoder):
            encoder.center.copy_(torch.from_numpy(mean))
            encoder.scale.copy_(torch.from_numpy(np.maximum(spread, 0.1)))
        with torch.no_grad():
            rest = [max(1 - self.gene_share_.sum(), 1e-4)] if self.module.decoder.rest else []
            logits = np.log(np.append(self.gene_share_, rest))
            self.module.decoder.out.bias.copy_(torch.from_numpy(logits))

    def _warn_of_collapse(self) -> None:
        history = self.history_ or {}
        if "pretrain_effective_rank" not in history:
            return
        rank = float(history["pretrain_effective_rank"].iloc[-1].item())
        spread = float(history["pretrain_latent_std"].iloc[-1].item())
        if rank < 2 or spread < 0.05:
            warnings.warn(
                f"The encoder has collapsed (effective rank {rank:.1f}, spread {spread:.2g}): raise "
                "vicreg_weight in pretrain_kwargs, or lower the learning rate.",
                UserWarning,
                stacklevel=4,
            )

    def _hold_out(self, cells: Cells) -> tuple[Holdout, np.ndarray]:
        assert cells.perturbations is not None
        holdout = hold_out(sorted(set(zip(cells.contexts, cells.perturbations, strict=True))))
        if holdout.kind != "cells":
            return holdout, exclude(cells.perturbations, cells.contexts, holdout)
        groups = pd.Series(list(zip(cells.contexts, cells.perturbations, strict=True)))
        return holdout, (groups.groupby(groups).cumcount() % 10 == 9).to_numpy()

    def _fit_closed_form(self, cells: Cells) -> None:
        assert cells.perturbations is not None
        self.effects_ = effect_table(
            cells.counts, cells.library, cells.perturbations, cells.contexts, self.genes
        )
        self._anchor = None
        self.library_shifts_ = library_shifts(cells.library, cells.perturbations, cells.contexts)

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
            mine = np.flatnonzero(is_control & (contexts == context))
            chosen, _ = _random.choose(cells.names[mine], min(_N_REFERENCE, len(mine)), 0)
            mine = mine[chosen]
            self.reference_[context] = {
                "state": state[mine].numpy(),
                "library": cells.library[mine],
                "batch": cells.batch[mine],
            }
        return state

    @torch.inference_mode()
    def _encode(self, cells: Cells, where: np.ndarray) -> torch.Tensor:
        """States of cells, shape (n_cells, n_latent)."""
        self.module.eval()
        device = self.module.anchor_map.device
        visible = None if cells.visible.all() else torch.from_numpy(cells.visible).to(device)
        states = []
        for start in range(0, len(where), _ENCODE):
            values = cells.tensors(where[start : start + _ENCODE])["values"].to(device)
            states.append(self.module.inference(values, visible)["z"].cpu())
        return torch.cat(states).clone()

    # Prediction

    @property
    def anchor(self) -> EffectAnchor:
        """The closed-form predictor of mean effects, fitted on the training cells."""
        if self.effects_ is None:
            raise RuntimeError("The model is not trained on perturbations yet: call train() first.")
        if self._anchor is None:
            self._anchor = EffectAnchor().fit(self.effects_)
        return self._anchor

    def _parse(
        self, perturbation: str | Perturbation | Sequence[str | Perturbation]
    ) -> list[Perturbation]:
        one = isinstance(perturbation, str | Perturbation)
        wanted = [perturbation] if one else list(perturbation)
        if not wanted:
            raise ValueError("No perturbation was given.")
        args = self.registry_["setup_args"]
        control = args["control"]
        names = (control,) if isinstance(control, str) else tuple(control)
        # `strip` is for guide names in the data; a target is asked for by its own name.
        reader = LabelReader((*names, "control"), args["separator"])
        read = [reader.read(p) for p in wanted]
        for p in read:
            self.vocabulary.check(p)
        return list(dict.fromkeys(read))

    def _contexts(self, wanted: str | Sequence[str] | None, present: Sequence[str]) -> list[str]:
        known = self.anchor.effects_.contexts
        chosen = (
            list(present) if wanted is None else [wanted] if isinstance(wanted, str) else wanted
        )
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            raise ValueError(
                f"Unknown context {', '.join(map(repr, unknown))}; known are {known}. A context is "
                "known once its control cells are in the training data."
            )
        return list(chosen)

    def _gate(self, regime: str, gate: Gate) -> float:
        if gate == "auto":
            return float(self.gate_.get(regime, {}).get("gate", 0))
        if gate not in (0, 1):
            raise ValueError(f"gate={gate!r}: choose 'auto', 0 (anchor) or 1 (network).")
        return float(gate)

    def _action(self, perturbations: Sequence[Perturbation]) -> torch.Tensor:
        """Action embeddings, shape (n_perturbations, n_action)."""
        targets, doses = self._target_indices(perturbations)
        device = self.module.anchor_map.device
        return self.module.perturbation_encoder(targets.to(device), doses.to(device))

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
        self, state: np.ndarray, noise: np.ndarray, perturbation: Perturbation, anchor: np.ndarray,
        gate: float = 1.0,
    ) -> np.ndarray:  # fmt: skip
        """Perturbed states: z_b + W_A A + g (T + σ ε), shape (n_cells, n_latent)."""
        device = self.module.anchor_map.device
        base = torch.from_numpy(state).to(device)
        shift = (torch.from_numpy(anchor).to(device) @ self.module.anchor_map).expand_as(base)
        if gate:
            action = self._action([perturbation]).expand(len(base), -1)
            residual, log_variance = self.module.transition(base, action, shift)
            epsilon = torch.from_numpy(noise).to(device)
            shift = shift + gate * (residual + (0.5 * log_variance).exp() * epsilon)
        return (base + shift).cpu().numpy()

    @torch.inference_mode()
    def _decode(self, state: np.ndarray, batch: np.ndarray) -> np.ndarray:
        """Share of each gene in the library size, shape (n_cells, n_genes)."""
        device = self.module.anchor_map.device
        z, b = torch.from_numpy(state).to(device), torch.from_numpy(batch).to(device)
        return self.module.decoder(z, b).cpu().numpy()

    @property
    def _dispersion(self) -> np.ndarray:
        return self.module.decoder.dispersion.detach().cpu().numpy()

    def _network_effect(
        self, perturbation: Perturbation, context: str, anchor: np.ndarray,
        scales: Sequence[Scale] = SCALES,
    ) -> dict[Scale, np.ndarray]:  # fmt: skip
        """N: mean effect of the network's decoded cells against its decoded control cells."""
        control = self.reference_[context]
        names = np.arange(len(control["state"])).astype(str)
        noise = _random.normal(
            names, np.zeros(len(names), int), control["state"].shape[1], "reference"
        )
        state = self._transition(control["state"], noise, perturbation, anchor)
        before = self._decode(control["state"], control["batch"])
        after = self._decode(state, control["batch"])
        effect: dict[Scale, np.ndarray] = {}
        if "log1p_mean" in scales:
            effect["log1p_mean"] = np.log1p(PER * after.mean(0)) - np.log1p(PER * before.mean(0))
        if "mean_log1p" in scales:
            library = control["library"]
            moved = library * np.exp(library_shift(self.library_shifts_, perturbation))
            effect["mean_log1p"] = expected_log1p(
                after * moved[:, None], self._dispersion, moved
            ).mean(0) - expected_log1p(before * library[:, None], self._dispersion, library).mean(0)
        return effect

    def _effect(
        self, perturbation: Perturbation, context: str, gate: Gate = "auto"
    ) -> PredictedEffect:
        """D = A + g (N - A), on both scales."""
        anchor = self.anchor
        both = {s: anchor.predict([perturbation], [context], s) for s in SCALES}
        regime = both["mean_log1p"].regime[0]
        mean = {s: both[s].mean[0] for s in SCALES}
        g = 0.0 if perturbation.is_control else self._gate(regime, gate)
        effect: dict[str, np.ndarray] = {s: mean[s] for s in SCALES}
        if g:
            network = self._network_effect(perturbation, context, mean["mean_log1p"])
            effect = {s: mean[s] + g * (network[s] - mean[s]) for s in SCALES}
        return PredictedEffect(
            str(perturbation), context, regime, g,
            {s: effect[s].astype(np.float32) for s in SCALES},
            {s: mean[s] for s in SCALES},
            {s: both[s].variance[0] for s in SCALES},
            anchor.effects_.control["log1p_mean"][context],
        )  # fmt: skip

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
        wanted = self._parse(perturbations)
        chosen = self._contexts(contexts, self.anchor.effects_.contexts)
        frames = [self._effect(p, c, gate).frame(self.genes, scale) for p in wanted for c in chosen]
        return pd.concat(frames, ignore_index=True)

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
        if n_samples is not None and n_samples < 1:
            raise ValueError(f"n_samples={n_samples}: expected at least 1, or None.")
        self._gate("", gate)
        cells = self._query_cells(adata)
        if cells.perturbations is None:
            key = self.registry_["setup_args"]["perturbation_key"]
            raise ValueError(f"The AnnData has no column obs[{key!r}] that marks control cells.")
        control = np.flatnonzero(cells.is_control)
        if not len(control):
            raise ValueError(
                "The AnnData has no control cells; predictions start from them. Pass the training "
                "AnnData, or control cells of your own."
            )
        at = {}
        for i in control:
            at.setdefault(cells.contexts[i], []).append(i)
        chosen = self._contexts(context, sorted(at))
        absent = [c for c in chosen if c not in at]
        if absent:
            raise ValueError(f"The AnnData has no control cells of context {absent}.")
        groups = []
        for c in chosen:
            mine = cells.take(np.array(at[c]))
            where, draws = _random.choose(mine.names, n_samples, seed)
            mine = mine.take(where)
            state = self._encode(mine, np.arange(len(mine))).numpy()
            for p in wanted:
                effect = self._effect(p, c, gate)
                groups.append(self._predict_cells(mine, state, draws, p, effect, seed, return_mean))
        order = {str(p): i for i, p in enumerate(wanted)}
        groups.sort(key=lambda g: order[g.effect.perturbation])
        units = "expected counts" if return_mean else "sampled counts"
        key = self.registry_["setup_args"]["context_key"]
        return assemble(groups, self.genes, seed, units, key)

    def _predict_cells(
        self, cells: Cells, state: np.ndarray, draws: np.ndarray, perturbation: Perturbation,
        effect: PredictedEffect, seed: int, return_mean: bool,
    ) -> PredictedCells:  # fmt: skip
        stream = (seed, effect.perturbation)
        noise = _random.normal(cells.names, draws, state.shape[1], *stream)
        moved = self._transition(
            state, noise, perturbation, effect.anchor["mean_log1p"], effect.gate
        )
        # Without the network, control cells keep their own rates and only the mean is moved.
        share = self._decode(moved if effect.gate else state, cells.batch)
        expected = PER * share.astype(float)
        expected *= effect.target_rate / np.maximum(expected.mean(0), 1e-12)
        library = cells.library * np.exp(library_shift(self.library_shifts_, perturbation))
        mean = expected * (library / PER)[:, None]
        counts = mean if return_mean else _random.negative_binomial(
            mean, self._dispersion, cells.names, draws, *stream
        )  # fmt: skip
        return PredictedCells(
            effect, sp.csr_matrix(counts, dtype=np.float32), expected.astype(np.float32), moved,
            library, cells.names, draws,
        )  # fmt: skip

    def control_cells(self) -> AnnData:
        """The control cells among the training cells, all that predictions need of the data."""
        cells = self._training_cells()
        assert self.adata is not None
        keep = self.adata[np.flatnonzero(cells.is_control)]
        layer = self.registry_["field_registries"][REGISTRY_KEYS.X_KEY]["data_registry"]["attr_key"]
        counts = keep.X if layer is None else keep.layers[layer]
        own = [k for k in keep.obs if not str(k).startswith("_gpjepa_")]
        return AnnData(counts.copy(), obs=keep.obs[own].copy(), var=keep.var[[]].copy())

    # Representations

    def get_latent_representation(
        self, adata: AnnData | None = None, indices: Sequence[int] | None = None
    ) -> np.ndarray:
        """States of cells.

        Parameters
        ----------
        adata
            Cells, aligned by gene name; the training cells by default.
        indices
            Cells to take; all by default.

        Returns
        -------
        numpy.ndarray
            Shape (n_cells, n_latent).
        """
        self._check_if_trained(warn=True)
        cells = self._query_cells(adata)
        where = np.arange(len(cells)) if indices is None else np.asarray(indices)
        if where.dtype == bool:
            where = np.flatnonzero(where)
        if not len(where):
            raise ValueError("No cells were selected.")
        # Batches in the order of the names: the same cells give the same numbers to the last bit.
        order = np.argsort(cells.names[where], kind="stable")
        result = np.empty((len(where), self.module.anchor_map.shape[1]), np.float32)
        result[order] = self._encode(cells, where[order]).numpy()
        return result

    def embed(self, adata: AnnData) -> None:
        """Write the states of cells to ``adata.obsm["X_gpjepa"]``."""
        adata.obsm["X_gpjepa"] = self.get_latent_representation(adata)

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
        return pd.DataFrame(embedding, index=[str(p) for p in perturbations])

    def posterior_predictive_sample(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 1,
        batch_size: int | None = None,
    ) -> Any:
        """Counts drawn from each cell's own state, for :mod:`scvi.criticism`.

        Parameters
        ----------
        adata
            Cells; the training cells by default.
        indices
            Cells to take; all by default.
        n_samples
            Draws per cell.
        batch_size
            Cells decoded at a time.

        Returns
        -------
        sparse.GCXS
            Shape (n_cells, n_genes), with a third axis (n_samples,) if there are several.
        """
        import sparse

        self._check_if_trained(warn=True)
        cells = self._query_cells(adata)
        where = np.arange(len(cells)) if indices is None else np.asarray(indices)
        draws = []
        for k in range(n_samples):
            parts = []
            for start in range(0, len(where), batch_size or _ENCODE):
                part = where[start : start + (batch_size or _ENCODE)]
                share = self._decode(self._encode(cells, part).numpy(), cells.batch[part])
                counts = _random.negative_binomial(
                    share * cells.library[part, None], self._dispersion, cells.names[part],
                    np.full(len(part), k), "posterior",
                )  # fmt: skip
                parts.append(sparse.GCXS.from_numpy(counts))
            draws.append(sparse.concatenate(parts))
        return draws[0] if n_samples == 1 else sparse.stack(draws, axis=2)

    # Files

    def save(
        self, dir_path: str, prefix: str | None = None, overwrite: bool = False, **kwargs: Any
    ) -> None:
        """Save the model to a directory; nothing half written is left behind.

        Parameters
        ----------
        dir_path
            Directory; must not exist unless ``overwrite``.
        prefix
            Prepended to the names of the files.
        overwrite
            Replace the files of an existing directory.
        **kwargs
            As in :meth:`scvi.model.base.BaseModelClass.save`.
        """
        path = Path(dir_path)
        if path.exists() and not overwrite:
            raise ValueError(
                f"{dir_path} already exists. Choose another directory, or pass overwrite=True."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as part:
            super().save(part, prefix=prefix, overwrite=True, **kwargs)
            path.mkdir(exist_ok=True)
            for file in os.listdir(part):
                os.replace(Path(part) / file, path / file)

    @classmethod
    def load(
        cls, dir_path: str, adata: AnnData | Literal[False] | None = None,
        prefix: str | None = None, **kwargs: Any,
    ) -> GPJEPA:  # fmt: skip
        """Load a saved model.

        Parameters
        ----------
        dir_path
            Directory that :meth:`save` wrote.
        adata
            Cells to attach, aligned by gene name; False for none.
        prefix
            Prefix of the names of the files.
        **kwargs
            As in :meth:`scvi.model.base.BaseModelClass.load`.

        Raises
        ------
        ValueError
            If the directory does not hold a whole model of this class.
        """
        file = Path(dir_path) / f"{prefix or ''}model.pt"
        if not file.is_file():
            raise ValueError(
                f"{dir_path} is not the directory of a saved model: it has no file {file.name}."
            )
        try:
            registry = cls.load_registry(str(dir_path), prefix)
        except Exception as error:
            raise ValueError(
                f"{file} cannot be read as a model: it is truncated or of another kind "
                f"({type(error).__name__}: {error})."
            ) from error
        name = registry.get("model_name")
        if name != cls.__name__:
            raise ValueError(f"{dir_path} holds a model of class {name}, not {cls.__name__}.")
        if isinstance(adata, AnnData):
            adata = cls._as_trained(adata, registry)
        return super().load(str(dir_path), adata, prefix=prefix, **kwargs)

    @staticmethod
    def _as_trained(adata: AnnData, registry: dict) -> AnnData:
        """The AnnData itself if its genes are the model's in their order, else an aligned copy."""
        counts = registry["field_registries"][REGISTRY_KEYS.X_KEY]
        genes = np.asarray(counts["state_registry"]["column_names"])
        if np.array_equal(adata.var_names.to_numpy().astype(str), genes.astype(str)):
            return adata
        return align(adata, genes, counts["data_registry"]["attr_key"], list(adata.obs))[0]


class _ActionStage:
    """Stages B and C on the training rows, and what is decided on the held-out ones."""

    def __init__(
        self, model: GPJEPA, cells: Cells, out: np.ndarray, holdout: Holdout, state: torch.Tensor
    ) -> None:
        assert cells.perturbations is not None
        assert model.effects_ is not None
        self.model, self.cells, self.holdout, self.state = model, cells, holdout, state
        keys = list(zip(cells.contexts, cells.perturbations, strict=True))
        members: dict[tuple[str, Perturbation], list[int]] = {}
        for i in np.flatnonzero(~out):
            members.setdefault(keys[i], []).append(i)
        self.members = {key: np.array(found) for key, found in members.items()}
        self.inside = self._table(np.flatnonzero(~out))
        self.rows = self.inside.rows
        if holdout.kind == "cells":
            self.outside = self._table(np.flatnonzero(out)) if out.any() else self.inside
        else:
            held = {keys[i] for i in np.flatnonzero(out)}
            self.outside = model.effects_.subset(np.array([r in held for r in model.effects_.rows]))
        # What the anchor would have said had the held-out rows never been measured.
        self.anchor = EffectAnchor().fit(self.inside)
        pairs = [p for _, p in self.outside.rows], [c for c, _ in self.outside.rows]
        self.predicted = {s: self.anchor.predict(*pairs, s) for s in SCALES}

    def _table(self, where: np.ndarray) -> EffectTable:
        part = self.cells.take(where)
        assert part.perturbations is not None
        control = {
            c for c, p in zip(part.contexts, part.perturbations, strict=True) if p.is_control
        }
        keep = np.array([c in control for c in part.contexts], bool)
        part = part.take(np.flatnonzero(keep))
        assert part.perturbations is not None
        return effect_table(
            part.counts, part.library, part.perturbations, part.contexts, self.model.genes
        )

    def plan(self, matching: str, plan_kwargs: dict) -> ActionPlan:
        module = self.model.module
        perturbations = [p for _, p in self.rows]
        targets, doses = self.model._target_indices(perturbations)
        trained = torch.zeros_like(module.perturbation_encoder.trained)
        trained[targets[targets >= 0].unique()] = 1
        module.perturbation_encoder.trained.copy_(trained)
        anchor = torch.from_numpy(self.anchor.out_of_fold("mean_log1p"))
        shift = anchor.to(module.anchor_map.device) @ module.anchor_map
        return ActionPlan(
            module, targets, doses, shift, self.error, matching=matching, **plan_kwargs
        )

    def batches(self, batch_size: int) -> Batches:
        per_row = 32
        controls = {c: self.members[c, Perturbation()] for c, _ in self.rows}
        sampler = CoherentBatches(
            [self.members[row] for row in self.rows],
            [controls[c] for c, _ in self.rows],
            max(1, batch_size // per_row), per_row, 25,
        )  # fmt: skip
        return Batches(self.cells, sampler, self.state)

    def _networks(self, scale: Scale) -> np.ndarray:
        """N of the held-out rows, shape (n_rows, n_genes)."""
        rows = zip(self.outside.rows, self.predicted["mean_log1p"].mean, strict=True)
        return np.stack([self.model._network_effect(p, c, a, [scale])[scale] for (c, p), a in rows])

    def error(self) -> float:
        """Squared error of the network on the held-out rows, over that of no change."""
        measured = self.outside.effect["log1p_mean"]
        wrong = ((self._networks("log1p_mean") - measured) ** 2).sum()
        return float(wrong / max((measured**2).sum(), 1e-12))

    def gates(self) -> dict[str, dict[str, Any]]:
        """Per regime: 1 where the network beats the anchor on at least five held-out rows."""
        measured = self.outside.effect["mean_log1p"]
        network = ((self._networks("mean_log1p") - measured) ** 2).sum(1)
        anchor = ((self.predicted["mean_log1p"].mean - measured) ** 2).sum(1)
        regimes = np.array(self.predicted["mean_log1p"].regime)
        gates = {}
        for regime in sorted(set(regimes)):
            mine = regimes == regime
            enough = mine.sum() >= MIN_UNITS and self.holdout.kind == "perturbations"
            gates[str(regime)] = {
                "gate": int(enough and network[mine].sum() < anchor[mine].sum()),
                "n_rows": int(mine.sum()),
                "error_network": float(network[mine].sum()),
                "error_anchor": float(anchor[mine].sum()),
            }
        return gates


def _ridge(values: np.ndarray, state: np.ndarray) -> torch.Tensor:
    """Ridge regression of states on expression, in its dual, shape (n_genes, n_latent)."""
    x = values - values.mean(0)
    z = state - state.mean(0)
    gram = (x @ x.T).astype(float)
    gram[np.diag_indices_from(gram)] += max(0.1 * np.trace(gram) / len(gram), 1e-6)
    return torch.from_numpy((x.T @ np.linalg.solve(gram, z)).astype(np.float32))


def _gene_loadings(values: np.ndarray, n: int) -> torch.Tensor:
    """Loadings of genes on the first principal components of cells, unit spread per component."""
    from sklearn.utils.extmath import randomized_svd

    x = values - values.mean(0)
    k = min(n, *x.shape)
    _, singular, components = randomized_svd(x, k, random_state=0)
    loadings = (components * singular[:, None]).T / np.sqrt(len(x))
    loadings = loadings / np.maximum(loadings.std(0), 1e-8)
    padded = np.zeros((values.shape[1], n), np.float32)
    padded[:, :k] = np.clip(loadings, -5, 5)
    return torch.from_numpy(padded)
