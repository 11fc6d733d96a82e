"""A dense model from a mixture of experts: each mixture becomes one MLP, everything else stays.

Source: LongLLaVA's utils/dense_downcycling.py. Its words speak of a mean over the experts, but it sets the number of
experts to one before it lists them, so it takes expert 0; and it multiplies the down projection of those layers by
0.045. ORIGINAL does exactly that; the mean it seems to have meant is take="mean".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longllava.checkpoints.calibration import given, measured_shares
from longllava.checkpoints.convert import Source, maker, on_meta, open_source, write_layout
from longllava.checkpoints.save import NATIVE
from longllava.checkpoints.write import SHARD_BYTES, Output
from longllava.errors import CheckpointError
from longllava.files import expanded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ORIGINAL: dict[str, Any] = {"take": 0, "scale": 0.045}
SAMPLES = 4096  # the share of an expert is then known to about 1/64 of itself


def downcycle(
    source: str | Path,
    target: str | Path,
    *,
    take: int | str = "mean",
    calibrate: str | Path | None = None,
    scale: float = 1.0,
    scheme: str = NATIVE,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the dense model of a folder's mixture of experts, tensor by tensor.

    take: the number of an expert; "mean" of all; or "router", the mean weighted by how much the router gives each
    expert when the model reads the text of the file `calibrate`. Without one, the router is given inputs whose normed
    values are independent and normal, which no text's are.
    scale: of the down projections that came from experts: a router's weights do not add up to one.
    Raises: CheckpointError when the model has no experts, or not that one.
    """
    experts = open_source(source)
    config = experts.model.config
    n_experts = config.backbone.n_experts
    if config.int8 is not None:
        raise CheckpointError(f"{experts.folder}: its experts are int8; take the floats they came from")
    if n_experts == 1:
        raise CheckpointError(f"{experts.folder}: its layers have no experts to make one of; it is dense already")
    if isinstance(take, int) and not 0 <= take < n_experts:
        raise CheckpointError(f"take: expert {take} of {n_experts}; give 0 to {n_experts - 1}, mean or router")
    if not isinstance(take, int) and take not in ("mean", "router"):
        raise CheckpointError(f"take: got {take!r}; give the number of an expert, mean or router")
    if not math.isfinite(scale):
        raise CheckpointError(f"scale: got {scale}; give a finite number")
    if calibrate is not None and take != "router":
        raise CheckpointError(f"calibrate: a text is read with take router only, not with {take!r}")
    measured = {} if calibrate is None else measured_shares(experts, expanded(calibrate))
    dense = replace(config, name=f"{config.name}-dense", n_parameters=None,
                    backbone=replace(config.backbone, n_experts=1, n_experts_per_token=1))  # fmt: skip
    outputs: dict[str, Output] = {}
    for key, tensor in on_meta(dense).state_dict().items():
        shape = tuple(tensor.shape)
        if key in experts.places.shapes:
            outputs[key] = Output(shape, experts.dtype(key, dtype), maker(experts, key))
        else:
            factor = scale if key.endswith("down_proj.weight") else 1.0
            first = expert_key(key, 0)
            outputs[key] = Output(shape, experts.dtype(first, dtype), merger(experts, key, take, factor, measured))
    return write_layout(experts, dense, outputs, target, scheme, shard_bytes)


def expert_key(key: str, expert: int) -> str:
    """backbone.layers.1.ffn.up_proj.weight -> backbone.layers.1.ffn.experts.0.up_proj.weight"""
    return key.replace(".ffn.", f".ffn.experts.{expert}.")


def merger(
    experts: Source, key: str, take: int | str, factor: float, measured: dict[str, list[float]]
) -> Callable[[], Tensor]:
    def merge() -> Tensor:
        import torch

        merged = torch.zeros(experts.places.shapes[expert_key(key, 0)])
        for expert, share in enumerate(measured.get(key.split(".ffn.")[0]) or shares(experts, key, take)):
            if share:
                merged.add_(experts.make(expert_key(key, expert)).float(), alpha=share)
        return merged.mul_(factor)

    return merge


def shares(experts: Source, key: str, take: int | str) -> list[float]:
    """What each expert contributes; together one."""
    n_experts = experts.model.config.backbone.n_experts
    if take == "router":
        return router_shares(experts, key.split(".ffn.")[0])
    return [1 / n_experts if take == "mean" else float(expert == take) for expert in range(n_experts)]


def router_shares(experts: Source, layer: str) -> list[float]:
    import torch

    weight_XD = experts.make(f"{layer}.ffn.router.weight").float()
    norm_D = experts.make(f"{layer}.ffn_norm.weight").float()
    normal_SD = torch.randn(SAMPLES, weight_XD.shape[1], generator=torch.Generator().manual_seed(0))
    given_X = given((normal_SD * norm_D) @ weight_XD.T, experts.model.config.backbone.n_experts_per_token)
    return (given_X / given_X.sum()).tolist()
