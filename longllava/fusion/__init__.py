"""Fusions by kind: how media and text meet.

A fusion supplies `embed(text_BLD, spans_S4, image_tokens_NMD) -> x_BLD` at run time and
`adapt(block, layer) -> block` at build time, and nothing else.
"""

from __future__ import annotations

from longllava.config import FusionConfig
from longllava.errors import ConfigError
from longllava.fusion.splice import Splice

FUSIONS = {"splice": Splice}


def build_fusion(config: FusionConfig) -> Splice:
    if config.kind not in FUSIONS:
        raise ConfigError(f"fusion.kind: got {config.kind!r}, allowed: {', '.join(FUSIONS)}")
    return FUSIONS[config.kind]()
