"""`longllava generate` and `longllava chat`."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longllava.cli.pictures import expand
from longllava.errors import InputError, LongLLaVAError

if TYPE_CHECKING:
    from rich.console import Console

    from longllava.api import LongLLaVA
    from longllava.generation.keywords import Reading, Settings

Model = Annotated[str, typer.Option("--model", "-m", help="A shipped name, a folder, or a hub name.")]
Images = Annotated[
    list[str],
    typer.Option("--image", "-i", help="A picture, folder or pattern. Repeatable.", show_default=False),
]
Video = Annotated[str | None, typer.Option("--video", "-v", help="A video file, a GIF or a folder of frames.")]
Fps = Annotated[float, typer.Option(help="Frames of a video taken per second.")]
MaxFrames = Annotated[int, typer.Option("--max-frames", help="At most so many frames of a video, evenly spread.")]
Tiles = Annotated[
    str | None,
    typer.Option(help="Huge pictures in parts too: fit, or rows x columns such as 2x3.", show_default="none"),
]
Hosts = Annotated[
    list[str],
    typer.Option("--allow-host", help="Host that media may be downloaded from. Repeatable.", show_default=False),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="a GPU if there is one")]
Int8 = Annotated[bool, typer.Option("--int8", help="Quantise the linear layers while they are read.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest of this total mass.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from so many of the likeliest; 0: from any.")]
Stop = Annotated[list[str], typer.Option(help="Text that ends an answer. Repeatable.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]


def load(model: str, device: str | None, int8: bool) -> LongLLaVA:
    from longllava.api import LongLLaVA

    return LongLLaVA.from_pretrained(model, device=device, int8=int8)


def generate(
    prompt: Annotated[str, typer.Argument(help="<image> marks where a picture stands; - reads stdin.")],
    image: Images = [],  # noqa: B006  typer copies it
    video: Video = None,
    fps: Fps = 1.0,
    max_frames: MaxFrames = 1024,
    tiles: Tiles = None,
    allow_host: Hosts = [],  # noqa: B006  typer copies it
    model: Model = "nano",
    device: Device = None,
    int8: Int8 = False,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    stop: Stop = [],  # noqa: B006  typer copies it
    stream: Annotated[bool, typer.Option(help="Print the answer while it is made.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Answer one prompt about pictures, a video, or nothing but text."""
    text = sys.stdin.read().rstrip("\r\n") if prompt == "-" else prompt  # a last line has an end, a question none
    pictures = expand(image)
    started = time.perf_counter()
    settings: Settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop,
    }
    media: dict[str, Any] = {"images": pictures or None, "video": video and os.path.expanduser(video)}
    reading: Reading = {"fps": fps, "max_frames": max_frames, "tiles": tiles, "allow_hosts": allow_host}
    talker = load(model, device, int8)
    if as_json or not stream:
        answer = talker.generate(text, **media, **settings, **reading)
        seconds = round(time.perf_counter() - started, 3)
        row = {"answer": answer, "prompt": text, "model": model, **media, **settings, **reading, "seconds": seconds}
        unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        print(json.dumps(row, ensure_ascii=not unicode) if as_json else answer)
        return
    for piece in talker.generate(text, **media, **settings, **reading, stream=True):
        print(piece, end="", flush=True)
    print()


def chat(
    image: Images = [],  # noqa: B006  typer copies it
    video: Video = None,
    fps: Fps = 1.0,
    max_frames: MaxFrames = 1024,
    tiles: Tiles = None,
    allow_host: Hosts = [],  # noqa: B006  typer copies it
    model: Model = "nano",
    device: Device = None,
    int8: Int8 = False,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    stop: Stop = [],  # noqa: B006  typer copies it
) -> None:
    """Talk about pictures. Lines that begin with / are commands: /help lists them."""
    from rich.console import Console

    settings: Settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop,
    }
    reading: Reading = {"fps": fps, "max_frames": max_frames, "tiles": tiles, "allow_hosts": allow_host}
    console = Console()
    talk = Chat(load(model, device, int8), settings, reading, console)
    talk.show(expand(image), video)
    console.print(f"[bold]{model}[/bold]: /help lists the commands, /exit or Ctrl-D ends.", highlight=False)
    while True:
        try:
            line = console.input("[bold green]you[/bold green]> ").strip()
        except EOFError:
            console.print()
            return
        if line in ("/exit", "/quit"):
            return
        try:
            talk.turn(line)
        except LongLLaVAError as error:  # a mistyped path must not end the conversation
            console.print(str(error), style="red", markup=False, highlight=False)
        except KeyboardInterrupt:  # stops the answer, not the conversation
            console.print(" (stopped)")


HELP = """/image PATH   show pictures (a file, folder or pattern) with the next question
/video PATH   show a video with the next question
/history      print the conversation so far
/clear        forget the conversation
/exit         end"""


class Chat:
    """A conversation on one session: each turn reads only what is new. Pictures wait for a question."""

    def __init__(self, model: LongLLaVA, settings: Settings, reading: Reading, console: Console) -> None:
        self.model, self.settings, self.reading, self.console = model, settings, reading, console
        self.clear()

    def clear(self) -> None:
        self.session = self.model.session(**self.reading)
        self.turns: list[tuple[str, str]] = []
        self.pictures: list[str] = []
        self.video: str | None = None

    def show(self, pictures: list[str], video: str | None = None) -> None:
        if video == "":
            raise InputError("video: the name is empty; give a file or a folder of frames")
        self.pictures += pictures
        self.video = self.video if video is None else os.path.expanduser(video)

    def turn(self, line: str) -> None:
        """One line of the user's: a question or a command."""
        command, _, rest = line.partition(" ")
        if not line:
            return
        if not line.startswith("/"):
            self.ask(line)
        elif command == "/help":
            self.console.print(HELP, highlight=False)
        elif command == "/image":
            self.show(expand([rest.strip()]))
            self.console.print(f"pictures for the next question: {len(self.pictures)}", highlight=False)
        elif command == "/video":
            self.show([], rest.strip())
        elif command == "/history":
            for question, answer in self.turns:
                self.console.print(f"you: {question}\nanswer: {answer}", markup=False, highlight=False)
        elif command == "/clear":
            self.clear()
        else:
            raise InputError(f"no command {command}; /help lists them")

    def ask(self, question: str) -> None:
        """A streamed answer. The turn is kept when the answer is whole. What was shown is dropped on error: one broken
        picture would spoil every later question. Of an answer that is stopped it waits for the next question."""
        shown = self.pictures, self.video
        media: dict[str, Any] = {"images": self.pictures or None, "video": self.video}
        self.pictures, self.video = [], None
        answer = ""
        try:
            for piece in self.session.ask(question, **media, **self.settings, stream=True, keep=True):
                answer += piece
                self.console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            self.pictures, self.video = shown
            raise
        self.console.print()
        n_shown = len(media["images"] or ()) + (media["video"] is not None)
        self.turns.append((f"({n_shown} shown) {question}" if n_shown else question, answer))
