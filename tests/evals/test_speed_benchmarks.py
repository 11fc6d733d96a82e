"""Benchmarks of scaling and efficiency: small runs from the command line to the files, and their sums."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from tests.evals.scripts import BENCHMARKS, load_script
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    return load_script("scaling")


def point(images: int, seconds: float) -> dict:
    return {"images": images, "seconds_to_read": seconds}


def test_the_slope_is_of_large_prompts_only(scaling: ModuleType) -> None:
    points = [point(1, 50.0), point(100, 2.0), point(1000, 20.0), point(10_000, 2000.0)]
    assert scaling.slope(points, "seconds_to_read") == pytest.approx(1.5)  # 1 and 2, with equal steps
    assert scaling.slope(points[:2], "seconds_to_read") is None
    not_measured = {"images": 10**6, "not_measured": "as before"}
    assert scaling.slope([*points, not_measured], "seconds_to_read") == pytest.approx(1.5)


def test_what_would_take_too_long_is_foreseen(scaling: ModuleType) -> None:
    assert scaling.expected_seconds(None, 10_000) == 0
    assert scaling.expected_seconds(point(10, 9.0), 10_000) == 0  # too few to tell
    assert scaling.expected_seconds(point(1000, 5.0), 3000) == 45
    assert scaling.expected_seconds({"images": 1000, "not_measured": ""}, 3000) == float("inf")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(BENCHMARKS / script), *arguments], capture_output=True, text=True)


def test_scaling_from_the_command_line(tmp_path: Path) -> None:
    save = tmp_path / "scaling.json"
    done = run("scaling.py", "--images", "1,100,200", "--tokens", "4", "--budget", "0.0001", "--save", str(save))
    assert done.returncode == 0, done.stderr
    report = json.loads(save.read_text())
    one, hundred, left_out = report["points"]
    assert one["prompt_tokens"] < 10 < 100 * 6 <= hundred["prompt_tokens"]
    assert left_out["not_measured"].endswith("budget 0") and "not measured" in done.stdout
    assert report["weights"] == "trained" and report["command"].startswith("scaling.py")
    assert save.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_scaling_that_is_stopped_keeps_its_points(scaling: ModuleType, tmp_path: Path, monkeypatch) -> None:
    measured = {"prompt_tokens": 8, "seconds_to_answer": 0.1, "milliseconds_per_image": 1.0, "peak_bytes": 10**6,
                "key_value_bytes": 10**5, "seconds_to_read": 0.1, "tokens_per_image": 4}  # fmt: skip

    def stopped(task: dict) -> dict:
        if task["images"] == 100:
            raise KeyboardInterrupt
        return {**measured, "images": task["images"]}

    monkeypatch.setattr(scaling, "write_pictures", lambda folder: None)
    monkeypatch.setattr(scaling, "in_a_process_of_its_own", stopped)
    save = tmp_path / "scaling.json"
    with pytest.raises(KeyboardInterrupt):
        scaling.scaling(images="1,10,100", tokens="4", save=save)
    report = json.loads(save.read_text())
    assert [point["images"] for point in report["points"]] == [1, 10] and report["slopes"]["4"]["peak_bytes"] is None
    assert save.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_the_processor_did_does_not_stand_under_the_gpus_name(scaling, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(scaling, "chart", lambda points, title, file: file.write(title.encode()))
    scaling.write_report(tmp_path / "x.json", [], "nano", device="cpu", pixels="files", int8=False)
    assert json.loads((tmp_path / "x.json").read_text())["device"] == "cpu"
    assert b"a GPU" not in (tmp_path / "x.png").read_bytes()


def test_efficiency_from_the_command_line(tmp_path: Path) -> None:
    save = tmp_path / "efficiency.json"
    done = run("efficiency.py", "--tokens", "40", "--new-tokens", "3", "--peer-tokens", "24", "--peer-new-tokens", "2",
               "--dtype", "float32", "--save", str(save))  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(save.read_text())
    assert [(row["way"], row["tokens_in"], row["tokens_out"]) for row in report["rows"]] == [
        ("longllava", 40, 3), ("longllava", 24, 2), ("transformers", 24, 2)
    ]  # fmt: skip
    assert report["rows"][1]["largest_difference_of_logits"] < 1e-3  # the same weights
    assert "times as fast to the first token" in done.stdout
    assert all(row["prefill_seconds"] > 0 and row["tokens_per_second"] > 0 for row in report["rows"])
    assert report["dtype"] == "float32"
    assert len(report["published_on_a100"]) == 4 and "16.5 s" in done.stdout
    assert save.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_prompts_of_one_length_have_a_bar_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """--tokens 64 --peer-tokens 64: ours as it is, and ours with what transformers has."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    row = {"tokens_in": 64, "prefill_seconds": 1.0, "tokens_per_second": 2.0, "peak_bytes": 10}
    rows = [{"way": way, **row} for way in ("longllava", "longllava", "transformers")]
    load_script("efficiency").chart(rows, "", None)
    for axes in drawn[0].axes:
        assert len({bar.get_y() for bar in axes.patches}) == 3
    ticks = [tick.get_text() for tick in drawn[0].axes[0].get_yticklabels()]
    assert ticks == ["transformers, 64 in", "longllava, 64 in", "longllava, 64 in"]


