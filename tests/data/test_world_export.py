"""What people look at: pictures and JSON that the loader reads back as the samples they came from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from longllava.data.images import open_reference
from longllava.data.sources import LlavaSource
from longllava.data.worlds.export import export_world
from longllava.data.worlds.pictures import PicturePool
from longllava.data.worlds.tasks import TASKS, WorldTask
from longllava.errors import ConfigError, DataError


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


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="n: got 0 samples"):
        export_world(tmp_path / "x", 0, 0)
    with pytest.raises(ConfigError, match="task: got 'cat'"):
        export_world(tmp_path / "x", 3, 0, "cat")
    assert not (tmp_path / "x").exists()
