"""Text, pictures and videos to the tensors of LongLLaVAForConditionalGeneration.

A string is a user's turn and messages are messages, as in LongLLaVA.generate: their text is plain text, whatever it
says. What apply_chat_template rendered remembers its messages, so text that was rendered is no less guarded.
B rows, L tokens of the longest, N pictures of all rows, S pixels a side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from longllava.checkpoints import find_folder
from longllava.checkpoints.folders import CONFIG, INDEX, WEIGHTS
from longllava.checkpoints.published import read_config
from longllava.config import ModelConfig
from longllava.data.images import open_reference
from longllava.errors import InputError
from longllava.files import write_json
from longllava.inputs.chat import IMAGE_MARK, Answer, Mark, Piece
from longllava.inputs.image import named, square_pixels
from longllava.inputs.media import MediaOptions, MediaReader, listed
from longllava.inputs.processor import Encoded, Processor
from longllava.inputs.prompts import Media, prompt_turns
from longllava.inputs.template import chat_template as template_of
from longllava.inputs.tiles import picture_numbers
from longllava.inputs.tokenizer import Tokenizer
from longllava.integrations.transformers.loading import hub_arguments
from longllava.integrations.transformers.tokenization import LongLLaVATokenizer
from longllava.settings import check_count

MEDIA = tuple(field.name for field in dataclasses.fields(MediaOptions))
# options of a call, and the values of those that are only checked: other code gives them of its own accord
OWN = (*MEDIA, "tokens_per_image", "max_length")
CHECKED: dict[str, tuple] = {
    "padding": (True, False, "longest", "max_length"),
    "padding_side": ("left", "right"),
    "truncation": (True, False),
    "add_special_tokens": (True, False),
    "return_tensors": ("pt", "auto"),
    "return_mm_token_type_ids": (False,),
}
DECODERS = 4  # threads; Pillow frees the interpreter while it decodes
Row = tuple[Encoded, list[Any]]


class Rendered(str):
    """A conversation as text, and what it was made from."""

    told: Told


@dataclasses.dataclass(frozen=True)
class Told:
    """messages, or a question. answer_next: the assistant's turn is opened. goes_on: the last answer is not over."""

    messages: Any
    answer_next: bool = True
    goes_on: bool = False


