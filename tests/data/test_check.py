"""A recipe's check: counts, reasons, lengths and colours; what is missing offline; and data of one's own."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from longllava.checkpoints.load import ASSETS
from longllava.config import ModelConfig
from longllava.data import own
from longllava.data.check import check_recipe
from longllava.data.check_report import coloured, draw_lengths, show_check, write_check
from longllava.data.own import OWNERS, QUESTION, THINGS_EACH, drawn, pool, write_own_data
from longllava.data.recipes import Recipe, RecipeConfig
from longllava.data.worlds.words import name_of, one
from longllava.errors import ConfigError, DataError
from longllava.inputs.processor import Processor
from longllava.inputs.tokenizer import Tokenizer
from longllava.settings import build, load, read_mapping
from longllava.shipped import shipped
from longllava.train.config import load_stage
from longllava.train.stage import main as train_stage

LONGLLAVA = ("longllava/stage1", "longllava/stage2", "longllava/stage3")


@pytest.fixture(scope="module")
def processor() -> Processor:
    config = load(ModelConfig, ASSETS / "nano/config.json")
    return Processor(config, Tokenizer.from_folder(ASSETS / "nano", config.prompt))


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGLLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LONGLLAVA_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def recipe(folder: Path, *, n: int = 300, broken: int = 0, bad: int = 0) -> Path:
    """n records with a picture, the first `bad` without an answer, the next `broken` with a torn picture."""
    Image.new("RGB", (8, 8), "red").save(folder / "good.png")
    (folder / "torn.png").write_bytes((folder / "good.png").read_bytes()[:40])
    records = []
    for i in range(n):
        answer = "" if i < bad else "a red panda"
        name = "torn" if bad <= i < bad + broken else "good"
        records.append({"id": f"r{i}", "image": f"{name}.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": answer}]})  # fmt: skip
    (folder / "data.json").write_text(json.dumps(records))
    path = folder / "r.yaml"
    path.write_text(
        "name: r\nabout: things\nsources:\n"
        "  - {name: files, kind: llava, path: data.json, licence: CC0, origin: here, weight: 3, max_bad: 0.05}\n"
        "  - {name: gone, kind: llava, path: gone.json, licence: CC-BY-4.0, origin: https://example.org, weight: 1}\n"
        "  - {name: world, kind: world, task: caption, licence: CC0, origin: here, weight: 1}\n"
    )
    return path


@pytest.mark.parametrize(("lengths", "shown"), [([63], ["63", "64"]), ([40, 120], ["40", "53", "70", "92", "121"]),
                                                ([5, 3000], ["10", "100", "1,000"])])  # fmt: skip
def test_lengths_are_written_as_numbers(lengths: list[int], shown: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn_figures.append(figure))
    draw_lengths(io.BytesIO(), "own", [SimpleNamespace(lengths=lengths, config=SimpleNamespace(name="own"))])
    (axes,) = drawn_figures[0].axes
    drawn_figures[0].canvas.draw()
    low, high = axes.get_xlim()
    ticks = [*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks()]
    assert [tick.label1.get_text() for tick in ticks
            if low <= tick.get_loc() <= high and tick.label1.get_text()] == shown  # fmt: skip


def test_counts_lengths_and_reasons(tmp_path: Path, processor: Processor) -> None:
    config, checks = check_recipe(recipe(tmp_path, broken=2, bad=3), processor, limit=400, row_length=40)
    files, gone, world = checks
    assert gone.missing == f"{tmp_path}/gone.json: no such file"
    assert (files.n_samples, world.n_samples) == (297, None) and [c.share for c in checks] == [0.6, 0.2, 0.2]
    assert dict(files.reasons()) == {"turns out of order or empty": 3, "broken image": 2}
    assert len(files.lengths) == 295 and len(world.lengths) == 400
    assert files.n_images == 295 and files.n_image_tokens == 295 * 36
    (item,) = files.shown
    assert set(files.lengths) == {len(item)} and files.too_long == 295
    assert files.n_learned == 295 * sum(item.trainable)
    assert files.as_dict()["tokens"] == {"median": len(item), "p99": len(item), "longest": len(item)}
    written = write_check(tmp_path / "out", config, checks)
    assert [path.name for path in written] == ["check.json", "lengths.png", "quarantine.txt"]
    with Image.open(written[1]) as histogram:
        assert histogram.size == (960, 540)
    lines = written[2].read_text().splitlines()
    out = io.StringIO()
    show_check(Console(file=out, width=300), config, checks, processor.tokenizer)
    told = f"295 samples looked at are longer than a row, which leaves them out, the longest of {len(item)} tokens"
    assert f"files: 295 of {told}: raise row_length, or lower tokens_per_image\n" in out.getvalue()
    assert len(lines) == 5 and lines[0].startswith(f"files\t{tmp_path}/data.json:") and "torn.png" in lines[-1]
    with pytest.raises(ConfigError, match="no source 'file'; have files, gone, world"):
        check_recipe(tmp_path / "r.yaml", processor, only="file")


def test_the_share_of_one_source_is_that_of_the_recipe(tmp_path: Path, processor: Processor) -> None:
    path = recipe(tmp_path)
    (checked,) = check_recipe(path, processor, limit=5, only="files")[1]
    assert checked.share == 0.6
    path.write_text(re.sub(r", weight: \d|  - {name: world.*\n", "", path.read_text()))  # shares follow the numbers
    config, checks = check_recipe(path, processor, limit=5, only="files")
    assert checks[0].share is None and checks[0].as_dict()["share"] is None  # nobody has counted the other one
    out = io.StringIO()
    show_check(Console(file=out, width=300), config, checks, processor.tokenizer)
    assert re.search(r"files +\d+ +1 ", out.getvalue())  # samples, no share, pictures


def test_what_is_learned_is_in_colour(tmp_path: Path, processor: Processor) -> None:
    config, checks = check_recipe(recipe(tmp_path), processor, limit=5, only="files")
    text = coloured(checks[0].shown[0], processor.tokenizer)
    assert "[36 tokens of a picture]" in text.plain and "What is this?" in text.plain
    styled = {text.plain[span.start : span.end].strip(): str(span.style) for span in text.spans}
    assert styled["a red panda"] == "bold green" and styled["[36 tokens of a picture]"] == "blue"
    assert all("green" not in style for part, style in styled.items() if "What" in part or "|" in part)
    out = io.StringIO()
    show_check(Console(file=out, force_terminal=True, width=120), config, checks, processor.tokenizer)
    assert "\x1b[1;32ma red panda\x1b[0m" in out.getvalue()
    (tmp_path / "quarantine.txt").write_text("of a check before this one, when records were broken")
    assert [path.name for path in write_check(tmp_path, config, checks)] == ["check.json", "lengths.png"]
    assert not (tmp_path / "quarantine.txt").exists()


@pytest.mark.parametrize("name", LONGLLAVA)
def test_the_published_mix_says_offline_what_is_missing(tmp_path: Path, processor: Processor, name: str) -> None:
    config, checks = check_recipe(shipped("data_recipes", name), processor)
    out = io.StringIO()
    show_check(Console(file=out, width=300), config, checks, processor.tokenizer)
    for row, one_check in zip(config.sources, checks, strict=True):
        assert one_check.missing is not None and one_check.missing.endswith("no such file")
        assert row.licence and row.origin.startswith("https://") and row.count and row.columns and row.format != "auto"
        assert f"{row.count:,} samples" in out.getvalue() and row.origin in out.getvalue()
    assert [path.name for path in write_check(tmp_path / "out", config, checks)] == ["check.json"]


def test_the_published_mix_has_the_published_counts() -> None:
    counts = {}
    for name in LONGLLAVA:
        path = shipped("data_recipes", name)
        config = build(RecipeConfig, read_mapping(path), str(path))
        counts[name] = {row.name: row.count for row in config.sources}
    assert [sum(one_stage.values()) for one_stage in counts.values()] == [600_000, 932_000, 750_000]
    assert counts["longllava/stage3"] == {
        "mantis": 200_000, "videochat2": 200_000, "sharegpt4video": 50_000, "replay-single": 200_000,
        "replay-text": 50_000, "sub-image": 50_000,
    }  # fmt: skip


def test_the_published_mix_reads_records_of_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred records of each source's form, where the recipe looks for them, with its counts made small."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = tmp_path / "data"
    monkeypatch.setenv("LONGLLAVA_DATA", str(data))
    answer = {"from": "gpt", "value": "a red panda"}
    for name in LONGLLAVA:
        path = shipped("data_recipes", name)
        mapping = read_mapping(path)
        for row in mapping["sources"]:
            row["count"] = 5
            columns, root = row["columns"], data / row.get("image_root", ".")
            root.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (700, 400), "red").save(root / "a.jpg")
            second = Image.new("RGB", (8, 8), "red")
            Image.new("RGB", (8, 8)).save(root / "v.gif", save_all=True, append_images=[second], duration=1000)
            records: list[dict] = []
            for number in range(10):
                record: dict = {"id": str(number)}
                if row["name"] == "videochat2":
                    record = {"video": "v.gif", "QA": [{"i": "Look.", "q": "What opens?", "a": "the door"}]}
                elif row["format"] == "parquet":
                    record |= {"images": [{"bytes": None, "path": "a.jpg"}],
                               "conversation": [{"role": "user", "content": "<image> What is this?"},
                                                {"role": "assistant", "content": "a red panda"}]}  # fmt: skip
                else:
                    mark = "<image>\n" if "image" in columns else "<video>\n" if "video" in columns else ""
                    record |= {"conversations": [{"from": "human", "value": f"{mark}What is this?"}, answer]}
                    record |= {"image": "a.jpg"} if "image" in columns else {}
                    record |= {"video": "v.gif"} if "video" in columns else {}
                records.append(record)
            for written in [row["path"]] if isinstance(row["path"], str) else row["path"]:
                target = data / written.replace("*", "x")
                target.parent.mkdir(parents=True, exist_ok=True)
                if row["format"] == "parquet":
                    fields = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
                    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
                    kinds = {"id": pa.string(), "images": pa.list_(fields), "conversation": pa.list_(turn)}
                    schema = pa.schema(list(kinds.items()))
                    pq.write_table(pa.Table.from_pylist(records, schema=schema), target)
                else:
                    target.write_text(json.dumps(records))
        small = tmp_path / "small.yaml"
        small.write_text(json.dumps(mapping))
        found = Recipe.load(small)
        for source in found.sources:
            sample = source.sample(4)
            assert source.n_samples == 5
            expected = {"replay-text": 0, "videochat2": 2, "sharegpt4video": 2, "sub-image": 1 + 6}
            assert len(sample.images) == expected.get(source.name, 1), source.name


# --- data of one's own


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
