"""What a run writes while it trains: a bar on the terminal, log.jsonl, and what its trackers keep."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from longllava.evals.memory import PeakMemory
from longllava.files import naming, write_text
from longllava.train.trackers import open_trackers


class TrainingLog:
    """One record every `log_every` steps, at a checkpoint, and at a phase's end. Records after `step` (of a run that
    was cut off) are dropped."""

    def __init__(
        self, folder: Path, *, step: int, total_steps: int, label: str, active: bool = True,
        report_to: Sequence[str] = ("tensorboard",), settings: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.active = active
        if not active:
            return
        self.trackers = open_trackers(report_to, folder, step, label, settings or {})
        self.path = folder / "log.jsonl"
        drop_after(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")
        self.bar = open_bar(total_steps, step, label)
        self.started, self.first_step, self.total_steps = time.monotonic(), step, total_steps

    def step(self, step: int) -> None:
        """Move the bar on to `step` finished steps."""
        if self.active and self.bar is not None:
            self.bar.update(step - self.bar.n)

    def write(self, step: int, record: dict[str, Any]) -> None:
        """step: finished steps. Numbers of the record go to the trackers too, the rest to log.jsonl only.

        What is not finite is null there.
        """
        if not self.active:
            return
        whole = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                 for name, value in record.items()}  # fmt: skip
        with naming(self.path):
            self.file.write(json.dumps({"step": step, **whole}) + "\n")  # NaN is no JSON
            self.file.flush()
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        for tracker in self.trackers:
            tracker.write(step, numbers)
        shown = {name: f"{value:.4g}" for name, value in numbers.items() if type(value) is float and "/" not in name}
        if self.bar is not None:
            self.bar.set_postfix(shown)
        else:
            each = (time.monotonic() - self.started) / max(1, step - self.first_step)
            left = each * (self.total_steps - step)
            text = " ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step}/{self.total_steps} {text} left {left / 60:.1f} min", flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.active:
            return
        with naming(self.path):  # on a full disk it fails again
            self.file.close()
        for tracker in self.trackers:
            tracker.close()
        if self.bar is not None:
            self.bar.close()


def drop_after(path: Path, step: int) -> None:
    """Keep the records of log.jsonl up to `step`; what follows a spoiled line is dropped too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, LookupError, TypeError):
            break
    write_text(path, "".join(kept))


def open_bar(total_steps: int, step: int, label: str) -> Any:
    """A bar on a terminal; None elsewhere, where `write` prints lines instead."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(total=total_steps, initial=step, desc=label, unit="step", dynamic_ncols=True)


class Meter:
    """Sums since the last record: means over labels, by source too; tokens a second (not counting encoding of
    pictures that are kept); memory at most; and the share of `peak` operations a second that all processes have.
    """

    def __init__(self, peak: float = 0.0) -> None:
        self.sums: dict[str, Any] = {}
        self.n_tokens = self.n_labels = self.n_operations = 0
        self.seconds, self.peak = 0.0, peak
        self.memory = PeakMemory()
        self.memory.start()
        self.resume()

    def resume(self) -> None:
        """The time since the last `add` went to something else."""
        self.last = time.monotonic()

    def add(self, measured: dict[str, Any], n_tokens: int, n_labels: int, n_operations: int = 0) -> None:
        """n_operations: floating point operations that the batch needed."""
        for name, value in measured.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.n_tokens += n_tokens
        self.n_labels += n_labels
        self.n_operations += n_operations
        self.seconds += time.monotonic() - self.last
        self.resume()

    def take(self, gather: Callable[[list[Any]], list[Any]] = list) -> dict[str, float]:
        """The record so far, of all processes; begins the next.

        gather: a list of this process's objects to that of all processes' (accelerate.utils.gather_object).
        """
        own = {name: float(value) for name, value in self.sums.items()}
        own |= {"n_labels": self.n_labels, "n_tokens": self.n_tokens, "n_operations": self.n_operations}
        sums: dict[str, float] = {}
        highest = 0
        for of_one, n_bytes in gather([(own, self.memory.bytes())]):
            sums |= {name: sums.get(name, 0.0) + value for name, value in of_one.items()}
            highest = max(highest, n_bytes)
        n_labels, n_tokens, n_operations = (sums.pop(name) for name in ("n_labels", "n_tokens", "n_operations"))
        by_source = {name.removeprefix("labels/"): sums.pop(name) for name in list(sums) if name.startswith("labels/")}
        record = {name: value / max(1, by_source.get(name.removeprefix("loss/"), n_labels) if "/" in name else n_labels)
                  for name, value in sums.items()}  # fmt: skip
        seconds = max(1e-9, self.seconds)
        record |= {"tokens_per_second": n_tokens / seconds, "memory_mb": round(highest / 1e6, 1)}
        if self.peak:
            record["mfu"] = n_operations / seconds / self.peak
        self.sums, self.n_tokens, self.n_labels, self.n_operations, self.seconds = {}, 0, 0, 0, 0.0
        self.memory.start()
        return record
