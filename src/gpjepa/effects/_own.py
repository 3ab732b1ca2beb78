"""What perturbations do to the very genes that they target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpjepa.perturbations import Perturbation

from ._denoise import Denoiser


@dataclass(frozen=True)
class OwnGenes:
    r"""Effects on the targeted genes, which no other perturbation has in common.

    A knock-out lowers its own transcript, whatever it does to others: shrinkage towards what effects
    share takes that off. Of a measured effect *d* with noise *v*, denoised to *m*, the targeted genes
    take :math:`m + (d - m)\, \tau^2 / (\tau^2 + v)`, with :math:`\tau^2` the mean of
    :math:`(d - m)^2 - v` over the targeted genes of all perturbations: as much as the screen shows that
    they are different from others (Efron and Morris 1973). In combinations that were not measured, they
    take the sum over the targets.

    Parameters
    ----------
    denoiser
        Of the measured effects.
    misfit
        Squared interaction over squared effect of combinations.
    """

    denoiser: Denoiser
    misfit: float = 0.0

    @cached_property
    def _mask(self) -> np.ndarray:
        """Genes that the measured perturbations target, shape (n_rows, n_genes)."""
        effects = self.denoiser.measured.effects
        return effects.targeted(range(len(effects.rows)))

    @cached_property
    def _genes(self) -> np.ndarray:
        """The targeted genes, sorted."""
        return np.flatnonzero(self._mask.any(0))

    @cached_property
    def _column(self) -> dict[str, int]:
        """Place of each targeted gene among them."""
        names = self.denoiser.measured.effects.genes[self._genes]
        return {str(name): k for k, name in enumerate(names)}

    @cached_property
    def _denoised(self) -> np.ndarray:
        """Denoised effects on the targeted genes, shape (n_rows, n_targeted)."""
        measured = self.denoiser.measured
        found = np.zeros((len(measured.values), len(self._genes)))
        for context, rows in self.denoiser.rows.items():
            values = measured.values[np.ix_(rows, self._genes)]
            found[rows] = self.denoiser.of(context).weights(rows) @ values
        return found

    @cached_property
    def _variance(self) -> tuple[np.ndarray, np.ndarray]:
        """Sampling variance of perturbed profiles, and of control profiles, on the targeted genes."""
        measured, n = self.denoiser.measured, len(self.denoiser.measured.values)
        variance = measured.effects.interval_variance(measured.scale)[:, self._genes]
        return variance[:n], variance[n:]

    @cached_property
    def _noise(self) -> np.ndarray:
        own, of_controls = self._variance
        return own + self.denoiser.measured.effects.compared[0].power(2) @ of_controls

    @cached_property
    def _beyond(self) -> float:
        """τ²: mean square of what targeted genes do beyond what is shared."""
        at = self._mask[:, self._genes]
        if not at.any():
            return 0.0
        apart = self.denoiser.measured.values[:, self._genes] - self._denoised
        return max(float((apart**2 - self._noise)[at].mean()), 0.0)

    def put_right(
        self,
        pairs: Sequence[tuple[Perturbation, str]],
        mean: np.ndarray,
        variance: np.ndarray,
        noise: np.ndarray,
    ) -> None:
        """Change predictions at the targeted genes, each of shape (n_pairs, n_genes), in place."""
        if not self._beyond:
            return
        row = self.denoiser.measured.row
        for i, (perturbation, context) in enumerate(pairs):
            columns = [self._column[t] for t in perturbation.targets if t in self._column]
            whole = row.get((context, perturbation))
            singles = [row.get((context, s)) for s in perturbation.singles]
            parts = singles if whole is None else [whole]
            if not columns or None in parts:
                continue
            rows = np.array(parts, int)
            for k in columns:
                g = self._genes[k]
                mean[i, g], noise[i, g] = self._sum(rows, k)
                interaction = self.misfit * mean[i, g] ** 2 if len(rows) > 1 else 0.0
                variance[i, g] = noise[i, g] + interaction

    def alone(self, singles: Sequence[Perturbation], context: str) -> dict[int, tuple[int, float]]:
        """Place, of those measured alone, of the gene that each targets, and the effect on it."""
        found = {}
        for i, single in enumerate(singles if self._beyond else ()):
            row = self.denoiser.measured.row.get((context, single))
            k = self._column.get(single.targets[0])
            if row is not None and k is not None:
                found[i] = int(self._genes[k]), self._sum(np.array([row]), k)[0]
        return found

    def _sum(self, rows: np.ndarray, k: int) -> tuple[float, float]:
        """Sum of some effects on a targeted gene, and its variance."""
        noise, said = self._noise[rows, k], self._denoised[rows, k]
        targeted = self._mask[rows, self._genes[k]]
        share = self._beyond / (self._beyond + noise)
        apart = self.denoiser.measured.values[rows, self._genes[k]] - said
        value = said + np.where(targeted, share, 0) * apart
        # What is shrunk is known better; of the rest, the noise. They share that of the controls.
        own, of_controls = self._variance
        kept = np.where(targeted, share, 1)
        together = np.sqrt(kept) @ self.denoiser.measured.of_rows(rows)
        return float(value.sum()), float(kept @ own[rows, k] + together**2 @ of_controls[:, k])
