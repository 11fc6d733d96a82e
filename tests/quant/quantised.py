"""A small model, and what its int8 form stands for."""

from __future__ import annotations

import torch

from longllava.nn import Context
from longllava.ops.int8_linear import rotate_rows
from longllava.quant import float_places
from tests.tiny import tiny_model

NEVER = {"dynamic_from": 10**6}


def tiny(n_experts: int = 1, **changes):
    return tiny_model(n_experts, **changes).model


def dequantised(model, n_experts: int = 1):
    """A model of floats that holds exactly what the int8 one stands for."""
    floats = tiny(n_experts)
    state = dict(model.state_dict())
    wanted = {}
    for key, place in float_places(model).items():
        weight, scale = state[place.weight], state[place.scale]
        values = weight.reshape(-1, weight.shape[-1]).float() * scale.reshape(-1, 1)
        rows = values[place.start : place.start + place.shape[0]]
        wanted[key] = rotate_rows(rows) if place.rotated else rows
    wanted |= {key: state[key] for key in floats.state_dict() if key not in wanted}
    floats.load_state_dict(wanted)
    return floats


def hidden(model, x_BLD, **context):
    with torch.no_grad():
        return model(x_BLD, Context(**context))[0]
