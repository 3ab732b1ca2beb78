"""What sits on the encoder: predictors of hidden genes and of perturbed states, and the decoder."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn


def mlp(n_in: int, n_hidden: int, n_out: int) -> nn.Sequential:
    """Two hidden layers with layer norm and GELU."""
    return nn.Sequential(
        nn.Linear(n_in, n_hidden), nn.LayerNorm(n_hidden), nn.GELU(),
        nn.Linear(n_hidden, n_hidden), nn.LayerNorm(n_hidden), nn.GELU(),
        nn.Linear(n_hidden, n_out),
    )  # fmt: skip


class BlockPredictor(nn.Module):
    """Predicts the embedding of hidden gene blocks from the visible context (I-JEPA).

    Which genes are hidden is told by an identity query, the mean of learned gene identities.
    """

    by_gene: ClassVar[dict[str, int]] = {"identity": 0}

    def __init__(self, n_genes: int, n_latent: int, n_hidden: int) -> None:
        super().__init__()
        self.identity = nn.Parameter(torch.randn(n_genes, n_latent) / n_latent**0.5)
        self.net = mlp(2 * n_latent, n_hidden, n_latent)

    def forward(self, context: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Predict each block.

        Parameters
        ----------
        context
            Embedding of the visible genes, shape (n_cells, n_latent).
        blocks
            Which genes each block hides, boolean, shape (n_blocks, n_genes).

        Returns
        -------
        torch.Tensor
            Shape (n_blocks, n_cells, n_latent).
        """
        blocks = blocks.to(context.dtype)
        # A mean of n identities shrinks like 1/sqrt(n); undo it so that queries keep their size.
        query = blocks @ self.identity / blocks.sum(1, keepdim=True).sqrt()
        shape = (len(blocks), len(context), context.shape[1])
        pair = torch.cat([context.expand(shape), query.unsqueeze(1).expand(shape)], -1)
        return self.net(pair)


class PerturbationEncoder(nn.Module):
    """Embeds a set of targets with doses and features; the order of the targets is no input.

    A target's token is its learned embedding, zero if training never perturbed it, beside its
    features, zero if it has none. Tokens times log2(1 + dose) are summed, then transformed.
    """

    features: torch.Tensor
    trained: torch.Tensor

    def __init__(self, n_targets: int, n_known: int, n_features: int, n_action: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(max(n_targets, 1), n_action)
        nn.init.normal_(self.embedding.weight, std=0.3)
        # Row i belongs to target i of the vocabulary; the last row is "no target".
        self.register_buffer("features", torch.zeros(n_known + 1, n_features))
        self.register_buffer("trained", torch.zeros(n_known + 1))
        self.n_targets = n_targets
        self.token = mlp(n_action + n_features, n_action, n_action)
        self.out = nn.Linear(n_action, n_action)

    def forward(self, targets: torch.Tensor, doses: torch.Tensor) -> torch.Tensor:
        """Action embeddings.

        Parameters
        ----------
        targets
            Indices in the vocabulary, -1 for padding, shape (n_perturbations, n_max_targets).
        doses
            Doses, same shape.

        Returns
        -------
        torch.Tensor
            Shape (n_perturbations, n_action).
        """
        known = (targets >= 0).unsqueeze(-1)
        free = self.embedding(targets.clamp(0, self.embedding.num_embeddings - 1))
        free = free * self.trained[targets].unsqueeze(-1)
        token = self.token(torch.cat([free, self.features[targets]], -1))
        strength = torch.log2(1 + doses).unsqueeze(-1)
        return self.out((token * strength * known).sum(1))


class GaussianHead(nn.Module):
    """Mean and log-variance of a state, from the concatenation of its inputs.

    The last layer starts at zero mean and small variance: an untrained head changes nothing.
    """

    def __init__(self, n_in: int, n_hidden: int, n_latent: int) -> None:
        super().__init__()
        self.net = mlp(n_in, n_hidden, 2 * n_latent)
        for parameter in self.net[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance, each of shape (n_cells, n_latent)."""
        mean, log_variance = self.net(torch.cat(inputs, -1)).chunk(2, -1)
        return mean, (log_variance - 2).clamp(-8, 2)


class CountDecoder(nn.Module):
    """State to the share of each gene in a cell's counts.

    Softmax over the genes, plus one logit for the rest of the transcriptome where library sizes
    of whole cells are known.

    Parameters
    ----------
    n_latent, n_hidden, n_genes
        Sizes of input, hidden layer and output.
    n_batches
        Batches with an offset of their own; a cell of an unknown batch has none.
    rest
        Whether the genes hold only part of the library size.
    """

    def __init__(
        self, n_latent: int, n_hidden: int, n_genes: int, n_batches: int, rest: bool
    ) -> None:
        super().__init__()
        self.rest = rest
        n_out = n_genes + rest
        self.hidden = nn.Sequential(
            nn.Linear(n_latent, n_hidden), nn.LayerNorm(n_hidden), nn.GELU()
        )
        # A linear path beside the hidden layer: most of a state's effect on log rates is linear.
        self.out = nn.Linear(n_hidden + n_latent, n_out)
        nn.init.normal_(self.out.weight, std=0.01)
        self.batch = nn.Embedding(n_batches + 1, n_out, padding_idx=n_batches)
        nn.init.zeros_(self.batch.weight)
        self.log_dispersion = nn.Parameter(torch.zeros(n_genes))

    @property
    def dispersion(self) -> torch.Tensor:
        """Inverse dispersion θ of each gene, shape (n_genes,)."""
        return self.log_dispersion.clamp(-5, 7).exp()

    def forward(self, state: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Share of each gene in the library size, shape (n_cells, n_genes)."""
        logits = self.out(torch.cat([self.hidden(state), state], -1)) + self.batch(batch)
        share = logits.softmax(-1)
        return share[:, :-1] if self.rest else share
