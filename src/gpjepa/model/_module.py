from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import NegativeBinomial
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import nn
from torch.nn import functional as F

from gpjepa.effects import PER
from gpjepa.nn import (
    BlockPredictor,
    CountDecoder,
    GaussianHead,
    PerturbationEncoder,
    ema_copy,
    make_encoder,
)
from gpjepa.objectives import (
    energy_distance,
    gaussian_kl,
    mmd,
    negative_binomial_nll,
    optimal_transport_pairs,
    sliced_wasserstein,
    vicreg,
)

from ._fields import BATCH_KEY, LIBRARY_KEY

MATCHINGS = ("prototype", "energy", "mmd", "sliced_wasserstein", "ot")


class GPJEPAModule(BaseModuleClass):
    r"""Encoder, predictor and decoder of GP-JEPA.

    Stage A trains ``encoder`` and ``block_predictor`` against ``target_encoder``
    (:class:`gpjepa.model.PretrainPlan`). Stages B and C train ``perturbation_encoder``, ``predictor``,
    ``posterior`` and ``decoder`` on the states of the frozen encoder (:meth:`action_loss`):

    .. math::
        \pi: \hat z \sim \mathcal N(z_b + W_A A + T_\varphi(z_b, z_p), \sigma_\varphi^2),\qquad
        q(z \mid x', z_b, z_p)

    Parameters
    ----------
    n_genes, n_targets, n_known, n_batches
        Genes, targets perturbed in training, all targets known, batches.
    n_latent, n_hidden, n_action, n_features
        Sizes of states, hidden layers, action embeddings and target features.
    encoder
        A key of ``gpjepa.nn.ENCODERS``.
    components
        Whether it adds to closed-form components.
    rest
        Whether library sizes are of whole cells, so that the genes hold a part only.
    """

    def __init__(
        self,
        n_genes: int,
        n_targets: int,
        n_known: int,
        n_batches: int,
        *,
        n_latent: int = 64,
        n_hidden: int = 256,
        n_action: int = 32,
        n_features: int = 16,
        encoder: Any = "mlp",
        components: bool = True,
        rest: bool = False,
    ) -> None:
        super().__init__()
        self.n_genes = n_genes
        self.encoder = make_encoder(encoder, n_genes, n_latent, n_hidden, components)
        self.target_encoder = ema_copy(self.encoder)
        self.block_predictor = BlockPredictor(n_genes, n_latent, n_hidden)
        self.perturbation_encoder = PerturbationEncoder(n_targets, n_known, n_features, n_action)
        self.predictor = GaussianHead(2 * n_latent + n_action, n_hidden, n_latent)
        self.posterior = GaussianHead(3 * n_latent + n_action, n_hidden, n_latent)
        self.decoder = CountDecoder(n_latent, n_hidden, n_genes, n_batches, rest)
        # W_A, the least-squares image in latent space of a shift in mean log1p expression.
        self.register_buffer("anchor_map", torch.zeros(n_genes, n_latent))
        # Genes that the encoder has learned of; one that it has not is hidden from it.
        self.register_buffer("known", torch.ones(n_genes, dtype=torch.bool))

    anchor_map: torch.Tensor
    known: torch.Tensor

    # The scvi-tools interface: a cell to its state to its counts.

    def _get_inference_input(self, tensors: dict[str, torch.Tensor], **kwargs: Any) -> dict:
        counts = tensors[REGISTRY_KEYS.X_KEY]
        library = tensors.get(LIBRARY_KEY)
        library = counts.sum(1) if library is None else library.flatten()
        return {"counts": counts, "library": library}

    def _get_generative_input(
        self, tensors: dict[str, torch.Tensor], inference_outputs: dict, **kwargs: Any
    ) -> dict:
        return {**inference_outputs, "batch": tensors[BATCH_KEY].flatten()}

    @auto_move_data
    def inference(
        self, counts: torch.Tensor, library: torch.Tensor, visible: torch.Tensor | None = None
    ) -> dict:
        """State of cells from their counts, shape (n_cells, n_genes), and library sizes."""
        return {"z": self.encoder(log1p_rates(counts, library), visible), "library": library}

    @auto_move_data
    def generative(self, z: torch.Tensor, library: torch.Tensor, batch: torch.Tensor) -> dict:
        """Distribution of the counts of cells in states ``z``."""
        mean = self.decoder(z, batch) * library.unsqueeze(1)
        return {"px": NegativeBinomial(mu=mean, theta=self.decoder.dispersion)}

    def loss(self, tensors: dict, inference_outputs: dict, generative_outputs: dict) -> LossOutput:
        """Negative log-likelihood of counts decoded from the cells' own states."""
        px = generative_outputs["px"]
        nll = negative_binomial_nll(tensors[REGISTRY_KEYS.X_KEY], px.mu, px.theta)
        return LossOutput(loss=nll.mean(), reconstruction_loss=nll)

    # Stages B and C

    @auto_move_data
    def transition(
        self, state: torch.Tensor, action: torch.Tensor, shift: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prior π: residual T of the mean, and log-variance, per cell.

        Parameters
        ----------
        state
            States of control cells, shape (n_cells, n_latent).
        action
            Embedding of the perturbation, shape (n_cells, n_action).
        shift
            Latent image of the anchor, shape (n_cells, n_latent).
        """
        return self.predictor(state, action, shift)

    def action_loss(
        self,
        tensors: dict[str, torch.Tensor],
        action: torch.Tensor,
        shift: torch.Tensor,
        *,
        matching: str,
        weights: dict[str, float],
    ) -> dict[str, torch.Tensor]:
        """Loss of one perturbation-coherent mini-batch.

        Parameters
        ----------
        tensors
            Perturbed cells row by row, then as many control cells: ``latent`` beside counts,
            library sizes and batches.
        action, shift
            Action embedding and latent anchor of each row, shape (n_rows, ·).
        matching
            How control and perturbed cells are compared: see :meth:`gpjepa.GPJEPA.train`.
        weights
            Weights of ``vicreg``, ``nb`` and ``kl``; 0 is off.
        """
        n = len(tensors["latent"]) // 2
        per_row = n // len(action)
        target, base = tensors["latent"][:n], tensors["latent"][n:]
        order = torch.arange(n, device=target.device)
        if matching == "ot":
            sets = [x.unflatten(0, (-1, per_row)) for x in (base, target)]
            order = (order[::per_row].unsqueeze(1) + optimal_transport_pairs(*sets)).flatten()
        target = target[order]
        action = action.repeat_interleave(per_row, 0)
        shift = shift.repeat_interleave(per_row, 0)

        residual, log_variance = self.transition(base, action, shift)
        prior = base + shift + residual
        q_residual, q_log_variance = self.posterior(target, base, action, shift)
        q_mean = prior.detach() + q_residual
        z = q_mean + torch.randn_like(q_mean) * (0.5 * q_log_variance).exp()

        compare = (prior, log_variance, target)
        predict = F.smooth_l1_loss(q_mean, target) + self._prior_loss(*compare, per_row, matching)
        kl = gaussian_kl(q_mean, q_log_variance, prior, log_variance).mean() / z.shape[1]
        counts, library, batch = (
            torch.cat([tensors[key][:n][order], tensors[key][n:]])
            for key in (REGISTRY_KEYS.X_KEY, LIBRARY_KEY, BATCH_KEY)
        )
        share = self.decoder(torch.cat([z, base]), batch)
        nb = negative_binomial_nll(counts, share * library.unsqueeze(1), self.decoder.dispersion)
        nb = nb.mean() / self.n_genes
        spread = vicreg(z, spread=target.std(0).mean()) if weights["vicreg"] else kl * 0
        loss = predict + sum(
            weights[name] * part for name, part in (("vicreg", spread), ("nb", nb), ("kl", kl))
        )
        return {
            "loss": loss,
            "predict": predict.detach(),
            "kl": kl.detach(),
            "nb": nb.detach(),
        }

    @staticmethod
    def _prior_loss(
        prior: torch.Tensor,
        log_variance: torch.Tensor,
        target: torch.Tensor,
        per_row: int,
        matching: str,
    ) -> torch.Tensor:
        if matching == "ot":
            return F.smooth_l1_loss(prior, target)
        if matching == "prototype":
            means = [x.unflatten(0, (-1, per_row)).mean(1) for x in (prior, target)]
            return F.smooth_l1_loss(*means)
        distance: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
            "energy": energy_distance,
            "mmd": mmd,
            "sliced_wasserstein": sliced_wasserstein,
        }
        sample = prior + torch.randn_like(prior) * (0.5 * log_variance).exp()
        sets = [x.unflatten(0, (-1, per_row)) for x in (sample, target)]
        return torch.stack([distance[matching](x, y) for x, y in zip(*sets, strict=True)]).mean()

    def parts(self, stage: Literal["pretrain", "action"]) -> nn.ModuleList:
        """What a stage trains."""
        if stage == "pretrain":
            return nn.ModuleList([self.encoder, self.block_predictor])
        return nn.ModuleList(
            [self.perturbation_encoder, self.predictor, self.posterior, self.decoder]
        )


def log1p_rates(counts: torch.Tensor, library: torch.Tensor) -> torch.Tensor:
    """log1p of counts per 10,000, shape (n_cells, n_genes)."""
    return torch.log1p(counts * (PER / library).unsqueeze(1))
