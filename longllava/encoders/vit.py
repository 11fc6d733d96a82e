"""A vision transformer: CLIP's, SigLIP's, or with a residual convolution stem for small pictures.

Shapes: N images, S pixels a side, T tokens (the square grid), C width, H heads.
Source of the CLIP form: Radford et al. 2021 (arXiv:2103.00020); of SigLIP's: Zhai et al. 2023 (arXiv:2303.15343).
The stem: small patches of small pictures carry too little to start from; convolutions learn shapes from a
hundred times fewer pictures (Xiao et al. 2021, "Early convolutions help transformers see better",
arXiv:2106.14881).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longllava.config import EncoderConfig
from longllava.errors import InputError
from longllava.nn.linear import Conv2d, Linear, better_in_fp32
from longllava.nn.recompute import Recomputing, recomputed
from longllava.ops.conv3x3 import conv3x3
from longllava.ops.pixel_conv import pixel_conv
from longllava.ops.vision import activate_, add_layer_norm

# Pictures of a whole batch on a GPU: 36,928 rows of 336 x 336 ones, nine waves of an H100's tiles in CLIP's widest
# product. For whole batches alone cuDNN plans the attention.
GPU_BATCH = 64


class VisionTransformer(nn.Module, Recomputing):
    """Pixels to features: uint8 or float (N, 3, S, S) -> (N, T, C), class token dropped.

    uint8 pixels are scaled to [0, 1] here and normalised with the config's mean and std, so that a thousand
    waiting pictures take one byte a value. Float pixels are taken as already normalised.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        # with values even in a model built on meta: no checkpoint holds them
        mean_std = torch.tensor([config.mean, config.std], dtype=torch.float32, device="cpu").view(2, 1, 3, 1, 1) * 255
        self.register_buffer("mean", mean_std[0].clone(), persistent=False)
        self.register_buffer("std", mean_std[1].clone(), persistent=False)
        n_tokens = config.grid() ** 2
        if config.stem_widths:
            self.patches: nn.Module = Stem(config)
            self.class_embedding = None
        else:
            self.patches = Conv2d(3, config.width, config.patch_size, config.patch_size, bias=config.patch_bias)
            self.class_embedding = nn.Parameter(torch.zeros(config.width)) if config.class_token else None
            n_tokens += config.class_token
        self.position_embedding = nn.Parameter(torch.empty(n_tokens, config.width))
        if not self.position_embedding.is_meta:  # there, normal_ would import all of torch._dynamo: 1.4 s
            nn.init.normal_(self.position_embedding, std=0.02)
        self.pre_norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        # layers after the selected one are never run: they are not built (CLIP at -2 saves one of 24)
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.n_layers_used()))

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        side = self.config.image_size
        if pixels_N3SS.shape[1:] != (3, side, side):
            raise InputError(f"encoder: pixels are {tuple(pixels_N3SS.shape)}, expected (N, 3, {side}, {side})")
        if pixels_N3SS.dtype == torch.uint8 and not self.reads_bytes(pixels_N3SS):
            pixels_N3SS = (pixels_N3SS.to(self.mean.dtype) - self.mean) / self.std
        x_NTC = self.pre_norm(self.placed(self.patch_tokens(pixels_N3SS)))
        if torch.is_grad_enabled():
            for layer in self.layers:
                if self.gradient_checkpointing and self.training:
                    x_NTC = recomputed(layer, x_NTC, self.offload_activations)
                else:
                    x_NTC = layer(x_NTC)
        else:
            x_NTC = self.without_gradients(x_NTC)
        return x_NTC[:, 1:] if self.class_embedding is not None else x_NTC

    def reads_bytes(self, pixels_N3SS: Tensor) -> bool:
        """Whether the first convolution normalises them as it reads them: a stem's, on a CPU, in fp32, without
        gradients. (CLIP's patches would take the time that they take now.)"""
        in_fp32 = self.position_embedding.dtype == self.mean.dtype == torch.float32
        without_gradients = not (self.training or torch.is_grad_enabled())
        return isinstance(self.patches, Stem) and pixels_N3SS.device.type == "cpu" and in_fp32 and without_gradients

    def patch_tokens(self, pixels_N3SS: Tensor) -> Tensor:
        """Of normalised pixels, or of uint8 ones where the first convolution reads them: (N, T, C)."""
        patches = self.patches
        if pixels_N3SS.dtype == torch.uint8:
            return patches(pixels_N3SS, self.mean.flatten(), self.std.flatten()).flatten(2).transpose(1, 2)
        pixels_N3SS = pixels_N3SS.to(self.position_embedding.dtype)
        # on a GPU, where convolutions of 3 channels are slow, CLIP's patches are rows of one product
        if isinstance(patches, nn.Conv2d) and pixels_N3SS.device.type == "cuda":
            rows_NTP = patch_rows(pixels_N3SS, self.config.patch_size)
            weight_CP = patches.weight.flatten(1)
            weight_CP = F.pad(weight_CP, (0, rows_NTP.shape[2] - weight_CP.shape[1]))
            return F.linear(rows_NTP, weight_CP, patches.bias)
        return patches(pixels_N3SS.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)

    def placed(self, x_NTC: Tensor) -> Tensor:
        """The class token first, and all with their positions."""
        if self.class_embedding is None:
            return x_NTC + self.position_embedding
        first_C = self.class_embedding.to(x_NTC.dtype)
        if torch.is_grad_enabled():
            return torch.cat([first_C.expand(len(x_NTC), 1, -1), x_NTC], dim=1) + self.position_embedding
        n, t, width = x_NTC.shape
        dtype = torch.promote_types(x_NTC.dtype, self.position_embedding.dtype)
        placed_NTC = x_NTC.new_empty(n, t + 1, width, dtype=dtype)
        placed_NTC[:, 0] = first_C + self.position_embedding[0]
        # joining them first was a pass more: 3.7 to 4.3 ms for 1,000 of CLIP's pictures on an H100
        # (benchmarks/results/encoder-h100.json, as the times below)
        torch.add(x_NTC, self.position_embedding[1:], out=placed_NTC[:, 1:])
        return placed_NTC

    def without_gradients(self, x_NTC: Tensor) -> Tensor:
        """The layers, with each residual added in the pass that normalises it."""
        blocks = cast(list[VisionBlock], list(self.layers))
        if not blocks:
            return x_NTC
        y_NTC = blocks[0].attention_norm(x_NTC)
        with fastest_attention(x_NTC):
            for block, following in zip(blocks, [*blocks[1:], None], strict=True):
                attended_NTC = block.out(block.attend(y_NTC)).to(x_NTC.dtype)  # under autocast x is fp32, it is bf16
                y_NTC, x_NTC = block.mlp_norm.added(attended_NTC, x_NTC)
                fed_NTC = block.feed(y_NTC).to(x_NTC.dtype)
                if following is None:
                    return x_NTC + fed_NTC
                y_NTC, x_NTC = following.attention_norm.added(fed_NTC, x_NTC)
        return x_NTC


