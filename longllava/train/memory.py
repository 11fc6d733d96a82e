"""What a step of a stage takes of a device's memory, before anything is allocated: counted, not measured.

Counts follow the code: what autograd keeps of one layer while it runs (again), what every layer keeps until then, what
the engine holds of weights, gradients and AdamW. tests/train/test_memory.py compares them with what is allocated.
T tokens of a forward, D width, E inner channels, N scan states, R rank of delta, F hidden width of an MLP, H heads, G
key-value heads, K head size, V vocabulary, a bytes of an activation. An encoder that trains is counted as on a GPU: on
a CPU its attention keeps its weights too.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

from longllava.config import BackboneConfig, EncoderConfig, ModelConfig
from longllava.data.features import BATCH
from longllava.plan.memory import sized
from longllava.plan.need import encoder_workspace
from longllava.quant import Int8Module, build_model
from longllava.train.config import TrainConfig, engine_named
from longllava.train.lora import LoraConfig, layers_of
from longllava.train.parts import FROZEN_INT8

FLOAT = 4
LOSS_CHUNK = 2048  # train/loss.py
SCAN_CHUNK = 16  # tokens between two scan states that are kept for the backward pass (csrc; 32 on a GPU)
# of deepspeed 0.19, in numbers: weights that ZeRO-3 has together at once, fetched ahead; gradients in a bucket
LIVE, AHEAD, BUCKET = 1_000_000_000, 50_000_000, 500_000_000


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process. weights, gradients, optimizer: all the time. kept: from a layer's forward to its backward.
    layer: the one that runs. loss: of a chunk of positions. encoder: of the pictures it sees at once."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    kept: int
    layer: int
    loss: int
    encoder: int
    grows_with_backward: bool = False

    def total(self) -> int:
        """The peak: at the end of the forward pass all is kept, and gradients do not exist yet where they come and go
        with a step; at the end of the backward pass it is the other way round."""
        running = max(self.layer, self.loss, self.encoder)
        held = max(self.kept, self.gradients) if self.grows_with_backward else self.kept + self.gradients
        return self.weights + self.optimizer + self.gathered + held + running

    def __str__(self) -> str:
        names = [name for name in dataclasses.asdict(self) if name != "grows_with_backward"]
        parts = ", ".join(f"{name} {sized(getattr(self, name))}" for name in names if getattr(self, name))
        return f"{sized(self.total())} ({parts})"


def estimate(config: TrainConfig, model: ModelConfig, world: int, value_bytes: int) -> Estimate:
    """The largest of the stage's phases. value_bytes: of an activation, 2 for bfloat16."""
    return max((of_phase(config, model, number, world, value_bytes) for number in range(len(config.phases))),
               key=Estimate.total)  # fmt: skip


