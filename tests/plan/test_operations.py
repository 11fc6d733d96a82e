"""What is counted, against what torch counts while a small model runs, and against counts by hand for the 9B model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from longllava.config import BackboneConfig, BridgeConfig, EncoderConfig, ModelConfig
from longllava.model import Model
from longllava.nn import Context
from longllava.ops.selective_scan import reference
from longllava.plan import operations
from longllava.plan.operations import scan_operations
from tests.kernels import needs_kernels
from tests.tiny import tiny_config

N_TOKENS, N_PAST = 13, 6
CLIP = {"encoder": EncoderConfig(image_size=28, width=32, n_layers=3, n_heads=2, mlp_width=48),
        "bridge": BridgeConfig(tokens_per_image=1, hidden=16)}  # fmt: skip


def counted(call) -> int:
    """With attention as two products: torch does not count in its one kernel for CPUs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


@needs_kernels  # a scan in plain torch is counted too
@pytest.mark.parametrize("n_experts", [1, 4])
def test_products_and_attention_are_what_torch_counts(n_experts, monkeypatch):
    """The reference attends to every key and hides the later ones; they are not counted here."""
    monkeypatch.setenv("LONGLLAVA_ATTENTION", "reference")
    config = tiny_config(n_experts)
    model = Model(config)
    model.initialise_()
    model.eval()
    state = model.backbone.empty_state(1, N_PAST + N_TOKENS, "cpu", torch.float32)
    _, state = model(torch.randn(1, N_PAST, config.backbone.width), Context(), state)
    x_BLD = torch.randn(1, N_TOKENS, config.backbone.width)
    total = counted(lambda: model.logits(model(x_BLD, Context(start=N_PAST), state, last_only=True)[0]))
    mine = operations(config, N_TOKENS, n_past=N_PAST)
    seen = N_TOKENS * N_PAST + N_TOKENS * (N_TOKENS + 1) // 2
    assert total - mine.products == mine.attention * N_TOKENS * (N_PAST + N_TOKENS) // seen
    assert mine.attention > 0


@pytest.mark.parametrize("parts", [{}, CLIP], ids=["stem", "clip"])
def test_encoder_and_bridge_are_what_torch_counts(parts):
    config = tiny_config(**parts)
    model = Model(config).eval()
    side = config.encoder.image_size
    mine = operations(config, 100, 2, config.bridge.tokens_per_image)
    assert counted(lambda: model.encode(torch.zeros(2, 3, side, side, dtype=torch.uint8))) == mine.encoder
    features_NTC = torch.zeros(2, config.encoder.grid() ** 2, config.encoder.width)
    assert counted(lambda: model.image_tokens(features_NTC)) == mine.bridge


class Elements(TorchDispatchMode):
    """Values that elementwise operations and sums go over."""

    COUNTED = ("add", "mul", "exp", "softplus", "silu", "sum")

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name().partition("::")[2].partition(".")[0]
        if name in self.COUNTED:
            self.total += (args[0] if name == "sum" else result).numel()
        return result


def test_the_scan_is_what_its_reference_does():
    config = BackboneConfig(width=16, state_size=4, n_heads=1, n_kv_heads=1, conv_bias=False, conv_size=1)
    inner, states = config.d_inner(), config.state_size
    u, delta, z = torch.randn(3, 1, N_TOKENS, inner)
    B, C = torch.randn(2, 1, N_TOKENS, states)
    with Elements() as elements:
        reference.run(u, delta, -torch.ones(inner, states), B, C, torch.ones(inner), z, torch.ones(inner), True)
    convolution = 3 * inner  # a product, a sum, SiLU
    assert elements.total == N_TOKENS * (scan_operations(config) - convolution)


def test_counts_by_hand_for_the_published_models():
    """TFLOP of 36,000 tokens, 1,000 pictures of 36 among them: 4,096 wide, 28 Mamba layers of 105.1 M weights each."""
    dense = operations(ModelConfig(), 36_000, 1000, 36)
    mixture = operations(ModelConfig(backbone=BackboneConfig(n_experts=16)), 36_000, 1000, 36)
    mamba = 4096 * 16384 + 8192 * (256 + 32) + 256 * 8192 + 8192 * 4096
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    mlp = 3 * 4096 * 14336
    head = 2 * 65536 * 4096
    last = 8192 * 4096 + mlp  # of one token alone
    assert dense.products == 2 * 36_000 * (28 * mamba + 4 * attention + 32 * mlp - last) + 2 * last + head
    assert mixture.products == dense.products + 2 * (36_000 * 15 + 1) * (mlp + 4096 * 16)
    assert dense.products / 1e12 == pytest.approx(615, abs=0.5)
    assert mixture.products / 1e12 == pytest.approx(805, abs=0.5)
    assert dense.attention / 1e12 == pytest.approx(32768 * 36_000**2 / 1e12, rel=1e-4)
    assert dense.encoder / 1e12 == pytest.approx(366, abs=0.5)
    # the original's calculator printed 78.9 TFLOP for 54 pictures of 144: twelve Mamba layers of 28, no projections
    assert operations(ModelConfig(), 54 * 144).total() / 1e12 == pytest.approx(135, abs=1)
    assert operations(ModelConfig(backbone=BackboneConfig(n_experts=16)), 54 * 144).total() / 1e12 == pytest.approx(
        176, abs=1
    )
