"""Which pictures there are: pools of specs, the split into train and test, and references as text.

Train and test never share a combination of (thing, digit, colour), nor a rendering seed; every thing, digit
and colour occurs in both. A pool is fixed: index -> picture is a pure function of (split, seed, thing,
number), so that features of a pool can be cached once and used by every stage.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from longllava.data.worlds.render import COLOUR_NAMES, MAX_COUNT, PLACES, PictureSpec
from longllava.data.worlds.sheets import STYLES, sprites, things
from longllava.errors import ConfigError, InputError

SPLITS = ("train", "test")
N_DIGITS = 10
HELD_OUT = 8  # of a thing's 80 combinations of digit and colour: test only
HELD_OUT_PARTIAL = 2  # of its 19 combinations without a digit or a frame or both
PREFIX = "world:"
GRID = "grid:"


@functools.cache
def combinations(thing: int, split: str, whole: bool) -> tuple[tuple[int | None, int | None], ...]:
    """The (digit, colour) pairs of a thing in a split; whole: with both, else with one or none."""
    digits, colours = range(N_DIGITS), range(len(COLOUR_NAMES))
    pairs: list[tuple[int | None, int | None]]
    if whole:
        pairs, held_out = [(d, c) for d in digits for c in colours], HELD_OUT
    else:
        pairs = [(d, None) for d in digits] + [(None, c) for c in colours] + [(None, None)]
        held_out = HELD_OUT_PARTIAL
    random.Random(f"combinations/{thing}/{whole}").shuffle(pairs)
    return tuple(pairs[:held_out] if split == "test" else pairs[held_out:])


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """Which pictures a pool holds.

    per_thing: pictures of each thing. styles: drawing styles, taken in turn ("noto", "fluent", or the path
    of a sheet). restyle: share of pictures with drawing-style augmentation (train only). plain: every picture
    holds one thing, a digit and a frame; otherwise one in four holds several copies, and one in eight lacks a
    digit or a frame or both.
    """

    per_thing: int = 60
    styles: tuple[str, ...] = STYLES
    restyle: float = 0.25
    plain: bool = False

    def __post_init__(self) -> None:
        if self.per_thing < 1:
            raise ConfigError(f"per_thing: got {self.per_thing}, must be above 0")
        if not self.styles:
            raise ConfigError("styles: the list is empty; name at least one drawing style")
        if not 0 <= self.restyle <= 1:
            raise ConfigError(f"restyle: got {self.restyle}, must be a share between 0 and 1")


def draw_spec(
    rng: random.Random, thing: int, split: str, style: str, *, plain: bool, restyle: float
) -> PictureSpec:
    """A picture of a thing, everything else drawn from `rng`."""
    digit, colour = rng.choice(combinations(thing, split, plain or rng.random() < 0.875))
    count = 1 if plain or rng.random() < 0.75 else rng.randint(2, MAX_COUNT)
    place = rng.randrange(4) if count == 1 and rng.random() < 0.5 else PLACES.index("middle")
    # Even seeds train, odd seeds test: the same drawing is never placed, tinted and turned alike in both.
    seed = rng.getrandbits(40) * 2 + (split == "test")
    return PictureSpec(thing, style, digit, colour, count, place, seed, rng.random() < restyle)


class PicturePool:
    """The fixed pictures of one split and seed. `len(pool)`, `pool.spec(index)`, `pool.reference(index)`.

    Pictures of one thing are neighbours: index = position of the thing in `pool.things` * per_thing + number.
    Raises: ConfigError for an unknown split; DataError for a style without a sheet.
    """

    def __init__(self, split: str = "train", seed: int = 0, settings: PoolSettings | None = None) -> None:
        if split not in SPLITS:
            raise ConfigError(f"split: got {split!r}, allowed: {', '.join(SPLITS)}")
        self.split, self.seed, self.settings = split, seed, settings or PoolSettings()
        self.things = drawn_things(self.settings.styles)
        self.position = {thing: position for position, thing in enumerate(self.things)}
        self._specs: dict[int, PictureSpec] = {}
        self._references: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.things) * self.settings.per_thing

    def index(self, thing: int, number: int) -> int:
        return self.position[thing] * self.settings.per_thing + number % self.settings.per_thing

    def spec(self, index: int) -> PictureSpec:
        found = self._specs.get(index)
        if found is None:
            position, number = divmod(index, self.settings.per_thing)
            thing, settings = self.things[position], self.settings
            rng = random.Random(f"picture/{self.split}/{self.seed}/{thing}/{number}")
            style = settings.styles[number % len(settings.styles)]
            restyle = settings.restyle if self.split == "train" else 0.0
            found = draw_spec(rng, thing, self.split, style, plain=settings.plain, restyle=restyle)
            self._specs[index] = found
        return found

    def reference(self, index: int) -> str:
        found = self._references.get(index)
        if found is None:
            found = self._references[index] = reference(self.spec(index))
        return found

    def draw(self, rng: random.Random, thing: int | None = None) -> int:
        """The index of a picture, of any thing or of a given one."""
        if thing is None:
            return rng.randrange(len(self))
        return self.index(thing, rng.randrange(self.settings.per_thing))


def drawn_things(styles: tuple[str, ...]) -> tuple[int, ...]:
    """The things that every one of the styles has a drawing of; the shipped styles have all."""
    missing = {
        thing
        for style in styles
        if style not in STYLES
        for thing, sprite in enumerate(sprites(style))
        if sprite is None
    }
    return tuple(thing for thing in range(len(things())) if thing not in missing)


# --- references: a picture as text, self-contained


def reference(spec: PictureSpec) -> str:
    """ "world:THING.DIGIT.COLOUR.COUNT.PLACE.SEED.RESTYLE@STYLE", with "-" for no digit or no frame."""
    digit = "-" if spec.digit is None else spec.digit
    colour = "-" if spec.colour is None else spec.colour
    values = (spec.thing, digit, colour, spec.count, spec.place, spec.seed, int(spec.restyle))
    return f"{PREFIX}{'.'.join(map(str, values))}@{spec.style}"


def grid_reference(n_columns: int, references: tuple[str, ...]) -> str:
    """One large picture of several, row by row: "world:grid:COLUMNS:" and the references, joined by "|"."""
    return f"{PREFIX}{GRID}{n_columns}:" + "|".join(ref.removeprefix(PREFIX) for ref in references)


def parse_reference(text: str) -> PictureSpec:
    """The spec of a reference to one picture. Raises: InputError."""
    try:
        values, separator, style = text.removeprefix(PREFIX).partition("@")
        thing, digit, colour, count, place, seed, restyle = values.split(".")
        spec = PictureSpec(
            thing=int(thing), style=style, digit=None if digit == "-" else int(digit),
            colour=None if colour == "-" else int(colour), count=int(count), place=int(place), seed=int(seed),
            restyle=bool(int(restyle)),
        )  # fmt: skip
        known = (
            text.startswith(PREFIX) and separator and 0 <= spec.thing < len(things())
            and (spec.digit is None or 0 <= spec.digit < N_DIGITS)
            and (spec.colour is None or 0 <= spec.colour < len(COLOUR_NAMES))
            and 1 <= spec.count <= MAX_COUNT and 0 <= spec.place < len(PLACES)
        )  # fmt: skip
    except ValueError:
        known = False
    if not known:
        raise InputError(
            f"{text!r:.200} names no picture of the world; expected"
            " world:THING.DIGIT.COLOUR.COUNT.PLACE.SEED.RESTYLE@STYLE within the world's ranges"
        )
    return spec


def parse_grid(text: str) -> tuple[int, list[PictureSpec]]:
    """Columns and pictures of a grid reference. Raises: InputError."""
    columns, _, rest = text.removeprefix(PREFIX + GRID).partition(":")
    if not text.startswith(PREFIX + GRID) or columns not in map(str, range(1, 65)):
        raise InputError(f"{text!r:.200} names no grid; expected world:grid:COLUMNS:PICTURE|PICTURE|...")
    return int(columns), [parse_reference(PREFIX + part) for part in rest.split("|")]
