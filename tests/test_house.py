"""The house itself: what ships, what a bare machine sees, how big files are, what make offers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import longllava
from longllava import shipped
from longllava.errors import ConfigError, LongLLaVAError

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, **options)


def test_import_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'PIL', 'yaml', 'rich'}"
    done = python("-c", f"import sys, longllava; print(sorted({heavy} & set(sys.modules)))")
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_names_load_when_used_and_unknown_ones_say_so() -> None:
    assert longllava.LongLLaVAError is LongLLaVAError
    assert set(longllava.__all__) <= set(dir(longllava))
    with pytest.raises(AttributeError, match="'longllava' has no attribute 'LongLlava'"):
        longllava.LongLlava  # noqa: B018


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "benchmarks").glob("[!_]*.py")))
def test_a_script_without_the_environment_says_what_to_run(script: str) -> None:
    """-S hides every installed package: what a user's own Python looks like."""
    done = python("-S", "-E", f"benchmarks/{script}", "--help")
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"torch is not installed for .*: run `make setup` once .*\n", done.stderr)


def test_the_command_line_without_the_environment_says_what_to_run() -> None:
    done = python("-S", "-E", "-m", "longllava", "--help")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"typer is not installed for .*: run `make setup` once .*\n", done.stderr)


def test_shipped_files_are_found_and_unknown_names_get_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("package/configs/models/nano", "configs/models/nano", "configs/models/large"):
        place += ".yaml"
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "package")
    assert shipped.shipped("configs", "models/nano") == tmp_path / "package/configs/models/nano.yaml"
    assert shipped.shipped("configs", "models/nano.yaml").is_file()
    (tmp_path / "package/configs").rename(tmp_path / "package/gone")
    assert shipped.shipped("configs", "models/large") == tmp_path / "configs/models/large.yaml"
    with pytest.raises(ConfigError, match="no file 'models/nanno'; have models/nano, models/large$"):
        shipped.shipped("configs", "models/nanno")
    with pytest.raises(ConfigError, match="no kind 'recipes'; have configs, data_recipes"):
        shipped.shipped("recipes", "x")
    with pytest.raises(ConfigError, match="data_recipes/ is neither in .*package nor beside it"):
        shipped.shipped("data_recipes", "x")


def test_the_repository_ships_its_configs() -> None:
    assert "models/nano" in shipped.shipped_names("configs")
    assert shipped.shipped_names("data_recipes")


