"""A recipe's check for people: tables, samples with what is learned in colour, a picture of the lengths, a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from longllava.data.check import SourceCheck
from longllava.data.packing import MEND, Item
from longllava.data.recipes import RecipeConfig
from longllava.files import write_atomic, write_json, write_text
from longllava.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

LEARNED, READ, PICTURE, SPECIAL = "bold green", "dim", "blue", "yellow"
SHOWN_TOKENS = 400  # of a sample
REASONS = 5  # of a source, in the table
BINS = 60


def show_check(console: Console, config: RecipeConfig, checks: Sequence[SourceCheck], tokenizer: Tokenizer) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    # without lines between columns it fits 80 of them
    table = Table(Column("source", overflow="fold"), "samples", "share", "images", "tokens: median", "99 %", "longest",
                  "learned", "left out", title=f"{config.name}: {config.about}", title_justify="left",
                  box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))  # fmt: skip
    for one in checks:
        if one.missing is not None:
            table.add_row(one.config.name, "[red]unusable[/red]", *[""] * 7)
            continue
        found = one.as_dict()
        tokens = found["tokens"]
        table.add_row(
            one.config.name, "without end" if one.n_samples is None else f"{one.n_samples:,}",
            "" if one.share is None else f"{one.share:.1%}",
            f"{found['images_a_sample']:g}", *(f"{value:,}" if value is not None else "" for value in tokens.values()),
            f"{one.n_learned / max(1, sum(one.lengths)):.1%}", f"{len(one.left_out)}{too_long(one)}",
        )  # fmt: skip
    console.print(table)
    for one in checks:
        if one.missing is not None:
            console.print(f"[red]{one.config.name}[/red]: ", end="")
            console.print(f"{one.missing}\n  {wanted(one)}", markup=False, highlight=False)
        if one.too_long:
            console.print(f"{one.config.name}: {one.too_long} of {len(one.lengths)} samples looked at are longer than a"
                          f" row, which leaves them out, the longest of {max(one.lengths):,} tokens: {MEND}",
                          markup=False, highlight=False)  # fmt: skip
        for kind, n in one.reasons()[:REASONS]:
            first = next(item for item in one.left_out if item.kind == kind)
            console.print(f"{one.config.name}: {n} x {kind}; the first: {first}", markup=False, highlight=False)
    for one in checks:
        for item in one.shown:
            console.print(f"\n[bold]{one.config.name}[/bold], sample {item.id}, {len(item)} tokens:", highlight=False)
            console.print(coloured(item, tokenizer))
    if any(one.shown for one in checks):
        console.print(f"\n[{LEARNED}]learned[/], [{READ}]read[/], [{PICTURE}]pictures[/], [{SPECIAL}]special[/]")


def too_long(one: SourceCheck) -> str:
    return f", {one.too_long} too long" if one.too_long else ""


def wanted(one: SourceCheck) -> str:
    n = f"{one.config.count:,} samples of it" if one.config.count else "it"
    return f"the recipe wants {n} ({one.config.licence}); from {one.config.origin}"


def coloured(item: Item, tokenizer: Tokenizer) -> Text:
    """A sample's tokens as text, in runs of one kind; a picture's are one word."""
    from rich.text import Text

    names = {number: name for name, number in tokenizer.special_ids.items()}
    pictures = {span.start: span.length for span in item.spans}
    text, at = Text(), 0
    while at < min(len(item), SHOWN_TOKENS):
        if at in pictures:
            text.append(f"[{pictures[at]} tokens of a picture]", PICTURE)
            at += pictures[at]
            continue
        if item.ids[at] in names:
            text.append(names[item.ids[at]], f"{SPECIAL} underline" if item.trainable[at] else SPECIAL)
            at += 1
            continue
        end = at
        while end < len(item) and end not in pictures and item.ids[end] not in names and (
            item.trainable[end] == item.trainable[at]
        ):  # fmt: skip
            end += 1
        text.append(tokenizer.decode(item.ids[at:end]), LEARNED if item.trainable[at] else READ)
        at = end
    if at < len(item):
        text.append(f" ... {len(item) - at} more tokens", READ)
    return text


def write_check(folder: Path, config: RecipeConfig, checks: Sequence[SourceCheck]) -> list[Path]:
    """check.json; lengths.png, where samples were counted; quarantine.txt, where some were left out.

    What an earlier check wrote there goes: its list would be taken for this one's.
    """
    for name in ("lengths.png", "quarantine.txt"):
        (folder / name).unlink(missing_ok=True)
    written = [write_json(folder / "check.json", {"recipe": config.name, "sources": [one.as_dict() for one in checks]})]
    if any(one.lengths for one in checks):
        written.append(write_atomic(folder / "lengths.png", lambda file: draw_lengths(file, config.name, checks)))
    lines = [f"{one.config.name}\t{item}\n" for one in checks for item in one.left_out]
    if lines:
        written.append(write_text(folder / "quarantine.txt", "".join(lines)))
    return written


def draw_lengths(file: BinaryIO, title: str, checks: Sequence[SourceCheck]) -> None:
    """A histogram of tokens a sample, sources stacked, on a logarithmic axis."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    counted = [one for one in checks if one.lengths]
    longest = max(max(one.lengths) for one in counted)
    shortest = min(min(one.lengths) for one in counted)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    edges = np.geomspace(max(1, shortest), longest + 1, BINS + 1).tolist()
    axes.hist([one.lengths for one in counted], bins=edges, stacked=True, label=[str(i) for i in range(len(counted))])
    axes.set(xscale="log", xlabel="tokens a sample", ylabel="samples looked at")
    axes.set_title(title, parse_math=False)  # a name may hold $
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))  # not 6.32 x 10^1
    if longest < 10 * shortest:  # else tens and hundreds suffice
        axes.set_xticks(np.unique(np.geomspace(max(1, shortest), longest + 1, 5).round()))
        axes.minorticks_off()
    for text in axes.legend(fontsize="small").get_texts():  # a label that begins with _ would have no entry
        text.set(text=counted[int(text.get_text())].config.name, parse_math=False)
    figure.savefig(file, format="png", dpi=120)
