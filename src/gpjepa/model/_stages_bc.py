"""Stages B and C: the plan that trains predictor and decoder, and what it is watched by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gpjepa.effects import AnchorPrediction, EffectTable, Scale
from gpjepa.nn import ema_copy, ema_update

from ._module import GPJEPAModule
from ._plan import Plan
from ._populations import Populations

_AVERAGE = 0.98
"""Momentum of the averaged weights of stages B and C: two epochs of 25 steps."""


class Watch:
    """How far the decoded means of held-out rows are from those measured.

    Parameters
    ----------
    populations
        What the predictor makes of control cells.
    measured
        Effects of the held-out rows.
    predicted
        What the anchor predicts of them without having seen them, per scale.
    """

    def __init__(
        self,
        populations: Populations,
        measured: EffectTable,
        predicted: dict[Scale, AnchorPrediction],
    ) -> None:
        self.populations, self.measured, self.predicted = populations, measured, predicted
        # A perturbation that hits its target is no success of a prediction.
        self.scored = ~measured.targeted(range(len(measured.rows)))

    def squares(self, rows: Sequence[int]) -> tuple[float, float]:
        """Squared errors of some rows, and of no change, on the scale ``log1p_mean``."""
        wrong = base = 0.0
        for i in rows:
            context, perturbation = self.measured.rows[i]
            anchor, mean = (self.predicted[s].mean[i] for s in ("mean_log1p", "log1p_mean"))
            mean = mean + self.populations.shift(perturbation, context, anchor)
            measured, scored = self.measured.effect["log1p_mean"][i], self.scored[i]
            wrong += float(((mean - measured)[scored] ** 2).sum())
            base += float((measured[scored] ** 2).sum())
        return wrong, base


class ActionPlan(Plan):
    """Stages B and C: the predictor with its posterior, and the count decoder.

    After every epoch the averaged weights are judged on held-out rows; they generalise better, and
    the best of many epochs, which is kept, is less of an accident.

    Parameters
    ----------
    module
        The module, with a trained encoder.
    targets, doses
        Target indices and doses of each training row, shape (n_rows, n_max_targets).
    shift
        Latent image of each row's out-of-fold anchor, shape (n_rows, n_latent).
    watch
        The held-out rows; their error is logged as ``holdout_error`` after every epoch.
    matching
        See :meth:`gpjepa.GPJEPA.train`.
    vicreg_weight, nb_weight, kl_weight
        Weights of the losses; 0 is off.
    lr, weight_decay
        Of AdamW.
    """

    def __init__(
        self,
        module: GPJEPAModule,
        targets: torch.Tensor,
        doses: torch.Tensor,
        shift: torch.Tensor,
        watch: Watch,
        *,
        matching: str = "prototype",
        vicreg_weight: float = 0.05,
        nb_weight: float = 10.0,
        kl_weight: float = 0.1,
        lr: float = 2e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__(module, "action", lr, weight_decay)
        for name, of_rows in (
            ("targets", targets),
            ("doses", doses),
            ("shift", shift),
        ):
            self.register_buffer(name, of_rows, persistent=False)
        self.watch, self.matching = watch, matching
        self.weights = {"vicreg": vicreg_weight, "nb": nb_weight, "kl": kl_weight}
        self.averaged = ema_copy(module.parts("action"))
        self.judged: list[float] = []  # errors, per epoch
        self.best: dict[str, torch.Tensor] | None = None  # averaged weights of the best epoch
        self._seen: list[tuple[float, float]] = []

    targets: torch.Tensor
    doses: torch.Tensor
    shift: torch.Tensor

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Loss of one mini-batch."""
        rows = batch["rows"]
        action = self.module.perturbation_encoder(self.targets[rows], self.doses[rows])
        losses = self.module.action_loss(
            batch,
            action,
            self.shift[rows],
            matching=self.matching,
            weights=self.weights,
        )
        self.add(losses, "train", len(batch["latent"]) // 2)
        return losses["loss"]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        momentum = min(_AVERAGE, 1 - 1 / (1 + self.global_step / 5))
        ema_update(self.averaged, self.module.parts("action"), momentum)

    def end_epoch(self) -> None:
        self.means("train")

    def on_validation_start(self) -> None:
        parts = self.module.parts("action")
        self._current = {k: v.clone() for k, v in parts.state_dict().items()}
        parts.load_state_dict(self.averaged.state_dict())

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Errors of some held-out rows."""
        rows = batch["rows"].tolist()
        self._seen.append(self.watch.squares(rows))

    def on_validation_epoch_end(self) -> None:
        wrong, base = np.sum(self._seen, 0)
        self._seen.clear()
        error = float(np.nan_to_num(wrong / max(base, 1e-12), nan=np.inf))
        self.record("holdout_error", error)
        if error < min(self.judged, default=np.inf):
            self.best = {k: v.detach().clone() for k, v in self.averaged.state_dict().items()}
        self.judged.append(error)

    def on_validation_end(self) -> None:
        self.module.parts("action").load_state_dict(self._current)

    def load_best(self) -> None:
        """Give the module the averaged weights of the best epoch, or the last if none was judged."""
        self.module.parts("action").load_state_dict(self.best or self.averaged.state_dict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["judged"], checkpoint["best"] = self.judged, self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.judged, self.best = checkpoint["judged"], checkpoint["best"]
