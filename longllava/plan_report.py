"""A prompt planned before it is read: its tokens, bytes and operations, where they go, and how many pictures fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from longllava.checkpoints.folders import find_folder, shipped_models
from longllava.checkpoints.placing import layer_bytes
from longllava.checkpoints.published import read_config
from longllava.config import Int8Config, ModelConfig
from longllava.errors import CheckpointError, InputError
from longllava.files import expanded
from longllava.generation import prefill
from longllava.inputs.chat import Message, media_pieces
from longllava.inputs.processor import Processor
from longllava.inputs.tokenizer import Tokenizer
from longllava.model import Model
from longllava.ops import native
from longllava.plan import operations, prompt_need
from longllava.plan.need import token_bytes
from longllava.plan.split import Placement, fits, split
from longllava.quant import build_model
from longllava.settings import load
from longllava.shipped import shipped, shipped_names

ASSUMED_PER_TAG = 3  # "<", "img", ">": sub-words of the published models' tags, where no tokenizer can be asked
MOST = 1 << 32  # pictures, for a model that keeps nothing of them; and of whatever else is counted in a request
MOST_DEVICES = 64


@dataclass(frozen=True)
class Request:
    """tokens_per_image: None for the model's own. text_tokens: of the question. chunk_tokens: read at a time."""

    images: int = 1000
    tokens_per_image: int | None = None
    text_tokens: int = 32
    answer_tokens: int = 256
    dtype: torch.dtype = torch.bfloat16
    int8: bool = False
    int8_cache: bool = False
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("images", 0), ("text_tokens", 0), ("answer_tokens", 1), ("chunk_tokens", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value <= MOST:
                bound = f"least {least}" if value < least else f"most {MOST:,}"
                raise InputError(f"{name}: got {value:,}, expected at {bound}")


def open_config(name: str) -> tuple[ModelConfig, Tokenizer | None]:
    """Of a shipped model, a folder, or a name of configs/models, which has no tokenizer. Nothing is downloaded."""
    if name in shipped_models() or expanded(name).is_dir():
        folder = find_folder(name)
        config = read_config(folder)
        return config, Tokenizer.from_folder(folder, config.prompt)
    names = [known.partition("/")[2] for known in shipped_names("configs") if known.startswith("models/")]
    if name not in names:
        raise CheckpointError(
            f"{name}: neither a folder here nor a known config; have {', '.join(sorted({*names, *shipped_models()}))}"
        )
    return load(ModelConfig, shipped("configs", f"models/{name}")), None


class Plan:
    """A request to a model on devices with so much memory free; names that begin with "cpu" are the host's."""

    def __init__(self, name: str, request: Request, free: Mapping[str, int]):
        self.name, self.request, self.free = name, request, dict(free)
        self.config, self.tokenizer = open_config(name)
        if request.int8 and self.config.int8 is None:
            self.config = dataclasses.replace(self.config, int8=Int8Config())
        if self.config.int8 is not None and request.dtype == torch.float16:
            raise InputError("dtype: float16 ends at 65504, sums of int8 layers do not; plan bfloat16 or float32")
        if request.images and self.config.encoder is None:
            raise InputError(f"model {self.config.name!r} reads text only; plan it with --images 0")
        with torch.device("meta"):
            self.model: Model = build_model(self.config)
        self.on_host = next(iter(free)).startswith("cpu")
        self.per_image = self.image_tokens()
        self.tags, self.template = self.tokens_around()
        self.layers, self.rest = layer_bytes(self.model, request.dtype)

    def image_tokens(self) -> int:
        if self.config.encoder is None:
            return 0
        # the processor's rule needs no tokenizer
        return Processor(self.config, self.tokenizer).tokens_per_image(self.request.tokens_per_image)  # type: ignore

    def tokens_around(self) -> tuple[int, int]:
        """Of a picture's tags, and of the conversation's strings."""
        prompt = self.config.prompt
        if self.tokenizer is None:
            tags = sum(ASSUMED_PER_TAG for text in (prompt.image_open, prompt.image_close) if text)
            return tags if self.config.encoder is not None else 0, 4 * ASSUMED_PER_TAG

        processor = Processor(self.config, self.tokenizer)

        def n_tokens(n_images: int) -> int:
            message = Message("user", tuple(media_pieces(n_images, 0, prompt)))
            return len(processor.encode_messages([message], self.request.tokens_per_image, True).ids)

        if self.config.encoder is None:
            return 0, n_tokens(0)
        one, two = n_tokens(1), n_tokens(2)
        return two - one - self.per_image, one - (two - one)

    def n_tokens(self, images: int) -> int:
        """Of a prompt with so many pictures."""
        return images * (self.per_image + self.tags) + self.template + self.request.text_tokens

    def need(self, images: int, layers: list[int] | None = None, ends: bool = True) -> Any:
        chunk = prefill.CHUNK_TOKENS if self.on_host else prefill.GPU_CHUNK_TOKENS
        at_once = 0
        if images and self.config.encoder is not None:
            by_size = max(1, min(prefill.MAX_BATCH, prefill.PIXELS_PER_BATCH // self.config.encoder.image_size**2))
            at_once = min(images, by_size if self.on_host else prefill.GPU_BATCH)
        return prompt_need(
            self.config, self.n_tokens(images) + self.request.answer_tokens, value_bytes=self.request.dtype.itemsize,
            chunk_tokens=self.request.chunk_tokens or chunk, images_per_batch=at_once, layers=layers, ends=ends,
            on_host=self.on_host, int8_cache=self.request.int8_cache,
            plain=self.on_host and native.why_not() is not None,
        )  # fmt: skip

    def costs(self, images: int) -> tuple[list[int], int, int]:
        """Of each layer, of what is no layer, and what each device needs beside."""
        kept = [self.need(images, [layer], ends=False) for layer in range(len(self.layers))]
        layers = [w + n.keys_values + n.state for w, n in zip(self.layers, kept, strict=True)]
        work, work_at_ends = self.need(images, ends=False).workspace, self.need(images).workspace
        return layers, self.rest + work_at_ends - work, work

    def placement(self) -> Placement | None:
        try:
            return split(*self.costs(self.request.images), self.free)
        except InputError:
            return None

    def most_images(self) -> int | None:
        """None where already the weights do not fit; at most MOST, where no layer keeps anything of them."""
        if self.config.encoder is None or not fits(*self.costs(0), self.free):
            return None
        low, high = 0, 1
        while high < MOST and fits(*self.costs(high), self.free):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(*self.costs(middle), self.free) else (low, middle)
        return low

    def devices_needed(self) -> int | None:
        """So many like the first one; None where even MOST_DEVICES do not hold it."""
        each, costs = next(iter(self.free.values())), self.costs(self.request.images)
        counts = range(1, MOST_DEVICES + 1)
        return next((n for n in counts if fits(*costs, dict.fromkeys(map(str, range(n)), each))), None)

    def device_rows(self, placement: Placement) -> list[dict[str, Any]]:
        rows = []
        for device in placement.devices():
            layers, ends = [i for i, own in enumerate(placement.layers) if own == device], device == placement.first
            need = self.need(self.request.images, layers, ends)
            weights = sum(self.layers[i] for i in layers) + self.rest * ends
            rows.append({
                "device": device, "free": self.free[device], "layers": len(layers), "weights": weights,
                "keys_values": need.keys_values, "state": need.state, "workspace": need.workspace,
                "left": self.free[device] - weights - need.total(),
            })  # fmt: skip
        return rows

    def as_dict(self) -> dict[str, Any]:
        """All of it, in bytes, tokens and operations."""
        request, images = self.request, self.request.images
        need, n_tokens, placement = self.need(images), self.n_tokens(images), self.placement()
        counted = operations(self.config, n_tokens, images, self.per_image or None)
        attention = self.config.backbone.mixers().count("attention")
        return {
            "model": self.name, "dtype": str(request.dtype).removeprefix("torch."),
            "int8": self.config.int8 is not None, "int8_cache": request.int8_cache, "images": images,
            "tokens": {
                "per_image": self.per_image, "tags_per_image": self.tags, "template": self.template,
                "text": request.text_tokens, "prompt": n_tokens, "answer": request.answer_tokens,
                "tags_are": "counted by the tokenizer" if self.tokenizer else "assumed: there is no tokenizer",
            },
            "bytes": {
                "weights": sum(self.layers) + self.rest, "keys_values": need.keys_values, "state": need.state,
                "workspace": need.workspace, "total": sum(self.layers) + self.rest + need.total(),
                "per_token": attention * token_bytes(
                    self.config.backbone, request.dtype.itemsize, request.int8_cache
                ),
            },
            "operations": {**dataclasses.asdict(counted), "total": counted.total()},
            "fits": placement is not None,
            "devices": self.device_rows(placement) if placement else
                       [{"device": name, "free": size} for name, size in self.free.items()],
            "devices_needed": self.devices_needed(), "most_images": self.most_images(),
        }  # fmt: skip
