"""A recipe's check: counts, reasons, lengths and colours; what is missing offline."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from longllava.cli.data import check as command
from longllava.data.check import check_recipe
from longllava.data.check_report import coloured, draw_lengths, show_check, write_check
from longllava.data.recipes import Recipe, RecipeConfig
from longllava.errors import ConfigError, InputError
from longllava.inputs.processor import Processor
from longllava.settings import build, read_mapping
from longllava.shipped import shipped

pytestmark = pytest.mark.usefixtures("places")
LONGLLAVA = ("longllava/stage1", "longllava/stage2", "longllava/stage3")


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


def test_each_source_stands_in_the_legend_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where matplotlib would hide it (_) or read a formula ($)."""
    drawn_figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn_figures.append(figure))
    names = ["own", "_others", r"a$\frac$"]
    sources = [SimpleNamespace(lengths=[60 + i], config=SimpleNamespace(name=name)) for i, name in enumerate(names)]
    draw_lengths(io.BytesIO(), r"b$\frac$", sources)
    drawn_figures[0].canvas.draw()
    shown = {text.get_text(): handle.get_facecolor() for text, handle in zip(
        drawn_figures[0].axes[0].get_legend().get_texts(), drawn_figures[0].axes[0].get_legend().legend_handles)}
    bars = [container[0].get_facecolor() for container in drawn_figures[0].axes[0].containers]
    assert shown == dict(zip(names, bars))


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


def test_a_report_that_cannot_be_written_is_said_before_the_counting(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("longllava.data.check.check_recipe", lambda *_, **__: pytest.fail("records were read"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: it is a file; name a folder to write into"):
        command("nano/stage3", output=str(tmp_path / "file"))


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