def test_files_fit_a_sitting() -> None:
    files = [*ROOT.glob("longllava/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    lines = {str(path.relative_to(ROOT)): path.read_text("utf-8").count("\n") for path in files}
    assert {path: n for path, n in lines.items() if n > 300} == {}


def test_every_make_target_is_explained() -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    done = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert set(re.findall(r"^make ([a-z0-9-]+) +\S", done.stdout, re.MULTILINE)) == targets
    for name in ("README.md", "CONTRIBUTING.md"):
        used = set(re.findall(r"(?:`|^)make ([a-z][a-z0-9-]*)", (ROOT / name).read_text("utf-8"), re.MULTILINE))
        assert used <= targets, name


def test_what_is_set_of_phases_is_the_text_foundations() -> None:
    """The encoder's YAML has none, and would refuse it: NPROC=2 needs rows=2."""
    done = subprocess.run(["make", "-n", "foundation", "SET=seed=7 phases.0.rows=2"], capture_output=True, text=True,
                          cwd=ROOT, check=True)  # fmt: skip
    found = dict(re.findall(r"train configs/train/nano/foundation-(\w+)\.yaml *(.*)", done.stdout))
    assert found == {"vision": "seed=7", "text": "seed=7 phases.0.rows=2"}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., list[str]]:
    """make in a fresh environment; what its python is told to run till then, each line as it begins and as it ends."""
    for name in ("csrc", "longllava", "tests", "benchmarks", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "constraints.txt", ".venv/.installed"):
        (tmp_path / name).touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    run = tmp_path / ".venv/bin/python"
    run.write_text('#!/bin/sh\necho "begins $*" >> told; sleep 0.1; echo "ends $*" >> told\n')
    run.chmod(0o755)

    def made(*arguments: str) -> list[str]:
        (tmp_path / "told").write_text("")
        bare = {"PATH": os.environ["PATH"]}  # without what a make that runs these tests was told
        subprocess.run(["make", *arguments], capture_output=True, cwd=tmp_path, env=bare, check=True)
        return (tmp_path / "told").read_text().splitlines()

    return made


def test_stages_named_together_run_one_after_the_other(make: Callable[..., list[str]]) -> None:
    """Each starts from what the one before it has written; -j may come from the environment."""
    told = make("-j4", "stage1", "stage2", "stage3")
    assert [re.sub(r" .*/(\w+)\.yaml.*", r" \1", line) for line in told] == [
        f"{word} stage{n}" for n in (1, 2, 3) for word in ("begins", "ends")
    ]


def test_what_clean_removes_is_made_again(make: Callable[..., list[str]]) -> None:
    """The compiled kernels among it, without which everything works, slower."""
    assert make("test") == [f"{word} -m pytest -q -n 2" for word in ("begins", "ends")]
    assert make("clean") == []
    assert [line for line in make("test") if line.startswith("begins -m pip install") and " -e " in line]


def test_what_python_caches_of_the_build_script_asks_for_no_new_setup(
    make: Callable[..., list[str]], tmp_path: Path
) -> None:
    cached, kernel, later = tmp_path / "csrc/__pycache__", tmp_path / "csrc/a_kernel.cpp", time.time() + 60
    cached.mkdir()
    os.utime(cached, (later, later))
    assert make("setup") == []
    kernel.touch()
    os.utime(kernel, (later, later))
    assert len(make("setup")) == 4


def test_the_tested_set_covers_every_requirement() -> None:
    """Each package that setup.py asks for in what `make setup` installs stands in constraints.txt, pinned."""
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    pins = {pin.lower().replace("_", "-") for pin in pins}
    text = (ROOT / "setup.py").read_text("utf-8")
    lists = re.findall(r"^(?:CORE|TRAIN|TEST|DEV) = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    names = {name.lower() for block in lists for name in re.findall(r'"([a-zA-Z0-9_.-]+?)>=', block)}
    assert len(names) > 15
    assert names - pins == set()


def build_wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    """The wheel of a copy of the sources, and pip's words. No network is needed."""
    copy = folder / "copy"
    hidden = shutil.ignore_patterns("__pycache__", "lib")
    for name in ("longllava", "csrc", "configs", "data_recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=hidden)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy / name)
    command = ["-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(folder), str(copy)]
    done = python(*command, env={**os.environ, "LONGLLAVA_CUDA": "0", **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout + done.stderr


def test_the_wheel_of_a_machine_without_compiler(tmp_path: Path) -> None:
    wheel, words = build_wheel(tmp_path, CXX="no-such-compiler")
    assert re.search(r"the C\+\+ kernels were not built \(CXX=no-such-compiler.*plain torch", words)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 55e6
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in ("configs/models/nano.yaml", "assets/pictures/noto.png", "py.typed"):
        assert f"longllava/{needed}" in names
    assert any(name.startswith("longllava/data_recipes/") for name in names)
    assert any(name.endswith("/licenses/NOTICE") for name in names)
    assert not any(name.endswith(".so") or name.startswith(("tests/", "configs/")) for name in names)


@pytest.mark.long
def test_an_installed_wheel_works_outside_the_clone(tmp_path: Path) -> None:
    wheel, _ = build_wheel(tmp_path)
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", wheel.name), "a C++ compiler was expected here"
    home = tmp_path / "installed"
    command = ["-m", "pip", "install", "--no-deps", "--no-compile", "--target", str(home), str(wheel)]
    assert python(*command).returncode == 0
    code = (
        "import longllava; from longllava.ops import native; from longllava.shipped import shipped;"
        "print(longllava.__file__, native.why_not(), shipped('configs', 'models/nano'))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(home)},
    )  # fmt: skip
    expected = f"{home}/longllava/__init__.py None {home}/longllava/configs/models/nano.yaml\n"
    assert (done.stdout, done.stderr) == (expected, "")


@pytest.mark.parametrize(("given", "found"), [(None, "passive"), ("active", "active")])
def test_waiting_threads_sleep_unless_told_otherwise(given: str | None, found: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    code = "import longllava, os; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == found


def test_an_answer_on_a_cpu_imports_no_compiler() -> None:
    """torch._dynamo, sympy and triton took two seconds and 190 MB of every start, for one decorator."""
    code = (
        "from longllava import LongLLaVA; import sys;"
        "print(LongLLaVA.from_pretrained('nano', device='cpu').generate('What is this?', max_new_tokens=2));"
        "print('imported', {'torch._dynamo', 'sympy', 'triton', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported set()"
