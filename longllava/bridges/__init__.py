"""Bridges by kind, from encoder features to image tokens of the language model."""

from __future__ import annotations

from torch import nn

from longllava.bridges.mlp import MLPBridge
from longllava.bridges.pool import pool_features
from longllava.config import BridgeConfig
from longllava.errors import ConfigError

BRIDGES = {"mlp": MLPBridge}

__all__ = ["build_bridge", "pool_features"]


def build_bridge(config: BridgeConfig, in_width: int, out_width: int) -> nn.Module:
    if config.kind not in BRIDGES:
        raise ConfigError(f"bridge.kind: got {config.kind!r}, allowed: {', '.join(BRIDGES)}")
    return BRIDGES[config.kind](config, in_width, out_width)
