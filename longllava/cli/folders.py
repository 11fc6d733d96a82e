"""`longllava convert`, `downcycle`, `quantize`, `merge` ...: model folders into other model folders."""

from __future__ import annotations

from typing import Annotated

import typer

from longllava.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")


def convert(
    source: Annotated[str, typer.Argument(help="A pickled file (mm_projector.bin), or a model folder.")],
    target: Annotated[str | None, typer.Argument(help="Folder to write into; pickles: default, beside them.")] = None,
    to: Annotated[str | None, typer.Option(help="Layout to write: native, longllava, jamba or llava.")] = None,
    text_only: Annotated[bool, typer.Option(help="With --to: the language model alone.")] = False,
    dtype: Annotated[str | None, typer.Option(help="With --to: stored dtype; default: as it is.")] = None,
) -> None:
    """Turn pickled weights into safetensors, in a separate process; or, with --to, a folder into another layout."""
    from longllava.checkpoints.convert import convert_layout, convert_pickles

    if to is None:
        if text_only or dtype:
            raise InputError("--text-only and --dtype need --to: pickles are converted as they are")
        for path in convert_pickles(source, target):
            print(path)
    elif target is None:
        raise InputError("convert --to: give the folder to write into")
    else:
        print(convert_layout(source, target, to, text_only=text_only, dtype=torch_dtype(dtype)))


def downcycle(
    source: Annotated[str, typer.Argument(help="Folder of a model with experts.")],
    target: Annotated[str, typer.Argument(help="Folder to write the dense model into.")],
    take: Annotated[
        str, typer.Option(help="Number of an expert; mean of all; or router: mean weighted by what the router gives.")
    ] = "mean",
    calibrate: Annotated[
        str | None, typer.Option(help="With --take router: text file to measure it on; default: random inputs.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on the down projections made of experts.")] = 1.0,
    original: Annotated[
        bool, typer.Option(help="As LongLLaVA's script, whatever else is given: expert 0, scale 0.045, bfloat16.")
    ] = False,
    to: Annotated[str, typer.Option(help="Layout to write: native, longllava, jamba or llava.")] = "native",
    dtype: Annotated[str | None, typer.Option(help="Stored dtype; default: as it is.")] = None,
) -> None:
    """Make a dense model of a mixture of experts: in each layer one MLP of its experts, all else as it is.

    The model is never held whole. A dense model made so has to be trained further before it is of use.
    """
    from longllava.checkpoints.downcycle import ORIGINAL
    from longllava.checkpoints.downcycle import downcycle as run

    asked = {"take": int(take) if take.isdecimal() else take, "scale": scale, "calibrate": calibrate}
    how = ORIGINAL if original else asked
    print(run(source, target, **how, scheme=to, dtype=torch_dtype("bfloat16" if original else dtype)))


def quantize(
    source: Annotated[str, typer.Argument(help="A shipped name, a folder of floats (any layout), or a hub name.")],
    target: Annotated[str, typer.Argument(help="Folder to write into.")],
    part: Annotated[list[str], typer.Option(help="backbone, bridge, encoder. Repeatable.")] = ["backbone"],  # noqa: B006
    keep: Annotated[
        list[str], typer.Option(help="Layers that stay floats: down_proj, a pattern. Repeatable.", show_default=False)
    ] = [],  # noqa: B006
    weight_only: Annotated[
        list[str], typer.Option(help="Layers whose inputs stay floats. Repeatable.", show_default=False)
    ] = [],  # noqa: B006
    two_terms: Annotated[
        list[str], typer.Option(help="Layers whose inputs are int8 twice. Repeatable.", show_default=False)
    ] = [],  # noqa: B006
    rotated: Annotated[
        list[str], typer.Option(help="Layers whose rows are rotated before they become int8; or: none. Repeatable.")
    ] = ["out_proj", "down_proj"],  # noqa: B006
    lm_head: Annotated[bool, typer.Option("--lm-head", help="The output layer too, its weights only.")] = False,
) -> None:
    """Write a model with its linear layers in int8, a scale for each output; the rest as it is.

    The folder is read like any other. --int8 of other commands does the same while a model is loaded.
    """
    from longllava.checkpoints import quantize_folder
    from longllava.checkpoints.int8 import sizes
    from longllava.config import Int8Config

    config = Int8Config(
        parts=tuple(part), keep=tuple(keep), weight_only=tuple(weight_only), two_terms=tuple(two_terms),
        rotated=() if rotated == ["none"] else tuple(rotated), lm_head=lm_head,
    )  # fmt: skip
    folder = quantize_folder(source, target, config)
    before, after = sizes(folder)
    print(f"{folder}\n{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB")


def export(
    source: Annotated[str, typer.Argument(help="A folder (any layout), or a hub name.")],
    target: Annotated[str, typer.Argument(help="Folder to write into.")],
    format: Annotated[
        str, typer.Option(help="hf-llava (Llava with Jamba), or jamba: the language model alone.")
    ] = "hf-llava",
    allow_unpooled: Annotated[
        bool, typer.Option("--allow-unpooled", help="Of a model that pools, write all tokens of each picture.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="Stored dtype; default: as it is.")] = None,
) -> None:
    """Write a folder that stock transformers loads, without code of this library or of the folder.

    A model with settings that stock transformers has no word for is refused, and all of them are named.
    """
    from longllava.checkpoints.export import export as run

    print(run(source, target, format, allow_unpooled=allow_unpooled, dtype=torch_dtype(dtype)))


def torch_dtype(name: str | None):
    import torch

    if name is not None and name not in DTYPES:
        raise InputError(f"dtype: got {name!r}, allowed: {', '.join(DTYPES)}")
    return None if name is None else getattr(torch, name)


def merge(
    base: Annotated[str, typer.Argument(help="The model that the adapter was trained on.")],
    adapter: Annotated[str, typer.Argument(help="Folder of peft: a LoRA stage's model.")],
    target: Annotated[str, typer.Argument(help="Folder to write the whole model into.")],
    dtype: Annotated[str | None, typer.Option(help="Stored dtype; default: as the base's.")] = None,
) -> None:
    """Put an adapter, and the bridge that was trained with it, into the weights of its model."""
    from longllava.checkpoints.adapters import merge as run

    print(run(base, adapter, target, dtype=torch_dtype(dtype)))
