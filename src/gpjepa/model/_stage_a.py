"""Stage A: the encoder's training plan, what it hides, and the guard against collapse."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS
from torch import nn
from torch.nn import functional as F

from gpjepa.nn import ema_update, mlp
from gpjepa.objectives import effective_rank, gene_blocks, info_nce, sigreg, vicreg

from ._cells import Cells
from ._fields import BATCH_KEY, LIBRARY_KEY
from ._masks import MASKS, GeneSets, masks
from ._module import GPJEPAModule, log1p_rates
from ._plan import Plan

logger = logging.getLogger(__name__)

OBJECTIVES = ("jepa", "reconstruction", "contrastive")
REGULARISERS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float]] = {
    "vicreg": (vicreg, 0.01),  # and the weight it has for the JEPA
    "sigreg": (sigreg, 5.0),
}

_MIN_RANK, _MIN_SPREAD, _MIN_RATIO = 2.0, 0.05, 0.02
_RAISE, _FIRST, _BOUND = 4.0, 0.25, 64.0
_PATIENCE = 3  # epochs that a raised weight gets to show what it does


class CollapseError(RuntimeError):
    """The encoder gives all cells the same state, whatever the regulariser's weight."""


class CollapseGuard:
    """Warns of collapse, then raises the regulariser's weight, then stops.

    States are collapsed when they vary too little or along too few directions. Predictions that
    vary little beside varied targets are another matter: what is hidden may say nothing of what is
    seen, and no regulariser helps. Of that it only warns.

    Parameters
    ----------
    weight
        Weight of the regulariser; raised fourfold, and to 0.25 at least, for every three epochs
        that the collapse goes on, up to 64 times itself, and at least up to 16.
    """

    def __init__(self, weight: float) -> None:
        self.weight, self.bound = weight, _BOUND * max(weight, _FIRST)
        self.epochs, self.told = 0, False

    def look(self, rank: float, spread: float, ratio: float, most: float = math.inf) -> None:
        """Judge an epoch.

        Parameters
        ----------
        rank
            Effective rank of the states.
        spread
            Mean standard deviation of their dimensions.
        ratio
            Spread of the predictions over that of the targets.
        most
            The largest rank that the states could have; half of it is asked for where it is small.

        Raises
        ------
        CollapseError
            If the states are still collapsed at the largest weight.
        """
        least = min(_MIN_RANK, most / 2)
        if rank >= least and spread >= _MIN_SPREAD:
            self.epochs = 0
            if ratio < _MIN_RATIO and not self.told:
                self.told = True
                warnings.warn(
                    f"The predictions hardly vary: their spread is {ratio:.2g} of the targets' (at "
                    f"least {_MIN_RATIO:g} is expected). The genes that are seen say little of "
                    "those that are hidden, or the predictor has not learned it yet.",
                    UserWarning,
                    stacklevel=2,
                )
            return
        self.epochs += 1
        seen = (
            f"The encoder has collapsed: effective rank {rank:.1f} (at least {least:g}), spread "
            f"{spread:.2g} (at least {_MIN_SPREAD:g}), predictions' spread over the targets' "
            f"{ratio:.2g}"
        )
        if self.epochs == 1:
            warnings.warn(
                f"{seen}. If it goes on, the regulariser is raised.", UserWarning, stacklevel=2
            )
        elif self.epochs % _PATIENCE != 1:
            return
        elif self.weight >= self.bound:
            raise CollapseError(
                f"{seen}, with the regulariser raised to {self.weight:g}. Lower the learning rate, "
                "hide fewer genes, or choose another objective."
            )
        else:
            self.weight = min(max(_RAISE * self.weight, _FIRST), self.bound)
            logger.warning("%s; the regulariser's weight is now %g.", seen, self.weight)


