"""Layers over several devices, in their order: each holds a stretch of them, the first also all that is no layer.

Encoder, bridge, embeddings and output layer stay together on the first device, where hidden states begin and to which
they come back, so that whatever calls the model sees one device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from longllava.errors import ConfigError, InputError
from longllava.plan.memory import sized

LAYERS = "backbone.layers."
KEYS = f"'' (all that is not named), '{LAYERS}0' ..."


@dataclass(frozen=True)
class Placement:
    """first: device of all that is no layer; layers: each layer's device."""

    first: str
    layers: tuple[str, ...]

    def device_of(self, key: str) -> str:
        """Of a parameter, by its name in the model."""
        if not key.startswith(LAYERS):
            return self.first
        return self.layers[int(key[len(LAYERS) :].partition(".")[0])]

    def devices(self) -> list[str]:
        """In the order of their layers, each once."""
        return list(dict.fromkeys((self.first, *self.layers)))


def placed(device_map: Mapping[str, str], n_layers: int) -> Placement:
    """A user's table of names and devices: "backbone.layers.7", and "" for the rest. Raises: ConfigError."""
    names = {f"{LAYERS}{i}": i for i in range(n_layers)}
    if unknown := [name for name in device_map if name and name not in names]:
        raise ConfigError(f"device_map: no part {unknown[0]!r}; allowed: {KEYS} to '{LAYERS}{n_layers - 1}'")
    if "" not in device_map:
        raise ConfigError("device_map: give '' too, the device of embeddings, output layer and all that is not named")
    first = str(device_map[""])
    return Placement(first, tuple(str(device_map.get(name, first)) for name in names))


def split(layer_bytes: Sequence[int], first_bytes: int, each_bytes: int, free: Mapping[str, int]) -> Placement:
    """The fewest devices that hold it, in their order, filled alike: the fullest one is as empty as it can be.

    first_bytes: of what is no layer; each_bytes: what every device that is used needs beside its layers. Devices that
    others have filled are passed over. Raises: InputError when all of them together are too small.
    """
    room = rooms(each_bytes, free)
    for n_devices in range(1, len(room) + 1):
        for begin in range(len(room) - n_devices + 1):  # the first may have room, but not for what is no layer
            names = list(room)[begin : begin + n_devices]
            if (places := most_even(layer_bytes, first_bytes, [room[name] for name in names])) is not None:
                return Placement(names[0], tuple(names[place] for place in places))
    have = ", ".join(f"{name} {sized(n)}" for name, n in free.items())
    raise InputError(
        f"the model needs {sized(first_bytes + sum(layer_bytes))}, and {sized(each_bytes)} of workspace on each device;"
        f" free are {have}, which does not hold it in whole layers; use int8, or more or larger devices"
    )


def most_even(layer_bytes: Sequence[int], first_bytes: int, room: Sequence[int]) -> list[int] | None:
    """Which device each layer goes to, so that the largest used share of a device's room is smallest."""
    sums = [0, *accumulate(layer_bytes)]
    stretches = (b - a for a in sums for b in sums if b >= a)
    shares = {stretch / size for stretch in set(stretches) for size in room}
    shares |= {(first_bytes + stretch) / room[0] for stretch in sums}
    candidates = sorted(share for share in shares if share <= 1)
    low, high = 0, len(candidates)
    while low < high:  # what fits into a share fits into a larger one
        middle = (low + high) // 2
        low, high = (low, middle) if filled(layer_bytes, first_bytes, room, candidates[middle]) else (middle + 1, high)
    return filled(layer_bytes, first_bytes, room, candidates[low]) if low < len(candidates) else None


def filled(layer_bytes: Sequence[int], first_bytes: int, room: Sequence[int], share: float) -> list[int] | None:
    """Devices filled one after the other up to a share of their room; None where that does not hold all."""
    limits = [size * share * (1 + 1e-12) for size in room]
    device, used, places = 0, first_bytes, []
    if used > limits[0]:
        return None
    for size in layer_bytes:
        while used + size > limits[device]:
            device, used = device + 1, 0
            if device == len(room):
                return None
        used += size
        places.append(device)
    return places


def fits(layer_bytes: Sequence[int], first_bytes: int, each_bytes: int, free: Mapping[str, int]) -> bool:
    """Whether `split` finds devices that hold it."""
    room = list(rooms(each_bytes, free).values())
    return any(filled(layer_bytes, first_bytes, room[begin:], 1.0) is not None for begin in range(len(room)))


def rooms(each_bytes: int, free: Mapping[str, int]) -> dict[str, int]:
    """What the devices that have any leave for layers."""
    return {name: size - each_bytes for name, size in free.items() if size > each_bytes}
