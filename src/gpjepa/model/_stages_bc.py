"""Stages B and C: the plan that trains predictor and decoder, and what it is watched by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from gpjepa.effects import (
    Additive,
    AnchorPrediction,
    EffectTable,
    Gate,
    MeanEffect,
    Scale,
    fit_gate,
    noise_corrected_error,
)
from gpjepa.nn import ema_copy, ema_update

from ._module import GPJEPAModule
from ._network import Network
from ._plan import Plan

_AVERAGE = 0.98
"""Momentum of the averaged weights of stages B and C: two epochs of 25 steps."""
_N_WATCHED = 64  # reference cells behind the error of each epoch


class Watch:
    """What the network says of held-out rows, and how wrong it is.

    Parameters
    ----------
    network
        What the network adds to the anchor.
    measured
        Effects of the held-out rows.
    predicted
        What the anchor predicts of them without having seen them, per scale.
    """

    def __init__(
        self, network: Network, measured: EffectTable, predicted: dict[Scale, AnchorPrediction]
    ) -> None:
        self.network, self.measured, self.predicted = network, measured, predicted
        # A perturbation that hits its target is no success of a prediction.
        self.scored = ~measured.targeted(range(len(measured.rows)))
        units = [p.targets for _, p in measured.rows]
        place = {unit: i for i, unit in enumerate(sorted(set(units)))}
        self.units = torch.tensor([place[u] for u in units], dtype=torch.long)

    def effects(self, rows: Sequence[int], scale: Scale, n_cells: int | None = None) -> np.ndarray:
        """N of some of the rows, shape (n, n_genes)."""
        found = self.predicted[scale].mean[rows].copy()
        for at, i in enumerate(rows):
            context, perturbation = self.measured.rows[i]
            anchor = self.predicted["mean_log1p"].mean[i]
            found[at] += self.network.effect(perturbation, context, anchor, [scale], n_cells)[scale]
        return found

    def squares(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Squared errors of N and of no change, each of shape (n,)."""
        measured, scored = self.measured.effect["log1p_mean"][rows], self.scored[rows]
        wrong = self.effects(rows, "log1p_mean", _N_WATCHED) - measured
        return tuple((np.where(scored, x, 0) ** 2).sum(1) for x in (wrong, measured))

    def gates(self, network: np.ndarray) -> dict[str, Gate]:
        """Gate of each regime, from N of the rows, shape (n_rows, n_genes)."""
        predicted = self.predicted["mean_log1p"]
        regimes = np.array(predicted.regime)
        gates = {}
        for regime in sorted(set(regimes)):
            mine = np.flatnonzero(regimes == regime)
            gates[str(regime)] = fit_gate(network[mine], predicted.mean[mine], self.measured, mine)
        return gates

    def errors(
        self, network: np.ndarray, gates: Mapping[str, float], trained: EffectTable
    ) -> pd.DataFrame:
        """Noise-corrected squared error of each method on the rows, by regime.

        Parameters
        ----------
        network
            N of the rows, shape (n_rows, n_genes).
        gates
            Gate of each regime.
        trained
            What simple baselines are fitted on.
        """
        table, predicted = self.measured, self.predicted["mean_log1p"]
        gate = np.array([gates[r] for r in predicted.regime])[:, None]
        pairs = [p for _, p in table.rows], [c for c, _ in table.rows]
        said = {
            "GP-JEPA": predicted.mean + gate * (network - predicted.mean),
            "anchor": predicted.mean,
            "network": network,
            "additive": Additive().fit(trained).predict(*pairs),
            "mean effect": MeanEffect().fit(trained).predict(*pairs),
            "no change": np.zeros_like(predicted.mean),
        }
        noise, measured = table.noise("mean_log1p"), table.effect["mean_log1p"]
        found = {
            name: noise_corrected_error(effect, measured, noise, self.scored)
            for name, effect in said.items()
        }
        return pd.DataFrame(found, index=pd.Index(predicted.regime, name="regime"))


