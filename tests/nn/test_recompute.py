"""Layers that run again in the backward pass: the same gradients, with inputs kept here or in host memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from longllava.backbone import Backbone
from longllava.config import EncoderConfig
from longllava.encoders.vit import VisionBlock, VisionTransformer
from longllava.nn import Context
from longllava.nn.recompute import Kept
from tests.tiny import tiny_config


def backbone(**changes: Any) -> Backbone:
    torch.manual_seed(1)
    made = Backbone(dataclasses.replace(tiny_config().backbone, n_experts=4, n_experts_per_token=1, **changes))
    made.initialise_()
    return made.train()


def gradients(made: Backbone, x_BLD: torch.Tensor, router: float) -> tuple[list[torch.Tensor | None], Context]:
    made.zero_grad()
    context = Context(torch.zeros(x_BLD.shape[:2], dtype=torch.int32))
    hidden_BLD, _ = made(x_BLD, context)
    reported = context.close()
    (hidden_BLD.square().sum() + router * reported["router"]).backward()
    return [parameter.grad for parameter in made.parameters()], context


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("router", [0.0, 3.0])
def test_gradients_are_those_of_layers_that_run_once(offload: bool, router: float) -> None:
    made, x_BLD = backbone(), torch.randn(2, 9, 32, requires_grad=True)
    expected, _ = gradients(made, x_BLD, router)
    of_x = x_BLD.grad.clone()
    made.gradient_checkpointing, made.offload_activations = True, offload
    x_BLD.grad = None
    got, context = gradients(made, x_BLD, router)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(x_BLD.grad, of_x)
    assert context.losses is None  # what layers report when they run again keeps nothing


def test_an_input_that_was_put_away_leaves_the_device(monkeypatch) -> None:
    taken = []
    monkeypatch.setattr(Kept, "take", lambda self, take=Kept.take: taken.append(self.x_BLD is None) or take(self))
    made = backbone()
    made.gradient_checkpointing = made.offload_activations = True
    gradients(made, torch.randn(1, 5, 32, requires_grad=True), 0.0)
    n_layers = len(made.layers)
    assert taken == [False] * n_layers + [True] * n_layers


def test_a_frozen_model_through_which_gradients_go_runs_its_layers_again_too(monkeypatch) -> None:
    """Of a stage in which the bridge alone learns all layers' activations were kept."""
    taken = []
    monkeypatch.setattr(Kept, "take", lambda self, take=Kept.take: taken.append(1) or take(self))
    made, x_BLD = backbone().eval().requires_grad_(False), torch.randn(2, 9, 32, requires_grad=True)
    context = Context(torch.zeros(2, 9, dtype=torch.int32))
    of_x = []
    for again in (False, True):
        made.gradient_checkpointing = made.offload_activations = again
        made(x_BLD, context)[0].square().sum().backward()
        of_x.append(x_BLD.grad)
        x_BLD.grad = None
    torch.testing.assert_close(*of_x)
    assert len(taken) == 2 * len(made.layers)
    with torch.no_grad():
        made(x_BLD.detach(), context)
    assert len(taken) == 2 * len(made.layers)


@torch.no_grad()
def test_without_gradients_no_input_is_put_away_and_the_last_hidden_state_comes_alone(monkeypatch) -> None:
    """Also of a model in training mode: it made all hidden states, and copied each layer's input to the host."""
    monkeypatch.setattr(Kept, "put_away", lambda self: pytest.fail("an input was put away"))
    made, x_BLD = backbone(), torch.randn(2, 9, 32)
    expected = made(x_BLD, Context())[0][:, -1:]
    made.gradient_checkpointing = made.offload_activations = True
    torch.testing.assert_close(made(x_BLD, Context(), None, True)[0], expected)


def test_every_expert_has_a_gradient_while_training() -> None:
    """One of zeros, where no token chose it: processes that share experts must call the same modules."""
    made, x_BLD = backbone(), torch.randn(1, 1, 32)
    gradients(made, x_BLD, 0.0)
    experts = {name: parameter.grad for name, parameter in made.named_parameters() if ".experts." in name}
    assert all(gradient is not None for gradient in experts.values())
    idle = [name for name, gradient in experts.items() if gradient is not None and not gradient.any()]
    assert len(idle) == len(experts) * 3 // 4  # one token, one expert of four


@pytest.mark.parametrize("offload", [False, True])
def test_an_encoder_that_trains_runs_its_layers_again(offload: bool, monkeypatch) -> None:
    torch.manual_seed(1)
    encoder = VisionTransformer(EncoderConfig(image_size=16, patch_size=4, width=16, n_layers=3, n_heads=2,
                                              mlp_width=32, select_layer=-1)).train()  # fmt: skip
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    runs = []
    monkeypatch.setattr(VisionBlock, "feed", lambda self, x, feed=VisionBlock.feed: runs.append(1) or feed(self, x))
    gradients = []
    for again in (False, True):
        encoder.gradient_checkpointing, encoder.offload_activations = again, again and offload
        encoder.zero_grad()
        encoder(pixels).square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    assert len(runs) == 3 + 6
    torch.testing.assert_close(*gradients)
