"""Training: mean effects, stage A, stages B and C."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import EarlyStopping

from gpjepa.effects import (
    SCALES,
    EffectAnchor,
    EffectTable,
    gene_loadings,
)
from gpjepa.nn import ComponentEncoder, ResidualEncoder
from gpjepa.perturbations import Perturbation, TargetFeatures, Vocabulary
from gpjepa.response import ResponsePredictor
from gpjepa.splits import MIN_UNITS

from . import _random
from ._batches import Batches, EpochSampler, RandomBatches, RowBatches
from ._cells import Cells
from ._components import fit_components, worth_keeping
from ._module import GPJEPAModule
from ._moments import moments
from ._populations import Populations, Reference, target_indices
from ._progress import ANCHOR, MEAN_EFFECTS, STAGE_A, STAGES_BC, Stage
from ._response import Response
from ._running import TrainingOptions
from ._stage_a import PretrainPlan
from ._stages_bc import ActionPlan, Watch
from ._states import States
from ._training_cells import TrainingCells

logger = logging.getLogger(__name__)

_N_REFERENCE = 64  # control cells of a context behind the error of each epoch
_N_MAP = 2_000  # cells behind the latent image of the anchor
_CELLS_PER_ROW = 32
_BATCHES_PER_EPOCH = 25
_ROWS_WATCHED = 16  # held-out rows judged at a time
_N_WATCHED = 512  # cells that stage A is watched by, at most

History = dict[str, pd.DataFrame]


class Pretraining:
    """Stage A on some cells.

    Parameters
    ----------
    module
        The module, of which the encoder is trained.
    data
        Cells of training.
    plan
        The plan.
    batch_size
        Cells in a mini-batch.
    """

    def __init__(
        self, module: GPJEPAModule, data: TrainingCells, plan: PretrainPlan, batch_size: int
    ) -> None:
        if batch_size < 2:
            raise ValueError(f"batch_size={batch_size}: cells are compared, so 2 are needed.")
        self.module, self.data, self.plan = module, data, plan
        cells, where = data.cells, data.inside
        plan.learn_masks(cells, data.genes, where)
        groups = [where[mine] for _, mine in cells.by_dataset(where)]
        if min(map(len, groups)) < 2:
            raise ValueError(
                "A single cell, or the only one of its data set, cannot be compared with anything: "
                "at least 2 are needed, better 50. Add cells or remove it."
            )
        self.sampler: EpochSampler = RandomBatches(groups, batch_size)
        if plan.set_size:
            self.sampler = self._sets(plan.set_size, batch_size)

    def _sets(self, set_size: int, batch_size: int) -> RowBatches:
        """Sets of cells that share context and perturbation."""
        cells = self.data.cells
        if cells.perturbations is None:
            raise ValueError("set_size needs perturbations: the cells have none.")
        if cells.measured is not None:
            raise ValueError("set_size needs cells of one data set, and dataset_key was given.")
        rows = [mine for mine in self.data.members().values() if len(mine) >= set_size]
        if len(rows) < 2:
            raise ValueError(
                f"set_size={set_size}: {len(rows)} groups of cells with one context and perturbation "
                "have so many; at least 2 are needed."
            )
        n_batches = max(1, len(self.data.inside) // batch_size)
        return RowBatches(rows, max(2, batch_size // set_size), set_size, n_batches)

    def run(
        self,
        max_epochs: int | None,
        options: TrainingOptions,
        callbacks: Sequence[pl.Callback] = (),
    ) -> tuple[History, bool]:
        """Components in closed form, then the network; history, and whether it was interrupted."""
        cells, encoder = self.data.cells, self.module.encoder
        epochs = max(2, round(1_000 / len(self.sampler))) if max_epochs is None else max_epochs
        closed_form = next(encoder.parameters(), None) is None
        learns = bool(epochs) or closed_form
        if self.module.anchor_map.device.type == "mps":
            self.module.cpu()  # which has no eigenvalues; training takes it back
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_random.key(options.seed, "components") % 2**63)
            self._fit_components(again=closed_form, learns=learns)
        if learns:
            self.module.known.fill_(True)
        if not epochs or closed_form:
            return {}, False
        held = [self.data.held[mine] for _, mine in cells.by_dataset(self.data.held)]
        watched = [spread_out(w, _N_WATCHED) for w in held if len(w) > 1 and not self.plan.set_size]
        batches = Batches(cells, self.sampler, validation=[(w, torch.empty(0)) for w in watched])
        interrupted = options.run(STAGE_A, self.plan, batches, epochs, callbacks)
        self.plan.finish()
        return self.plan.history, interrupted

    def _fit_components(self, *, again: bool, learns: bool) -> None:
        """For an encoder that has components; a network that learned to add to them keeps them.

        But not if there are genes to be learned with which other components say more.
        """
        cells, where, encoder = self.data.cells, self.data.inside, self.module.encoder
        if isinstance(encoder, ComponentEncoder) and (again or not encoder.axes.any()):
            fit_components(cells, where, encoder)
        elif isinstance(encoder, ResidualEncoder) and learns and not self.module.known.all():
            if not worth_keeping(cells, where, encoder):
                logger.info("Components are fitted again: with the new genes they say more.")
                fit_components(cells, where, encoder)
                encoder.add_nothing()
        self.module.target_encoder.load_state_dict(encoder.state_dict())


def standardise(module: GPJEPAModule, cells: Cells, where: np.ndarray) -> np.ndarray:
    """What cells say of each gene, for the encoder's input and the decoder's start.

    Dispersion too: the steps that training has would not bring it there.

    Returns
    -------
    numpy.ndarray
        Mean share of each gene in the counts, shape (n_genes,).
    """
    found = moments(cells, where)
    scale = max(float(np.sqrt(np.square(found.spread).mean())), 1e-3)
    for encoder in (module.encoder, module.target_encoder):
        encoder.set_standard(torch.from_numpy(found.root), scale)
    share = np.maximum(found.share, 1e-8)
    decoder = module.decoder
    with torch.no_grad():
        rest = [max(1 - share.sum(), 1e-4)] if decoder.rest else []
        decoder.out.bias.copy_(torch.from_numpy(np.log(np.append(share, rest))))
        log_dispersion = np.log(np.clip(found.dispersion, 0.05, 100))
        decoder.log_dispersion.copy_(torch.from_numpy(log_dispersion))
    return share


@dataclass(frozen=True)
class ActionOptions:
    """How stages B and C are trained: see :meth:`gpjepa.GPJEPA.train`."""

    max_epochs: int | None
    batch_size: int
    matching: str
    patience: int | None
    plan: dict[str, Any]


def mean_effects(
    predictor: ResponsePredictor, effects: EffectTable, data: TrainingCells, shown: bool
) -> Response:
    """The closed form, and how much of the networks counts."""
    predictor.fit(effects)
    bar = Stage(MEAN_EFFECTS, predictor.n_refits, shown)
    judged = predictor.judge(progress=bar.advance)
    bar.close()
    return Response(effects, data.library_shifts(), judged)


class ActionTraining:
    """Stages B and C; their epoch is chosen on the held-out rows.

    Parameters
    ----------
    module
        The module; its predictor and decoder are trained.
    data
        Cells of training.
    features
        Kinds of target features.
    vocabulary
        Targets by their place in the perturbation encoder.
    """

    def __init__(
        self,
        module: GPJEPAModule,
        data: TrainingCells,
        features: Sequence[TargetFeatures],
        vocabulary: Vocabulary,
    ) -> None:
        self.module, self.data, self.vocabulary = module, data, vocabulary
        self.effects, inside, outside = data.effects()
        held_rows = data.held_rows
        self.inside = self.effects.subset(np.zeros(len(self.effects.rows), bool))
        self.inside = self.inside if inside is None else inside
        self.features = features
        warn_of_coverage(self.features, self.effects)
        # What is held out is judged where it has control cells of its own.
        judged = outside is not None and len(outside.rows) > 0
        held = outside if judged or data.holdout.kind == "cells" else self.effects
        rows = [] if held is None else [i for i, row in enumerate(held.rows) if row in held_rows]
        self.outside = self.inside if held is None or not rows else held.subset(np.array(rows))

    def run(
        self,
        options: ActionOptions,
        training: TrainingOptions,
        callbacks: Sequence[pl.Callback] = (),
        *,
        skip: bool = False,
    ) -> History:
        """Train stages B and C; ``skip`` leaves them untrained."""
        state = States(self.module).encode(self.data.cells)
        self._prepare_module(state)
        rows = self._rows()
        if skip or not rows:
            return {}
        # What the anchor would have said had the held-out rows never been measured.
        anchor = EffectAnchor(self.features, "mean").fit(self.inside)
        watch = self.watch(anchor, state)
        plan = self._plan(rows, anchor, watch, options, training.shown)
        batches = self._batches(rows, state, options.batch_size)
        if options.patience is not None:
            stop = EarlyStopping(
                "holdout_error", patience=options.patience, check_on_train_epoch_end=False
            )
            callbacks = [*callbacks, stop]
        epochs = 40 if options.max_epochs is None else options.max_epochs
        training.run(STAGES_BC, plan, batches, epochs, callbacks)
        plan.load_best()
        return plan.history

    def _rows(self) -> list[tuple[str, Perturbation]]:
        """Rows that are trained on.

        A context of which only controls are known is trained on as it is: the decoder would else
        never have seen its cells.
        """
        perturbed = {c for c, _ in self.inside.rows}
        lone = sorted({c for c, p in self.data.members() if p.is_control and c not in perturbed})
        return [*self.inside.rows, *((c, Perturbation()) for c in lone)] if perturbed else []

    def _prepare_module(self, state: np.ndarray) -> None:
        """The latent image of the anchor, and features of targets: their loadings in cells."""
        inside = self.data.inside
        some = inside[_random.stream("map").permutation(len(inside))[:_N_MAP]]
        values = self.data.cells.log1p_rates(some)
        self.module.anchor_map.copy_(_ridge(values, state[some]))
        encoder = self.module.perturbation_encoder
        loadings = _gene_loadings(values, encoder.features.shape[1])
        at = [self.vocabulary.index[str(gene)] for gene in self.data.genes]
        encoder.features.zero_()
        encoder.features[at] = loadings.to(encoder.features)
        targets, _ = target_indices([p for _, p in self.inside.rows], self.vocabulary)
        encoder.trained.zero_()
        encoder.trained[targets[targets >= 0].unique()] = 1

    def _reference(self, state: np.ndarray) -> dict[str, Reference]:
        cells, inside = self.data.cells, self.data.inside
        controls = inside[cells.is_control[inside]]
        contexts = np.array(cells.contexts, dtype=object)[controls]
        found = {}
        for context in sorted(set(cells.contexts)):
            mine = controls[contexts == context]
            chosen, _ = _random.choose(cells.names[mine], min(_N_REFERENCE, len(mine)), 0)
            mine = mine[chosen]
            found[context] = Reference(state[mine], cells.batch[mine])
        return found

    def watch(self, anchor: EffectAnchor, state: np.ndarray) -> Watch:
        """The held-out rows, by which the epoch is chosen."""
        reference = self._reference(state)
        populations = Populations(States(self.module), self.vocabulary, reference)
        pairs = [p for _, p in self.outside.rows], [c for c, _ in self.outside.rows]
        return Watch(populations, self.outside, {s: anchor.predict(*pairs, s) for s in SCALES})

    def _plan(
        self,
        rows: list[tuple[str, Perturbation]],
        anchor: EffectAnchor,
        watch: Watch,
        options: ActionOptions,
        shown: bool,
    ) -> ActionPlan:
        targets, doses = target_indices([p for _, p in rows], self.vocabulary)
        anchor_map = self.module.anchor_map
        bar = Stage(ANCHOR, anchor.n_folds, shown)
        left_out = anchor.out_of_fold("mean_log1p", progress=bar.advance)
        bar.close()

        def padded(effect: np.ndarray) -> torch.Tensor:
            """Effects of the measured rows, and none of the others."""
            every = torch.zeros(len(rows), effect.shape[1])
            every[: len(effect)] = torch.from_numpy(effect)
            return every

        shift = padded(left_out).to(anchor_map.device) @ anchor_map
        return ActionPlan(
            self.module,
            targets,
            doses,
            shift,
            watch,
            matching=options.matching,
            **options.plan,
        )

    def _batches(
        self, rows: list[tuple[str, Perturbation]], state: np.ndarray, batch_size: int
    ) -> Batches:
        members = self.data.members()
        sampler = RowBatches(
            [members[row] for row in rows],
            max(1, batch_size // _CELLS_PER_ROW),
            _CELLS_PER_ROW,
            _BATCHES_PER_EPOCH,
            [members[c, Perturbation()] for c, _ in rows],
        )
        watched = torch.arange(len(self.outside.rows)).split(_ROWS_WATCHED)
        nobody = np.array([], int)
        validation = [(nobody, part) for part in watched if len(part)]
        return Batches(self.data.cells, sampler, torch.from_numpy(state), validation)


def spread_out(cells: np.ndarray, n: int) -> np.ndarray:
    """Some of the cells at equal distances, as names that are alike are of one batch."""
    return cells if len(cells) <= n else cells[np.linspace(0, len(cells) - 1, n).astype(int)]


def warn_of_coverage(features: Sequence[Any], effects: EffectTable) -> None:
    """Features can only be judged by perturbed targets that they cover."""
    targets = {p.targets[0] for p in effects.perturbations if len(p.targets) == 1}
    known = sum(any(kind.covers(t) for kind in features) for t in targets)
    nothing = [kind.name for kind in features if not any(map(kind.covers, targets))]
    problem = ""
    if features and known < MIN_UNITS:
        problem = (
            f"cover {known} of the {len(targets)} targets perturbed alone, of which {MIN_UNITS} are "
            "needed to judge them; they get no weight"
        )
    elif nothing:
        problem = f"{', '.join(nothing)}: none of the targets perturbed alone is covered"
    if problem:
        warnings.warn(
            f"Target features: {problem}. Are their names written as the targets are?",
            UserWarning,
            stacklevel=4,
        )


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
