"""Reading a prompt: images are decoded, encoded, pooled, embedded, prefilled a few at a time, then dropped.

Nothing here grows with the number of images except the keys and values of the attention layers.
Shapes: L tokens of a chunk, M tokens an image, D width, S pixels a side.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longllava.bridges import pool_features
from longllava.encoders.vit import GPU_BATCH
from longllava.errors import InputError
from longllava.generation.lane import Lane, Throttle, uploaded
from longllava.inputs.image import named, square_pixels
from longllava.inputs.media import MediaOptions, MediaReader, listed, n_cores
from longllava.inputs.processor import Encoded, Processor, Span
from longllava.inputs.tiles import picture_numbers
from longllava.model import Model
from longllava.nn import Context, State
from longllava.nn.cache import int8_cache
from longllava.ops import native
from longllava.plan import check_fits, prompt_need
from longllava.settings import check_count

PIXELS_PER_BATCH = 1 << 20  # encoder batch: 9 images of 336 x 336, or MAX_BATCH small ones
MAX_BATCH = 32
DECODERS = 16  # threads at most, one a core that the process may use; Pillow frees the interpreter while it decodes
CHUNK_TOKENS, GPU_CHUNK_TOKENS = 2048, 8192
BAR_AFTER = 2.0  # seconds


@dataclass
class Reader:
    """A model and what it takes to read a prompt into its state.

    tokens_per_image: None for the config's. chunk_tokens: prefilled at a time, None for 2,048, on a GPU 8,192.
    options: how media are read. open_scheme: turns "world:..." sources into pictures. int8_cache: keys and values in
    int8, each token and head with scales of its own: half the memory of bfloat16.
    """

    model: Model
    processor: Processor
    tokens_per_image: int | None = None
    chunk_tokens: int | None = None
    options: MediaOptions = field(default_factory=MediaOptions)
    open_scheme: Callable[[str], Any] | None = None
    int8_cache: bool = False

    def __post_init__(self) -> None:
        encoder = self.model.config.encoder
        self.media_reader = MediaReader(self.options, encoder.image_size if encoder else None, self.open_scheme)
        if self.chunk_tokens is not None:
            self.chunk_tokens = check_count("chunk_tokens", self.chunk_tokens)

    @property
    def device(self) -> torch.device:
        return self.model.backbone.embed_tokens.weight.device

    @property
    def chunk(self) -> int:
        """Tokens prefilled at a time."""
        return self.chunk_tokens or (GPU_CHUNK_TOKENS if self.device.type == "cuda" else CHUNK_TOKENS)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.backbone.embed_tokens.weight.dtype

    def empty_state(self, capacity: int, batch: int = 1) -> State:
        """The state before the first token, with room for exactly `capacity`. Raises: InputError for too much."""
        self.check_room(capacity, batch)
        state = self.model.backbone.empty_state(batch, 0 if self.int8_cache else capacity, self.device, self.dtype)
        return int8_cache(state, capacity) if self.int8_cache else state

    def check_room(self, n_tokens: int, rows: int = 1) -> None:
        """Raises: InputError when a device has less memory free than n_tokens more in each row take."""
        devices = self.model.backbone.layer_devices or [self.device] * len(self.model.backbone.layers)
        for device in dict.fromkeys([self.device, *devices] if n_tokens else ()):
            need = prompt_need(
                self.model.config, n_tokens, value_bytes=self.dtype.itemsize, chunk_tokens=self.chunk, rows=rows,
                images_per_batch=self.images_at_once(), on_host=device.type == "cpu",
                layers=[layer for layer, own in enumerate(devices) if own == device], ends=device == self.device,
                int8_cache=self.int8_cache, plain=device.type == "cpu" and native.why_not() is not None,
            )  # fmt: skip
            check_fits(need, device, f"{n_tokens:,} tokens (prompt and answer)" + f" in {rows} rows" * (rows > 1))

    def images_at_once(self) -> int:
        """The encoder's batch."""
        encoder = self.model.config.encoder
        if self.device.type == "cuda" or encoder is None:
            return GPU_BATCH if encoder else 0
        return max(1, min(MAX_BATCH, PIXELS_PER_BATCH // encoder.image_size**2))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) over the tokens that the tokenizer knows; a model may have spare rows."""
        return self.model.logits(hidden)[..., : self.processor.tokenizer.vocab_size]

    def media(self, images: Any, video: Any) -> tuple[list[Any], int, int]:
        """Images and a video's frames as one list of sources, and how many there are of each."""
        given = listed(images)
        if given or video is not None:
            self.processor.tokens_per_image(self.tokens_per_image)  # a model without eyes says so before it reads
        return self.media_reader.media(given, video)

    @torch.inference_mode()
    def read(self, encoded: Encoded, sources: Sequence[Any], state: State, start: int) -> tuple[Tensor, State]:
        """Prefill: returns the last token's hidden state (1, D) and the state after it.

        sources: images by number, as encoded.spans name them. start: tokens already in `state`.
        Raises: InputError naming the image that cannot be read.
        """
        if not encoded.ids:
            raise InputError("the prompt has no tokens")
        ids_1L = torch.tensor([encoded.ids], device=self.device)
        waiting = deque(encoded.spans)
        live: list[tuple[Span, Tensor]] = []  # images whose tokens are not all in the state yet
        queued = Throttle(self.device, ahead=1)  # images of a chunk are encoded while the chunk before it is read
        with closing(self.image_tokens([sources[span.image] for span in encoded.spans])) as images:
            for begin in range(0, ids_1L.shape[1], self.chunk):
                end = min(begin + self.chunk, ids_1L.shape[1])
                queued.wait()
                while waiting and waiting[0].start < end:
                    live.append((waiting.popleft(), next(images)))
                x_1LD = self.embed(ids_1L[:, begin:end], live, begin)
                hidden_11D, state = self.model(x_1LD, Context(start=start + begin), state, last_only=True)
                queued.mark()
                live = [(span, tokens) for span, tokens in live if span.start + span.length > end]
        return hidden_11D[:, -1], state

    def embed(self, ids_1L: Tensor, live: list[tuple[Span, Tensor]], begin: int) -> Tensor:
        """Text and image tokens of one chunk: (1, L, D). A chunk may begin or end inside an image.

        The part of an image that lies in the chunk is placed as an image with fewer tokens. Which token goes where is
        worked out on the host, so that a GPU is not waited for.
        """
        end = begin + ids_1L.shape[1]
        x_1LD = self.model.embed(ids_1L)
        parts: dict[int, list[tuple[int, Tensor]]] = {}
        for span, tokens_MD in live:
            first, last = max(span.start, begin), min(span.start + span.length, end)
            part_MD = tokens_MD[first - span.start : last - span.start]
            parts.setdefault(last - first, []).append((first - begin, part_MD))
        for length, placed in parts.items():
            spans_S4 = torch.tensor([(0, place, length, i) for i, (place, _) in enumerate(placed)])
            x_1LD = self.model.fusion.embed(x_1LD, spans_S4, torch.stack([tokens_MD for _, tokens_MD in placed]))
        return x_1LD

    def image_tokens(self, sources: Sequence[Any]) -> Generator[Tensor]:
        """Image tokens (M, D), image after image."""
        with closing(self.features(sources)) as batches:
            for features_NMC in batches:
                yield from self.model.image_tokens(features_NMC, self.tokens_per_image)

    def features(self, sources: Sequence[Any]) -> Generator[Tensor]:
        """Pooled features (N, M, C), a batch of images at a time. A source may be its own features (M, C), or its
        pixels, uint8 (3, S, S), as the encoder looks at them.

        Decoding runs ahead in threads, by one batch at most. On a GPU the encoder has a stream of its own.
        """
        if not sources:
            return
        n_tokens = self.processor.tokens_per_image(self.tokens_per_image)
        config, bridge = self.model.config.encoder, self.model.config.bridge
        assert config is not None and bridge is not None  # or tokens_per_image would have raised
        side, mean = config.image_size, config.mean
        batch, numbers = self.images_at_once(), picture_numbers(sources)

        def decode(index: int) -> Tensor:
            with named(numbers[index], numbers[-1] + 1, sources[index]):
                return square_pixels(sources[index], side, mean, self.media_reader.open_reference)

        def given(index: int) -> Tensor:
            tensor = sources[index]
            if tensor.dtype == torch.uint8 and tensor.shape == (3, side, side) and has_values(tensor):
                return tensor
            return checked_features(tensor, numbers[index], (n_tokens, config.width))

        def encoded(images_N: Sequence[Tensor]) -> Tensor:
            images = uploaded(images_N, self.device)
            if images.is_floating_point():  # features already
                return images
            return pool_features(self.model.encode(images), n_tokens, bridge.pool)

        lane = Lane(self.device)
        bar = progress_bar(len(sources))
        pool = ThreadPoolExecutor(min(DECODERS, n_cores(), len(sources)), "longllava-decode")
        ahead: deque[Future[Tensor] | Tensor] = deque()
        submitted = 0
        try:
            for first in range(0, len(sources), batch):
                last = min(first + batch, len(sources))
                while submitted < min(last + batch, len(sources)):
                    is_tensor = isinstance(sources[submitted], Tensor)
                    ahead.append(given(submitted) if is_tensor else pool.submit(decode, submitted))
                    submitted += 1
                batch_N = [x.result() if isinstance(x := ahead.popleft(), Future) else x for _ in range(first, last)]
                for _, group in itertools.groupby(batch_N, lambda x: (x.dtype, x.device)):
                    features_NMC = lane.run(functools.partial(encoded, list(group)))
                    yield features_NMC
                    if bar is not None:
                        bar.update(len(features_NMC))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if bar is not None:
                bar.close()


def checked_features(features_MC: Tensor, number: int, shape: tuple[int, int]) -> Tensor:
    """Features that `LongLLaVA.encode` made. Raises: InputError when another model or setting made them."""
    if features_MC.shape != shape or not features_MC.is_floating_point() or not has_values(features_MC):
        kind = f"{features_MC.dtype} {tuple(features_MC.shape)}" + ", sparse or on meta" * (not has_values(features_MC))
        raise InputError(
            f"image {number + 1}: got a tensor of {kind}, expected floats"
            f" {shape}, which this model's encode() makes; or give a picture"
        )
    return features_MC


def has_values(tensor: Tensor) -> bool:
    """Each in its place: not on the meta device, nor sparse."""
    return not tensor.is_meta and tensor.layout == torch.strided


def progress_bar(total: int) -> Any:
    """A bar on a terminal's stderr, shown only when reading takes more than two seconds; else None."""
    if sys.stderr is None or not sys.stderr.isatty():  # None: closed, or a program without a console
        return None
    from tqdm import tqdm

    return tqdm(total=total, delay=BAR_AFTER, unit="image", desc="reading", leave=False, file=sys.stderr)
