"""Plain torch: encoders, predictors, the count decoder, EMA. Tensors in, tensors out."""

from ._ema import ema_copy, ema_update
from ._encoders import MLPEncoder, PCAEncoder, PerceiverEncoder, make_encoder
from ._heads import (
    BlockPredictor,
    CountDecoder,
    GaussianHead,
    PerturbationEncoder,
    mlp,
)

__all__ = [
    "BlockPredictor",
    "CountDecoder",
    "GaussianHead",
    "MLPEncoder",
    "PCAEncoder",
    "PerceiverEncoder",
    "PerturbationEncoder",
    "ema_copy",
    "ema_update",
    "make_encoder",
    "mlp",
]
