"""The doctor: probes that tell working from installed, one verdict per op, tables and JSON that agree."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longllava import doctor, probes
from longllava.ops.dispatch import Backend
from longllava.probes import Probe, Verdict, try_all, try_probe


def probe_of(module: str, use: str) -> Probe:
    return Probe("a-package", module, "a purpose", use, "pip install 'a-package[all]'")


def test_a_package_that_is_not_there_is_missing() -> None:
    assert try_probe(probe_of("no_such_module_anywhere", "1")).state == "missing"


def test_what_is_not_wanted_is_not_missed() -> None:
    gone = probe_of("no_such_module_anywhere", "1")
    there = replace(probe_of("json", "import json"), wanted=False)
    verdicts = try_all([gone, replace(gone, wanted=False), there])
    assert [(v.probe, v.state) for v in verdicts] == [(gone, "missing"), (there, "works")]


def test_a_package_that_works_works() -> None:
    assert try_probe(probe_of("json", "import json; assert json.loads('1') == 1")).state == "works"


def test_a_file_with_a_packages_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "yaml.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    assert try_probe(probe_of("yaml", "import yaml")).state == "works"


@pytest.mark.parametrize(
    ("use", "why"),
    [
        ("import json; json.gone", "AttributeError: module 'json' has no attribute 'gone'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with code -11"),
        ("import time; time.sleep(9)", "no answer within 1 s"),
    ],
)
def test_installed_is_not_working(use: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "SECONDS", 1 if "sleep" in use else 60)
    verdict = try_probe(probe_of("json", use))
    assert (verdict.state, verdict.why) == ("broken", why)


@pytest.mark.parametrize("op", doctor.CALLS)
def test_every_op_has_a_verdict_and_its_backends_agree(op: str) -> None:
    found = doctor.examine_op(op)
    assert found["uses"] in found["backends"]
    assert found["backends"]["reference"] == "runs, differs from the reference by 0e+00"
    for answer in found["backends"].values():
        prefix = "runs, differs from the reference by "
        assert not answer.startswith(prefix) or float(answer.removeprefix(prefix)) < 1e-4


def test_on_a_gpu_the_examples_of_ops_that_choose_by_size_are_a_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By metadata alone: the device meta stands for an H100."""
    from longllava.ops import attention, causal_conv1d, int8_linear, native_cuda, triton_support, vision
    from longllava.ops.dispatch import choose

    def chosen(device: str) -> list[str]:
        of = {"int8_linear": int8_linear.BACKENDS, "causal_conv1d": causal_conv1d.BACKENDS}
        of |= {"linear_activated": vision.LINEAR_ACTIVATED_BACKENDS}
        return [choose(op, backends, *doctor.example(op, device)).name for op, backends in of.items()]

    monkeypatch.setattr(native_cuda, "DEVICE", "meta")
    monkeypatch.setattr(native_cuda, "missing", lambda: None)
    monkeypatch.setattr(native_cuda, "n_processors", lambda device: 132)  # an H100's
    monkeypatch.setattr(native_cuda, "has", lambda name: True)
    monkeypatch.setattr(triton_support, "why_not", lambda **tensors: None)
    int8_linear.cuda._cannot_run_on.cache_clear()
    assert chosen("meta") == ["cuda", "cuda", "triton"]
    int8_linear.cuda._cannot_run_on.cache_clear()
    monkeypatch.setattr(native_cuda, "has", lambda name: False)
    answer = int8_linear.BACKENDS[0].why_not(*doctor.example("int8_linear", "meta"))
    assert str(answer).startswith("the CUDA kernels are built without those for sm_90a")
    int8_linear.cuda._cannot_run_on.cache_clear()
    monkeypatch.undo()
    q, k = doctor.example("attention", "meta")[:2]
    assert (q.dtype, q.shape[1] % attention.cudnn.UNIT, k.shape[1] - q.shape[1]) == (torch.bfloat16, 0, 7)
    assert set(doctor.PROMPT_CALLS) <= set(doctor.CALLS)
    for op in doctor.PROMPT_CALLS:
        x = doctor.example(op, "cpu")[0]
        assert x.dtype == torch.float32 and 33 in x.shape


