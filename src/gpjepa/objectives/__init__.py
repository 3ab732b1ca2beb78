"""Plain functions on tensors: regularisers, distances between sets, matching, masks."""

from ._distances import energy_distance, mmd, optimal_transport_pairs, sliced_wasserstein
from ._masks import random_blocks
from ._regularisers import effective_rank, gaussian_kl, negative_binomial_nll, vicreg

__all__ = [
    "effective_rank",
    "energy_distance",
    "gaussian_kl",
    "mmd",
    "negative_binomial_nll",
    "optimal_transport_pairs",
    "random_blocks",
    "sliced_wasserstein",
    "vicreg",
]
