"""Checkpoints of training: killed or failing at every operation of a save, the last good one is whole.

Operations are those that change a disk: making, writing, flushing, renaming, deleting. A child process of its own dies
before or in the middle of each; in this process each fails as a full or broken disk does.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from longllava.data.packing import Cursor
from longllava.errors import TrainingError
from longllava.train import checkpoints
from longllava.train.checkpoints import latest_state, save_state
from longllava.train.state import TrainingState

CODE = 77  # a child's that died where it should


def state_of(step: int) -> TrainingState:
    generator = torch.Generator().manual_seed(step)
    tensors = {"bridge.up.weight": torch.randn(7, 5, generator=generator)}
    slots = {f"{slot}/bridge.up.weight": torch.randn(7, 5, generator=generator) for slot in ("exp_avg", "exp_avg_sq")}
    slots["random"] = torch.get_rng_state()
    return TrainingState(step, step - 1, Cursor(step * 3, (step, step + 4), (step,)), tensors, slots, {"seed": 1})


def same(state: TrainingState | None, step: int) -> bool:
    if state is None:
        return False
    wanted = state_of(step)
    tables = ((state.tensors, wanted.tensors), (state.optimizer, wanted.optimizer))
    return (state.step, state.first_step, state.begin, state.facts) == (
        wanted.step, wanted.first_step, wanted.begin, wanted.facts
    ) and all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in tables)  # fmt: skip


class Operations:
    """Counts the operations of a save, and calls `at(name, path)` at the chosen one, before or after half of it."""

    def __init__(self, patch: pytest.MonkeyPatch, chosen: int, at: Callable[[], Any], half: bool = False):
        self.names: list[str] = []
        self.chosen, self.at, self.half = chosen, at, half
        for place, name in ((os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")):
            patch.setattr(place, name, self.counted(name, getattr(place, name)))
        patch.setattr(safetensors.torch, "save_file", self.written(safetensors.torch.save_file, 1))
        patch.setattr(Path, "write_text", self.written(Path.write_text, 0))

    def reached(self, name: str) -> bool:
        self.names.append(name)
        return len(self.names) - 1 == self.chosen

    def counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if self.reached(name) and not self.half:
                self.at()
            return real(*arguments, **options)

        return operation

    def written(self, real: Callable[..., Any], place: int) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            reached = self.reached("write")
            if reached and not self.half:
                self.at()
            result = real(*arguments, **options)
            if reached and self.half:
                path = Path(arguments[place])
                os.truncate(path, path.stat().st_size // 2)
                self.at()
            return result

        return operation


def names_of_a_save(folder: Path) -> list[str]:
    """All operations of the save of step 4, when steps 1 to 3 lie there (so that an old one is deleted)."""
    with pytest.MonkeyPatch.context() as patch:
        operations = Operations(patch, -1, lambda: None)
        save_state(folder, state_of(4))
    return operations.names


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """Checkpoints of steps 2 and 3."""
    for step in (1, 2, 3):
        save_state(tmp_path / "before", state_of(step))
    return tmp_path / "before"


@pytest.fixture
def names(before: Path, tmp_path: Path) -> list[str]:
    return names_of_a_save(Path(shutil.copytree(before, tmp_path / "counted")))


def in_a_child(work: Callable[[], Any]) -> int:
    """The exit code of a fork that runs `work`; 0 when it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def copies(before: Path, tmp_path: Path, n: int) -> Iterator[tuple[int, Path]]:
    for number in range(n):
        yield number, Path(shutil.copytree(before, tmp_path / f"at-{number}"))


def test_what_is_saved_is_what_is_loaded_and_two_are_kept(before: Path) -> None:
    assert same(latest_state(before), 3)
    assert sorted(path.name for path in before.iterdir()) == ["step-00000002", "step-00000003"]


