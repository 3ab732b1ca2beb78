"""Plain torch: encoders, predictors, the count decoder, EMA. Tensors in, tensors out."""

from ._ema import ema_copy, ema_update
from ._encoders import MLPEncoder, PerceiverEncoder, make_encoder
from ._heads import (
    BlockPredictor,
    CountDecoder,
    GaussianHead,
    PerturbationEncoder,
)

__all__ = [
    "BlockPredictor",
    "CountDecoder",
    "GaussianHead",
    "MLPEncoder",
    "PerceiverEncoder",
    "PerturbationEncoder",
    "ema_copy",
    "ema_update",
    "make_encoder",
]
