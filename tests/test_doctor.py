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


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGLLAVA_SELECTIVE_SCAN", "abacus")
    found = doctor.examine_op("selective_scan")
    assert found["forced"] == "abacus"
    assert found["uses"].startswith("selective_scan: no backend 'abacus'; allowed are ")


def test_difference_is_relative_to_the_truth() -> None:
    truth = (torch.tensor([2.0, -4.0]), torch.tensor([1.0]))
    assert doctor.difference((torch.tensor([2.0, -4.2]), torch.tensor([1.0])), truth) == pytest.approx(0.05)
    assert doctor.difference(torch.tensor([1.0]), torch.tensor([1.0])) == 0


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
