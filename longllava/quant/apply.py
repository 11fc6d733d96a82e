"""Which layers become int8, and how they take their places in a built model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from longllava.config import ROTATED, Int8Config, ModelConfig
from longllava.encoders.vit import Activation, LayerNorm, VisionBlock
from longllava.errors import ConfigError, LongLLaVAError
from longllava.model import Model
from longllava.nn import Block
from longllava.nn.mamba import Mamba
from longllava.nn.mlp import Experts, SwiGLU
from longllava.nn.norm import RMSNorm
from longllava.ops.quantized import MIXED
from longllava.quant.layers import (
    NEVER,
    Inputs,
    Int8Experts,
    Int8Linear,
    Int8SwiGLU,
    QuantizedActivation,
    QuantizedLayerNorm,
    QuantizedNorm,
)
from longllava.quant.weights import all_finite, fill_

# a recurrence of ten thousand steps hangs on the first two, which expert is asked on the third; together they are a
# hundredth of the products
FLOATS = ("x_proj", "dt_proj", "router")
HEAD = "lm_head"
NAMING = ("keep", "weight_only", "two_terms", "rotated")  # fields of Int8Config that name layers
FUSED: dict[type, Any] = {
    RMSNorm: QuantizedNorm, LayerNorm: QuantizedLayerNorm, Activation: QuantizedActivation
}  # fmt: skip
Holder = Int8Linear | Int8SwiGLU | Int8Experts


class Place(NamedTuple):
    """Where a weight of the float model lies in the int8 model: rows of one of its tensors, and their scales. rotated:
    as `rotate_rows` makes them."""

    weight: str
    scale: str
    start: int
    shape: tuple[int, int]
    rotated: bool


@torch.no_grad()
def quantize_(model: Model, config: Int8Config | None = None, *, keep: Iterable[str] = ()) -> Model:
    """Replace the linear layers of a built model by int8 ones, one after the other, and say so in its config.

    keep: more layers that stay floats, beside config.keep. A mixture's experts of one layer, and a gate and its up
    projection, go together or not at all. Returns the model.
    Raises: LongLLaVAError when it is quantised already, in float16, or a weight is not finite, ConfigError for a name
    that no layer has.
    """
    if model.config.int8 is not None:
        raise LongLLaVAError("quantize_: the weights are int8 already; quantise the model of floats they came from")
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise LongLLaVAError("quantize_: float16 ends at 65504, sums of int8 layers do not; take bfloat16 or float32")
    if isinstance(keep, str):
        raise ConfigError(f"int8.keep: expected a list, got {keep!r}")
    config = (config or Int8Config()).chosen()
    config = dataclasses.replace(config, keep=(*config.keep, *keep))
    for name, old, new in replacements(model, config, on=torch.device("meta")):
        for key in new.slots():
            if not all_finite(old.get_parameter(key)):
                raise LongLLaVAError(f"quantize_: NaN or infinite weights in {name}.{key}; int8 has neither")
    for name, old, new in replacements(model, config):
        for key, slot in new.slots().items():
            weight, scale = new.get_buffer(slot.weight), new.get_buffer(slot.scale)
            fill_(weight, scale, slot.start, old.get_parameter(key), slot.rotated)
        put_(model, name, new)
    fuse_norms_(model)
    fuse_scans_(model, config.scan_epilogue)
    model.config = dataclasses.replace(model.config, int8=config)
    return model


def build_model(config: ModelConfig) -> Model:
    """A model with the layers its config asks for, without values where it is built on the meta device."""
    model = Model(dataclasses.replace(config, int8=None))
    if config.int8 is not None:
        for name, _, new in replacements(model, config.int8):
            put_(model, name, new)
        fuse_norms_(model)
        fuse_scans_(model, config.int8.scan_epilogue)
        model.config = config
    return model


def text_part(config: ModelConfig) -> ModelConfig:
    """The language model alone, whose int8 names no part and no layer that it does not have."""
    text = dataclasses.replace(config, encoder=None, bridge=None, int8=None, n_parameters=None)
    if config.int8 is None or "backbone" not in config.int8.parts:
        return text
    with torch.device("meta"):
        names = linear_names(Model(text))
    named: dict[str, Any] = {
        field: tuple(pattern for pattern in getattr(config.int8, field) or () if named_by(pattern, names))
        for field in NAMING
    }
    return dataclasses.replace(text, int8=dataclasses.replace(config.int8, parts=("backbone",), **named))


def float_places(model: Model) -> dict[str, Place]:
    """For each weight that the model would have in floats, where it lies now."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Int8SwiGLU | Int8Experts | Int8Linear) and not holds(model, name):
            for key, slot in module.slots().items():
                found[f"{name}.{key}"] = Place(
                    f"{name}.{slot.weight}", f"{name}.{slot.scale}", slot.start, (slot.n_rows, slot.width), slot.rotated
                )
    return found


