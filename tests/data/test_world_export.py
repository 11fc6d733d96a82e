"""What people look at: pictures and JSON that the loader reads back as the samples they came from."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from longllava.data.images import open_reference
from longllava.data.worlds import export
from longllava.data.worlds.export import export_world
from longllava.data.worlds.pictures import PicturePool
from longllava.data.worlds.tasks import TASKS, WorldTask
from longllava.errors import ConfigError, DataError
from tests.data.llava_source import LlavaSource


@pytest.mark.parametrize("task", TASKS)
def test_the_loader_reads_back_equal_samples(tmp_path: Path, task: str) -> None:
    written = export_world(tmp_path, 3, 4, task)
    assert all(path.is_file() for path in written)
    source = LlavaSource("world", tmp_path / "world.json")
    original = WorldTask(task, seed=4, pool=PicturePool("train", 4))
    assert source.n_samples == 3
    for index in range(3):
        sample, expected = source.sample(index), original.sample(index)
        assert replace(sample, images=()) == replace(expected, images=())
        assert len(sample.images) == len(expected.images)
        for path, reference in list(zip(sample.images, expected.images))[:4]:
            assert open_reference(path).tobytes() == open_reference(reference).tobytes()


def test_n_pictures_and_a_sheet(tmp_path: Path) -> None:
    export_world(tmp_path, 8, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["contact-sheet.png", "images", "world.json"]
    assert len(list((tmp_path / "images").iterdir())) == 8
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.size == (6 * 200 + 8, 2 * 244 + 8)


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        export_world(tmp_path / folder, 5, 1, "subimage")
    first, second = (
        {
            path.relative_to(tmp_path / folder): path.read_bytes()
            for path in sorted((tmp_path / folder).rglob("*.*"))
        }
        for folder in ("a", "b")
    )
    assert first == second and len(first) > 20


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_world_that_cannot_be_finished_leaves_nothing(tmp_path: Path, monkeypatch, fault: BaseException) -> None:
    export_world(tmp_path / "there", 2, 0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def failing(references):
        raise fault

    monkeypatch.setattr(export, "contact_sheet", failing)
    for folder in ("there", "new/world"):
        with pytest.raises(type(fault)):
            export_world(tmp_path / folder, 3, 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_world_is_written_over_another(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    export_world(tmp_path, 3, 0)
    export_world(tmp_path, 2, 1)
    export_world(tmp_path / "new", 2, 1)
    for name in ("world.json", "contact-sheet.png", "images/00000.png", "images/00001.png"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    assert (tmp_path / "images/00002.png").is_file() and (tmp_path / "notes").is_file()


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="n: got 0 samples"):
        export_world(tmp_path / "x", 0, 0)
    with pytest.raises(ConfigError, match="task: got 'cat'"):
        export_world(tmp_path / "x", 3, 0, "cat")
    assert not (tmp_path / "x").exists()
