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
    def _gene(self) -> dict[str, int]:
        return {str(g): i for i, g in enumerate(self.denoiser.measured.effects.genes)}

    @cached_property
    def _genes(self) -> np.ndarray:
        """The targeted genes, sorted."""
        rows = self.denoiser.measured.effects.rows
        found = {self._gene[t] for _, p in rows for t in p.targets if t in self._gene}
        return np.array(sorted(found), int)

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
    def _noise(self) -> np.ndarray:
        effects = self.denoiser.measured.effects
        return effects.interval_noise(self.denoiser.measured.scale)[:, self._genes]

    @cached_property
    def _beyond(self) -> float:
        """τ²: mean square of what targeted genes do beyond what is shared."""
        rows, columns = self._targeted
        if not len(rows):
            return 0.0
        measured = self.denoiser.measured
        apart = measured.values[rows, self._genes[columns]] - self._denoised[rows, columns]
        return max(float((apart**2 - self._noise[rows, columns]).mean()), 0.0)

    @cached_property
    def _targeted(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows, and columns among the targeted genes, of what each measured perturbation targets."""
        column = {g: k for k, g in enumerate(self._genes)}
        pairs = [
            (i, column[self._gene[t]])
            for i, (_, p) in enumerate(self.denoiser.measured.effects.rows)
            for t in p.targets
            if t in self._gene
        ]
        rows, columns = np.array(pairs, int).reshape(-1, 2).T
        return rows, columns

    def put_right(
        self,
        pairs: Sequence[tuple[Perturbation, str]],
        mean: np.ndarray,
        variance: np.ndarray,
        noise: np.ndarray,
    ) -> None:
        """Change predictions at the targeted genes, each of shape (n_pairs, n_genes), in place."""
        if not len(self._genes) or not self._beyond:
            return
        column = {g: k for k, g in enumerate(self._genes)}
        row = self.denoiser.measured.row
        for i, (perturbation, context) in enumerate(pairs):
            whole = row.get((context, perturbation))
            parts = (
                [whole]
                if whole is not None
                else [row.get((context, s)) for s in perturbation.singles]
            )
            if not parts or None in parts:
                continue
            for target in perturbation.targets:
                g = self._gene.get(target)
                if g is None:
                    continue
                said = [self._of(r, column[g], target) for r in parts if r is not None]
                mean[i, g] = sum(m for m, _ in said)
                doubt = sum(v for _, v in said)
                interaction = self.misfit * mean[i, g] ** 2 if len(parts) > 1 else 0.0
                noise[i, g], variance[i, g] = doubt, doubt + interaction

    def _of(self, row: int, column: int, target: str) -> tuple[float, float]:
        """Effect of a measured perturbation on a targeted gene, and its variance."""
        measured = self.denoiser.measured
        said, noise = self._denoised[row, column], self._noise[row, column]
        if target not in measured.effects.rows[row][1].targets:
            return float(said), float(noise)
        share = self._beyond / (self._beyond + noise)
        own = measured.values[row, self._genes[column]]
        return float(said + share * (own - said)), float(share * noise)
