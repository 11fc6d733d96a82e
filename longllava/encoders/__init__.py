"""Vision towers by kind. A new one is a module `(N, 3, S, S) pixels -> (N, T, C) features` and a row here."""

from __future__ import annotations

from longllava.config import EncoderConfig
from longllava.encoders.vit import VisionTransformer
from longllava.errors import ConfigError

ENCODERS = {"vit": VisionTransformer}


def build_encoder(config: EncoderConfig) -> VisionTransformer:
    if config.kind not in ENCODERS:
        raise ConfigError(f"encoder.kind: got {config.kind!r}, allowed: {', '.join(ENCODERS)}")
    return ENCODERS[config.kind](config)
