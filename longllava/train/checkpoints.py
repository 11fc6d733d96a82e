"""Checkpoints of training on disk. The last good one can always be loaded.

A checkpoint is a folder step-00001200 with model.safetensors (the parts that train), optimizer.safetensors and
state.json, which has sizes and checksums of both. It is written under a temporary name, flushed, read back, and
renamed: there are whole ones only, whenever the process is killed. One that a disk has spoiled is passed over.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from longllava.data.packing import Cursor
from longllava.errors import TrainingError
from longllava.files import sync
from longllava.train.state import TrainingState

NAME = re.compile(r"step-(\d{8})")
RECORD = "state.json"
KEPT = 2
SPARE_BYTES = 1 << 20  # of a disk, beside the tensors: names, state.json, folders
PIECE = 1 << 24  # bytes read at a time


def save_state(folder: Path, state: TrainingState) -> Path:
    """Write a checkpoint below `folder`; keep the last two. Raises: TrainingError; what was there is then whole."""
    from safetensors import SafetensorError

    target = folder / f"step-{state.step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    aside = folder / f".{target.name}.old"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, state)
        write_files(temporary, state)
        if target.exists():  # the same step again, after one before it
            os.replace(target, aside)
        os.replace(temporary, target)
        sync(folder)
        if aside.exists():
            shutil.rmtree(aside)
        for old in checkpoint_folders(folder)[:-KEPT]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        undo_unfinished(folder)
        raise TrainingError(
            f"{target}: the checkpoint cannot be written: {' '.join(str(error).split())}; {what_is_left(folder)}"
        ) from None
    return target


def write_files(folder: Path, state: TrainingState) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    files = {}
    for name, tensors in (("model.safetensors", state.tensors), ("optimizer.safetensors", state.optimizer)):
        plain = {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}
        (folder / name).touch()
        mode = (folder / name).stat().st_mode  # what the umask leaves; safetensors closes its files to others
        save_file(untied(plain), folder / name)
        os.chmod(folder / name, mode)
        flush(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "crc32": checksum(folder / name)}
    record = {"step": state.step, "first_step": state.first_step, "next": state.begin.next,
              "held": state.begin.held, "starts": state.begin.starts, "facts": state.facts, "files": files}  # fmt: skip
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    flush(folder / RECORD)
    sync(folder)


def check_space(folder: Path, state: TrainingState) -> None:
    wanted = sum(tensor.nbytes for tensors in (state.tensors, state.optimizer) for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < wanted + SPARE_BYTES:
        raise OSError(f"it takes {(wanted + SPARE_BYTES) / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB of the disk are free")


def what_is_left(folder: Path) -> str:
    left = checkpoint_folders(folder)
    if not left:
        return "there is none before it; make room and start again"
    return f"{left[-1].name} is whole: make room and start again, and the run goes on from it"


def untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses two names of one storage (tied embeddings): the second gets a copy."""
    seen: set[int] = set()
    result = {}
    for key, value in tensors.items():
        result[key] = value.clone() if value.data_ptr() in seen and value.numel() else value
        seen.add(value.data_ptr())
    return result


def flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def checksum(path: Path) -> str:
    total = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            total = zlib.crc32(piece, total)
    return f"{total:08x}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def undo_unfinished(folder: Path) -> None:
    """What a killed run was writing goes; what it had put aside for that comes back, where the new one is not there."""
    for path in folder.glob(".step-*.old"):
        if (target := folder / path.stem.removeprefix(".")).exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.replace(path, target)
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def latest_state(folder: Path, say: Callable[[str], Any] = print) -> TrainingState | None:
    """The newest checkpoint below `folder` that is whole, or None where there is none at all.

    One that is not is passed over, and said. Raises: TrainingError when none of several can be read.
    """
    undo_unfinished(folder)
    problems = []
    for path in reversed(checkpoint_folders(folder)):
        try:
            return read_state(path)
        except TrainingError as error:
            problems.append(str(error))
            say(f"{error}; passed over")
    if problems:
        raise TrainingError(f"{'; '.join(problems)}; no checkpoint is left: delete {folder} to begin again")
    return None


def read_state(path: Path) -> TrainingState:
    """Raises: TrainingError naming the file that is not what was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = json.loads((path / RECORD).read_text("utf-8"))
        for name, expected in record.get("files", {}).items():  # older ones have none
            got = {"bytes": (path / name).stat().st_size, "crc32": checksum(path / name)}
            if got != expected:
                raise TrainingError(f"{path / name}: not the file that was written: {got} instead of {expected}")
        return TrainingState(
            record["step"], record["first_step"],
            Cursor(record["next"], tuple(record["held"]), tuple(record.get("starts", ()))),  # older ones have none
            load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors"), record["facts"],
        )  # fmt: skip
    except TrainingError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise TrainingError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