@dataclass(frozen=True)
class Ablation:
    """What else stage A could be made of: for comparisons, as none of it was measured to help.

    Attributes
    ----------
    objective
        ``"jepa"``; or, with the same encoder, ``"reconstruction"`` of the expression of the hidden
        genes, or ``"contrastive"``: InfoNCE between the visible and the hidden genes of a cell.
    set_size
        0 for cells on their own. For the condition-level JEPA, cells come in sets of this size that
        share context and perturbation, and the mean state of one half predicts the other half's.
    masks
        Which genes are hidden together: ``"random"`` ones, ``"gene_sets"``, ``"regulons"``, or
        ``"adversarial"`` ones: those that tell most of the perturbation, by a linear probe on the
        training cells.
    gene_sets
        GMT files, or a dict of names to genes.
    regulons
        A table or CSV with columns ``source`` and ``target``.
    overlap, size_spread
        Of blocks: see :func:`gpjepa.objectives.gene_blocks`.
    teacher
        Whether an EMA copy of the encoder gives the (layer-normalised) targets, and is the encoder
        in the end. Without it the encoder gives them itself, and the regulariser holds for them.
    regulariser
        ``"vicreg"``, or ``"sigreg"`` (LeJEPA; made for ``teacher=False``).
    noise
        Standard deviation of Gaussian noise on log1p counts per 10,000 of the context's expressed
        genes, which falls to 0 over training (N-JEPA).
    """

    objective: Literal["jepa", "reconstruction", "contrastive"] = "jepa"
    set_size: int = 0
    masks: Literal["random", "gene_sets", "regulons", "adversarial"] = "random"
    gene_sets: GeneSets | None = None
    regulons: pd.DataFrame | str | Path | None = None
    overlap: float = 0.0
    size_spread: float = 0.0
    teacher: bool = True
    regulariser: Literal["vicreg", "sigreg"] = "vicreg"
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("objective", self.objective, OBJECTIVES),
            ("regulariser", self.regulariser, tuple(REGULARISERS)),
            ("masks", self.masks, MASKS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known; choose one of {known}.")
        if self.set_size and self.objective != "jepa":
            raise ValueError("Sets of cells are for objective='jepa'.")
        if self.set_size and (self.set_size < 4 or self.set_size % 2):
            raise ValueError(f"set_size={self.set_size}: expected an even number from 4.")
        if self.noise < 0:
            raise ValueError(f"noise={self.noise}: expected a number from 0.")
        for name, given in (("gene_sets", self.gene_sets), ("regulons", self.regulons)):
            if (given is not None) != (self.masks == name):
                found = "given" if given is not None else None
                raise ValueError(
                    f"masks={self.masks!r} and {name}={found}: {name} are needed for "
                    f"masks={name!r}, and for nothing else."
                )

    @classmethod
    def of(cls, given: Ablation | Mapping[str, Any] | None) -> Ablation:
        """An ablation as it is, or from a configuration."""
        if isinstance(given, Ablation):
            return given
        options = dict(given or {})
        known = [f.name for f in fields(cls)]
        if wrong := [name for name in options if name not in known]:
            raise TypeError(
                f"ablation has no option {', '.join(map(repr, wrong))}; its options are "
                f"{', '.join(known)}."
            )
        return cls(**options)


class PretrainPlan(Plan):
    """Stage A: masked context to the teacher's embedding of hidden gene blocks.

    Parameters
    ----------
    module
        The module.
    n_blocks, hidden
        Blocks of genes that are hidden, and the share of the genes that they hide together.
    momentum
        EMA momentum of the teacher at the start, at most 1 - 10/steps: in a short run the teacher
        would else stay near its random start. It rises to 1 along a cosine.
    regulariser_weight
        Weight of the regulariser; 0 is off, the default but for the JEPA (0.01 for VICReg).
    thinning
        Largest share of the counts that the context does not see, drawn for each cell (binomial
        thinning); targets see all. 0 is off.
    lr, weight_decay
        Of AdamW.
    ablation
        An :class:`Ablation`, or its options.
    """

    def __init__(
        self,
        module: GPJEPAModule,
        *,
        n_blocks: int = 1,
        hidden: float = 0.5,
        momentum: float = 0.996,
        regulariser_weight: float | None = None,
        thinning: float = 0.9,
        lr: float = 3e-4,
        weight_decay: float = 1e-4,
        ablation: Ablation | Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= thinning < 1:
            raise ValueError(f"thinning={thinning}: expected a share from 0 to below 1.")
        if not 0 <= momentum < 1 or (regulariser_weight or 0) < 0:
            raise ValueError(
                f"momentum={momentum}, regulariser_weight={regulariser_weight}: expected a weight "
                "from 0, and a momentum from 0 to below 1."
            )
        self.ablation = made = Ablation.of(ablation)
        super().__init__(module, "pretrain", lr, weight_decay)
        self.objective, self.set_size, self.teacher = made.objective, made.set_size, made.teacher
        self.blocks: dict[str, Any] = {
            "n_blocks": n_blocks,
            "hidden": hidden,
            "overlap": made.overlap,
            "size_spread": made.size_spread,
        }
        self.momentum, self.thinning, self.noise = momentum, thinning, made.noise
        self.regularise, weight = REGULARISERS[made.regulariser]
        if regulariser_weight is None:
            regulariser_weight = weight if self.objective == "jepa" else 0.0
        self.guard = CollapseGuard(regulariser_weight)
        n_latent, n_hidden = module.anchor_map.shape[1], 256
        self.most = 0  # the largest rank that the states of the mini-batch could have
        n_out = module.n_genes if self.objective == "reconstruction" else n_latent
        self.head = nn.Identity() if self.objective == "jepa" else mlp(n_latent, n_hidden, n_out)

    def learn_masks(self, cells: Cells, genes: np.ndarray, where: np.ndarray) -> None:
        """What is hidden together, from gene sets or from the cells of training.

        Raises
        ------
        ValueError
            If there is nothing to hide, such as gene sets that share no gene with the data.
        """
        self.blocks |= masks(self.ablation, cells, genes, where)
        with torch.random.fork_rng(devices=[]):  # as they will be drawn
            for measured, _ in cells.by_dataset(where):
                gene_blocks(len(genes), among=torch.from_numpy(measured), **self.blocks)

    def trained(self) -> list[nn.Parameter]:
        """The encoder's, the predictor's and those of a head that other objectives have."""
        return [*super().trained(), *self.head.parameters()]

    def on_fit_start(self) -> None:
        for name in ("groups", "weights"):  # to where they are drawn from
            if name in self.blocks:
                self.blocks[name] = self.blocks[name].to(self.device)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Loss of one mini-batch."""
        losses, more = self._losses(batch)
        self.add(losses, "pretrain", len(batch[BATCH_KEY]))
        if self.trainer.is_last_batch:
            self.add(self._statistics(*more), "pretrain_last", 1)
        return losses["loss"]

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """The same of cells that are not trained on."""
        losses, _ = self._losses(batch)
        self.add({"loss": losses["loss"]}, "pretrain_validation", len(batch[BATCH_KEY]))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.means("pretrain_validation")

    def _losses(
        self, batch: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], tuple[Any, ...]]:
        """Losses, and what statistics are made of: states, what is predicted and wanted, masks."""
        counts, library = batch[REGISTRY_KEYS.X_KEY], batch[LIBRARY_KEY]
        there = batch.get("measured")
        blocks = gene_blocks(self.module.n_genes, among=there, **self.blocks).to(counts.device)
        visible = ~blocks.any(0) if there is None else there & ~blocks.any(0)
        target = log1p_rates(counts, library)
        view = self._view(counts, library, target)
        if self.set_size:
            view, target = (
                x.unflatten(0, (-1, 2, self.set_size // 2))[:, i].flatten(0, 1)
                for i, x in enumerate((view, target))
            )
        state = self.module.encoder(view, visible)
        predicted, wanted, predict = getattr(self, f"_{self.objective}")(state, target, blocks)
        regulariser = self.regularise(state) if self.guard.weight else predict.detach() * 0
        if self.guard.weight and not self.teacher and self.objective == "jepa":
            regulariser = regulariser + self.regularise(wanted.flatten(0, -2))
        losses = {
            "loss": predict + self.guard.weight * regulariser,
            "predict": predict,
            "regulariser": regulariser,
        }
        return losses, (state.detach(), predicted, wanted, blocks, there)

    def _statistics(
        self,
        state: torch.Tensor,
        predicted: torch.Tensor,
        wanted: torch.Tensor,
        blocks: torch.Tensor,
        there: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """How states and predictions vary, and what was hidden; once an epoch is enough."""
        self.most = min(len(state) - 1, state.shape[1])
        spread, together = state.std(0), blocks.sum(0)
        return {
            "latent_std": spread.mean(),
            "latent_std_min": spread.min(),
            "effective_rank": effective_rank(state),
            "spread_ratio": _spread(predicted) / _spread(wanted).clamp_min(1e-12),
            "n_blocks": torch.tensor(float(len(blocks))),
            "hidden_share": (together > 0).sum()
            / (len(together) if there is None else there.sum()),
            "overlap": (together > 1).sum() / (together > 0).sum(),
            "block_size": blocks.sum(1).float().mean(),
            "block_size_std": blocks.sum(1).float().std(correction=0),
        }

    def _view(
        self, counts: torch.Tensor, library: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """What the context sees: log1p counts per 10,000, thinned and with noise."""
        if self.thinning:
            # Apple's GPUs draw no binomial variables.
            where = "cpu" if values.device.type == "mps" else values.device
            keep = 1 - self.thinning * torch.rand(len(values), 1, device=where)
            thinned = torch.binomial(counts.to(where), keep.expand_as(counts))
            values = log1p_rates(thinned.to(counts.device), library * keep[:, 0].to(library.device))
        if self.noise:
            left = 1 - self.global_step / max(int(self.trainer.estimated_stepping_batches), 1)
            noise = torch.randn_like(values) * (values != 0)
            values = values + max(left, 0.0) * self.noise * noise
        return values

    def _jepa(
        self, state: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        predicted = self.module.block_predictor(self._pool(state), blocks)
        encoder = self.module.target_encoder if self.teacher else self.module.encoder
        with torch.set_grad_enabled(not self.teacher):
            target = torch.stack([self._pool(encoder(values, block)) for block in blocks])
        if self.teacher:
            target = F.layer_norm(target, target.shape[-1:])
        return predicted, target, F.smooth_l1_loss(predicted, target)

    def _pool(self, state: torch.Tensor) -> torch.Tensor:
        """Mean state of each set."""
        return state.unflatten(0, (-1, self.set_size // 2)).mean(1) if self.set_size else state

    def _reconstruction(
        self, state: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = blocks.any(0)
        wanted = self.module.encoder.standardise(values, None)[:, hidden]
        predicted = self.head(state)[:, hidden]
        return predicted, wanted, F.mse_loss(predicted, wanted)

    def _contrastive(
        self, state: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        predicted = self.head(state)
        wanted = self.head(self.module.encoder(values, blocks.any(0)))
        return predicted, wanted, info_nce(predicted, wanted)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.teacher:
            return
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        start = max(min(self.momentum, 1 - 10 / total), 0.0)
        cosine = 0.5 * (1 + np.cos(np.pi * min(self.global_step / total, 1.0)))
        ema_update(self.module.target_encoder, self.module.encoder, 1 - (1 - start) * cosine)

    def end_epoch(self) -> None:
        seen = self.means("pretrain")
        seen |= self.means("pretrain_last", "pretrain")
        if "pretrain_effective_rank" not in seen:  # interrupted before its last mini-batch
            return
        if not math.isfinite(seen["pretrain_loss"]):
            raise RuntimeError(
                f"Stage A diverged: states are not finite in epoch {self.current_epoch}. Lower the "
                "learning rate (lr in plan_kwargs, or in pretrain_kwargs of train)."
            )
        rank, spread, ratio = (
            seen[f"pretrain_{name}"] for name in ("effective_rank", "latent_std", "spread_ratio")
        )
        self.guard.look(rank, spread, ratio, self.most)
        self.record("pretrain_regulariser_weight", self.guard.weight)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["guard"] = (self.guard.weight, self.guard.epochs, self.guard.told, self.most)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.guard.weight, self.guard.epochs, self.guard.told, self.most = checkpoint["guard"]

    def finish(self) -> None:
        """Make teacher and encoder one: the teacher is the smoother of the two."""
        pair = (self.module.encoder, self.module.target_encoder)
        first, second = pair if self.teacher else pair[::-1]
        first.load_state_dict(second.state_dict())


def _spread(x: torch.Tensor) -> torch.Tensor:
    """Mean standard deviation over cells."""
    return x.detach().std(-2).mean()
