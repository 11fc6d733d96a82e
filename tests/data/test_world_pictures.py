"""The pools: fixed, apart by split, complete; references that say everything."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from longllava.data.images import open_reference, safe_path
from longllava.data.worlds.pictures import (
    PicturePool,
    PoolSettings,
    combinations,
    grid_reference,
    parse_grid,
    parse_reference,
    reference,
)
from longllava.data.worlds.render import COLOUR_NAMES, MAX_COUNT, PLACES, SIDE, PictureSpec, render
from longllava.data.worlds.sheets import COLUMNS, sprites, things
from longllava.errors import ConfigError, InputError

N_THINGS = len(things())
specs = st.builds(
    PictureSpec,
    thing=st.integers(0, N_THINGS - 1),
    style=st.sampled_from(["noto", "fluent", "sheets/open moji@2.png"]),
    digit=st.none() | st.integers(0, 9),
    colour=st.none() | st.integers(0, len(COLOUR_NAMES) - 1),
    count=st.integers(1, MAX_COUNT),
    place=st.integers(0, len(PLACES) - 1),
    seed=st.integers(0, 2**41),
    restyle=st.booleans(),
)


def combination(spec: PictureSpec) -> tuple:
    return spec.thing, spec.digit, spec.colour


@given(specs)
def test_a_reference_holds_the_whole_spec(spec: PictureSpec) -> None:
    assert parse_reference(reference(spec)) == spec
    assert parse_grid(grid_reference(3, (reference(spec),) * 4)) == (3, [spec] * 4)


@pytest.mark.parametrize(
    "text",
    ["world:", "world:1.2", "world:1.2.3.1.4.5.0", "world:797.2.3.1.4.5.0@noto", "world:1.10.3.1.4.5.0@noto",
     "world:1.2.8.1.4.5.0@noto", "world:1.2.3.4.4.5.0@noto", "world:1.2.3.1.5.5.0@noto", "cat.png",
     "world:a.2.3.1.4.5.0@noto", "world:-1.2.3.1.4.5.0@noto"],
)  # fmt: skip
def test_what_is_no_reference_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match="names no picture of the world"):
        parse_reference(text)


@pytest.mark.parametrize("text", ["world:grid:0:1", "world:grid:65:1", "world:grid:x:1", "world:grid:"])
def test_what_is_no_grid_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match="names no grid"):
        parse_grid(text)


def test_a_thing_has_72_combinations_for_training_and_8_for_tests() -> None:
    for thing in range(N_THINGS):
        for whole, n_train, n_test in ((True, 72, 8), (False, 17, 2)):
            train, test = (set(combinations(thing, split, whole)) for split in ("train", "test"))
            assert (len(train), len(test), train & test) == (n_train, n_test, set())


def test_no_combination_and_no_rendering_is_in_both_splits() -> None:
    settings = PoolSettings(per_thing=12)
    train, test = (PicturePool(split, 0, settings) for split in ("train", "test"))
    seen = [{combination(pool.spec(i)) for i in range(len(pool))} for pool in (train, test)]
    assert len(seen[0]) > 8000 and len(seen[1]) > 4000 and not seen[0] & seen[1]
    assert all(train.spec(i).seed % 2 == 0 and test.spec(i).seed % 2 == 1 for i in range(0, len(train), 7))


def test_every_thing_digit_colour_and_style_is_trained_on() -> None:
    pool = PicturePool("train", 0, PoolSettings(per_thing=8))
    drawn = [pool.spec(i) for i in range(len(pool))]
    assert {spec.thing for spec in drawn} == set(range(N_THINGS))
    assert {spec.digit for spec in drawn} == {None, *range(10)}
    assert {spec.colour for spec in drawn} == {None, *range(len(COLOUR_NAMES))}
    assert set(Counter(spec.style for spec in drawn).values()) == {len(pool) // 2}
    assert 0.7 < sum(spec.count == 1 for spec in drawn) / len(pool) < 0.8
    assert 0.2 < sum(spec.restyle for spec in drawn) / len(pool) < 0.3


def test_test_pictures_are_drawn_as_the_artists_drew_them() -> None:
    pool = PicturePool("test", 0, PoolSettings(per_thing=2))
    assert not any(pool.spec(i).restyle for i in range(len(pool)))


def test_pictures_do_not_depend_on_the_order_they_are_asked_in_or_the_process() -> None:
    pool = PicturePool("train", 3)
    wanted = [pool.reference(i) for i in (40_000, 5, 5, 17_321)]
    program = (
        "from longllava.data.worlds.pictures import PicturePool as P\n"
        "p = P('train', 3); a = [p.reference(i) for i in (17321, 5, 40000)]\n"
        "print('\\n'.join([a[2], a[1], a[1], a[0]]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    out = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.split("\n")[:4] == wanted
    assert wanted[0] == "world:666.5.1.1.4.907270713226.0@noto"  # caches and trained models rest on it
    assert PicturePool("train", 4).reference(5) != wanted[1]


def test_the_index_of_a_things_picture() -> None:
    pool = PicturePool("test", 0, PoolSettings(per_thing=5))
    assert [pool.spec(pool.index(400, number)).thing for number in range(7)] == [400] * 7
    assert pool.index(400, 6) == pool.index(400, 1) != pool.index(400, 0)


def test_a_style_that_lacks_a_drawing_lacks_the_thing(tmp_path) -> None:
    sheet = Image.new("RGBA", (COLUMNS * 64, -(-N_THINGS // COLUMNS) * 64))
    for thing in (0, 31, 796):
        sheet.paste(sprites("noto")[thing], (thing % COLUMNS * 64, thing // COLUMNS * 64))
    sheet.save(tmp_path / "third.png")
    pool = PicturePool("test", 0, PoolSettings(styles=(str(tmp_path / "third.png"),), per_thing=3))
    assert pool.things == (0, 31, 796) and len(pool) == 9
    assert open_reference(pool.reference(8)).size == (SIDE, SIDE)


def test_a_sheet_that_is_drawn_anew(tmp_path) -> None:
    """Its old drawings were used, and their features stayed in the cache as the new ones'."""
    style, size = str(tmp_path / "sheet.png"), (COLUMNS * 64, -(-len(things()) // COLUMNS) * 64)
    for colour, n_drawn in ((0, 0, 255), len(things())), ((255, 0, 0), 30):
        sheet = Image.new("RGBA", size)
        sheet.paste((*colour, 255), (0, 0, size[0], 64 if n_drawn == 30 else size[1]))
        sheet.save(style)
        pool = PicturePool(settings=PoolSettings(styles=(style,), plain=True, restyle=0))
        assert len(pool.things) == n_drawn
        red, _, blue = render(pool.spec(0)).getpixel((48, 48))
        assert (red > blue) == (colour[0] > colour[2])


def test_settings_that_cannot_be() -> None:
    for wrong, message in (({"per_thing": 0}, "per_thing: got 0"), ({"styles": ()}, "styles"),
                           ({"restyle": 1.5}, "restyle: got 1.5")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            PoolSettings(**wrong)
    with pytest.raises(ConfigError, match="split: got 'dev', allowed: train, test"):
        PicturePool("dev")


def test_opening_references(tmp_path) -> None:
    pool = PicturePool("train", 0)
    refs = tuple(pool.reference(i) for i in (3, 40, 500))
    tiles = [render(pool.spec(i)) for i in (3, 40, 500)]
    grid = open_reference(grid_reference(2, refs))
    assert grid.size == (2 * SIDE, 2 * SIDE)
    assert grid.crop((SIDE, 0, 2 * SIDE, SIDE)).tobytes() == tiles[1].tobytes()
    assert grid.crop((0, SIDE, SIDE, 2 * SIDE)).tobytes() == tiles[2].tobytes()
    assert open_reference(refs[0]).tobytes() == tiles[0].tobytes()
    tiles[0].save(tmp_path / "a.png")
    assert open_reference("a.png", root=tmp_path).tobytes() == tiles[0].tobytes()
    assert open_reference(str(tmp_path / "a.png")).tobytes() == tiles[0].tobytes()
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    for name in ("torn.png", "none.png"):
        with pytest.raises(InputError, match=name):
            open_reference(name, root=tmp_path)


def test_paths_stay_below_their_root(tmp_path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").touch()
    (root / "sub" / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "sub" / "inside.png").symlink_to(root / "b.png")
    assert safe_path("sub/inside.png", root) == (root / "b.png").resolve()
    for path in ("../secret.png", str(tmp_path / "secret.png"), "sub/../../secret.png", "..\\x.png", "a\0b"):
        with pytest.raises(InputError, match="must be relative"):
            safe_path(path, root)
    with pytest.raises(InputError, match="through a link"):
        safe_path("sub/link.png", root)
