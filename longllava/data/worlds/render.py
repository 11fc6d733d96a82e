"""Pictures of the world: a thing or several copies of it, a digit badge and a coloured frame, on a background.

A picture is a pure function of its `PictureSpec`: what is on it is spelled out, how it is drawn (size, place
inside its slot, turn, tint, background) follows from `seed`. Integer resampling of Pillow, so the bytes are
the same on every machine with the same Pillow.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from longllava.data.worlds.sheets import sprites
from longllava.errors import DataError

SIDE = 96
FRAME = 6
COLOURS = {
    "red": (214, 40, 40), "orange": (245, 140, 20), "yellow": (250, 220, 50), "green": (40, 160, 70),
    "blue": (40, 80, 210), "purple": (140, 60, 180), "black": (20, 20, 20), "white": (250, 250, 250),
}  # fmt: skip
COLOUR_NAMES = tuple(COLOURS)
PLACES = ("top left", "top right", "bottom left", "bottom right", "middle")
MAX_COUNT = 3


@dataclass(frozen=True)
class PictureSpec:
    """What is on a picture.

    thing: index into sheets.things(). style: drawing style. digit 0-9 and colour (index into COLOUR_NAMES),
    or None for no badge or frame. count 1-3 copies. place: index into PLACES, of the one copy; with several,
    they take the corners that the badge leaves. seed: everything else. restyle: drawing-style augmentation.
    """

    thing: int
    style: str
    digit: int | None
    colour: int | None
    count: int = 1
    place: int = 4
    seed: int = 0
    restyle: bool = False


def render(spec: PictureSpec) -> Image.Image:
    """Draw a picture: (96, 96) RGB. Raises: DataError when the style has no drawing of the thing."""
    rng = random.Random(spec.seed)
    sprite = sprites(spec.style)[spec.thing]
    if sprite is None:
        raise DataError(f"drawing style {spec.style!r} has no drawing of thing {spec.thing}")
    canvas = background(rng)
    corners = [0, 1, 2, 3]
    badge_corner = rng.choice([c for c in corners if c != spec.place or spec.count > 1])
    tinted = restyled(sprite, rng) if spec.restyle else tint(sprite, rng)
    slots = [spec.place] if spec.count == 1 else rng.sample([c for c in corners if c != badge_corner], spec.count)
    for slot in slots:
        paste(canvas, tinted, slot, rng, alone=spec.count == 1)
    if spec.colour is not None:
        frame(canvas, COLOURS[COLOUR_NAMES[spec.colour]], rng)
    if spec.digit is not None:
        badge(canvas, spec.digit, badge_corner, rng)
    return canvas


def background(rng: random.Random) -> Image.Image:
    """A plain colour, a gradient or a cloudy pattern in muted colours."""
    cells = rng.choice((1, 2, 2, 3, 5, 8))
    base = [rng.randrange(40, 236) for _ in range(3)]
    spread = rng.randrange(10, 60)
    small = Image.new("RGB", (cells, cells))
    small.putdata([tuple(min(255, max(0, c + rng.randint(-spread, spread))) for c in base)
                   for _ in range(cells * cells)])  # fmt: skip
    return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def tint(sprite: Image.Image, rng: random.Random) -> Image.Image:
    """Brightness, saturation and contrast within 20 %: the light of the scene, not another thing."""
    alpha = sprite.getchannel("A")
    rgb = sprite.convert("RGB")
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Color, ImageEnhance.Contrast):
        rgb = enhance(rgb).enhance(rng.uniform(0.8, 1.2))
    rgb.putalpha(alpha)
    return rgb


def restyled(sprite: Image.Image, rng: random.Random) -> Image.Image:
    """Another artist's hand, roughly: flat colours, an outline, no shading, paler or stronger colours."""
    alpha = sprite.getchannel("A")
    rgb = sprite.convert("RGB")
    if rng.random() < 0.5:
        rgb = ImageOps.posterize(rgb, rng.choice((1, 2, 2, 3)))
    rgb = ImageEnhance.Color(rgb).enhance(rng.uniform(0.0, 1.8))
    rgb = ImageEnhance.Brightness(rgb).enhance(rng.uniform(0.7, 1.35))
    rgb = ImageEnhance.Contrast(rgb).enhance(rng.uniform(0.6, 1.5))
    if rng.random() < 0.4:
        grey = ImageOps.grayscale(rgb).point(edge_table())
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, (16, 16, 16)), grey)
    rgb.putalpha(alpha)
    return rgb


@functools.cache
def edge_table() -> list[int]:
    return [0 if level < 70 else 255 for level in range(256)]


def paste(canvas: Image.Image, sprite: Image.Image, slot: int, rng: random.Random, *, alone: bool) -> None:
    """Place one copy: 40-68 pixels high alone (54 at most in a corner), 34-42 among others."""
    inner = SIDE - 2 * FRAME
    if not alone:
        side = rng.randrange(34, 43)
    elif PLACES[slot] == "middle":
        side = rng.randrange(46, 69)
    else:
        side = rng.randrange(40, 55)
    drawn = sprite.resize((side, side), Image.Resampling.BILINEAR)
    if rng.random() < 0.6:
        drawn = drawn.rotate(rng.uniform(-14, 14), Image.Resampling.BILINEAR)
    free = inner - side
    if PLACES[slot] == "middle":
        x, y = (free // 2 + rng.randint(-6, 6) for _ in range(2))
    else:
        slack = min(8, free)
        x = rng.randint(0, slack) if slot % 2 == 0 else free - rng.randint(0, slack)
        y = rng.randint(0, slack) if slot < 2 else free - rng.randint(0, slack)
    canvas.paste(drawn, (FRAME + x, FRAME + y), drawn)


def frame(canvas: Image.Image, colour: tuple[int, ...], rng: random.Random) -> None:
    jittered = tuple(min(255, max(0, c + rng.randint(-14, 14))) for c in colour)
    ImageDraw.Draw(canvas).rectangle((0, 0, SIDE - 1, SIDE - 1), outline=jittered, width=rng.randint(4, FRAME))


def badge(canvas: Image.Image, digit: int, corner: int, rng: random.Random) -> None:
    """A disc of 22-25 pixels with the digit, dark on light or light on dark."""
    side = rng.randrange(22, 26)
    drawn = badge_sprite(digit, rng.random() < 0.5).resize((side, side), Image.Resampling.BILINEAR)
    near = FRAME + rng.randint(0, 3)
    x = near if corner % 2 == 0 else SIDE - near - side
    y = near if corner < 2 else SIDE - near - side
    canvas.paste(drawn, (x, y), drawn)


@functools.cache
def badge_sprite(digit: int, dark: bool) -> Image.Image:
    ink, paper = ((250, 250, 250), (25, 25, 30)) if dark else ((25, 25, 30), (250, 250, 250))
    image = Image.new("RGBA", (48, 48))
    draw = ImageDraw.Draw(image)
    draw.ellipse((0, 0, 47, 47), fill=paper, outline=ink, width=2)
    draw.text((24, 24), str(digit), font=ImageFont.load_default(38), fill=ink, anchor="mm")
    return image
