"""A model over several devices: weights straight to theirs, hidden states moved where the device changes."""

import contextlib

import pytest
import torch

from longllava import LongLLaVA, quant
from longllava.checkpoints import load_model, placing
from longllava.config import Int8Config
from longllava.errors import CheckpointError, ConfigError, InputError
from longllava.nn import Context
from longllava.plan import memory
from tests.tiny import tiny_model, tiny_pictures

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(n_experts=4).save_pretrained(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("int8", [False, True])
def test_each_layer_is_loaded_to_its_device(folder, int8, monkeypatch):
    """The meta device stands for another one; it has no values that could be looked at."""
    for name in ("all_finite", "fill_"):
        real = getattr(quant, name)
        monkeypatch.setattr(quant, name, lambda x, *rest, real=real: x.is_meta or real(x, *rest))
    monkeypatch.setattr("longllava.checkpoints.load.damaged_scales", lambda state: [])
    table = {"": "cpu", "backbone.layers.1": "meta", "backbone.layers.2": "meta"}
    model = load_model(folder, device_map=table, dtype=torch.float32, int8=Int8Config() if int8 else None)
    tensors = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in tensors:
        expected = "meta" if name.startswith(("backbone.layers.1.", "backbone.layers.2.")) else "cpu"
        assert tensor.device.type == expected, name
    states = model.backbone.empty_state(1, 4, "cpu", torch.float32)
    devices = [state[0].device.type if isinstance(state, tuple) else state.buffer.keys_BSGK.device.type
               for state in states]  # fmt: skip
    assert devices == ["cpu", "meta", "meta", "cpu", "cpu"]
    whole = load_model(folder, dtype=torch.float32, int8=Int8Config() if int8 else None)
    assert whole.backbone.layer_devices is None
    for (name, tensor), (_, other) in zip(tensors, (*whole.named_parameters(), *whole.named_buffers()), strict=True):
        assert tensor.device.type == "meta" or torch.equal(tensor, other), name


def test_what_is_missing_is_placed_too(folder, monkeypatch):
    monkeypatch.setattr(quant, "all_finite", lambda x, real=quant.all_finite: x.is_meta or real(x))
    model = load_model(folder, device_map={"": "cpu", "backbone.layers.1": "meta"}, allow_missing=("bridge.",))
    for name, tensor in model.named_parameters():
        assert tensor.is_meta == name.startswith("backbone.layers.1."), name


class Entered:
    """Stands for torch.cuda.device, which Triton's kernels are launched by."""

    def __init__(self):
        self.devices = []

    def __call__(self, device):
        self.devices.append(device.index)
        return contextlib.nullcontext()


def test_hidden_states_move_where_the_device_changes(monkeypatch):
    """On two GPUs that are not there: what is moved to them stays where it is, and is written down."""
    model = tiny_model().model
    x_BLD, ctx = torch.randn(2, 7, model.config.backbone.width), Context(torch.zeros(2, 7, dtype=torch.int32))
    states = [model.backbone.empty_state(2, 7, "cpu", torch.float32) for _ in range(2)]
    moved, entered, real = [], Entered(), torch.Tensor.to
    with torch.no_grad():
        expected, expected_state = model(x_BLD, ctx, states[0])

    def to(self, *args, **options):
        if args and args[0] in (FIRST, SECOND):
            moved.append((args[0].index, tuple(self.shape)))
            return self
        return real(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.cuda, "device", entered)
    model.backbone.layer_devices = [FIRST, FIRST, SECOND, SECOND, FIRST]
    with torch.no_grad():
        found, found_state = model(x_BLD, ctx, states[1])
    assert torch.equal(found, expected)
    for mine, theirs in zip(found_state, expected_state, strict=True):
        parts = (mine, theirs) if isinstance(mine, tuple) else (mine.segments()[-1], theirs.segments()[-1])
        assert all(torch.equal(a, b) for a, b in zip(parts[0][:2], parts[1][:2], strict=True))
    hidden, marks = (2, 7, x_BLD.shape[-1]), (2, 7)
    assert moved == [(0, hidden), (0, marks), (1, hidden), (1, marks), (0, hidden), (0, marks)]
    assert entered.devices == [0, 0, 1, 1, 0]


def test_auto_takes_the_fewest_devices_that_hold_it(folder, monkeypatch):
    """Without GPUs that is the host; with room for a part of the layers on each, several."""
    monkeypatch.setenv(memory.VARIABLE, "10GB")
    assert load_model(folder, device_map="auto", dtype=torch.float32).backbone.layer_devices is None
    model = load_model(folder, dtype=torch.float32)
    layers, rest = placing.layer_bytes(model, torch.float32)
    stored = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    assert sum(layers) + rest == pytest.approx(stored, rel=1e-3) and len(layers) == 5
    work = placing.auto_placement(model, torch.float32, {"cuda:0": 10**9})
    assert work.devices() == ["cuda:0"]
    with pytest.raises(InputError, match="free are cuda:0 10 bytes, which does not hold it"):
        placing.auto_placement(model, torch.float32, {"cuda:0": 10})


def test_auto_without_gpus_holds_what_the_host_does(monkeypatch):
    """A GPU's chunk of a prompt, four times the host's, has no part in it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv(memory.VARIABLE, "80MB")
    asked = {"prompt": "what is this?", "max_new_tokens": 2}
    loaded = [LongLLaVA.from_pretrained("nano", dtype="float32", **where)
              for where in ({"device": "cpu"}, {"device_map": "auto"})]  # fmt: skip
    assert loaded[0].generate(**asked) == loaded[1].generate(**asked)
    monkeypatch.setenv(memory.VARIABLE, "20MB")
    with pytest.raises(CheckpointError, match="the weights take 22.1 MB of memory on cpu, 20.0 MB are free"):
        LongLLaVA.from_pretrained("nano", dtype="float32", device_map="auto")


def test_bf16_weights_are_half_but_for_the_recurrence(folder):
    model = load_model(folder, dtype=torch.float32)
    found = placing.weight_bytes(model, torch.bfloat16)
    for name, tensor in model.state_dict().items():
        in_fp32 = name.endswith(("A_log_EN", "D_E", "dt_bias_E", "log_length_H")) or not tensor.is_floating_point()
        assert found[name] == tensor.numel() * (tensor.itemsize if in_fp32 else 2), name


def test_weights_that_do_not_fit_are_refused_before_they_are_read(folder, monkeypatch):
    monkeypatch.setenv(memory.VARIABLE, "100KB")
    monkeypatch.setattr("longllava.checkpoints.load.load_weights_", None)
    with pytest.raises(CheckpointError, match=r"the weights take .* KB of memory on cpu, 100.0 KB are free; load them"):
        LongLLaVA.from_pretrained(folder, device="cpu", dtype="float32")


def test_weights_that_keep_their_dtype_are_counted_in_it(folder, tmp_path, monkeypatch):
    model = LongLLaVA.from_pretrained(folder, device="cpu", dtype="float32")
    model.save_pretrained(tmp_path / "half", dtype="bfloat16")
    n_bytes = (tmp_path / "half/model.safetensors").stat().st_size
    monkeypatch.setenv(memory.VARIABLE, str(n_bytes))
    assert load_model(tmp_path / "half").backbone.embed_tokens.weight.dtype == torch.bfloat16
    for dtype, free in ((torch.float32, n_bytes), (None, n_bytes // 2)):
        monkeypatch.setenv(memory.VARIABLE, str(free))
        with pytest.raises(CheckpointError, match="the weights take"):
            load_model(tmp_path / "half", dtype=dtype)


def test_wrong_maps_are_refused(folder):
    with pytest.raises(ConfigError, match="device_map: got 'balanced', allowed: 'auto' or a table"):
        LongLLaVA.from_pretrained(folder, device_map="balanced")
    with pytest.raises(InputError, match="device and device_map: give one of them"):
        LongLLaVA.from_pretrained(folder, device="cpu", device_map="auto")
    with pytest.raises(InputError, match="device: got 'tpu'"):
        LongLLaVA.from_pretrained(folder, device_map={"": "tpu"})
    with pytest.raises(ConfigError, match="device_map: '': got 'cpuu', allowed: cpu"):
        load_model(folder, device_map={"": "cpuu"})
    with pytest.raises(ConfigError, match="no part 'lm_head'"):
        LongLLaVA.from_pretrained(folder, device_map={"": "cpu", "lm_head": "cpu"})


@pytest.mark.gpu
def test_a_model_on_host_and_gpu_answers_as_on_the_host(folder):
    """Some layers here, some there: prefill in chunks, decoding, forks, a session saved and loaded."""
    pictures = tiny_pictures(3)
    whole = LongLLaVA.from_pretrained(folder, device="cpu", dtype="float32")
    table = {"": "cuda:0", "backbone.layers.1": "cpu", "backbone.layers.4": "cpu"}
    split = LongLLaVA.from_pretrained(folder, device_map=table, dtype="float32")
    answers = [model.generate("what is this", pictures, max_new_tokens=8, chunk_tokens=5) for model in (whole, split)]
    assert answers[0] == answers[1]
    sessions = [model.session(images=pictures) for model in (whole, split)]
    many = [session.ask_many(["a", "what"], max_new_tokens=5) for session in sessions]
    assert many[0] == many[1]
    path = sessions[1].save(folder / "split.session")
    assert split.load_session(path).ask("a", max_new_tokens=5) == sessions[0].ask("a", max_new_tokens=5)