class LongLLaVAProcessor(ProcessorMixin):
    """Made by from_pretrained. Rows are padded where the tokenizer's padding_side says: on the left, where generation
    wants it, unless it was told otherwise.

    Options of a call, or in processor_kwargs of apply_chat_template: padding_side="right", padding="max_length" (to
    max_length), max_length (a longer row is an error: nothing is ever cut), tokens_per_image, and how media are read:
    fps, max_frames, tiles, allow_hosts (see MediaOptions).
    """

    def __init__(self, tokenizer: Any = None, config: ModelConfig | None = None):
        assert config is not None, "a processor is made by from_pretrained"
        super().__init__(tokenizer, chat_template=template_of(config.prompt))
        self.config = config
        self.inner = Processor(config, Tokenizer(tokenizer.backend_tokenizer.to_str(), config.prompt))
        self.image_token = IMAGE_MARK

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        folder = find_folder(pretrained_model_name_or_path, **hub_arguments(kwargs))
        return cls(LongLLaVATokenizer.from_pretrained(folder, **kwargs), read_config(folder))

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """The tokenizer's files, processor_config.json, and the config.json that it is made from, unless weights lie
        there with one of their own."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if not ((folder / CONFIG).is_file() and any((folder / name).is_file() for name in (WEIGHTS, INDEX))):
            write_json(folder / CONFIG, dataclasses.asdict(self.config))
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {"processor_class": type(self).__name__}

    @property
    def image_processor(self) -> LongLLaVAProcessor:
        """Itself: pipelines ask it how pixels are padded, which they are not, and then make batches of them."""
        return self

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(  # type: ignore[override]
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **options: Any
    ) -> BatchFeature:
        """text: a question, or what apply_chat_template rendered, or a list of them.

        images, videos: for one text its pictures and its video; for a list of texts, for each its own, or None.
        Returns: input_ids and attention_mask (B, L), and uint8 pixel_values (N, 3, S, S) where there are pictures.
        Raises: InputError.
        """
        if audio is not None:
            raise InputError("audio: this model hears nothing; give text, images or videos")
        options = checked(options)
        if isinstance(text, (list, tuple)):
            if not text:
                raise InputError("text: got an empty list; expected a question, or a list with at least one")
            prompts = zip(text, per_row(images, len(text), "images"), per_row(videos, len(text), "videos"))
        else:
            nested = isinstance(images, (list, tuple)) and len(images) == 1 and isinstance(images[0], (list, tuple))
            prompts = zip([text or ""], [images[0] if nested else images], [videos])
        features = self.batch([self.row(*prompt, options) for prompt in prompts], options)
        del features["assistant_masks"]
        return features

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: str | None = None, *, add_generation_prompt: bool = False,
        continue_final_message: bool = False, return_assistant_tokens_mask: bool = False, tokenize: bool = False,
        return_tensors: Any = None, return_dict: bool = False, processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Messages, or a list of conversations, as text, as input_ids, or (return_dict) as all that the model takes.

        return_assistant_tokens_mask: also assistant_masks (B, L), 1 where an answer or its end stands: what is learned.
        """
        if chat_template not in (None, self.chat_template):
            raise InputError("chat_template: the layout is the model's own; leave it out")
        options = checked({**options, **(processor_kwargs or {}), "return_tensors": return_tensors})
        # a string is a question, whose letters are no conversations
        several = isinstance(conversation, (list, tuple)) and not isinstance(next(iter(conversation), {}), Mapping)
        rendered = [self.render(Told(messages, add_generation_prompt, continue_final_message))
                    for messages in (conversation if several else [conversation])]  # fmt: skip
        if not tokenize:
            return rendered if several else rendered[0]
        features = self.batch([self.row(one, None, None, options) for one in rendered], options)
        if not return_assistant_tokens_mask:
            features.pop("assistant_masks")
        return features if return_dict else features["input_ids"]

    def render(self, told: Told) -> Rendered:
        pieces, _ = self.pieces(dataclasses.replace(told, messages=with_image(told.messages, "")), None, None, unopened)
        eos, between = self.inner.prompt.eos_token, self.inner.prompt.between_turns
        words = []
        for piece in pieces:
            words.append(IMAGE_MARK if isinstance(piece, Mark) else piece.text)
            if isinstance(piece, Answer) and not (told.goes_on and piece.last):
                words.append(eos if piece.last or between is None else between)
        rendered = Rendered("".join(words))
        rendered.told = told
        return rendered

    def row(self, prompt: Any, images: Any, video: Any, options: Mapping[str, Any]) -> Row:
        """One row's tokens, and its pictures in order, as functions that give their pixels."""
        bos = self.inner.prompt.bos_token
        if isinstance(prompt, Rendered):  # pictures that are given stand for those that its messages name
            told = prompt.told
            told = told if images is None else dataclasses.replace(told, messages=with_image(told.messages, None))
        elif isinstance(prompt, str) and prompt.startswith(bos):
            raise InputError(f"text: it begins with {bos!r}, but apply_chat_template did not give it like this; pass on"
                             " its text unchanged, or give messages to apply_chat_template")  # fmt: skip
        else:
            told = Told(prompt)
        reader = MediaReader(
            MediaOptions(**{name: options[name] for name in MEDIA if name in options}),
            self.config.encoder.image_size if self.config.encoder else None, open_reference,
        )  # fmt: skip
        pieces, sources = self.pieces(told, images, video, reader.media)
        encoded = self.inner.encode_pieces(pieces, options.get("tokens_per_image"))
        if told.goes_on:
            del encoded.ids[-1], encoded.trainable[-1]
        if (longest := options.get("max_length")) is not None and len(encoded.ids) > longest:
            raise InputError(f"max_length: the prompt has {len(encoded.ids)} tokens, allowed are {longest}")
        return encoded, [(sources[span.image], reader) for span in encoded.spans]

    def pieces(self, told: Told, images: Any, video: Any, media: Media) -> tuple[list[Piece], list[Any]]:
        turns, sources = prompt_turns(told.messages, images, video, self.inner, media, answered=not told.answer_next)
        if told.goes_on and not isinstance(turns[-1], Answer):
            raise InputError("continue_final_message: the last message is not the assistant's")
        return [*turns, *([self.inner.assistant_open()] if told.answer_next else [])], sources

    def batch(self, rows: Sequence[Row], options: Mapping[str, Any]) -> BatchFeature:
        length = max(len(encoded.ids) for encoded, _ in rows)
        side = options.get("padding_side", self.tokenizer.padding_side)
        if options.get("padding") == "max_length":
            length = options["max_length"]
        ids_BL = torch.full((len(rows), length), self.inner.tokenizer.pad_id)
        mask_BL, learned_BL = torch.zeros_like(ids_BL), torch.zeros_like(ids_BL)
        for number, (encoded, _) in enumerate(rows):
            n = len(encoded.ids)
            place = slice(0, n) if side == "right" else slice(length - n, length)
            ids_BL[number, place] = torch.tensor(encoded.ids)
            mask_BL[number, place] = 1
            learned_BL[number, place] = torch.tensor(encoded.trainable).long()
        data = {"input_ids": ids_BL, "attention_mask": mask_BL, "assistant_masks": learned_BL}
        if options.get("tokens_per_image") is not None:
            data["tokens_per_image"] = options["tokens_per_image"]
        sources = [source for _, opened in rows for source in opened]
        if sources:
            data["pixel_values"] = self.pixels(sources)
        return BatchFeature(data)

    def pixels(self, sources: Sequence[tuple[Any, MediaReader]]) -> torch.Tensor:
        encoder = self.config.encoder
        assert encoder is not None  # or its tokens would have been refused
        numbers = picture_numbers([source for source, _ in sources])

        def decode(index: int) -> torch.Tensor:
            source, reader = sources[index]
            with named(numbers[index], numbers[-1] + 1, source):
                return square_pixels(source, encoder.image_size, encoder.mean, reader.open_reference)

        with ThreadPoolExecutor(min(DECODERS, len(sources))) as pool:
            return torch.stack(list(pool.map(decode, range(len(sources)))))


