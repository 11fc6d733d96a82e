"""Int8 from outside: a built model's linear layers are replaced by ones with int8 weights. The model never knows."""

from longllava.config import Int8Config
from longllava.quant.apply import Place, build_model, float_places, fuse_scans_, quantize_, text_part
from longllava.quant.layers import (
    Inputs,
    Int8Experts,
    Int8Linear,
    Int8Module,
    Int8SwiGLU,
    QuantizedActivation,
    QuantizedLayerNorm,
    QuantizedNorm,
)
from longllava.quant.weights import all_finite, fill_

__all__ = [
    "Inputs",
    "Int8Config",
    "Int8Experts",
    "Int8Linear",
    "Int8Module",
    "Int8SwiGLU",
    "Place",
    "QuantizedActivation",
    "QuantizedLayerNorm",
    "QuantizedNorm",
    "all_finite",
    "build_model",
    "fill_",
    "float_places",
    "fuse_scans_",
    "quantize_",
    "text_part",
]