def test_its_files_are_as_open_as_the_umask_leaves_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files = list(save_state(tmp_path, state_of(1)).iterdir())
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == dict.fromkeys(
        ("model.safetensors", "optimizer.safetensors", "state.json"), 0o640)  # fmt: skip


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("half", [False, True])
def test_killed_at_every_operation_the_last_good_one_is_whole(
    before: Path, names: list[str], tmp_path: Path, half: bool
) -> None:
    assert names.count("write") == 3 and names.count("fsync") >= 5 and names.count("replace") == 1
    renamed = names.index("replace")
    for number, folder in copies(before, tmp_path, len(names)):
        if half and names[number] != "write":
            continue

        def die_while_saving(folder: Path = folder, number: int = number) -> None:
            with pytest.MonkeyPatch.context() as patch:
                Operations(patch, number, lambda: os._exit(CODE), half)
                save_state(folder, state_of(4))

        assert in_a_child(die_while_saving) == CODE, (number, names[number])
        found = latest_state(folder, pytest.fail)
        assert same(found, 4 if number > renamed else 3), (number, names[number])
        save_state(folder, state_of(4))  # the run goes on, and what the kill left is gone
        save_state(folder, state_of(5))
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000005"]
        assert same(latest_state(folder), 5)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("killed", [True, False])
def test_the_same_step_saved_again_is_there_at_every_moment(before: Path, tmp_path: Path, killed: bool) -> None:
    shutil.rmtree(before / "step-00000002")  # nothing else to go on from
    counted = Path(shutil.copytree(before, tmp_path / "counted"))
    with pytest.MonkeyPatch.context() as patch:
        operations = Operations(patch, -1, lambda: None)
        save_state(counted, state_of(3))
    for number, folder in copies(before, tmp_path, len(operations.names)):

        def end() -> None:
            if killed:
                os._exit(CODE)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def save(folder: Path = folder, number: int = number, end: Callable[[], None] = end) -> None:
            with pytest.MonkeyPatch.context() as patch:
                Operations(patch, number, end)
                save_state(folder, state_of(3))

        if killed:
            assert in_a_child(save) == CODE, (number, operations.names[number])
        elif number:  # else the making of the outer folder, which is there
            with pytest.raises(TrainingError, match="step-00000003 is whole"):
                save()
        assert same(latest_state(folder, pytest.fail), 3), (number, operations.names[number])
        assert [path.name for path in folder.iterdir()] == ["step-00000003"], (number, operations.names[number])


@pytest.mark.parametrize("number_of_error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_at_any_operation_leaves_the_old_one_whole(
    before: Path, names: list[str], tmp_path: Path, number_of_error: int
) -> None:
    renamed = names.index("replace")
    for number, folder in copies(before, tmp_path, len(names)):
        if number == 0:  # the making of the outer folder, which is there
            continue

        def fail() -> None:
            raise OSError(number_of_error, os.strerror(number_of_error))

        with pytest.MonkeyPatch.context() as patch:
            Operations(patch, number, fail)
            with pytest.raises(TrainingError, match=os.strerror(number_of_error)) as caught:
                save_state(folder, state_of(4))
        assert not list(folder.glob(".step-*")), (number, names[number])
        newest = 4 if number > renamed else 3
        assert f"step-0000000{newest} is whole: make room and start again" in str(caught.value), (number, names[number])
        assert same(latest_state(folder, pytest.fail), newest), (number, names[number])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_quota_that_the_system_enforces(before: Path, capfd: pytest.CaptureFixture) -> None:
    """The writes of safetensors are not Python's: here the system itself refuses them."""

    def save_with_a_limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        try:
            save_state(before, state_of(4))
        except TrainingError as error:
            os.write(1, str(error).encode())
            os._exit(CODE)

    assert in_a_child(save_with_a_limit) == CODE
    assert "File too large" in capfd.readouterr().out
    assert same(latest_state(before, pytest.fail), 3)


def test_too_little_room_is_told_before_anything_is_written(before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    monkeypatch.setattr(checkpoints, "write_files", pytest.fail)
    with pytest.raises(TrainingError, match="it takes 1 MB, and 0 MB of the disk are free; step-00000003 is whole"):
        save_state(before, state_of(4))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "gone"])
def test_one_that_the_disk_has_spoiled_is_passed_over(before: Path, file: str, harm: str) -> None:
    path, said = before / "step-00000003" / file, []
    data = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(data[:-7])
    else:
        place = data.index(b'"facts"') if file == "state.json" else -3  # in the weights themselves
        data[place] ^= 1
        path.write_bytes(data)
    assert same(latest_state(before, said.append), 2)
    assert len(said) == 1 and "step-00000003" in said[0] and said[0].endswith("; passed over")


def test_when_none_can_be_read_it_says_so(before: Path) -> None:
    for path in before.glob("*/model.safetensors"):
        os.truncate(path, 100)
    with pytest.raises(TrainingError, match="no checkpoint is left: delete .* to begin again"):
        latest_state(before, lambda text: None)
    assert latest_state(before / "nowhere") is None
