"""Control cells of a context, moved by the predictor and decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpjepa.effects import PER
from gpjepa.perturbations import Perturbation, Vocabulary

from ._module import GPJEPAModule
from ._states import States


@dataclass(frozen=True)
class Reference:
    """Control cells of a context.

    Attributes
    ----------
    state
        Shape (n_cells, n_latent).
    batch
        Codes of batches, shape (n_cells,).
    """

    state: np.ndarray
    batch: np.ndarray


class Populations:
    """What the predictor makes of control cells.

    Parameters
    ----------
    states
        Encoder and decoder.
    vocabulary
        Which row of the perturbation encoder belongs to which target.
    reference
        Control cells of each context.
    """

    def __init__(
        self, states: States, vocabulary: Vocabulary, reference: Mapping[str, Reference]
    ) -> None:
        self.states, self.vocabulary, self.reference = states, vocabulary, reference

    @torch.inference_mode()
    def shift(self, perturbation: Perturbation, context: str, anchor: np.ndarray) -> np.ndarray:
        """What the predictor adds to the anchor in the decoded mean.

        Parameters
        ----------
        perturbation, context
            Of what.
        anchor
            A on the scale ``mean_log1p``, shape (n_genes,).

        Returns
        -------
        numpy.ndarray
            On the scale ``log1p_mean``, shape (n_genes,).
        """
        module, control = self.states.module, self.reference[context]
        moved = self.states.moved(control.state, anchor)
        like = module.anchor_map
        base, to = (torch.from_numpy(x).to(like) for x in (control.state, moved))
        action = actions(module, self.vocabulary, [perturbation]).expand(len(base), -1)
        residual, _ = module.transition(base, action, to - base)
        after, before = (
            self.states.decode(x, control.batch).mean(0)
            for x in (moved + residual.cpu().numpy(), moved)
        )
        return np.log1p(PER * after) - np.log1p(PER * before)


@torch.inference_mode()
def actions(
    module: GPJEPAModule, vocabulary: Vocabulary, perturbations: Sequence[Perturbation]
) -> torch.Tensor:
    """Action embeddings, shape (n_perturbations, n_action)."""
    targets, doses = target_indices(perturbations, vocabulary)
    like = module.anchor_map
    return module.perturbation_encoder(targets.to(like.device), doses.to(like))


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
