"""Model folders: config.json of our layout and of others, indices and headers of weights. One number, one folder."""

import copy
import functools
import json
import random
import shutil

import torch
from safetensors.torch import save_file

from longllava.checkpoints import load_model
from longllava.checkpoints.published import read_config
from longllava.checkpoints.stored import read_entries
from longllava.config import ModelConfig
from longllava.settings import load
from tests.checkpoints import published
from tests.fuzz.material import VALUES, cut, mutated, outcome
from tests.tiny import tiny_model

NUMBERS = (-1, 0, 1, 3, 7, 255, 65_536, 10**9, 10**30, 0.5, -0.0, 1e-300)
KEYS = ("backbone", "width", "n_layers", "auto_map", "int8", "", "a" * 300, "\u202e", "format", "model_type", "prompt")


@functools.cache
def folders(root):
    """A sound folder of each layout, written once, and the one to spoil, where the tower lies that they name."""
    native = tiny_model().save_pretrained(root / "native")
    (root / "longllava").mkdir()
    published.longllava(root / "longllava")
    published.jamba(root / "jamba")
    (root / "config").mkdir()
    shutil.copytree(root / "longllava/tower", root / "config/tower")
    return [native, native, root / "longllava", root / "longllava/stock", root / "jamba"]


def deep(draw):
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
    n = draw.choice((50, 3000, 100_000))
    return opening * n + "1" + closing * n


def places(value, path=()):
    """Paths of everything in nested JSON."""
    yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*path, key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from places(part, (*path, i))


def changed(value, draw):
    """JSON with one to three faults."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 3))):
        *path, last = draw.choice([place for place in places(value) if place])
        inside = value
        for key in path:
            inside = inside[key]
        fault = draw.randrange(6)
        if fault == 0:
            del inside[last]
        elif fault == 1 and isinstance(inside, dict):
            inside[draw.choice(KEYS)] = draw.choice((*NUMBERS, *VALUES[:-2]))
        elif fault == 2:
            inside[last] = draw.choice([part for part in VALUES if part != b""])
        elif fault == 3:
            inside[last] = {"a": [inside[last]]}
        else:
            inside[last] = draw.choice(NUMBERS)
        if not list(places(value))[1:]:
            break
    return value


def spoiled_text(value, draw):
    """A file's bytes: changed JSON, or sound JSON with faults of its own."""
    kind = draw.randrange(10)
    if kind < 6:
        return json.dumps(changed(value, draw)).encode()
    text = json.dumps(value).encode()
    if kind == 6:
        return cut(text, draw)
    if kind == 7:
        return mutated(text, draw)
    if kind == 8:
        return text.replace(b": ", b": " + deep(draw).encode() + b' , "b": ', 1)
    return draw.choice((b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), b"[]", b"", b"null", text + text))


def judge_config(number, root):
    """config.json is read into a whole config, or one error names the file; what is read is then checked by weights."""
    draw = random.Random(number)
    sound = draw.choice(folders(root))
    folder = root / "config"
    data = spoiled_text(json.loads((sound / "config.json").read_text("utf-8")), draw)
    (folder / "config.json").write_bytes(data)
    config = outcome(lambda: named(folder, lambda: read_config(folder)))
    assert config is None or isinstance(config, ModelConfig)
    if config is not None and number % 32 == 0:
        shutil.copyfile(sound / "model.safetensors", folder / "model.safetensors")
        model = outcome(lambda: named(folder, lambda: load_model(folder)))
        assert model is None or model.config == config
    if number % 16 == 1 and len(data) < 50_000:  # our own settings, from YAML, which is slow
        path = folder / "model.yaml"
        path.write_bytes(data)
        outcome(lambda: named(path, lambda: load(ModelConfig, path)))
    return config is not None


def named(path, call):
    """Every error says which file or folder it is about."""
    from longllava.errors import LongLLaVAError

    try:
        return call()
    except LongLLaVAError as error:
        assert str(path) in str(error), error
        raise


FILES = ("a.safetensors", "b.safetensors", "c.safetensors")
NAMES = ("../a.safetensors", "/etc/passwd", "a.safetensors\0", "a.bin", "", "b/../a.safetensors", "C:\\a.safetensors",
         "a.safetensors/", ".", "x" * 300 + ".safetensors", "\ud800.safetensors", 7, None, [])  # fmt: skip


def judge_index(number, root):
    """An index and its shards: all tensors with their values, or an error that names the folder; nothing outside it."""
    draw = random.Random(number)
    folder = root / "index"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    values = {f"{name}.{i}": torch.full((2, 3), float(10 * i + j)) for j, name in enumerate("abc") for i in range(2)}
    for file in FILES:
        save_file({key: tensor for key, tensor in values.items() if key[0] == file[0]}, folder / file)
    index = {"metadata": {"total_size": 144}, "weight_map": {key: f"{key[0]}.safetensors" for key in values}}
    fault = draw.randrange(8)
    if fault == 0:
        index["weight_map"][draw.choice(list(values))] = draw.choice(NAMES)
    elif fault == 1:
        (folder / draw.choice(FILES)).unlink()
    elif fault in (2, 3):
        path = folder / draw.choice(FILES)
        path.write_bytes((cut if fault == 2 else mutated)(path.read_bytes(), draw))
    elif fault == 4:
        (folder / "model.safetensors").write_bytes((folder / draw.choice(FILES)).read_bytes())
    text = json.dumps(index).encode() if fault != 5 else spoiled_text(index, draw)
    if fault == 6:  # twice the same name
        text = text.replace(b'"b.0": "b', b'"a.0": "b')
    (folder / "model.safetensors.index.json").write_bytes(text)

    def read():
        entries = read_entries(folder)
        return {key: (entry, entry.read().clone()) for key, entry in entries.items()}

    found = outcome(lambda: named(folder, read))
    for key, (entry, tensor) in (found or {}).items():
        assert entry.file.parent == folder and tuple(tensor.shape) == entry.shape
        if fault != 3:  # the format has no checksums: flipped bits of values are values
            assert torch.equal(tensor, values[key])
    return found is not None
