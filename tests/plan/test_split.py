"""Layers over devices: the split itself, exactly, and a model that is split."""

import itertools
import random

import pytest

from longllava.errors import ConfigError, InputError
from longllava.plan.split import Placement, fits, placed, split

GB = 10**9


def layers_on(placement: Placement) -> list[int]:
    return [placement.layers.count(name) for name in placement.devices()]


def test_one_device_when_one_is_enough():
    placement = split([2, 2, 2], 3, 1, {"cuda:0": 10, "cuda:1": 100})
    assert placement == Placement("cuda:0", ("cuda:0",) * 3) and placement.devices() == ["cuda:0"]


def test_the_53b_in_bf16_over_two_cards_of_80_gb():
    """Sixteen layers of 16 experts (5.7 GB) between sixteen dense ones, 1.7 GB of the rest: 103 GB, half on each."""
    layer_bytes = [int(0.56 * GB), int(5.86 * GB)] * 16
    placement = split(layer_bytes, int(1.7 * GB), 3 * GB, {"cuda:0": 79 * GB, "cuda:1": 79 * GB, "cuda:2": 79 * GB})
    assert placement.devices() == ["cuda:0", "cuda:1"] and layers_on(placement) == [16, 16]
    used = 1.7 * GB + sum(layer_bytes[:16]), sum(layer_bytes[16:])
    assert max(used) < 76 * GB and abs(used[0] - used[1]) < 2 * GB


def test_no_split_is_more_even():
    """Against all splits, for random sizes; devices of different sizes are filled in proportion."""
    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.randrange(1, 20) for _ in range(draw.randrange(1, 7))]
        room = [draw.randrange(5, 60) for _ in range(draw.randrange(1, 4))]
        first = draw.randrange(8)

        def shares(cuts, sizes=sizes, room=room, first=first):
            edges = [0, *cuts, len(sizes)]
            held = [sum(sizes[a:b]) for a, b in itertools.pairwise(edges)]
            held[0] += first
            return max(h / r for h, r in zip(held, room, strict=True))

        best = {}  # (devices, the first of them) -> the fullest one's share
        for n in range(1, len(room) + 1):
            for begin in range(len(room) - n + 1):
                cuts = itertools.combinations_with_replacement(range(len(sizes) + 1), n - 1)
                best[n, begin] = min(shares(cut, room=room[begin : begin + n]) for cut in cuts)
        fewest, begin = next((key for key in best if best[key] <= 1), (0, 0))
        free = {f"d{i}": size for i, size in enumerate(room)}
        if not fewest:
            with pytest.raises(InputError, match="does not hold it in whole layers"):
                split(sizes, first, 0, free)
            continue
        placement = split(sizes, first, 0, free)
        held = dict.fromkeys(free, 0)
        held[placement.first] += first
        for size, name in zip(sizes, placement.layers, strict=True):
            held[name] += size
        assert list(placement.layers) == sorted(placement.layers)
        used = list(free)[begin : begin + fewest]
        assert placement.first == used[0]
        assert max(held[name] / free[name] for name in used) == pytest.approx(best[fewest, begin])
        assert all(held[name] == 0 for name in free if name not in used)


def test_devices_that_others_have_filled_are_passed_over():
    """Also the first, and one that has some room, but not for what is no layer."""
    for full in (0, 5, 6):
        assert split([2, 2], 3, 5, {"cuda:0": full, "cuda:1": 12}) == Placement("cuda:1", ("cuda:1",) * 2)
        found = split([3, 3], 3, 5, {"cuda:0": full, "cuda:1": 11, "cuda:2": 5, "cuda:3": 11})
        assert found == Placement("cuda:1", ("cuda:1", "cuda:3"))


def test_what_fits_is_what_can_be_split():
    """Also beside devices that are full: what others use them for is nothing to a model that needs one or two."""
    draw = random.Random(0)
    for _ in range(500):
        sizes = [draw.randrange(1, 20) for _ in range(draw.randrange(1, 5))]
        free = {f"d{i}": draw.randrange(5, 60) for i in range(draw.randrange(1, 5))}
        costs = sizes, draw.randrange(8), draw.randrange(20)
        try:
            split(*costs, free)
        except InputError:
            assert not fits(*costs, free)
        else:
            assert fits(*costs, free)
    assert fits([1], 0, 5, {"cuda:0": 10, "cuda:1": 5})


def test_what_cannot_fit_is_one_sentence():
    with pytest.raises(InputError) as error:
        split([6 * GB] * 16, 2 * GB, GB, {"cuda:0": 24 * GB, "cuda:1": 24 * GB})
    assert str(error.value) == (
        "the model needs 98.0 GB, and 1.0 GB of workspace on each device; free are cuda:0 24.0 GB, cuda:1 24.0 GB,"
        " which does not hold it in whole layers; use int8, or more or larger devices"
    )
    with pytest.raises(InputError, match="does not hold"):  # the workspace alone is too large
        split([1], 0, 10, {"cuda:0": 10})


def test_a_table_of_ones_own():
    placement = placed({"": "cuda:1", "backbone.layers.2": "cpu"}, 4)
    assert placement == Placement("cuda:1", ("cuda:1", "cuda:1", "cpu", "cuda:1"))
    names = ("backbone.layers.2.mixer.out_proj.weight", "backbone.layers.3.ffn_norm.weight", "encoder.layers.2.up.bias")
    assert [placement.device_of(name) for name in names] == ["cpu", "cuda:1", "cuda:1"]
    with pytest.raises(ConfigError, match="no part 'layers.0'; allowed: '' .*'backbone.layers.0' ... to .*layers.3'"):
        placed({"": "cpu", "layers.0": "cpu"}, 4)
    with pytest.raises(ConfigError, match="give '' too"):
        placed({"backbone.layers.0": "cpu"}, 4)
