"""The stack: cut anywhere = whole, padding and packing do not leak, and it equals transformers' Jamba."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longllava.backbone import Backbone
from longllava.config import BackboneConfig
from longllava.nn import AttentionState, Context, MambaState, fork_state
from longllava.nn.priors import retrieval_prior_

TINY = {
    "vocab_size": 50, "width": 32, "n_layers": 5, "attention_every": 3, "attention_at": 1, "n_heads": 4,
    "n_kv_heads": 2, "head_dim": 8, "mlp_width": 48, "state_size": 4, "dt_rank": 4, "init_std": 0.3,
}  # fmt: skip
VARIANTS = {
    "jamba": {},
    "experts": {"n_experts": 4},
    "nano": {"qk_norm": True, "log_length_scale": True, "tie_embeddings": True},
}


def tiny(variant: str, **changes: int) -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(**{**TINY, **VARIANTS[variant], **changes}))
    backbone.initialise_()
    return backbone.eval()


def run(backbone: Backbone, x_BLD: torch.Tensor, cuts: list[int], seq_idx=None, positions=None):
    state = backbone.empty_state(len(x_BLD), 1, "cpu", torch.float32)
    pieces, bounds = [], [0, *sorted(cuts), x_BLD.shape[1]]
    for start, end in zip(bounds, bounds[1:], strict=False):
        part = None if seq_idx is None else seq_idx[:, start:end]
        where = None if positions is None else positions[:, start:end]
        hidden, state = backbone(x_BLD[:, start:end], Context(part, where, start=start), state)
        pieces.append(hidden)
    return torch.cat(pieces, dim=1), state


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 23), max_size=4))
def test_a_sequence_cut_anywhere_gives_the_same_hidden_states_and_state(variant, cuts):
    backbone = tiny(variant)
    x = torch.randn(2, 23, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, _ = backbone(x, Context())
        one, state_one = run(backbone, x, [])
        cut, state_cut = run(backbone, x, cuts)
    torch.testing.assert_close(one, whole, rtol=0, atol=2e-5)
    torch.testing.assert_close(cut, whole, rtol=0, atol=2e-5)
    for a, b in zip(state_one, state_cut, strict=True):
        if isinstance(a, MambaState):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
        else:
            torch.testing.assert_close(a.segments()[-1][:2], b.segments()[-1][:2], rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_batch_equals_each_row_alone(variant):
    backbone = tiny(variant)
    x = torch.randn(2, 12, 32)
    seq_idx = torch.zeros(2, 12, dtype=torch.int32)
    seq_idx[1, :5] = -1  # left padding
    positions = (torch.arange(12)[None] - torch.tensor([[0], [5]])).clamp(min=0)
    x[1, :5] = 1e4
    with torch.no_grad():
        both, state = run(backbone, x, [7], seq_idx, positions)
        alone, state_alone = run(backbone, x[1:, 5:], [])
    torch.testing.assert_close(both[1:, 5:], alone, rtol=0, atol=2e-5)
    for a, b in zip(state, state_alone, strict=True):
        if isinstance(a, MambaState):
            torch.testing.assert_close(a.conv_BKE[1:], b.conv_BKE, rtol=0, atol=2e-5)
            torch.testing.assert_close(a.scan_BEN[1:], b.scan_BEN, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_samples_equal_each_alone_gradients_included(variant):
    backbone = tiny(variant)
    a, b = torch.randn(1, 6, 32), torch.randn(1, 9, 32)
    packed = torch.cat([a, b], dim=1).requires_grad_()
    seq_idx = torch.tensor([[0] * 6 + [1] * 9], dtype=torch.int32)
    positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
    hidden, _ = backbone(packed, Context(seq_idx, positions))
    alone = b.clone().requires_grad_()
    hidden_b, _ = backbone(alone, Context())
    torch.testing.assert_close(hidden[:, 6:], hidden_b, rtol=0, atol=2e-5)
    hidden[:, 6:].square().sum().backward()
    hidden_b.square().sum().backward()
    torch.testing.assert_close(packed.grad[:, 6:], alone.grad, rtol=0, atol=2e-3)
    assert packed.grad[:, :6].abs().max() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_a_sequence_cut_anywhere_are_those_of_the_whole(variant):
    backbone, gradients = tiny(variant), []
    for cuts in ([], [5, 6]):
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        hidden, _ = run(backbone, x, cuts)
        backbone.zero_grad()
        (hidden * torch.arange(9)[:, None]).square().mean().backward()
        gradients.append([x.grad, *(p.grad for p in backbone.parameters() if p.grad is not None)])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_forks_continue_independently_and_leave_the_trunk_alone():
    backbone = tiny("nano")
    x, left, right = torch.randn(1, 9, 32), torch.randn(1, 4, 32), torch.randn(1, 3, 32)
    with torch.no_grad():
        _, trunk = run(backbone, x, [])
        for tail in (left, right, left):
            hidden, _ = backbone(tail, Context(start=9), fork_state(trunk))
            fresh, _ = backbone(torch.cat([x, tail], dim=1), Context())
            torch.testing.assert_close(hidden, fresh[:, 9:], rtol=0, atol=2e-5)
        both, _ = backbone(torch.cat([left, left.flip(1)]), Context(start=9), fork_state(trunk, batch=2))
        fresh, _ = backbone(torch.cat([x, left], dim=1), Context())
        torch.testing.assert_close(both[:1], fresh[:, 9:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_under_autocast_a_state_keeps_its_dtypes(variant):
    backbone, x = tiny(variant), torch.randn(2, 12, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole, _ = backbone(x, Context())
        cut, state = run(backbone, x, [1, 5])
        tail, _ = backbone(x[:, :3], Context(start=12), fork_state(state))
        longer, _ = backbone(torch.cat([x, x[:, :3]], dim=1), Context())
    for layer in state:
        parts = layer if isinstance(layer, MambaState) else layer.segments()[-1][:2]
        assert all(part.dtype == torch.float32 for part in parts)
    for got, expected in ((cut, whole), (tail, longer[:, 12:])):
        assert (got.float() - expected.float()).norm() < 0.05 * expected.float().norm()


def test_continuing_one_state_twice_without_forking_copies_instead_of_overwriting():
    state = AttentionState.empty(1, 8, 1, 2, torch.device("cpu"), torch.float32)
    one, two, three = (torch.full((1, 2, 1, 2), value) for value in (1.0, 2.0, 3.0))
    trunk = state.append(one, one, None)
    first, second = trunk.append(two, two, None), trunk.append(three, three, None)
    assert first.segments()[-1].keys_BSGK[0, :, 0, 0].tolist() == [1, 1, 2, 2]
    assert second.segments()[-1].keys_BSGK[0, :, 0, 0].tolist() == [1, 1, 3, 3]
    assert trunk.n_tokens() == 2


def test_a_full_buffer_grows_and_keeps_what_it_held():
    state = AttentionState.empty(1, 2, 1, 2, torch.device("cpu"), torch.float32)
    for value in range(5):
        piece = torch.full((1, 1, 1, 2), float(value))
        state = state.append(piece, piece, None)
    assert state.segments()[-1].values_BSGK[0, :, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_gradient_checkpointing_gives_the_same_gradients():
    backbone = tiny("experts").train()
    x = torch.randn(1, 11, 32)
    gradients = []
    for flag in (False, True):
        backbone.gradient_checkpointing = flag
        backbone.zero_grad()
        hidden, _ = backbone(x, Context())
        hidden.square().mean().backward()
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_retrieval_prior_finds_and_copies_equal_content():
    backbone = tiny("nano", n_kv_heads=4)  # 4 heads of 8: values span the width, so all content can be copied
    assert retrieval_prior_(backbone) == 2
    attention = backbone.layers[1].mixer
    x = torch.nn.functional.normalize(torch.randn(1, 9, 32), dim=-1) * 32**0.5
    x[0, 8] = x[0, 2]
    with torch.no_grad():
        attention.q_norm.weight.fill_(4.0)  # sharp, as training makes it
        y, _ = attention(x, Context())
    cosine = torch.nn.functional.cosine_similarity(y[0, 8], x[0, 2], dim=0)
    assert cosine > 0.9


@pytest.mark.parametrize("n_experts", [1, 4])
def test_equals_transformers_jamba(n_experts):
    """Logits in fp32 against stock JambaForCausalLM with the same weights, left padding included."""
    from transformers import JambaConfig, JambaForCausalLM

    ours = tiny("experts" if n_experts > 1 else "jamba")
    config = ours.config
    reference = JambaForCausalLM(JambaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_period=3, attn_layer_offset=1, num_experts=n_experts, num_experts_per_tok=2,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
        rms_norm_eps=config.norm_eps, pad_token_id=0, attn_implementation="eager",
    )).eval()  # fmt: skip
    names = {"mixer_norm": "input_layernorm", "ffn_norm": "pre_ff_layernorm", "dt_norm": "dt_layernorm",
             "B_norm": "b_layernorm", "C_norm": "c_layernorm", "A_log_EN": "A_log", "D_E": "D",
             "conv_weight_EK": "conv1d.weight", "conv_bias_E": "conv1d.bias", "dt_bias_E": "dt_proj.bias",
             "ffn": "feed_forward", "final_norm": "final_layernorm"}  # fmt: skip
    tensors = {}
    for key, tensor in ours.state_dict().items():
        parts = [names.get(part, part) for part in key.split(".")]
        if parts[0] == "layers":
            theirs = "self_attn" if config.mixers()[int(parts[1])] == "attention" else "mamba"
            parts[2] = parts[2].replace("mixer", theirs)
        if parts[-1] == "conv1d.weight":
            tensor = tensor[:, None]
        prefix = "" if parts[0] == "lm_head" else "model."
        tensors[prefix + ".".join(parts)] = tensor
    for layer in range(5 if n_experts > 1 else 0):  # transformers 5 keeps the experts of a layer stacked
        prefix = f"model.layers.{layer}.feed_forward.experts"
        if f"{prefix}.0.gate_proj.weight" in tensors:
            of = {kind: [tensors.pop(f"{prefix}.{j}.{kind}_proj.weight") for j in range(n_experts)]
                  for kind in ("gate", "up", "down")}  # fmt: skip
            tensors[f"{prefix}.gate_up_proj"] = torch.cat([torch.stack(of["gate"]), torch.stack(of["up"])], dim=1)
            tensors[f"{prefix}.down_proj"] = torch.stack(of["down"])
    missing, unexpected = reference.load_state_dict(tensors, strict=False)
    assert not missing and not unexpected
    ids = torch.randint(3, 50, (2, 17))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    seq_idx = (mask - 1).int()
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, use_cache=False).logits
        hidden, _ = ours(ours.embed_tokens(ids), Context(seq_idx))
        got = ours.logits(hidden)
    torch.testing.assert_close(got[mask == 1], expected[mask == 1], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_made_in_the_norms_are_the_same_sums(variant):
    """What a GPU runs without gradients."""
    backbone = tiny(variant)
    x_BLD = torch.randn(2, 9, 32)
    states = [backbone.empty_state(2, 9, "cpu", torch.float32) for _ in range(2)]
    truth, truth_state = backbone(x_BLD, Context(), states[0])
    found, found_state = backbone.without_gradients(x_BLD, Context(), states[1])
    assert torch.allclose(found, truth, atol=1e-5)
    assert torch.allclose(found_state[0].scan_BEN, truth_state[0].scan_BEN, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("n_layers", [4, 5])  # the last one a Mamba, an attention layer
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_hidden_state_alone_is_the_last_of_all_and_the_state_is_the_same(variant, n_layers):
    backbone = tiny(variant, n_layers=n_layers)
    x_BLD = torch.randn(2, 9, 32)

    def run(forward, *last_only):
        return forward(x_BLD, Context(), backbone.empty_state(2, 9, "cpu", torch.float32), *last_only)

    truth, truth_state = run(backbone)
    for path in (backbone.forward, backbone.without_gradients, backbone.across_devices):
        backbone.layer_devices = [x_BLD.device] * n_layers if path == backbone.across_devices else None
        found, state = run(path, True)
        assert found.shape == (2, 1, 32)
        torch.testing.assert_close(found, truth[:, -1:], rtol=0, atol=1e-5)
        for a, b in zip(state, truth_state, strict=True):
            if isinstance(a, MambaState):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
            else:
                torch.testing.assert_close(a.segments()[-1][:2], b.segments()[-1][:2], rtol=0, atol=1e-5)


def test_fresh_weights_are_the_same_for_a_seed_biases_too():
    made = []
    for before in (1, 2):
        torch.manual_seed(before)
        backbone = Backbone(BackboneConfig(**TINY, proj_bias=True))
        torch.manual_seed(0)
        backbone.initialise_()
        made.append(backbone.state_dict())
    assert [name for name in made[0] if not torch.equal(made[0][name], made[1][name])] == []


@torch.no_grad()
def test_a_step_that_leaves_no_trace_in_versions_is_seen():
    backbone, x_BLD = tiny("jamba"), torch.randn(1, 9, 32)
    before = run(backbone, x_BLD, [])[0]
    backbone.train()
    backbone.layers[0].mixer.A_log_EN.data.add_(1.0)
    after = run(backbone.eval(), x_BLD, [])[0]
    fresh = tiny("jamba")
    fresh.load_state_dict(backbone.state_dict())
    assert torch.equal(after, run(fresh, x_BLD, [])[0]) and not torch.equal(after, before)


def test_weights_that_take_the_place_of_others_are_seen():
    """Read twice between two calls, they may lie where the first ones did."""
    mixer = tiny("jamba").layers[0].mixer
    with torch.no_grad():
        for _ in range(50):
            mixer.A()
            for _ in range(2):
                mixer.A_log_EN = torch.nn.Parameter(mixer.A_log_EN + 0.01)
            torch.testing.assert_close(mixer.A(), -mixer.A_log_EN.exp(), rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda mixer: pickle.loads(pickle.dumps(mixer))])
def test_a_copy_knows_nothing_by_the_address_of_what_it_was_copied_from(copied):
    """Where that lay, once it is gone, weights given to the copy may lie; here they take the very place."""
    mixer = tiny("jamba").layers[0].mixer
    mixer.A_log_EN = torch.nn.Parameter(mixer.A_log_EN.detach().clone())  # as read from a file: never written to
    with torch.no_grad():
        mixer.A()
        other, place = copied(mixer), mixer.A_log_EN.data
        del mixer
        place.add_(1.0)
        other.A_log_EN = torch.nn.Parameter(place.data)
        torch.testing.assert_close(other.A(), -place.exp(), rtol=0, atol=0)
