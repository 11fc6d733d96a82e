"""`longllava generate | chat | train | data | eval`, and what works on folders: `convert`, `merge`, `plan` and so on.

Torch loads only when a command runs.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from longllava.cli import curriculum, data, evaluate, folders, plan, talk, work
from longllava.errors import LongLLaVAError
from longllava.version import __version__

app = typer.Typer(
    help="Multimodal language models that look at a thousand images at once on one device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

evaluations = typer.Typer(help="Measure a model.", no_args_is_help=True)
evaluations.command()(evaluate.vniah)
evaluations.command()(curriculum.curriculum)

sources = typer.Typer(help="Data to train on.", no_args_is_help=True)
sources.command()(data.check)
sources.command()(data.init)

app.command()(talk.generate)
app.command()(talk.chat)
app.command()(work.train)
app.add_typer(sources, name="data")
app.add_typer(evaluations, name="eval")
app.command()(folders.convert)
app.command()(folders.downcycle)
app.command()(folders.quantize)
app.command()(folders.merge)
app.command()(folders.export)
app.command()(plan.plan)
app.command()(work.world)
app.command()(work.doctor)


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"longllava {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Multimodal language models that look at a thousand images at once on one device."""


def run(command: Callable[[], Any], name: str = "longllava") -> None:
    """Call it. What the caller can mend is one sentence on stderr and exit code 1; Ctrl-C is 130."""
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # the caller has closed it
            setattr(sys, stream, open(os.devnull, mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may have no letter for an answer or a file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is not Unicode is told by who reads it
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        command()
    except LongLLaVAError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that may not be written
        files = " -> ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
        sys.exit(f"{name}: {files + ': ' if files else ''}{error.strerror or error}")


def one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings are for who runs the command: the place in the code would not help."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"longllava: warning: {message}\n"
    return usual(message, category, filename, lineno, line)


usual = warnings.formatwarning


def main() -> None:
    warnings.formatwarning = one_line
    run(app)
