"""What the training plans of all stages have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import pandas as pd
import torch

from . import _random
from ._module import GPJEPAModule


class Plan(pl.LightningModule):
    """AdamW with a short warm-up and cosine decay over the steps that are planned.

    Random numbers of an epoch follow from the seed and the epoch alone, so that training that is
    resumed goes on as it would have.

    Parameters
    ----------
    module
        The module.
    stage
        What of it is trained: see :meth:`GPJEPAModule.parts`.
    lr, weight_decay
        Of AdamW.
    """

    def __init__(
        self,
        module: GPJEPAModule,
        stage: Literal["pretrain", "action"],
        lr: float,
        weight_decay: float,
    ) -> None:
        super().__init__()
        self.module = module
        self.stage, self.seed = stage, 0
        self.lr, self.weight_decay = lr, weight_decay
        # Writes a checkpoint after every epoch. No callback, as those come before the plan itself.
        self.keep: Callable[[pl.Trainer], None] | None = None
        self.records: dict[str, dict[int, float]] = {}  # by epoch
        self._sums: dict[str, dict[str, torch.Tensor | float]] = {}
        self._n_cells: dict[str, int] = {}

    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that the stage trains."""
        return list(self.module.parts(self.stage).parameters())

    def configure_optimizers(self) -> Any:
        parameters = self.trained()
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.lr,
            weight_decay=self.weight_decay,
            fused=parameters[0].device.type in ("cpu", "cuda"),
        )
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

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # the mini-batches have a generator of their own
            torch.manual_seed(_random.key(self.seed, self.stage, self.current_epoch) % 2**63)

    def on_train_epoch_end(self) -> None:
        self.end_epoch()
        if self.keep is not None:
            self.keep(self.trainer)

    def end_epoch(self) -> None:
        """What a stage does once it has seen all mini-batches of an epoch."""

    def add(self, losses: dict[str, torch.Tensor], kind: str, n_cells: int) -> None:
        """Add a mini-batch to the means of the epoch.

        Lightning's own means over steps take as long as a third of a training step.
        """
        sums = self._sums.setdefault(kind, {})
        self._n_cells[kind] = self._n_cells.get(kind, 0) + n_cells
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach() * n_cells

    def means(self, kind: str, called: str | None = None) -> dict[str, float]:
        """Means over the cells of the epoch, which are kept in the history and logged."""
        n, sums = self._n_cells.pop(kind, 0), self._sums.pop(kind, {})
        found = {f"{called or kind}_{name}": float(total) / n for name, total in sums.items()}
        for key, value in found.items():
            self.record(key, value)
        return found

    def record(self, name: str, value: float) -> None:
        """One value of this epoch, for the history, the logger and callbacks."""
        self.records.setdefault(name, {})[self.current_epoch] = value
        self.log(name, value, prog_bar=name.endswith(("_loss", "_error")), batch_size=1)

    @property
    def history(self) -> dict[str, pd.DataFrame]:
        """A frame per metric, by epoch."""
        return {
            name: pd.DataFrame({name: values.values()}, pd.Index(values, name="epoch"))
            for name, values in self.records.items()
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["records"] = self.records

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.records = checkpoint["records"]
