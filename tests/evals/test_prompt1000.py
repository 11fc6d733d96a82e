"""The 1,000-picture prompt: a small one runs from files to the report, and the report's sums are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.evals.scripts import BENCHMARKS, load_script

SCRIPT = BENCHMARKS / "prompt1000.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("prompt1000")


def run_of(seconds: float, peak: int) -> dict:
    return {"seconds": seconds, "peak_bytes": peak, "answer": "7", "dtype": "float32", "cpu_seconds": 1.0,
            "tokens_per_image_with_tags": 38, "key_value_bytes_per_image": 1000}  # fmt: skip


def test_the_median_and_the_highest_peak_count(benchmark) -> None:
    row = benchmark.summary(10, [run_of(9.0, 5), run_of(3.004, 8), run_of(4.0, 6)])
    assert (row["seconds_to_first_answer"], row["peak_bytes"]) == (4.0, 8)
    assert row["all_seconds"] == [9.0, 3.0, 4.0]


def test_growth_is_per_further_picture(benchmark) -> None:
    small, large = benchmark.summary(10, [run_of(1, 50_000)]), benchmark.summary(30, [run_of(2, 74_000)])
    assert benchmark.growth([small, large]) == {"bytes_per_further_image": 1200, "times_its_keys_and_values": 1.2}


def test_pictures_lie_on_disk_with_one_needle_amid_the_smaller_prompt(benchmark, tmp_path: Path) -> None:
    from longllava.data.images import open_reference
    from longllava.evals.vniah_task import Settings, draw_needles

    question, answer = benchmark.write_pictures(tmp_path, [6, 12], seed=3)
    needle = draw_needles(Settings(n_needles=1, seed=3))[0]
    assert (question, answer) == (needle.question, needle.answer)
    assert {path.name for path in tmp_path.iterdir()} == {f"{i}.png" for i in range(12)}
    assert open_reference(str(tmp_path / "3.png")).tobytes() == open_reference(needle.picture).tobytes()


def test_from_files_to_the_report(tmp_path: Path) -> None:
    from longllava.api import LongLLaVA
    from longllava.model import Model
    from tests.tiny import tiny_config, tiny_tokenizer

    model = Model(tiny_config())
    model.initialise_()
    LongLLaVA(model, tiny_tokenizer()).save_pretrained(tmp_path / "tiny")
    line = [sys.executable, SCRIPT, "--model", tmp_path / "tiny", "--images", "3", "--save", tmp_path / "result.json"]
    line += ["--dtype", "float32"]  # else what the hardware multiplies fast
    done = subprocess.run(line, capture_output=True, text=True)
    slower = "longllava runs its slower plain-torch code"  # said once where there is no compiler
    assert done.returncode == 0 and all(told.startswith(slower) for told in done.stderr.splitlines()), done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["images"] for row in result["prompts"]] == [3, 6]
    for row in result["prompts"]:
        assert row["tokens_per_image_with_tags"] == 6  # 4 and two tags
        assert row["key_value_bytes_per_image"] == 6 * 2 * 2 * 2 * 8 * 4  # keys and values, 2 layers, 2 heads of 8
        assert 50e6 < row["peak_bytes"] < 3e9
        assert row["seconds_to_first_answer"] > 0.5  # torch alone takes longer to import
    assert "3 pictures, 6 tokens each with their tags, float32: first answer after" in done.stdout


@pytest.mark.parametrize("options", [["--images", "0"], ["--images", "5", "--more", "5"], ["--repeat", "0"]])
def test_bad_options_are_one_sentence(options: list[str]) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("prompt1000: --images and --repeat must be at least 1")
    assert len(done.stderr.splitlines()) == 1
