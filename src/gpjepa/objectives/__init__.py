"""Plain functions on tensors: regularisers, distances between sets, matching, masks."""

from ._distances import energy_distance, mmd, optimal_transport_pairs, sliced_wasserstein
from ._masks import gene_blocks
from ._regularisers import (
    effective_rank,
    gaussian_kl,
    info_nce,
    negative_binomial_nll,
    sigreg,
    vicreg,
)

__all__ = [
    "effective_rank",
    "energy_distance",
    "gaussian_kl",
    "gene_blocks",
    "info_nce",
    "mmd",
    "negative_binomial_nll",
    "optimal_transport_pairs",
    "sigreg",
    "sliced_wasserstein",
    "vicreg",
]