def holds(model: Model, name: str) -> bool:
    """Whether the module belongs to another one that knows its slots."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), Int8SwiGLU)


def put_(model: Model, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def replacements(
    model: Model, config: Int8Config, on: torch.device | None = None
) -> Iterator[tuple[str, nn.Module, Holder]]:
    """(name, layer of floats, int8 layer without values) of all that is quantised. on: device of the new ones."""
    check_names(model, config)
    for part in config.parts:
        root = getattr(model, part)
        if root is None:
            raise ConfigError(f"int8.parts: {part}, but this model has none; name other parts")
        done: tuple[str, ...] = ()
        for name in [name for name, _ in root.named_modules(prefix=part)]:  # names: modules would stay in memory
            if name.startswith(done):
                continue
            module = model.get_submodule(name)
            new = counterpart(name, module, config, on)
            if new is not None:
                done += (f"{name}.",)
                yield name, module, new


def counterpart(name: str, module: nn.Module, config: Int8Config, on: torch.device | None) -> Holder | None:
    linears = {key: linear for key, linear in module.named_modules(prefix=name) if isinstance(linear, nn.Linear)}
    # a mixture goes as a whole: rows of one expert are no sequence, whose length could say how to multiply them
    if ".experts." in name or not linears or any(not quantised(key, config) for key in linears):
        return None
    device = on or next(iter(linears.values())).weight.device
    inputs = {key: inputs_of(key, linear.in_features, config) for key, linear in linears.items()}
    if isinstance(module, SwiGLU | Experts):
        downs = {inputs[key] for key in linears if key.endswith("down_proj")}
        ups = {inputs[key] for key in linears if not key.endswith("down_proj")}
        if len(downs) > 1 or len(ups) > 1:
            return None
        first = module if isinstance(module, SwiGLU) else cast(SwiGLU, module[0])
        sizes = (first.gate_proj.in_features, first.gate_proj.out_features, device, ups.pop(), downs.pop())
        return Int8SwiGLU(*sizes) if isinstance(module, SwiGLU) else Int8Experts(len(module), *sizes)
    if isinstance(module, nn.Linear):
        return Int8Linear(module.in_features, module.out_features, module.bias, device, inputs[name])
    return None


def inputs_of(name: str, width: int, config: Int8Config) -> Inputs:
    if name.endswith(HEAD) or matches(name, config.weight_only):
        return Inputs(NEVER)
    two_terms = matches(name, config.two_terms)
    rotated = width % MIXED == 0 and not two_terms and matches(name, config.rotated or ())
    return Inputs(config.dynamic_from, two_terms, rotated)


def quantised(name: str, config: Int8Config) -> bool:
    last = name.rpartition(".")[2]
    return last not in FLOATS and (last != HEAD or config.lm_head) and not matches(name, config.keep)


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) or pattern in name.split(".") for pattern in patterns)


def linear_names(model: Model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def named_by(pattern: str, names: Iterable[str]) -> bool:
    return any(matches(name, (pattern,)) for name in names)


def check_names(model: Model, config: Int8Config) -> None:
    names = linear_names(model)
    for field in NAMING:
        for pattern in getattr(config, field) or ():  # what is chosen without a word need not be in every model
            if pattern not in ROTATED and not named_by(pattern, names):
                lasts = sorted({name.rpartition(".")[2] for name in names})
                raise ConfigError(
                    f"int8.{field}: {pattern!r} is no linear layer of this model; its layers end in {', '.join(lasts)}"
                )


def fuse_norms_(model: Model) -> None:
    """Norms and activations that int8 layers alone read quantise their rows as they make them."""
    for block in model.backbone.modules():
        if not isinstance(block, Block):
            continue
        mixer = block.mixer
        readers = [getattr(mixer, name, None) for name in ("in_proj", "q_proj", "k_proj", "v_proj")]
        block.mixer_norm = fused(block.mixer_norm, [reader for reader in readers if reader is not None])
        ffn = block.ffn
        block.ffn_norm = fused(block.ffn_norm, [ffn.gate_up_proj] if isinstance(ffn, Int8SwiGLU) else [])

    for block in model.encoder.modules() if model.encoder is not None else ():
        if isinstance(block, VisionBlock):
            block.attention_norm = fused(block.attention_norm, [block.qkv])
            block.mlp_norm = fused(block.mlp_norm, [block.up])
            block.activation = fused(block.activation, [block.down])


def fused(module: Any, readers: list[nn.Module]) -> Any:
    """What stands for it: itself, or a module of the same use that quantises its rows."""
    inputs = {reader.inputs if isinstance(reader, Int8Linear) else Inputs(NEVER) for reader in readers}
    if len(inputs) != 1 or type(module) not in FUSED or not min(inputs).fused(NEVER - 1):
        return module
    return FUSED[type(module)](module, inputs.pop())


def fuse_scans_(model: Model, wanted: bool) -> None:
    """Scans quantise what they hand to an int8 out_proj, or leave that to it. A built model may be switched."""
    for mixer in model.backbone.modules():
        if isinstance(mixer, Mamba):
            reader = mixer.out_proj
            inputs = reader.inputs if isinstance(reader, Int8Linear) else Inputs(NEVER)
            mixer.int8_rows_from = inputs.dynamic_from if wanted and inputs.fused(NEVER - 1) else NEVER
