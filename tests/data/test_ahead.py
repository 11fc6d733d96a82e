"""Pictures looked at ahead of their turn: the same plan, the same complaints, in threads."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from longllava.data import ahead, media, sources
from longllava.data.ahead import Looks
from longllava.data.packing import Cursor, Plan, plan_window
from longllava.data.recipes import Recipe
from longllava.errors import DataError, InputError
from tests.data.records import asked, write
from tests.data.test_media import picture
from tests.tiny import tiny_model

RECIPE = "name: r\nsources:\n  - {name: s, kind: llava, licence: CC0, origin: x, path: data.json, max_bad: 0.5}\n"


@pytest.fixture(autouse=True)
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """As on a machine of four cores."""
    fresh = Looks()
    monkeypatch.setattr(ahead, "n_threads", lambda: 4)
    for module in (media, sources):
        monkeypatch.setattr(module, "LOOKS", fresh)
    return fresh


def spoiled(folder: Path) -> Path:
    """120 records of three pictures; every seventh has a torn one first, second or last."""
    torn = picture(folder / "good.jpg", 64, 64).read_bytes()[:900]
    (folder / "torn.jpg").write_bytes(torn)
    records = []
    for i in range(120):
        names = [f"{i}-{j}.jpg" for j in range(3)]
        for j, name in enumerate(names):
            source = "torn.jpg" if i % 7 == 0 and j == i // 7 % 3 else "good.jpg"
            (folder / name).write_bytes((folder / source).read_bytes())
        records.append({"id": str(i), **asked("<image>\n<image>\n<image>\nWhat?", image=names)})
    write(folder, records)
    (folder / "r.yaml").write_text(RECIPE)
    return folder / "r.yaml"


def planned(recipe: Recipe, told: bool) -> list[Plan]:
    plans, cursor = [], Cursor()
    for _ in range(3):
        plans.append(
            plan_window(lambda n: recipe.sample(0, n), tiny_model().processor, cursor, seed=0, n_steps=2, n_rows=4,
                        row_length=300, expect=(lambda n: recipe.expect(0, n)) if told else None)
        )  # fmt: skip
        cursor = plans[-1].end
    return plans


def test_the_plan_is_the_same_and_threads_do_the_work(tmp_path, looks, monkeypatch):
    at = spoiled(tmp_path)
    seen: list[tuple[str, str]] = []
    check = ahead.check_picture
    monkeypatch.setattr(
        ahead, "check_picture", lambda name: (seen.append((threading.current_thread().name, name)), check(name))
    )
    alone = Recipe.load(at)
    expected = planned(alone, told=False)
    assert {thread for thread, _ in seen} == {"MainThread"} and any(plan.misfits for plan in expected)
    seen.clear()
    recipe = Recipe.load(at)
    assert planned(recipe, told=True) == expected
    assert recipe.rejected() == alone.rejected() and len(recipe.rejected()) > 3
    by_threads = [name for thread, name in seen if thread.startswith("longllava-look")]
    assert len(by_threads) > 0.9 * len(seen) > 100
    waiting = recipe.sources[0].expected
    assert len(waiting) <= ahead.SAMPLES
    assert set(looks.pending) <= {image for sample in waiting.values() for image in sample.images}


def test_one_thread_looks_at_nothing_ahead(tmp_path, looks, monkeypatch):
    monkeypatch.setattr(ahead, "n_threads", lambda: 1)
    looks.expect([str(picture(tmp_path / "a.jpg"))])
    assert not looks.pending and looks.pool is None


def test_what_is_found_is_told_in_its_turn(tmp_path, looks):
    good = str(picture(tmp_path / "good.jpg"))
    torn = tmp_path / "torn.jpg"
    torn.write_bytes(Path(good).read_bytes()[:200])
    looks.expect([good, str(torn), good])
    assert set(looks.pending) == {good, str(torn)}
    looks.look(good)
    with pytest.raises(InputError, match="torn.jpg"):
        looks.look(str(torn))
    assert not looks.pending
    torn.unlink()
    with pytest.raises(InputError, match="no such file"):  # not expected: looked at now
        looks.look(str(torn))


def test_a_record_that_cannot_be_read_is_told_in_its_turn(tmp_path):
    recipe = Recipe.load(spoiled(tmp_path))
    (tmp_path / "data.json").write_text("[]")
    recipe.expect(0, 0)
    with pytest.raises(DataError, match="it was usable when training began"):
        recipe.sample(0, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(tmp_path):
    path = str(picture(tmp_path / "a.png"))

    def look() -> None:
        ahead.LOOKS.expect([path])
        ahead.LOOKS.look(path)

    look()
    child = multiprocessing.get_context("fork").Process(target=look)
    child.start()
    child.join(30)
    child.kill()
    assert child.exitcode == 0


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(24))
    assert ahead.n_threads() == ahead.MOST_THREADS == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ahead.n_threads() == 3
