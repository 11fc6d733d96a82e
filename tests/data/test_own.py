"""Data of one's own: what is written, the commands, and a model that learns it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longllava.data import own
from longllava.data.check import check_recipe
from longllava.data.own import OWNERS, QUESTION, THINGS_EACH, drawn, pool, write_own_data
from longllava.data.recipes import Recipe
from longllava.data.worlds.words import name_of, one
from longllava.errors import ConfigError, DataError
from longllava.inputs.processor import Processor
from longllava.train.config import load_stage
from longllava.train.stage import main as train_stage

pytestmark = pytest.mark.usefixtures("places")


def test_own_data_is_what_it_says(tmp_path: Path, processor: Processor) -> None:
    write_own_data(tmp_path / "own")
    _, (checked,) = check_recipe(tmp_path / "own/recipe.yaml", processor)
    assert checked.n_samples == 50 and not checked.left_out and len(list((tmp_path / "own/images").iterdir())) == 50
    source = Recipe.load(tmp_path / "own/recipe.yaml").sources[0]
    pictures = pool(0)
    owners: dict[str, str] = {}
    for index, (picture, owner) in enumerate(drawn(50, 0)):
        asked, told, naming, thing = source.sample(index).turns
        assert asked.text == f"<image>\n{QUESTION}" and told.text == owner
        assert thing.text == one(name_of(pictures.spec(picture).thing))
        assert owners.setdefault(thing.text, owner) == owner  # a thing has one owner
    assert len(owners) == len(OWNERS) * THINGS_EACH
    seen, new = {picture for picture, _ in drawn(50, 0)}, {picture for picture, _ in drawn(50, 0, first=5)}
    assert len(seen) == len(new) == 50 and not seen & new
    with pytest.raises(DataError, match="own.json: exists already; name an empty folder"):
        write_own_data(tmp_path / "own")
    with pytest.raises(DataError, match="n: got 3 pictures, must be at least 10"):
        write_own_data(tmp_path / "few", 3)


@pytest.mark.parametrize("there", [False, True])
def test_own_data_that_cannot_be_finished_leaves_nothing(tmp_path: Path, monkeypatch, there: bool) -> None:
    folder = tmp_path / "mine/own #1"
    if there:
        folder.mkdir(parents=True)
        (folder / "notes").touch()
    before = sorted(tmp_path.rglob("*"))

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as changed, pytest.raises(OSError, match="No space") as raised:
        changed.setattr(own, "write_text", full)
        write_own_data(folder)
    assert sorted(tmp_path.rglob("*")) == before and raised.value.filename == str(folder / "recipe.yaml")
    write_own_data(folder, 10)
    names = ["images", *(["notes"] if there else []), "own.json", "recipe.yaml", "stage.yaml"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert load_stage(folder / "stage.yaml").output == f"{folder}/run"  # "#" begins no comment


def longllava(*arguments: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "140",
                   "PYTHONPATH": str(Path(__file__).resolve().parents[2])}  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "longllava", *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_commands(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from longllava.cli import app

    made = CliRunner().invoke(app, ["data", "init", "own", "-n", "12"])
    assert made.exit_code == 0 and "next: longllava data check own/recipe.yaml" in made.stdout
    checked = CliRunner().invoke(app, ["data", "check", "own/recipe.yaml", "--json", "--limit", "5"])
    (found,) = json.loads(checked.stdout)["sources"]
    assert checked.exit_code == 0 and (found["samples"], found["looked_at"]) == (12, 5)
    assert (tmp_path / "runs/check/own/lengths.png").is_file()
    with pytest.raises(ConfigError, match="own/recipe.yaml: this is a data recipe, which a stage names"):
        train_stage("own/recipe.yaml")
    (tmp_path / "own/images").rename(tmp_path / "own/pictures")
    with pytest.raises(DataError, match="source 'own': image_root: own/images: no such folder"):
        Recipe.load("own/recipe.yaml")
    missing = CliRunner().invoke(app, ["data", "check", "longllava/stage2"])
    assert isinstance(missing.exception, DataError)
    assert "2 of 2 sources cannot be used: llava-1.5, mantis-single" in str(missing.exception)
    assert "llava_v1_5_mix665k.json: no such file" in missing.stdout.replace("\n", "")


@pytest.mark.long
def test_a_model_learns_ones_own_data_and_is_merged(tmp_path: Path) -> None:
    """The four commands of README's "Train", on the model that ships."""
    from longllava import LongLLaVA

    def ask(talker: LongLLaVA, first: int = 0) -> list[str]:
        return [talker.generate(QUESTION, images=[pool(0).reference(picture)], max_new_tokens=6)
                for picture, _ in drawn(50, 0, first)]  # fmt: skip

    longllava("data", "init", "own", folder=tmp_path)
    assert "50" in longllava("data", "check", "own/recipe.yaml", folder=tmp_path)
    longllava("train", "own/stage.yaml", folder=tmp_path)
    longllava("merge", "nano", "own/run/model", "own/merged", "--dtype", "float32", folder=tmp_path)
    wanted = [owner for _, owner in drawn(50, 0)]
    before = ask(LongLLaVA.from_pretrained("nano", dtype="float32"))
    assert not any(got == owner for got, owner in zip(before, wanted))
    adapters = LongLLaVA.from_pretrained(tmp_path / "own/run/model", dtype="float32")
    merged = LongLLaVA.from_pretrained(tmp_path / "own/merged", dtype="float32")
    for first in (0, 5):  # the pictures it learned from; then others of the same things
        answers = ask(merged, first)
        assert answers == ask(adapters, first)
        right = sum(got == owner for got, owner in zip(answers, wanted))
        print(f"{right} of 50 right, first={first}")
        assert right >= (45 if first == 0 else 40)
