"""The network's mean effect: control cells, moved and decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from gpjepa.effects import PER, SCALES, Scale, expected_log1p, library_shift
from gpjepa.perturbations import Perturbation, Vocabulary

from ._states import States


@dataclass(frozen=True)
class Reference:
    """Control cells of a context, from which its mean effects are decoded.

    Attributes
    ----------
    state
        Shape (n_cells, n_latent).
    library, batch
        Library sizes and codes of batches, shape (n_cells,).
    """

    state: np.ndarray
    library: np.ndarray
    batch: np.ndarray

    def some(self, n: int) -> Reference:
        """Some of the cells, at equal distances: names that are alike are of one batch."""
        at = np.linspace(0, len(self.state) - 1, min(n, len(self.state))).astype(int)
        return Reference(self.state[at], self.library[at], self.batch[at])


class Network:
    """What the network adds to the anchor.

    Parameters
    ----------
    states
        Encoder and decoder.
    vocabulary
        Which row of the perturbation encoder belongs to which target.
    reference
        Control cells of each context.
    library_shifts
        How perturbations change the mean log library size.
    """

    def __init__(
        self,
        states: States,
        vocabulary: Vocabulary,
        reference: Mapping[str, Reference],
        library_shifts: Mapping[Perturbation, float],
    ) -> None:
        self.states, self.vocabulary = states, vocabulary
        self.reference, self.library_shifts = reference, library_shifts

    @torch.inference_mode()
    def action(self, perturbations: Sequence[Perturbation]) -> torch.Tensor:
        """Action embeddings, shape (n_perturbations, n_action)."""
        module = self.states.module
        targets, doses = target_indices(perturbations, self.vocabulary)
        like = module.anchor_map
        return module.perturbation_encoder(targets.to(like.device), doses.to(like))

    @torch.inference_mode()
    def moved(
        self,
        state: np.ndarray,
        perturbation: Perturbation,
        anchor: np.ndarray,
        gate: float = 1.0,
        noise: np.ndarray | None = None,
    ) -> np.ndarray:
        """Perturbed states: z_b + W_A A + g (T + σ ε), shape (n_cells, n_latent).

        Without noise ε, which decides where a cell is drawn, they are means.
        """
        module = self.states.module
        like = module.anchor_map
        base = torch.from_numpy(state).to(like)
        shift = (torch.from_numpy(anchor).to(like) @ like).expand_as(base)
        if not gate:
            return (base + shift).cpu().numpy()
        action = self.action([perturbation]).expand(len(base), -1)
        residual, log_variance = module.transition(base, action, shift)
        if noise is not None:
            residual = residual + (0.5 * log_variance).exp() * torch.from_numpy(noise).to(like)
        return (base + shift + gate * residual).cpu().numpy()

    def effect(
        self,
        perturbation: Perturbation,
        context: str,
        anchor: np.ndarray,
        scales: Sequence[Scale] = SCALES,
        n_cells: int | None = None,
    ) -> dict[Scale, np.ndarray]:
        """N - A, on each scale: what the residual changes in the mean of the decoded cells.

        Parameters
        ----------
        perturbation, context
            Of what.
        anchor
            A on the scale ``mean_log1p``, shape (n_genes,).
        scales
            Which are wanted.
        n_cells
            Reference cells that are decoded; all by default.
        """
        control = self.reference[context]
        control = control if n_cells is None else control.some(n_cells)
        after, before = (
            self.states.decode(self.moved(control.state, perturbation, anchor, gate), control.batch)
            for gate in (1.0, 0.0)
        )
        effect: dict[Scale, np.ndarray] = {}
        if "log1p_mean" in scales:
            effect["log1p_mean"] = np.log1p(PER * after.mean(0)) - np.log1p(PER * before.mean(0))
        if "mean_log1p" in scales:
            shift = library_shift(self.library_shifts, perturbation)
            library = control.library * np.exp(shift)

            def expected(share: np.ndarray) -> np.ndarray:
                mean = share * library[:, None]
                return expected_log1p(mean, self.states.dispersion, library).mean(0)

            with ThreadPoolExecutor(min(2, torch.get_num_threads())) as threads:
                effect["mean_log1p"] = np.subtract(*threads.map(expected, (after, before)))
        return effect


def target_indices(
    perturbations: Sequence[Perturbation], vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the targets in the vocabulary, -1 for no more, and doses, (n_perturbations, n_max)."""
    width = max([1, *(len(p.targets) for p in perturbations)])
    targets = torch.full((len(perturbations), width), -1)
    doses = torch.zeros(len(perturbations), width)
    for i, p in enumerate(perturbations):
        for k, (target, dose) in enumerate(zip(p.targets, p.doses, strict=True)):
            targets[i, k] = vocabulary.place(target)
            doses[i, k] = dose
    return targets, doses