def test_an_op_that_writes_over_its_input_is_judged_on_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from longllava.ops import vision

    truth = vision.ACTIVATION_BACKENDS[-1]
    half = Backend("half", lambda x, activation: truth.run(x, activation).mul_(0.5), lambda *_: None)
    monkeypatch.setattr(vision, "ACTIVATION_BACKENDS", (half, replace(truth, name="same"), truth))
    answers = doctor.examine_op("activation")["backends"]
    assert answers == {
        "half": "runs, differs from the reference by 5e-01",
        "same": "runs, differs from the reference by 0e+00",
        "reference": "runs, differs from the reference by 0e+00",
    }


@pytest.mark.parametrize(("uses", "word"), [(True, "by"), (False, "without")])
def test_the_form_of_the_compiled_kernels_names_amx(uses: bool, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from longllava.ops import native

    monkeypatch.setattr(native, "isa", lambda: "avx512")
    monkeypatch.setattr(native, "uses_amx", lambda: uses)
    assert doctor.compiled_form() == f"work, in their avx512 form, int8 and bf16 products {word} AMX"


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGLLAVA_SELECTIVE_SCAN", "abacus")
    found = doctor.examine_op("selective_scan")
    assert found["forced"] == "abacus"
    assert found["uses"].startswith("selective_scan: no backend 'abacus'; allowed are ")


def test_difference_is_relative_to_the_truth() -> None:
    truth = (torch.tensor([2.0, -4.0]), torch.tensor([1.0]))
    assert doctor.difference((torch.tensor([2.0, -4.2]), torch.tensor([1.0])), truth) == pytest.approx(0.05)
    assert doctor.difference(torch.tensor([1.0]), torch.tensor([1.0])) == 0
    assert doctor.difference(torch.tensor([127]).char(), torch.tensor([-127]).char()) == 2


def test_tables_and_json_tell_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = [
        Verdict(probe_of("a", ""), "works"),
        Verdict(probe_of("b", ""), "broken", "ImportError: libgone.so"),
    ]
    monkeypatch.setattr(doctor, "try_all", lambda: verdicts)
    monkeypatch.setattr(doctor, "CALLS", {"selective_scan": doctor.scan_call})
    monkeypatch.setenv("COLUMNS", "200")
    report = doctor.examine()
    doctor.show(report, as_json=True)
    assert json.loads(capsys.readouterr().out) == report
    assert [row["state"] for row in report["packages"]] == ["works", "broken"]
    doctor.show(report)
    printed = capsys.readouterr().out
    assert report["machine"]["torch"] in printed
    assert report["ops"]["selective_scan"]["uses"] in printed
    assert "broken: ImportError: libgone.so" in printed
    assert "pip install 'a-package[all]'" in printed


def test_a_backend_that_lies_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from longllava.ops import selective_scan as op

    truth = op.BACKENDS[-1]

    def wrong(*arguments):
        y, state = truth.run(*arguments)
        return y * 1.05, state

    def broken(*arguments):
        raise RuntimeError("illegal instruction")

    liars = (Backend("wrong", wrong, lambda *_: None), Backend("broken", broken, lambda *_: None))
    monkeypatch.setattr(op, "BACKENDS", (*liars, truth))
    answers = doctor.examine_op("selective_scan")["backends"]
    assert answers["wrong"] == "runs, differs from the reference by 5e-02"
    assert answers["broken"] == "says it can run, and fails: RuntimeError: illegal instruction"


def test_a_torch_that_cannot_be_imported_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "try_all", list)
    report = doctor.examine()
    assert report["machine"]["torch"].startswith("cannot be imported: ")
    assert report["ops"] == {}


def test_no_op_is_forgotten() -> None:
    """Each op folder of the library is examined."""
    folders = {path.parent.name for path in (Path(doctor.__file__).parent / "ops").glob("*/__init__.py")}
    assert folders == {doctor.PLACES.get(op, (op, ""))[0] for op in doctor.CALLS}
