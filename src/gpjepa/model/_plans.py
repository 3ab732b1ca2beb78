from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch

from gpjepa.nn import ema_copy, ema_update

from ._module import GPJEPAModule

_AVERAGE = 0.98
"""Momentum of the averaged weights of stages B and C: two epochs of 25 steps."""


class Plan(pl.LightningModule):
    """AdamW with a short warm-up and cosine decay over the steps that are planned."""

    def __init__(self, module: GPJEPAModule, stage: str, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.module = module
        self.parameters_ = module.freeze(stage)
        self.lr, self.weight_decay = lr, weight_decay
        self._sums: dict[str, torch.Tensor | float] = {}
        self._n_cells = 0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters_, lr=self.lr, weight_decay=self.weight_decay)
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            # Ten steps would make torch's warm-up zero steps long, by which it divides.
            optimizer,
            max_lr=self.lr,
            total_steps=max(total + 1, 11),
            pct_start=0.1,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _log(self, losses: dict[str, torch.Tensor], prefix: str, n_cells: int) -> torch.Tensor:
        """Add a mini-batch to the means of the epoch.

        Lightning's own means over steps take as long as a third of a training step.
        """
        self._n_cells += n_cells
        for name, value in losses.items():
            name = f"{prefix}_{name}"
            self._sums[name] = self._sums.get(name, 0.0) + value.detach() * n_cells
        return losses["loss"]

    def on_train_epoch_end(self) -> None:
        for name, total in self._sums.items():
            self.log(name, total / self._n_cells, prog_bar=name.endswith("_loss"))
        self._sums, self._n_cells = {}, 0


class ActionPlan(Plan):
    """Stages B and C: the predictor with its posterior, and the count decoder.

    Parameters
    ----------
    module
        The module, with a trained encoder.
    targets, doses
        Target indices and doses of each training row, shape (n_rows, n_max_targets).
    shift
        Latent image of each row's out-of-fold anchor, shape (n_rows, n_latent).
    missed
        Mean effect of each row minus its out-of-fold anchor, shape (n_rows, n_genes).
    monitor
        Gives the error on what is held out; logged as ``holdout_error`` after every epoch.
    matching
        See :meth:`gpjepa.GPJEPA.train`.
    vicreg_weight, nb_weight, kl_weight, effect_weight
        Weights of the losses; 0 is off.
    lr, weight_decay
        Of AdamW.
    """

    def __init__(
        self, module: GPJEPAModule, targets: torch.Tensor, doses: torch.Tensor,
        shift: torch.Tensor, missed: torch.Tensor, monitor: Callable[[], float], *, matching: str = "prototype",
        vicreg_weight: float = 0.05, nb_weight: float = 10.0, kl_weight: float = 0.1,
        effect_weight: float = 1.0, lr: float = 2e-3, weight_decay: float = 1e-4,
    ) -> None:  # fmt: skip
        super().__init__(module, "action", lr, weight_decay)
        self.register_buffer("targets", targets, persistent=False)
        self.register_buffer("doses", doses, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("missed", missed, persistent=False)
        self.monitor, self.matching = monitor, matching
        # In units of the mean squared length of what is to be learned.
        effect_weight = effect_weight / max(float(missed.square().sum(1).mean()), 1e-12)
        self.weights = {
            "vicreg": vicreg_weight, "nb": nb_weight, "kl": kl_weight, "effect": effect_weight,
        }  # fmt: skip
        self.averaged = ema_copy(module)
        self.best: tuple[float, dict[str, torch.Tensor]] | None = None

    targets: torch.Tensor
    doses: torch.Tensor
    shift: torch.Tensor
    missed: torch.Tensor

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Loss of one mini-batch."""
        rows = batch["rows"]
        action = self.module.perturbation_encoder(self.targets[rows], self.doses[rows])
        losses = self.module.action_loss(
            batch,
            action,
            self.shift[rows],
            self.missed[rows],
            matching=self.matching,
            weights=self.weights,
        )
        return self._log(losses, "train", len(batch["latent"]) // 2)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Averaged weights are judged and kept: they generalise better, and the best of many epochs
        # is less of an accident.
        ema_update(self.averaged, self.module, min(_AVERAGE, 1 - 1 / (1 + self.global_step / 5)))

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        current = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
        averaged = {k: v.detach().clone() for k, v in self.averaged.state_dict().items()}
        self.module.load_state_dict(averaged)
        self.module.eval()
        error = self.monitor()
        self.module.load_state_dict(current)
        self.module.train()
        self.log("holdout_error", error, prog_bar=True)
        if self.best is None or error < self.best[0]:
            self.best = (error, averaged)


@contextmanager
def finish_on_interrupt(trainer: pl.Trainer) -> Iterator[list[int]]:
    """Let Ctrl-C end training after the current step; a second one interrupts at once.

    Lightning answers the first by ``sys.exit``, which would lose the model. Yields a list that is
    not empty once training was interrupted.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def stop(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        trainer.should_stop = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
