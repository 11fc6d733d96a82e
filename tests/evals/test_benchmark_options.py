"""What the scripts of benchmarks/ are told is looked at before they measure: one sentence, and nothing is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longllava.errors import InputError, LongLLaVAError
from longllava.ops import causal_conv1d
from longllava.ops.attention.cases import Case as AttentionCase
from longllava.ops.causal_conv1d.cases import PLAIN
from longllava.ops.dispatch import Backend
from tests.evals.scripts import BENCHMARKS, load_script


@pytest.mark.parametrize(
    ("script", "options", "told"),
    [
        ("efficiency", {"peer_tokens": "16,2k"}, "--peer-tokens: got '16,2k', expected whole numbers above 0"),
        ("efficiency", {"peer_tokens": "0"}, "--peer-tokens: got '0'"),
        ("efficiency", {"tokens": 0}, "--tokens 0: nothing is left to measure without --peer-tokens"),
        ("gpu_first_token", {"batches": "2,x", "device": "cpu", "model": "nano"}, "--batches: got '2,x'"),
        ("training_memory", {"dtype": "int4"}, "dtype: got 'int4', allowed: float32, bfloat16"),
        ("training_memory", {"device": "tpu"}, "--device: got 'tpu', allowed: cpu, auto"),
        ("training_memory", {"model": "jamba-v0.1"}, "--model jamba-v0.1: it reads text only"),
        ("int8", {"device": "tpu"}, "--device tpu: expected cpu, or cuda where torch sees a GPU"),
        ("int8", {"tuning": True}, "--tune: it tries launches of the GPU kernel; give --device cuda"),
    ],
)
def test_what_cannot_be_read_is_said_before_anything_is_measured(
    script: str, options: dict[str, object], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_script(script)
    for name in ("open_model", "peak_of_steps", "tune", "row_of"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it went to work"), raising=False)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("a process was started"))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # training_memory starts itself again without
    with pytest.raises(LongLLaVAError, match=told):
        getattr(module, script)(**options)


@pytest.mark.parametrize(
    ("script", "options", "told"),
    [
        ("image_pipeline", "--pictures 0", "image_pipeline: --pictures and --repeat must be at least 1, and make two"),
        ("image_pipeline", "--pictures 8 --repeat 1", "image_pipeline: --pictures and --repeat must be at least 1"),
        ("video", "--seconds 0", "video: --seconds: got 0, expected a whole number above 0"),
        ("video", "--measure nowhere.mp4", "video: nowhere.mp4: no such video file or folder of frames"),
        ("checkpoints", "--measure nowhere", "checkpoints: nowhere: no such model"),
        ("curriculum", "--questions 0", "curriculum: --questions: got 0, expected a whole number above 0"),
        ("curriculum", "--generated -1", "curriculum: --generated: got -1, expected 0 or more"),
    ],
)
def test_scripts_end_with_one_sentence(script: str, options: str, told: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), *options.split()], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith(told)


@pytest.mark.parametrize(
    ("script", "option"),
    [("checkpoints", "--save"), ("cuda_report", "output"), ("efficiency", "save"), ("image_pipeline", "--save"),
     ("int8", "output"), ("int8_prefill", "save"), ("int8_quality", "save"), ("kernels", "output"),
     ("parity", "--save"), ("prompt1000", "--save"), ("scaling", "save"), ("training", "save"),
     ("training_memory", "save"), ("video", "--save")],
)  # fmt: skip
def test_a_file_that_cannot_be_written_is_said_before_the_measuring(
    script: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.mkdtemp", lambda *_, **__: pytest.fail("it went to work"))
    monkeypatch.setattr(sys, "argv", [script, "--save", f"{tmp_path}/file/x.json"])  # of those without typer
    module = load_script(script)
    with pytest.raises(InputError, match="file: it is a file; name a folder to write into"):
        if option == "--save":
            module.main()
        else:
            getattr(module, "report" if script == "cuda_report" else script)(**{option: tmp_path / "file/x.json"})
    with pytest.raises(InputError, match="it is a folder; name a file to write"):
        module.check_target(tmp_path)
    with pytest.raises(InputError, match="x.png: a chart would take the place of the figures; name a file"):
        module.check_target(tmp_path / "x.png")  # charts lie beside the JSON, under its name


@pytest.mark.parametrize("script", ["cuda_report", "triton_report"])
def test_counts_of_some_kernels_do_not_take_the_place_of_all(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_script(script)
    monkeypatch.setattr(module, "write_json", lambda *_: pytest.fail("the results were written over"))
    if script == "cuda_report":
        monkeypatch.setattr(module, "rows_of", lambda source, arch, wanted: [{}] if wanted in "scan" else [])
        monkeypatch.setattr(module, "tool", lambda *_: "V13.0")
    else:
        monkeypatch.setattr(module.triton_support, "missing", lambda: None)
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3"))
        launch = SimpleNamespace(__name__="scan"), {}
        monkeypatch.setattr(module, "CALLS", {"scan": lambda: None})
        monkeypatch.setattr(module, "recorded", lambda launches: nullcontext(launches.append(launch)))
        monkeypatch.setattr(module, "row", lambda *_: {})
    module.report(kernel="sca")
    with pytest.raises(LongLLaVAError, match="--kernel 'nosuch'"):
        module.report(kernel="nosuch")


@pytest.mark.parametrize("options", [["--tasks", "facts"], ["--folders", "nano"]])
def test_some_tasks_or_models_do_not_take_the_place_of_the_curriculum(options: list[str], monkeypatch) -> None:
    module = load_script("curriculum")
    monkeypatch.setattr(sys, "argv", ["curriculum", *options])
    monkeypatch.setattr(module, "column_of", lambda *_: SimpleNamespace(about={"device": "cpu"}))
    monkeypatch.setattr("longllava.evals.curriculum_report.print_report", lambda columns: True)
    monkeypatch.setattr("longllava.evals.curriculum_report.as_json", lambda *_, **__: {})
    monkeypatch.setattr("longllava.files.write_json", lambda *_: pytest.fail("the results were written over"))
    assert module.main()


def test_what_nvcc_says_is_passed_on() -> None:
    module = load_script("cuda_report")
    with pytest.raises(LongLLaVAError, match=r"^ls: .*--nosuch"):
        module.tool("ls", "--nosuch")


def test_the_run_on_a_gpu_begins_only_where_its_results_and_steps_are_known(tmp_path: Path) -> None:
    for name, says in (("nvidia-smi", "9.0"), ("python", "it went to work")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {says}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python", "LC_ALL": "C"}
    (tmp_path / "file").touch()
    for arguments, code, told in (
        ((), 1, "where the results go"),
        ((tmp_path / "file" / "results", "check"), 1, "cannot create directory"),
        ((tmp_path, "chekc"), 2, "no step 'chekc'; there are: build check sanitize kernels cpu first"),
    ):
        done = subprocess.run(["bash", BENCHMARKS / "gpu_run.sh", *arguments], capture_output=True, text=True,
                              env=environment)  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done
        assert told in done.stderr
    done = subprocess.run(["bash", BENCHMARKS / "gpu_run.sh", tmp_path, "check"], capture_output=True, text=True,
                          env=environment)  # fmt: skip
    assert done.returncode == 0 and "it went to work" in done.stdout and "checked" in done.stdout


def test_the_run_on_a_gpu_begins_nothing_when_its_time_is_over(tmp_path: Path) -> None:
    for name in ("nvidia-smi", "python", "compute-sanitizer", "taskset"):
        says = "9.0" if name == "nvidia-smi" else "it went to work"
        (tmp_path / name).write_text(f"#!/bin/sh\necho {says}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python", "LIMIT": "5"}
    environment["PEERS"] = ""
    done = subprocess.run(["bash", BENCHMARKS / "gpu_run.sh", tmp_path / "results"], capture_output=True, text=True,
                          env=environment)  # fmt: skip
    logs = [path.read_text("utf-8") for path in (tmp_path / "results").glob("*.log")]
    assert done.returncode == 0 and "it went to work" not in "".join([done.stdout, *logs]), (done, logs)
    for step in ("build.py", "memcheck causal_conv1d", "kernels.py --device cpu", "kernels.py --device cuda"):
        assert any("no time left for: " in line and step in line for line in done.stdout.splitlines()), done.stdout


@pytest.mark.parametrize("quick", [False, True])
def test_checks_of_kernels_that_are_cut_off_keep_what_they_have(quick: bool, tmp_path: Path, monkeypatch) -> None:
    module = load_script("kernel_checks")

    def rows(*_):
        yield {"op": "scan", "what": "1", "backend": "cuda", "right": True}
        raise KeyboardInterrupt

    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "environment", dict)
    monkeypatch.setattr(module, "all_rows", rows)
    with pytest.raises(KeyboardInterrupt):
        module.checks(quick=quick, output=tmp_path / "checks.json")
    kept = json.loads((tmp_path / "checks.json").read_text("utf-8"))
    assert not kept["finished"] and [row["what"] for row in kept["rows"]] == ["1"]


def test_a_backend_that_has_no_backward_is_left_out_where_gradients_are_timed_or_checked() -> None:
    """Attention's Triton kernels ended a run on a GPU: plain tensors they take, and what they give has no gradient."""

    def why_not(x, *rest):
        return "has no backward" if x.requires_grad else None

    forward_only = Backend("triton", lambda x, *rest: (x.detach(), x.detach()), why_not)
    kernels, checks = load_script("kernels"), load_script("kernel_checks")
    op = next(op for op in kernels.OPS if op.name == "attention")
    small = AttentionCase(name="small", n_queries=4, n_keys=4, n_heads=2, n_groups=1, head_dim=8)
    rows = kernels.rows_of(replace(op, backends=(forward_only, *op.backends)), small, "backward", "cpu", {})
    case = SimpleNamespace(name="small", dtype=torch.float32, inputs=lambda device: PLAIN.inputs())
    rows = [rows[0], *checks.gradient_rows("conv", causal_conv1d, case, [forward_only]),
            *checks.repeat_rows("conv", case, [forward_only], "backward")]  # fmt: skip
    assert [row["skipped"] for row in rows] == ["has no backward"] * 3


@pytest.mark.parametrize("script", ["kernels", "kernel_checks"])
def test_a_default_is_shown_whole_in_a_terminal_of_80_columns(script: str) -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / f"{script}.py", "--help"], capture_output=True, text=True,
                          check=True, env={**os.environ, "COLUMNS": "80"})  # fmt: skip
    assert "JSON file" in done.stdout and "\N{HORIZONTAL ELLIPSIS}" not in done.stdout


def test_threads_wait_as_they_do_for_users() -> None:
    """Scripts that import torch before the library took up to ten times as long where neighbours were busy."""
    code = "import _environment, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = f"{BENCHMARKS}:{BENCHMARKS.parent}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "passive False\n", done.stderr