@pytest.mark.parametrize("script", ["scaling", "efficiency"])
def test_a_name_in_a_title_is_no_formula(script: str) -> None:
    measured = {"way": "longllava", "tokens_in": 9, "prefill_seconds": 1.0, "tokens_per_second": 2.0, "peak_bytes": 10,
                "images": 1, "tokens_per_image": 4, "seconds_to_read": 1.0, "milliseconds_per_image": 1e3,
                "key_value_bytes": 1}  # fmt: skip
    load_script(script).chart([measured], r"a$\frac$", io.BytesIO())


def test_a_random_peer_is_made_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the fp32 weights that it is cast from count as its memory, beside ours, which are never there."""
    import torch
    from transformers import JambaForCausalLM

    made: list[torch.dtype] = []
    real = JambaForCausalLM.to

    def cast(model: JambaForCausalLM, *arguments: object) -> JambaForCausalLM:
        made.extend(parameter.dtype for parameter in model.parameters())
        return real(model, *arguments)

    module = load_script("efficiency")
    monkeypatch.setattr(JambaForCausalLM, "to", cast)
    monkeypatch.setattr(module, "is_random", lambda name: True)
    monkeypatch.setattr(module, "open_config", lambda name: tiny_config())
    task = {"model": "random", "device": "cpu", "dtype": "bfloat16", "tokens": 9, "new_tokens": 2, "highest": 60}
    module.measure_transformers(task)
    assert made and set(made) == {torch.bfloat16} and torch.get_default_dtype() == torch.float32


def test_wrong_numbers_are_one_sentence() -> None:
    done = run("scaling.py", "--images", "1,x")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--images: got '1,x'" in done.stderr and "Traceback" not in done.stderr


def test_int8_prefill_from_the_command_line(tmp_path: Path) -> None:
    save = tmp_path / "int8_prefill.json"
    done = run("int8_prefill.py", "--tokens", "70", "--rounds", "2", "--forms", "fp32,int8", "--save", str(save))
    assert done.returncode == 0, done.stderr
    report = json.loads(save.read_text())
    assert [row["form"] for row in report["rows"]] == ["fp32", "int8"] and report["tokens"] == 70
    assert all(len(row["rounds"]) == 2 and row["seconds"] > 0 for row in report["rows"])
    assert "x fp32" in done.stdout and "this processor has" in done.stdout
    done = run("int8_prefill.py", "--forms", "fp32,int4")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--forms: got 'int4', allowed: fp32, bf16, int8, int8-bf16" in done.stderr


@pytest.mark.long
def test_scaling_of_pixels_that_are_there(tmp_path: Path) -> None:
    save = tmp_path / "scaling.json"
    done = run("scaling.py", "--images", "2", "--tokens", "4", "--pixels", "device", "--save", str(save))
    assert done.returncode == 0, done.stderr
    (point,) = json.loads(save.read_text())["points"]
    assert point["prompt_tokens"] > 8 and point["seconds_to_read"] > 0 and "limit" not in point


@pytest.mark.long
def test_first_token_from_the_command_line(tmp_path: Path) -> None:
    """All that needs no GPU: prompts, decoding, sessions, files."""
    save = tmp_path / "first.json"
    done = run("gpu_first_token.py", "--model", "nano", "--device", "cpu", "--weights", "bf16", "--prompts", "2x4,30",
               "--once", "", "--batches", "2", "--answer", "8", "--files", "2", "--no-peer",
               "--save", str(save))  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(save.read_text())
    rows = report["rows"]
    assert [row["row"] for row in rows] == ["prompt", "prompt", "decode", "files", "session", "decode"]
    assert rows[1]["prompt_tokens"] == 30 and rows[0]["prompt_tokens"] > 8 and report["finished"]
    assert all(row["seconds"] > 0 and row["limit"] == sum(v for k, v in row["limit_parts"].items() if k != "total")
               for row in rows[:2])  # fmt: skip
    assert rows[2]["rows"] == 1 and rows[2]["tokens_per_second"] > 0
