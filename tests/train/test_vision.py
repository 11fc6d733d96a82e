"""The vision foundation: every picture follows from seed and number, and a stopped run goes on as if it had not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from longllava.errors import ConfigError, InputError, TrainingError
from longllava.files import unfinished
from longllava.shipped import shipped
from longllava.train import main, vision
from longllava.train.vision import Pictures, VisionTrainConfig, one_cycle, random_means
from longllava.train.vision_config import load_vision
from longllava.train.vision_model import NameReadout

SMALL = {
    "batch": 2,
    "crop_steps": 2,
    "whole_steps": 3,
    "name_steps": 3,
    "save_seconds": 0.0,
    "n_test": 2,
    "n_threads": 1,
}


def model_yaml(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(
        "encoder: {image_size: 96, patch_size: 8, width: 16, n_layers: 1, n_heads: 2, mlp_width: 16,\n"
        "  select_layer: -1, stem_widths: [8, 16], stem_strides: [4, 2], stem_blocks: [1, 1]}\n"
        "bridge: {tokens_per_image: 36}\n"
    )
    return str(path)


def train_until(phase, at, config, monkeypatch):
    """A run that is stopped before that step of the phase."""
    honest = vision.losses_of

    def stop(config, model, now, pixels, labels, step):
        if (now, step) == (phase, at):
            raise KeyboardInterrupt
        return honest(config, model, now, pixels, labels, step)

    with monkeypatch.context() as patch:
        patch.setattr(vision, "losses_of", stop)
        with pytest.raises(KeyboardInterrupt):
            vision.train(config)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    model = model_yaml(tmp_path)
    vision.train(VisionTrainConfig(model=model, out=str(tmp_path / "straight"), **SMALL))
    broken = VisionTrainConfig(model=model, out=str(tmp_path / "broken"), **SMALL)
    for phase, at in (("crops", 1), ("whole", 0), ("whole", 2), ("names", 0), ("names", 1)):
        train_until(phase, at, broken, monkeypatch)
    vision.train(broken)
    one, other = (load_file(tmp_path / name / "encoder.safetensors") for name in ("straight", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_steps_that_are_done_again_are_logged_once(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "LOG_EVERY", 1)
    config = VisionTrainConfig(model=model_yaml(tmp_path), out=str(tmp_path), **{**SMALL, "save_seconds": 1e9})
    train_until("names", 2, config, monkeypatch)
    vision.train(config)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    phases = ["crops"] * 2 + ["whole"] * 3 + ["names"] * 3
    assert [(row["phase"], row["step"]) for row in rows] == list(zip(phases, range(1, 9), strict=True))


def test_other_numbers_do_not_go_on_with_a_run(tmp_path, monkeypatch):
    config = VisionTrainConfig(model=model_yaml(tmp_path), out=str(tmp_path / "run"), **SMALL)
    monkeypatch.setattr(vision, "evaluate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        vision.train(config)
    with pytest.raises(TrainingError, match="batch"):
        vision.train(VisionTrainConfig(model=config.model, out=config.out, **{**SMALL, "batch": 3}))


@pytest.mark.parametrize("phase", ["crops", "whole"])
def test_an_encoder_that_changed_under_its_name_does_not_go_on_with_a_run(tmp_path, monkeypatch, phase):
    config = VisionTrainConfig(model=model_yaml(tmp_path), out=str(tmp_path / "run"), **SMALL)
    train_until(phase, 1 if phase == "crops" else 0, config, monkeypatch)
    path = tmp_path / "model.yaml"
    text = path.read_text()
    same = text.replace("-1", "-1, activation: gelu"), "encoder.activation: 'quick_gelu' then, 'gelu' now"
    wide = text.replace("mlp_width: 16", "mlp_width: 24"), "encoder.mlp_width: 16 then, 24 now"
    for text, told in (same, wide):
        path.write_text(text)
        with pytest.raises(TrainingError, match=told):
            vision.train(config)
    (record,) = (tmp_path / "run/checkpoints").glob("*1/state.json" if phase == "crops" else "*2/state.json")
    state = json.loads(record.read_text())
    del state["facts"]["encoder"]  # as older checkpoints are
    record.write_text(json.dumps(state))
    with pytest.raises(TrainingError, match="is of another model: 3 tensors of its encoder have other shapes"):
        vision.train(config)


def test_batches_are_a_pure_function_of_their_number():
    config = VisionTrainConfig(model="", batch=3)
    one = Pictures(config, "whole", "train", ("noto", "fluent"), 0, 9)[5]
    other = Pictures(config, "whole", "train", ("noto", "fluent"), 5, 4)[0]
    assert torch.equal(one[0], other[0]) and all(torch.equal(one[1][k], other[1][k]) for k in one[1])
    assert not torch.equal(one[0], Pictures(config, "whole", "test", ("noto", "fluent"), 0, 9)[5][0])


def test_a_preset_lays_smaller_numbers_over_the_file():
    path = str(shipped("configs", "train/nano/foundation-vision"))
    whole, smoke = load_vision(path), load_vision(path, ["preset=smoke", "seed=5"])
    assert smoke.whole_steps < 10 < whole.whole_steps
    assert (smoke.seed, smoke.model) == (5, whole.model)
    assert smoke.out != whole.out
    with pytest.raises(ConfigError, match="no preset 'tiny'; have smoke"):
        load_vision(path, ["preset=tiny"])


def test_the_shipped_foundation_trains_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = [f"{phase}_steps=0" for phase in ("crop", "whole", "name")]
    left = unfinished(tmp_path / "run" / "encoder.safetensors")  # a run that was killed while it wrote that
    left.parent.mkdir()
    left.touch()
    vision.main(str(shipped("configs", "train/nano/foundation-vision")), "preset=smoke", "out=run", "n_test=4", *steps)
    assert not left.exists()
    assert (tmp_path / "run" / "results.json").is_file() and (tmp_path / "run" / "encoder.safetensors").is_file()


def test_processes_beside_the_first_leave_it_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")  # of make foundation NPROC=2, whose second process found the folder locked
    steps = [f"{phase}_steps=0" for phase in ("crop", "whole", "name")]
    main(shipped("configs", "train/nano/foundation-vision"), ["preset=smoke", "out=run", "n_test=4", *steps])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 0}, {"crop_steps": -1}, {"max_tokens_read": 0}, {"max_tokens_read": 37}, {"name_learning_rate": -1.0},
     {"n_threads": -1}, {"n_threads": 100_000}, {"easy_share": 2.0}, {"pool_tokens": 35}, {"seed": 1 << 63}],
)  # fmt: skip
def test_numbers_that_cannot_be_are_told_before_the_first_step(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(vision, "run_phase", None)
    (name,) = wrong
    message = "144 tokens cannot become 35" if name == "pool_tokens" else f"{name}: got {wrong[name]}"
    with pytest.raises((ConfigError, InputError), match=message):
        vision.train(VisionTrainConfig(model=model_yaml(tmp_path), out=str(tmp_path / "run"), **{**SMALL, **wrong}))
    assert not (tmp_path / "run").exists()


def test_one_token_can_be_all_of_a_picture(tmp_path):
    small = {**SMALL, "pool_tokens": 1, "max_tokens_read": 1, "easy_share": 1.0}
    vision.train(VisionTrainConfig(model=model_yaml(tmp_path), out=str(tmp_path / "run"), **small))
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.parametrize("seed", [(1 << 63) - 1, 1 - (1 << 63)])
def test_every_seed_that_is_taken_trains(tmp_path, seed):
    small = {**SMALL, "crop_steps": 0, "whole_steps": 1, "name_steps": 0, "seed": seed}
    vision.train(VisionTrainConfig(model=model_yaml(tmp_path), out=str(tmp_path / "run"), **small))
    assert (tmp_path / "run" / "results.json").is_file()


def test_an_accuracy_counts_every_known_label_once(tmp_path):
    torch.manual_seed(0)
    config = VisionTrainConfig(model=model_yaml(tmp_path), **{**SMALL, "batch": 1, "n_test": 24, "name_steps": 0})
    model = vision.VisionFoundation(vision.named_config(config.model).encoder).eval()
    batches = [Pictures(config, "whole", "test", ("noto",), number, 1)[0] for number in range(24)]
    pixels = torch.cat([pixels for pixels, _ in batches])
    with torch.no_grad():
        found = model.whole(pixels, 36, torch.full((24, 36), 1 / 36), by_name=False)
    expected = {}
    for name, logits in found.items():
        labels = torch.cat([labels[name] for _, labels in batches])
        right = (logits.argmax(-1) == labels)[labels >= 0]  # not every picture has a digit, a frame or one place
        expected[name] = float(right.float().mean())
    assert 0 < expected["place"] < 1
    assert vision.evaluate(config, model, "noto") == pytest.approx(expected)


def test_means_are_over_the_asked_number_of_tokens():
    weights = random_means(50, 36, 2, 5, seed=1)
    counts = (weights > 0).sum(-1)
    assert counts.min() >= 2 and counts.max() <= 5 and len(counts.unique()) > 1
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))


def test_the_rate_rises_then_falls_to_zero():
    rates = [one_cycle(1.0, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == 1.0 and rates[-1] < 0.01


def test_name_codes_are_whitened_and_score_as_the_table_did():
    torch.manual_seed(0)
    skewed = torch.randn(797, 16) * torch.logspace(0, -1, 16)
    readout = NameReadout(16)
    readout.begin_(skewed)
    codes = readout.codes - readout.codes.mean(0)
    spread = torch.linalg.svdvals(codes)
    assert spread[0] / spread[-1] < 1.2 < torch.linalg.svdvals(skewed - skewed.mean(0))[0] / 3
    torch.testing.assert_close(readout.codes.norm(dim=1), torch.ones(797))
    # before a row's norm is taken away, codes @ map(x) is what the centred table gave
    u, s, v = torch.linalg.svd(skewed - skewed.mean(0), full_matrices=False)
    x = torch.randn(5, 16)
    torch.testing.assert_close(readout.map(x) @ (u @ v).T, x @ (skewed - skewed.mean(0)).T, rtol=1e-4, atol=1e-4)


def test_name_codes_do_not_train():
    readout = NameReadout(16)
    assert {name for name, _ in readout.named_parameters()} == {"map.weight", "log_scale", "threshold"}
    assert "codes" in readout.state_dict()