def patch_rows(pixels_N3SS: Tensor, size: int) -> Tensor:
    """(N, 3, S, S) -> (N, T, P): what a convolution of `size` pixels, as many apart, multiplies, and zeros up to a
    multiple of 8: tensor cores read rows of 588 by twos."""
    n, grid = len(pixels_N3SS), pixels_N3SS.shape[-1] // size
    width = 3 * size * size
    rows_NTP = pixels_N3SS.new_zeros(n, grid * grid, -(-width // 8) * 8)
    seen = grid * size
    tiles_N3GPGP = pixels_N3SS[..., :seen, :seen].reshape(n, 3, grid, size, grid, size)
    to_NGG3PP = rows_NTP[..., :width].unflatten(2, (3, size, size)).unflatten(1, (grid, grid))
    to_NGG3PP.copy_(tiles_N3GPGP.permute(0, 2, 4, 1, 3, 5))
    return rows_NTP


def fastest_attention(x_NTC: Tensor) -> AbstractContextManager[Any]:
    """On a GPU cuDNN's attention first for whole batches: torch itself prefers FlashAttention-2, which does not use
    Hopper's units (64 pictures of 577 tokens, 16 heads of 64, on an H100: 0.29 and 0.40 ms). But cuDNN makes a plan, in
    tenths of a second, for each number of pictures, and only a number that comes again and again pays it back.
    """
    if x_NTC.device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    order.insert(0 if len(x_NTC) % GPU_BATCH == 0 else 1, SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(order, set_priority=True)


class LayerNorm(nn.LayerNorm):
    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of total = residual + x, and total, in one pass where there is a kernel."""
        y, total = add_layer_norm(residual, x, self.weight, self.bias, self.eps)
        assert isinstance(y, Tensor)
        return y, total


class Activation(nn.Module):
    """Of the MLP's hidden rows; without gradients in their place."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return activate_(x, self.name)
        if self.name == "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        return F.gelu(x, approximate="tanh" if self.name == "gelu_tanh" else "none")

    def extra_repr(self) -> str:
        return self.name


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP, biases everywhere, as CLIP. What stands between two linear layers may hand on rows
    that the second one reads in another form; the norm of the first block gives floats."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.attention_norm = LayerNorm(config.width, eps=config.norm_eps)
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self.mlp_norm = LayerNorm(config.width, eps=config.norm_eps)
        self.up = Linear(config.width, config.mlp_width)
        self.activation = Activation(config.activation)
        self.down = Linear(config.mlp_width, config.width)

    def forward(self, x_NTC: Tensor) -> Tensor:
        x_NTC = x_NTC + self.out(self.attend(self.attention_norm(x_NTC)))
        return x_NTC + self.feed(self.mlp_norm(x_NTC))

    def feed(self, x_NTC: Tensor) -> Tensor:
        """Without gradients `up` is asked for its activated rows, so that hooks on its forward do not run."""
        floats = isinstance(self.up, Linear) and isinstance(self.activation, Activation)
        if floats and not torch.is_grad_enabled():
            return self.down(self.up.activated(x_NTC, self.activation.name))
        return self.down(self.activation(self.up(x_NTC)))

    @staticmethod
    def attention(q_NHTK: Tensor, k_NHTK: Tensor, v_NHTK: Tensor) -> Tensor:
        if q_NHTK.device.type == "cpu" and torch.is_grad_enabled():
            # two products and a softmax: torch's CPU SDPA takes 38 % of a training step in its backward
            return torch.softmax((q_NHTK * q_NHTK.shape[-1] ** -0.5) @ k_NHTK.mT, dim=-1) @ v_NHTK
        return F.scaled_dot_product_attention(q_NHTK, k_NHTK, v_NHTK)

    def attend(self, x_NTC: Tensor) -> Tensor:
        qkv = self.qkv(x_NTC)
        q, k, v = qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        if better_in_fp32(q, k):
            q, k, v = q.float(), k.float(), v.float()
        return self.attention(q, k, v).transpose(1, 2).flatten(2).to(qkv.dtype)


class Stem(nn.Module):
    """Convolutions that shrink the picture by each stride in turn, with residual blocks; then 1 x 1 to the width."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        stages: list[nn.Module] = []
        previous = 3
        for width, stride, n_blocks in zip(
            config.stem_widths, config.stem_strides, config.stem_blocks, strict=True
        ):
            stages.append(ConvNorm(previous, width, 2 * stride, stride))
            stages += [ResidualConv(width) for _ in range(n_blocks)]
            previous = width
        self.stages = nn.Sequential(*stages)
        self.out = Conv2d(previous, config.width, 1)

    def forward(self, x_N3SS: Tensor, mean_C: Tensor | None = None, std_C: Tensor | None = None) -> Tensor:
        """Of normalised pixels, or of their bytes with the mean and std to normalise them by (without gradients)."""
        first, *others = cast(list[ConvNorm], list(self.stages))
        if mean_C is not None and std_C is not None:
            x = first.of_bytes(x_N3SS, mean_C, std_C)
        else:
            x = first(x_N3SS)
        for stage in others:
            x = stage(x)
        return self.out(x)


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, a residual, ReLU. An even kernel of twice the stride, padded by half of it, divides
    exactly."""

    def __init__(self, n_in: int, n_out: int, kernel: int = 3, stride: int = 1):
        padding = stride // 2 if stride > 1 else kernel // 2
        super().__init__(Conv2d(n_in, n_out, kernel, stride, padding, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, norm = cast(Conv2d, self[0]), cast(nn.BatchNorm2d, self[1])
        if self.training or torch.is_grad_enabled() or x.dtype != torch.float32:
            y = norm(conv(x))
            return (y if residual is None else y.add_(residual)).relu_()
        weight, bias_C = self.folded()
        if conv.kernel_size == (3, 3) and conv.stride == (1, 1):
            return conv3x3(x, weight, bias_C, residual, relu=True)
        assert residual is None
        return F.conv2d(x, weight, bias_C, conv.stride, conv.padding).relu_()

    def of_bytes(self, pixels: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
        """The same of uint8 pixels, which are normalised first. Without gradients."""
        conv, (weight, bias_C) = cast(Conv2d, self[0]), self.folded()
        stride, padding = conv.stride[0], cast(tuple[int, int], conv.padding)[0]
        return pixel_conv(pixels, mean_C, std_C, weight, bias_C, stride=stride, padding=padding, relu=True)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of convolution and norm together: a norm of known mean and variance is part of the
        convolution. A pass less, one in fifteen of nano's encoder."""
        conv, norm = cast(Conv2d, self[0]), cast(nn.BatchNorm2d, self[1])
        mean_C, variance_C = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        scale_C = norm.weight * (variance_C + norm.eps).rsqrt()
        return conv.weight * scale_C[:, None, None, None], norm.bias - mean_C * scale_C


class ResidualConv(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first = ConvNorm(width, width)
        self.second = ConvNorm(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), x)
