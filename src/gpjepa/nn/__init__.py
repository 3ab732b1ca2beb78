"""Plain torch: encoders, predictors, the count decoder, EMA. Tensors in, tensors out."""

from collections.abc import Callable

from ._attention import SimilarityAttention
from ._by_gene import load_genes
from ._ema import ema_copy, ema_update
from ._encoders import ComponentEncoder, Encoder, MLPEncoder, ResidualEncoder
from ._heads import (
    BlockPredictor,
    CountDecoder,
    GaussianHead,
    PerturbationEncoder,
    mlp,
)
from ._perceiver import PerceiverEncoder
from ._response import ResponseInputs, ResponseNetwork
from ._tokens import Tokenizer
from ._transformer import TransformerEncoder

ENCODERS: dict[str, Callable[..., Encoder]] = {
    "mlp": MLPEncoder,
    "perceiver": PerceiverEncoder,
    "transformer": TransformerEncoder,
    "components": ComponentEncoder,
}


def make_encoder(
    kind: str, n_genes: int, n_latent: int, n_hidden: int, components: bool = False
) -> Encoder:
    """Build an encoder by name.

    Parameters
    ----------
    kind
        One of ``ENCODERS``.
    n_genes, n_latent
        Sizes of input and output.
    n_hidden
        Width of the MLP's hidden layers.
    components
        Whether it adds to the closed-form components instead of starting from nothing.

    Raises
    ------
    ValueError
        If there is no such encoder.
    """
    if kind not in ENCODERS:
        raise ValueError(f"encoder={kind!r} is not known; choose one of {tuple(ENCODERS)}.")
    sizes = (n_genes, n_latent, n_hidden) if kind == "mlp" else (n_genes, n_latent)
    encoder = ENCODERS[kind](*sizes)
    if not components or kind == "components":
        return encoder
    return ResidualEncoder(n_genes, n_latent, encoder)


__all__ = [
    "ENCODERS",
    "BlockPredictor",
    "ComponentEncoder",
    "CountDecoder",
    "Encoder",
    "GaussianHead",
    "MLPEncoder",
    "PerceiverEncoder",
    "PerturbationEncoder",
    "ResidualEncoder",
    "ResponseInputs",
    "ResponseNetwork",
    "SimilarityAttention",
    "Tokenizer",
    "TransformerEncoder",
    "ema_copy",
    "ema_update",
    "load_genes",
    "make_encoder",
    "mlp",
]
