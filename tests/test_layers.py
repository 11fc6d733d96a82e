"""The house stands on its ground floor: a module imports only from the lines above its own (ARCHITECTURE.md).

Neighbours of one line do not import each other. A module inside a package that is one name here may import
its own package freely; where a package has an order of its own, its modules are named. Imports inside functions
count, and so do those for type checkers: a room that knows another's types knows that room.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "longllava"

# From the ground up. `ops.__init__` means the file itself, `nn` the whole package.
LINES = """
errors version heap
files shipped
settings
config
ops.dispatch
ops.native
ops.sequences ops.quantized ops.upstream_support ops.triton_trial
ops.triton_support ops.triton_int8 ops.native_cuda
ops.triton_rotate
ops.few_rows
ops.int8_linear
ops.selective_scan ops.causal_conv1d ops.attention ops.fused ops.vision ops.conv3x3 ops.pixel_conv
ops.__init__
nn
inputs
encoders bridges
backbone
fusion
model
plan
generation
quant
checkpoints
choices plan_report
data
evals
train
api
integrations
probes
doctor
cli
__main__ __init__
"""
ORDER = [line.split() for line in LINES.split("\n") if line]
RANK = {name: rank for rank, line in enumerate(ORDER) for name in line}


def room(module: str) -> str:
    """The longest named prefix of a dotted module: "ops.attention.cases" -> "ops.attention"."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        if (name := ".".join(parts[:n])) in RANK:
            return name
    raise AssertionError(f"longllava.{module} is in no line of tests/test_layers.py; add it there")


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """Dotted name below the package; a package's own file keeps its `__init__` where that is named."""
    parts = path.relative_to(package).with_suffix("").parts
    whole = ".".join(parts)
    return ".".join(parts[:-1]) if parts[-1] == "__init__" and whole not in RANK else whole


def imported(source: str, module: str, exists) -> Iterator[tuple[int, str]]:
    """(line, module below longllava) of every import of the library itself, relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "longllava":
                    yield node.lineno, alias.name.partition(".")[2] or "__init__"
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = ["longllava", *module.split(".")][: -node.level] + base
            if base[:1] != ["longllava"]:
                continue
            for alias in node.names:  # a name of the module, or a module below it
                below = ".".join([*base[1:], alias.name])
                yield node.lineno, below if exists(below) else ".".join(base[1:]) or "__init__"


def exists_in(package: Path):
    def exists(module: str) -> bool:
        path = package.joinpath(*module.split("."))
        return path.with_suffix(".py").is_file() or path.is_dir()

    return exists


def offences(path: Path, package: Path = PACKAGE) -> list[str]:
    module = module_name(path, package)
    own = room(module)
    dotted = ".".join(path.relative_to(package).with_suffix("").parts)
    found = []
    for line, target in imported(path.read_text("utf-8"), dotted, exists_in(package)):
        other = room(target if target in RANK or not target else module_name_of(target, package))
        if other != own and RANK[other] >= RANK[own]:
            found.append(f"{path.name}:{line}: {own} imports {other}, which is not above it")
    return found


def module_name_of(target: str, package: Path) -> str:
    """`ops` as an import target is the file ops/__init__.py."""
    whole = f"{target}.__init__"
    return whole if whole in RANK and package.joinpath(*target.split(".")).is_dir() else target


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_that_is_named_is_there() -> None:
    places = {name: PACKAGE.joinpath(*name.split(".")) for name in RANK}
    assert [name for name, path in places.items() if not path.is_dir() and not path.with_suffix(".py").is_file()] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_from_above(path: Path) -> None:
    assert not offences(path)


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("nn/mamba.py", "from longllava.ops.selective_scan import selective_scan", []),
        ("nn/mamba.py", "from longllava.nn.norm import RMSNorm", []),
        ("nn/mamba.py", "from longllava import model",
         ["mamba.py:1: nn imports model, which is not above it"]),
        ("nn/mamba.py", "def f():\n    import longllava.api",
         ["mamba.py:2: nn imports api, which is not above it"]),
        ("nn/mamba.py", "from ..train import loop", ["mamba.py:1: nn imports train, which is not above it"]),
        ("nn/mamba.py", "from . import norm", []),
        ("bridges/mlp.py", "from longllava.encoders import clip",
         ["mlp.py:1: bridges imports encoders, which is not above it"]),
        ("ops/attention/cpu.py", "from longllava.ops.selective_scan import cases",
         ["cpu.py:1: ops.attention imports ops.selective_scan, which is not above it"]),
        ("errors.py", "from longllava import LongLLaVA",
         ["errors.py:1: errors imports __init__, which is not above it"]),
    ],
)  # fmt: skip
def test_the_rule_itself(tmp_path: Path, file: str, source: str, expected: list[str]) -> None:
    for name in ("model", "api", "train/loop", "nn/norm", "encoders/clip", "ops/selective_scan/cases"):
        name += ".py"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source, "utf-8")
    assert offences(tmp_path / file, tmp_path) == expected


def test_a_module_in_no_line_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").touch()
    with pytest.raises(AssertionError, match="longllava.helpers is in no line"):
        offences(tmp_path / "helpers.py", tmp_path)
