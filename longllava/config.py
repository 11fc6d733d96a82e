"""What a model is: frozen dataclasses, read through longllava.settings.

A ModelConfig describes a checkpoint fully: a model rebuilt from its own config is the same model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from longllava.errors import ConfigError
from longllava.settings import at_most, divides, not_negative, one_of, positive, typed_

MODEL_TYPE = "longllava"
MOST_EXPERTS = 16_384  # in all layers


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A vision tower. Defaults: openai/clip-vit-large-patch14-336, the tower of LongLLaVA.

    kind "vit": patch embedding, class token, a norm, pre-norm blocks (CLIP). SigLIP has neither class_token nor
    pre_norm (the norm before the blocks), but a patch_bias. With `stem_widths` the patches come from a convolution
    stem instead (per width its stride and its residual blocks), without a class token.
    patch_size: pixels left over at the right and bottom are not seen (384 / 14, as SigLIP's).
    select_layer: which layer's output is the feature, counted as transformers counts hidden_states.
    weights: whose encoder is used when a checkpoint does not carry its own: a shipped model, a folder (also of CLIP
    or SigLIP), a hub name, or open_clip:ARCHITECTURE/TAG.
    """

    kind: str = "vit"
    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    n_layers: int = 24
    n_heads: int = 16
    mlp_width: int = 4096
    activation: str = "quick_gelu"
    select_layer: int = -2
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    stem_widths: tuple[int, ...] = ()
    stem_strides: tuple[int, ...] = ()
    stem_blocks: tuple[int, ...] = ()
    norm_eps: float = 1e-5
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    weights: str | None = None

    def __post_init__(self) -> None:
        positive(self, "image_size", "patch_size", "width", "n_layers", "n_heads", "mlp_width", "norm_eps")
        at_most(self, "encoder", image_size=16_384, width=65536, n_layers=1024, mlp_width=1 << 20)
        divides(self, "n_heads", "width")
        if self.image_size < self.patch_size:
            raise ConfigError(f"encoder.patch_size: {self.patch_size} is more than image_size {self.image_size}")
        one_of(self, "activation", ("quick_gelu", "gelu", "gelu_tanh"))
        if not len(self.stem_widths) == len(self.stem_strides) == len(self.stem_blocks):
            raise ConfigError("encoder: stem_widths, stem_strides and stem_blocks must be of one length")
        if self.stem_widths:
            self.check_stem()
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"encoder: mean {list(self.mean)}, std {list(self.std)}; expected 3 numbers, std above 0")
        if not -self.n_layers - 1 <= self.select_layer <= self.n_layers:
            raise ConfigError(f"encoder.select_layer: {self.select_layer} of {self.n_layers} layers")

    def check_stem(self) -> None:
        for name, least, most in (("stem_widths", 1, 65536), ("stem_strides", 1, 16_384), ("stem_blocks", 0, 1024)):
            if not all(least <= value <= most for value in getattr(self, name)):
                raise ConfigError(f"encoder.{name}: got {list(getattr(self, name))}, allowed: {least} to {most} each")
        divides(self, "patch_size", "image_size")
        if math.prod(self.stem_strides) != self.patch_size or self.stem_sides()[-1] != self.grid():
            got = f"{list(self.stem_strides)} make {self.stem_sides()[-1]} tokens a side, not {self.grid()}"
            raise ConfigError(f"encoder.stem_strides: {got}; give even ones whose product is patch_size")

    def stem_sides(self) -> list[int]:
        """Of a picture, after each of the stem's convolutions: even strides divide it exactly."""
        sides = [self.image_size]
        for stride in self.stem_strides:
            sides.append((sides[-1] + 2 * (stride // 2 or 1)) // stride - 1)
        return sides[1:]

    def grid(self) -> int:
        """Tokens on a side, before pooling."""
        return self.image_size // self.patch_size

    def n_layers_used(self) -> int:
        return self.select_layer if self.select_layer >= 0 else self.n_layers + 1 + self.select_layer


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Pooling and projection from encoder features to the language model's width.

    pool "2d": mean over squares (24 -> 12 -> 6); "1d": linear interpolation over the flat sequence, as the
    original's stage 1; "none". tokens_per_image: after pooling. hidden: width between the two layers.
    output_rms: the scale, of word embeddings, to which the output is RMS-normed (0 = off, as published).
    """

    kind: str = "mlp"
    pool: str = "2d"
    tokens_per_image: int = 144
    hidden: int = 4096
    output_rms: float = 0.0

    def __post_init__(self) -> None:
        one_of(self, "pool", ("2d", "1d", "none"))
        positive(self, "tokens_per_image", "hidden")
        at_most(self, "bridge", hidden=1 << 20)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Jamba-style stack. Defaults: LongLLaVA-9B (Jamba with one expert). Source: LongLLaVA's Jamba/config.json.

    Layer i is attention when i % attention_every == attention_at, else Mamba-1; its MLP is a mixture of
    experts when n_experts > 1 and i % expert_every == expert_at. qk_norm and log_length_scale are not
    Jamba's: RMS-norm of each head's query and key, and a learned factor (per head) of log(keys seen) on the
    logits, which keeps a match sharp among many images. Both are off for published models.
    """

    vocab_size: int = 65536
    width: int = 4096
    n_layers: int = 32
    attention_every: int = 8
    attention_at: int = 4
    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int = 128
    qk_norm: bool = False
    log_length_scale: bool = False
    mlp_width: int = 14336
    n_experts: int = 1
    n_experts_per_token: int = 2
    expert_every: int = 2
    expert_at: int = 1
    expand: int = 2
    state_size: int = 16
    conv_size: int = 4
    dt_rank: int = 256
    conv_bias: bool = True
    proj_bias: bool = False
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.02
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        positive(self, "vocab_size", "width", "n_layers", "attention_every", "n_heads", "n_kv_heads", "head_dim",
                 "mlp_width", "n_experts", "n_experts_per_token", "expert_every", "expand", "state_size",
                 "conv_size", "dt_rank", "norm_eps")  # fmt: skip
        not_negative(self, "init_std", "embedding_std")
        divides(self, "n_kv_heads", "n_heads")
        at_most(self, "backbone", width=65536, n_layers=1024, vocab_size=4_194_304, mlp_width=1 << 20, n_experts=4096,
                state_size=256, conv_size=8, n_heads=1024, head_dim=4096, dt_rank=65536, expand=64)  # fmt: skip
        if 1 < self.n_experts < self.n_experts_per_token:
            raise ConfigError(f"backbone.n_experts_per_token: {self.n_experts_per_token} of {self.n_experts} experts")
        if self.n_layers * self.n_experts > MOST_EXPERTS:  # modules: few bytes must not take minutes
            raise ConfigError(
                f"backbone.n_experts: {self.n_layers} layers of {self.n_experts}; at most {MOST_EXPERTS} in all"
            )

    def mixers(self) -> tuple[str, ...]:
        return tuple(
            "attention" if i % self.attention_every == self.attention_at else "mamba" for i in range(self.n_layers)
        )

    def has_experts(self, layer: int) -> bool:
        return self.n_experts > 1 and layer % self.expert_every == self.expert_at

    def d_inner(self) -> int:
        return self.expand * self.width


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How images meet the text. kind "splice": image tokens stand in the text sequence (LLaVA, LongLLaVA)."""

    kind: str = "splice"


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """The text around images and turns; plain text except where a name is a special token of the tokenizer.

    Defaults are the clean form, for new models; PUBLISHED_PROMPT is what LongLLaVA's checkpoints were trained on.
    Source: LongLLaVA @f349366, cli.py, conversation.py, train.py (preprocess_jamba).
    """

    image_open: str = "<img>"
    image_close: str = "</img>"
    video_open: str = "<vid>"
    video_close: str = "</vid>"
    frame_join: str = "<t>"
    row_join: str = "\n"
    last_frame_close: str | None = None  # after a video's last frame; None: image_close
    whole_close: str | None = None  # after a whole picture that its tiles follow; None: image_close
    tiles_end: str = ""  # after the last tile of a picture
    images_end: str = "\n"  # between pictures and the text they are put before, as LLaVA's "<image>\n" + question
    user: str = "<|User|>\n"
    assistant: str = "<|Assistant|>\n"
    user_end: str = "\n"
    between_turns: str | None = None  # read after an answer that a turn follows, where eos is learned; None: eos
    bos_token: str = "<|startoftext|>"
    eos_token: str = "<|endoftext|>"
    pad_token: str = "<|pad|>"


# "</img></vid>" lost its first ">" to a character-wise rstrip("<t>"); a picture's own tags were put around its tiles
# too; and inputs had a line break where labels had eos.
PUBLISHED_PROMPT = PromptConfig(last_frame_close="</img", whole_close="", tiles_end="</img>", between_turns="\n")

ROTATED = ("out_proj", "down_proj")  # they read the rows that have values far larger than the rest


@dataclass(frozen=True, kw_only=True)
class Int8Config:
    """Which linear layers hold int8 weights, and when their inputs are int8 too. See longllava.quant.

    parts: of "backbone", "bridge", "encoder". What a recurrence or a choice hangs on (x_proj, dt_proj, router) is never
    quantised; lm_head: the output layer too, its weights only.
    keep: layers that stay floats. weight_only: layers whose inputs stay floats. two_terms: layers whose inputs are int8
    twice, the second time what the first left over: 15 bits a value for twice the products, where a few values of a row
    are far larger than the rest. rotated: layers whose weights are stored in rotated rows and whose inputs are rotated
    before they become int8 (ops/quantized.py), which spreads such values: not in two terms, nor where 16 does not
    divide the inputs. None is ROTATED when a model is quantised, whose products gain 4 to 9 dB in nano and random
    models, and no layer where a folder says nothing. All by a part of the dotted name ("down_proj") or a pattern over
    all of it ("backbone.layers.[01].*").
    scan_epilogue: whether the scan's CUDA kernel finds each token's largest value for out_proj's inputs, where it can:
    not if they are rotated. The numbers are the same. On an H100 a pass over what the scan wrote costs less than its
    blocks' agreeing.
    dynamic_from: tokens a sequence in one call from which inputs are int8, each row by its own scale: prefill. Below it
    (decoding) floats meet dequantised weights, exact but for these (and for rotated inputs, which bf16 rounds).
    """

    parts: tuple[str, ...] = ("backbone",)
    keep: tuple[str, ...] = ()
    weight_only: tuple[str, ...] = ()
    two_terms: tuple[str, ...] = ()
    rotated: tuple[str, ...] | None = None
    lm_head: bool = False
    scan_epilogue: bool = False
    dynamic_from: int = 2

    def __post_init__(self) -> None:
        typed_(self)  # made by callers too, who would write a folder that cannot be read again
        allowed = ("backbone", "bridge", "encoder")
        if not self.parts or not set(self.parts) <= set(allowed):
            raise ConfigError(f"parts: got {list(self.parts)}, allowed: some of {', '.join(allowed)}")
        positive(self, "dynamic_from")

    def chosen(self) -> Int8Config:
        """Of a model that is to be quantised: nothing is left open."""
        return self if self.rotated is not None else replace(self, rotated=ROTATED)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model, as config.json in its folder holds it. model_type: what transformers' Auto classes look at."""

    name: str = "longllava"
    encoder: EncoderConfig | None = field(default_factory=EncoderConfig)
    bridge: BridgeConfig | None = field(default_factory=BridgeConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    int8: Int8Config | None = None  # weights are stored in int8
    n_parameters: int | None = None  # stated; tests build the model on the meta device and compare
    format: str = "longllava-1"
    model_type: str = MODEL_TYPE

    def __post_init__(self) -> None:
        one_of(self, "model_type", (MODEL_TYPE,))
        if (self.encoder is None) != (self.bridge is None):
            raise ConfigError("model: encoder and bridge go together; give both or neither (a text-only model)")
        if self.encoder and self.bridge and self.bridge.pool == "2d":
            allowed = pooled_counts(self.encoder.grid())
            if self.bridge.tokens_per_image not in allowed:
                raise ConfigError(
                    f"bridge.tokens_per_image: {self.bridge.tokens_per_image} cannot be pooled from a"
                    f" {self.encoder.grid()} x {self.encoder.grid()} grid; allowed: {allowed}"
                )
        if self.encoder and self.bridge and self.bridge.pool == "none":
            if self.bridge.tokens_per_image != self.encoder.grid() ** 2:
                raise ConfigError(
                    f"bridge.tokens_per_image: {self.bridge.tokens_per_image} without pooling;"
                    f" the encoder makes {self.encoder.grid() ** 2}"
                )


def pooled_counts(grid: int) -> list[int]:
    """Token counts that whole squares of a grid can be averaged to: 24 -> 576, 144, 64, 36, 16, ..."""
    return [(grid // factor) ** 2 for factor in range(1, grid + 1) if grid % factor == 0]