class ActionPlan(Plan):
    """Stages B and C: the predictor with its posterior, and the count decoder.

    After every epoch the averaged weights are judged on held-out rows; they generalise better, and
    the best of many epochs is less of an accident. The epoch that is kept is the best on all of
    these rows. What the network says of a unit (a set of targets) for the gate comes from the epoch
    that is best on the *others*, so that the gate is not set on rows that chose the epoch.

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
    watch
        The held-out rows; their error is logged as ``holdout_error`` after every epoch.
    matching
        See :meth:`gpjepa.GPJEPA.train`.
    vicreg_weight, nb_weight, kl_weight, effect_weight
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
        missed: torch.Tensor,
        watch: Watch,
        *,
        matching: str = "prototype",
        vicreg_weight: float = 0.05,
        nb_weight: float = 10.0,
        kl_weight: float = 0.1,
        effect_weight: float = 1.0,
        lr: float = 2e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__(module, "action", lr, weight_decay)
        for name, of_rows in (
            ("targets", targets),
            ("doses", doses),
            ("shift", shift),
            ("missed", missed),
        ):
            self.register_buffer(name, of_rows, persistent=False)
        self.watch, self.matching = watch, matching
        # In units of the mean squared length of what is to be learned.
        effect_weight = effect_weight / max(float(missed.square().sum(1).mean()), 1e-12)
        self.weights = {
            "vicreg": vicreg_weight,
            "nb": nb_weight,
            "kl": kl_weight,
            "effect": effect_weight,
        }
        self.averaged = ema_copy(module.parts("action"))
        self.judged: list[torch.Tensor] = []  # errors of the units, per epoch
        self.kept: dict[int, dict[str, torch.Tensor]] = {}  # averaged weights of some epochs
        self._seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

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
        wrong, base = map(torch.from_numpy, self.watch.squares(rows))
        self._seen.append((self.watch.units[rows], wrong.double(), base.double()))

    def on_validation_epoch_end(self) -> None:
        units, wrong, base = map(torch.cat, zip(*self._seen, strict=True))
        self._seen.clear()
        by_unit = torch.zeros(int(units.max()) + 1, dtype=torch.float64)
        self.judged.append(by_unit.index_add_(0, units, wrong).nan_to_num(nan=torch.inf))
        self.record("holdout_error", float(wrong.sum() / base.sum().clamp_min(1e-12)))
        now, wanted = len(self.judged) - 1, {self.best, *self.chosen}
        if now in wanted:
            self.kept[now] = {k: v.detach().clone() for k, v in self.averaged.state_dict().items()}
        self.kept = {epoch: weights for epoch, weights in self.kept.items() if epoch in wanted}

    def on_validation_end(self) -> None:
        self.module.parts("action").load_state_dict(self._current)

    @property
    def best(self) -> int:
        """The epoch with the smallest error on all held-out rows."""
        return int(torch.stack(self.judged).sum(1).argmin())

    @property
    def chosen(self) -> list[int]:
        """For each unit, the epoch with the smallest error on the others."""
        judged = torch.stack(self.judged)
        if judged.shape[1] == 1:  # there are no others
            return [self.best]
        others = judged.sum(1, keepdim=True) - judged
        return others.nan_to_num(nan=torch.inf).argmin(0).tolist()

    def load_epoch(self, epoch: int) -> None:
        """Give the module the averaged weights of an epoch that was kept."""
        self.module.parts("action").load_state_dict(self.kept[epoch])

    def load_best(self) -> None:
        """Those of the best epoch, or of the last where none was judged."""
        if self.judged:
            self.load_epoch(self.best)
        else:
            self.module.parts("action").load_state_dict(self.averaged.state_dict())

    def cross_fitted(self, scale: Scale) -> np.ndarray:
        """N of the held-out rows, each by the epoch that the others choose, (n_rows, n_genes)."""
        epochs = np.array(self.chosen)[self.watch.units.numpy()]
        found = np.empty_like(self.watch.predicted[scale].mean)
        for epoch in np.unique(epochs):
            self.load_epoch(int(epoch))  # the caller loads the one that is kept
            rows = np.flatnonzero(epochs == epoch)
            found[rows] = self.watch.effects(rows.tolist(), scale)
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["judged"], checkpoint["kept"] = self.judged, self.kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.judged, self.kept = checkpoint["judged"], checkpoint["kept"]