def of_phase(config: TrainConfig, model: ModelConfig, number: int, world: int, value_bytes: int) -> Estimate:
    phase, backbone = config.phases[number], model.backbone
    mine = max(1, phase.rows // world)
    rows = min(phase.rows_at_once or mine, mine)
    n_tokens = rows * phase.row_length
    learns = "backbone" in config.train_only
    residual_bytes = FLOAT if engine_named(config) == "torch" else value_bytes  # autocast leaves sums in fp32
    layers = [layer_bytes(backbone, i, n_tokens, value_bytes, residual_bytes, learns) for i in range(backbone.n_layers)]
    inputs = n_tokens * backbone.width * residual_bytes
    ends = bridge_bytes(model, n_tokens, value_bytes) + 3 * inputs  # embedded; the last norm and what is labelled
    if phase.alignment_only:
        layers, kept = [Layer(0, 0)], ends
    elif config.gradient_checkpointing:
        kept = ends + (0 if config.offload_activations else backbone.n_layers * inputs)
    else:
        kept = ends + sum(layer.saved for layer in layers)
        layers = [Layer(0, layer.running) for layer in layers]
    n_encoder = n_kept = 0
    if model.encoder is not None and model.bridge is not None and "encoder" in config.train_only:
        n_pictures = n_tokens // (phase.tokens_per_image or model.bridge.tokens_per_image)
        n_kept, n_encoder = encoder_bytes(model.encoder, n_pictures, value_bytes, residual_bytes, config)
    elif model.encoder is not None and not config.feature_cache:
        n_encoder = BATCH * encoder_workspace(model.encoder, value_bytes)
    return dataclasses.replace(
        held_bytes(config, model, world, value_bytes),
        kept=kept + n_kept, layer=max(map(sum, layers)) + quantised(config, model)[2] * value_bytes,
        loss=0 if phase.alignment_only else LOSS_CHUNK * backbone.vocab_size * (3 * FLOAT + 2 * (value_bytes % FLOAT)),
        encoder=n_encoder,
        grows_with_backward=engine_named(config) == "torch" and rows == mine,
    )  # fmt: skip


def held_bytes(config: TrainConfig, model: ModelConfig, world: int, value_bytes: int) -> Estimate:
    """Weights, gradients and optimizer, as the engine shares them."""
    sizes = parameters_of(model)
    n_encoder = 0 if "encoder" in config.train_only else sizes.get("encoder", 0)
    n_adapters = 0 if config.lora is None else adapters_of(model, config.lora)
    whole = set(config.train_only) - set(config.lora.parts if config.lora else ())
    n_all = sum(sizes.values()) - n_encoder + n_adapters
    n_learned = sum(sizes.get(part, 0) for part in whole) + n_adapters
    n_frozen_inside = sum(count for name, count in sizes_inside(model).items() if name.split(".")[0] in whole and any(
        f"{name}.".startswith(f"{prefix}.") for prefix in config.frozen))  # fmt: skip
    n_learned -= n_frozen_inside
    n_quantised, int8, _ = quantised(config, model)
    n_all -= n_quantised
    engine = engine_named(config)
    if engine == "torch":  # weights stay fp32; products are taken of copies in a lower precision
        copies = value_bytes * n_all if value_bytes < FLOAT else 0
        weights = FLOAT * (n_all + n_encoder) + copies + int8
        return Estimate(weights, FLOAT * n_learned, 2 * FLOAT * n_learned, 0, 0, 0, 0, 0)
    stage, share = int(engine.removeprefix("zero")), world
    weights = value_bytes * n_all // (share if stage == 3 else 1)
    gradients = value_bytes * n_learned // (share if stage >= 2 else 1) + value_bytes * min(n_learned, BUCKET)
    gathered = value_bytes * min(n_all, LIVE + AHEAD) if stage == 3 else 0
    optimizer = 0 if config.offload != "none" else 3 * FLOAT * n_learned // share
    if config.offload == "all":
        weights = 0
    return Estimate(weights + FLOAT * n_encoder + int8, gradients, optimizer, gathered, 0, 0, 0, 0)


def adapters_of(model: ModelConfig, lora: LoraConfig, experts: float = 1.0, part: str = "") -> int:
    """Parameters of the adapters: two matrices a layer. experts: the share of those of experts that is counted. part:
    of it alone."""
    import torch

    from longllava.model import Model

    with torch.device("meta"):
        built = Model(model)
    sizes = {name: lora.rank * sum(built.get_parameter(f"{name}.weight").shape)
             for name in layers_of(built, lora) if name.startswith(part)}  # fmt: skip
    return round(sum(size * (experts if ".experts." in name else 1) for name, size in sizes.items()))


def quantised(config: TrainConfig, model: ModelConfig) -> tuple[int, int, int]:
    """Of a language model in 8 bits: parameters that are floats no more; bytes of what stands for them, which no engine
    shares among processes; numbers of the largest matrix, which is a float while it multiplies."""
    import torch

    if config.frozen_dtype != "int8":
        return 0, 0, 0
    with torch.device("meta"):
        backbone = build_model(dataclasses.replace(model, int8=FROZEN_INT8)).backbone
    n_floats = sum(parameter.numel() for parameter in backbone.parameters())
    held = [buffer for module in backbone.modules() if isinstance(module, Int8Module)
            for buffer in module.buffers(recurse=False)]  # fmt: skip
    largest = max(math.prod(buffer.shape[-2:]) for buffer in held)  # of experts one at a time
    return parameters_of(model)["backbone"] - n_floats, sum(buffer.nbytes for buffer in held), largest


def parameters_of(model: ModelConfig) -> dict[str, int]:
    """Part -> number of its parameters."""
    sizes: dict[str, int] = {}
    for name, count in sizes_inside(model).items():
        part = name.partition(".")[0]
        sizes[part] = sizes.get(part, 0) + count
    return sizes


def sizes_inside(model: ModelConfig) -> dict[str, int]:
    import torch

    from longllava.model import Model

    with torch.device("meta"):
        return {name: parameter.numel() for name, parameter in Model(model).named_parameters()}


class Layer(NamedTuple):
    """Bytes."""

    saved: int
    running: int


def layer_bytes(
    config: BackboneConfig, layer: int, n_tokens: int, value_bytes: int, residual_bytes: int, learns: bool = True
) -> Layer:
    """What autograd keeps of a layer's run, and what its backward pass takes beside it at its worst.

    learns: whether its weights do. Those that do not need no inputs of their products.
    """
    width, inner, small = config.width, config.d_inner(), config.dt_rank + 2 * config.state_size
    ratio = residual_bytes / value_bytes
    sums = 3 * width * ratio  # the sums before both norms, and the result
    norms = 2 * width if learns else 0
    if config.mixers()[layer] == "attention":  # q, k, v, y
        mixer = config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    else:  # x and z, convolved, delta, y; what delta, B and C come from, whole and normed; scan states, in fp32
        states = inner * config.state_size * FLOAT // (SCAN_CHUNK * value_bytes)
        mixer = (5 if learns else 4) * inner + 2 * small + states
    running = width * ratio + (2 if learns else 3) * config.mlp_width  # gradients of result, product, gate and up
    mlp = (3 if learns else 2) * config.mlp_width  # gate, up, product
    if config.has_experts(layer):  # a token's rows: sent, returned, sorted back; experts run one after the other
        mlp, running = config.n_experts_per_token * (mlp + (3 if learns else 2) * width) - width, 6 * width
    return Layer(*(int(n_tokens * value_bytes * count) for count in (norms + mixer + sums + mlp, running)))


def encoder_bytes(
    config: EncoderConfig, n_pictures: int, value_bytes: int, residual_bytes: int, stage: TrainConfig
) -> Layer:
    """Of an encoder that trains, of all pictures of a forward: what is kept to its backward pass, and what a layer
    takes beside that."""
    learns = stage.lora is None or "encoder" not in stage.lora.parts
    ratio = residual_bytes / value_bytes
    sides = zip(config.stem_widths, config.stem_blocks, config.stem_sides())
    stem = sum(2 * (1 + 2 * n_blocks) * width * side**2 for width, n_blocks, side in sides)  # convolved, and after ReLU
    pixels = 3 * config.image_size**2 * (1 + FLOAT)
    times = 3 if config.activation == "quick_gelu" else 2  # its factor too
    # the sums before both norms; q, k, v, y, and both norms where weights learn; the MLP's
    saved = config.width * (2 * ratio + (6 if learns else 4)) + config.mlp_width * (times - (not learns))
    running = config.width * ratio + config.mlp_width * (times - 1 + (not learns))
    between = config.width * ratio * (not stage.offload_activations)
    n_tokens = config.grid() ** 2 + (config.class_token and not config.stem_widths)
    of_layers = between if stage.gradient_checkpointing else saved
    beside = saved + running if stage.gradient_checkpointing else running
    ends = 2 * config.width * ratio  # patches at their places, and the result
    kept = n_pictures * (pixels + value_bytes * (stem + n_tokens * (config.n_layers_used() * of_layers + ends)))
    return Layer(int(kept), int(n_pictures * value_bytes * n_tokens * beside))


def bridge_bytes(model: ModelConfig, n_tokens: int, value_bytes: int) -> int:
    """Of rows that are pictures to the last token: features, the hidden layer before and after GELU, the result."""
    if model.bridge is None or model.encoder is None:
        return 0
    return n_tokens * (model.encoder.width + 2 * model.bridge.hidden + model.backbone.width) * value_bytes
