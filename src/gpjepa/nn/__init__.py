"""Plain torch: encoders, predictors, the count decoder, EMA. Tensors in, tensors out."""

from collections.abc import Callable

from ._ema import ema_copy, ema_update
from ._encoders import Encoder, MLPEncoder, PCAEncoder
from ._heads import (
    BlockPredictor,
    CountDecoder,
    GaussianHead,
    PerturbationEncoder,
    mlp,
)
from ._perceiver import PerceiverEncoder
from ._tokens import Tokenizer
from ._transformer import TransformerEncoder

ENCODERS: dict[str, Callable[..., Encoder]] = {
    "mlp": MLPEncoder,
    "perceiver": PerceiverEncoder,
    "transformer": TransformerEncoder,
    "pca": PCAEncoder,
}


def make_encoder(kind: str, n_genes: int, n_latent: int, n_hidden: int) -> Encoder:
    """Build an encoder by name; the width of hidden layers is the MLP's."""
    if kind not in ENCODERS:
        raise ValueError(f"encoder={kind!r} is not known; choose one of {tuple(ENCODERS)}.")
    if kind == "mlp":
        return MLPEncoder(n_genes, n_latent, n_hidden)
    return ENCODERS[kind](n_genes, n_latent)


__all__ = [
    "ENCODERS",
    "BlockPredictor",
    "CountDecoder",
    "Encoder",
    "GaussianHead",
    "MLPEncoder",
    "PCAEncoder",
    "PerceiverEncoder",
    "PerturbationEncoder",
    "Tokenizer",
    "TransformerEncoder",
    "ema_copy",
    "ema_update",
    "make_encoder",
    "mlp",
]
