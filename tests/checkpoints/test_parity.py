"""The parity table line by line; and that a line fails when routing, a norm or a layer is not as published."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from longllava.nn.mlp import MixtureOfExperts

SCRIPT = Path(__file__).parents[2] / "benchmarks/parity.py"


def parity():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("parity", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        sys.modules["parity"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


PARITY = parity()


@pytest.mark.parametrize("number", range(len(PARITY.CASES)))
def test_every_line_holds(number):
    line = PARITY.run(PARITY.CASES[number])
    assert line.holds(), line


def test_decoding_is_compared_over_different_tokens(tmp_path):
    """A model that says one word for ever would agree with anything."""
    from longllava.checkpoints import load_model
    from tests.checkpoints import published

    published.jamba(tmp_path, 4)
    model = load_model(tmp_path)
    ids = torch.randint(3, 60, (2, 17))
    with torch.no_grad():
        tokens = PARITY.greedy(model, model.embed(ids), torch.zeros(2, 17, dtype=torch.int32))
    assert min(len(set(row.tolist())) for row in tokens) >= 4


@pytest.mark.parametrize("change", ["renormalised", "softmax of the chosen", "top 1"])
def test_other_routing_fails(monkeypatch, change):
    published = torch.Tensor.topk

    def topk(weights, k, dim):
        values, indices = published(weights, k, dim=dim)
        if change == "renormalised":
            values = values / values.sum(-1, keepdim=True)
        elif change == "softmax of the chosen":
            values = torch.softmax(values.log(), -1)
        else:
            values = values * torch.tensor([1.0, 0.0])
        return values, indices

    def forward(self, x_BLD, ctx=None):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "topk", topk)
            return original(self, x_BLD, ctx)

    original = MixtureOfExperts.forward
    monkeypatch.setattr(MixtureOfExperts, "forward", forward)
    assert not PARITY.run(PARITY.routing).holds()


def test_the_table_fails_with_a_line(monkeypatch, capsys, tmp_path):
    good, bad, other = PARITY.Line("a", "b", 1e-5, True), PARITY.Line("c", "d", 2e-4), PARITY.Line("e", "f", 0.0, False)
    for lines, code in (([good], 0), ([good, bad], 1), ([good, other], 1)):
        monkeypatch.setattr(PARITY, "CASES", [lambda folder, line=line: line for line in lines])
        with pytest.raises(SystemExit) as caught:
            PARITY.main(["--save", str(tmp_path / "table.json")])
        assert int(caught.value.code) == code
        saved = json.loads((tmp_path / "table.json").read_text())
        assert [line["holds"] for line in saved["lines"]] == [line.holds() for line in lines]
        assert saved["environment"]["command"]
        assert capsys.readouterr().out.count("FAILS") == code
