"""What a run writes while it trains: a bar on the terminal, log.jsonl, TensorBoard events."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from longllava.files import write_text


class TrainingLog:
    """One record every `log_every` steps. Records after `step` (of a run that was cut off) are dropped."""

    def __init__(self, folder: Path, *, step: int, total_steps: int, label: str, active: bool = True):
        self.active = active
        if not active:
            return
        self.path = folder / "log.jsonl"
        drop_after(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")
        self.events = open_events(folder / "tensorboard", step)
        self.bar = open_bar(total_steps, step, label)
        self.started, self.first_step, self.total_steps = time.monotonic(), step, total_steps

    def step(self, step: int) -> None:
        """Move the bar on to `step` finished steps."""
        if self.active and self.bar is not None:
            self.bar.update(step - self.bar.n)

    def write(self, step: int, record: dict[str, Any]) -> None:
        """step: finished steps. Numbers of the record go to all three; the rest to log.jsonl only."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **record}) + "\n")
        self.file.flush()
        for name, value in record.items():
            if self.events is not None and isinstance(value, (int, float)):
                self.events.add_scalar(name, value, step)
        shown = {name: f"{value:.4g}" for name, value in record.items() if isinstance(value, float)}
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
        self.file.close()
        if self.events is not None:
            self.events.close()
        if self.bar is not None:
            self.bar.close()


def drop_after(path: Path, step: int) -> None:
    """Keep the records of log.jsonl up to `step`; a torn last line is dropped too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break
    write_text(path, "".join(kept))


def open_events(folder: Path, step: int) -> Any:
    """A TensorBoard writer, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def open_bar(total_steps: int, step: int, label: str) -> Any:
    """A bar on a terminal; None elsewhere, where `write` prints lines instead."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(total=total_steps, initial=step, desc=label, unit="step", dynamic_ncols=True)


class Meter:
    """Sums since the last record: means over labels, tokens a second (not counting encoding of pictures)."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.n_tokens = self.n_labels = 0
        self.seconds = 0.0
        self.resume()

    def resume(self) -> None:
        """The time since the last `add` went to something else."""
        self.last = time.monotonic()

    def add(self, measured: dict[str, Any], n_tokens: int, n_labels: int) -> None:
        for name, value in measured.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.n_tokens += n_tokens
        self.n_labels += n_labels
        self.seconds += time.monotonic() - self.last
        self.resume()

    def take(self, gather: Callable[[list[Any]], list[Any]] = list) -> dict[str, float]:
        """The record so far, of all processes; begins the next.

        gather: a list of this process's objects to that of all processes' (accelerate.utils.gather_object).
        """
        mine = ({name: float(value) for name, value in self.sums.items()}, self.n_labels, self.n_tokens)
        sums: dict[str, float] = {}
        n_labels = n_tokens = 0
        for own, labels, tokens in gather([mine]):
            sums |= {name: sums.get(name, 0.0) + value for name, value in own.items()}
            n_labels, n_tokens = n_labels + labels, n_tokens + tokens
        record = {name: value / max(1, n_labels) for name, value in sums.items()}
        record["tokens_per_second"] = n_tokens / max(1e-9, self.seconds)
        self.sums, self.n_tokens, self.n_labels, self.seconds = {}, 0, 0, 0.0
        return record