def check_pixels(pixels_N3SS: torch.Tensor, encoder: Mapping[str, Any]) -> None:
    """Raises: InputError for bytes of another dtype, which the encoder would take as normalised."""
    if pixels_N3SS.dtype == torch.uint8:
        return
    brightest = max(max(mean, 1 - mean) / std for mean, std in zip(encoder["mean"], encoder["std"]))
    if not pixels_N3SS.is_floating_point() or not bool(pixels_N3SS.abs().max() <= 2 * brightest):  # NaN too
        raise InputError(
            f"pixel_values: got {pixels_N3SS.dtype} from {pixels_N3SS.min():g} to {pixels_N3SS.max():g}, expected"
            f" uint8, as the processor gives them, or normalised floats, which end at {brightest:.2g}"
        )


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that were given. Raises: InputError for one that is unknown, or that this library does otherwise."""
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in OWN and name not in CHECKED:
            raise InputError(f"{name}: no such option; allowed: {', '.join((*OWN, *CHECKED))}")
        if name in CHECKED and value not in CHECKED[name]:
            raise InputError(f"{name}: got {value!r}, allowed: {', '.join(map(str, CHECKED[name]))}")
    if given.get("padding") == "max_length" and "max_length" not in given:
        raise InputError("padding: 'max_length' pads to max_length, which was not given")
    counts = [name for name in ("max_length", "tokens_per_image") if name in given]
    return given | {name: check_count(name, given[name]) for name in counts}


def per_row(values: Any, n_rows: int, name: str) -> Sequence[Any]:
    if values is None:
        return [None] * n_rows
    if not isinstance(values, (list, tuple)) or len(values) != n_rows:
        raise InputError(f"{name}: {n_rows} texts were given, expected a list of {n_rows}: for each its own, or None")
    return values


def unopened(images: Any, video: Any) -> tuple[list[Any], int, int]:
    """Media that are only counted; a video stands for its first frame."""
    return [*listed(images), *([] if video is None else [video])], len(listed(images)), int(video is not None)


def with_image(messages: Any, image: Any) -> Any:
    """Messages whose image parts have another source; None: the next one that is given."""

    def replaced(message: Any) -> Any:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), (list, tuple)):
            return message
        pictures = [isinstance(part, Mapping) and part.get("type") == "image" for part in message["content"]]
        parts = [{"type": "image", "image": image} if is_picture else part
                 for is_picture, part in zip(pictures, message["content"])]  # fmt: skip
        return {**message, "content": parts}

    return [replaced(message) for message in messages] if isinstance(messages, (list, tuple)) else messages
