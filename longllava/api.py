"""LongLLaVA: a model, its tokenizer, and the ways to talk to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from longllava.choices import checked_device as checked_device
from longllava.choices import checked_dtype as checked_dtype
from longllava.choices import checked_int8, checked_kv_dtype, checked_map
from longllava.config import Int8Config
from longllava.errors import InputError
from longllava.settings import check_count

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from longllava.generation.keywords import Options, Reading
    from longllava.generation.scoring import Score
    from longllava.generation.session import Session
    from longllava.inputs.chat import Piece
    from longllava.inputs.tokenizer import Tokenizer
    from longllava.model import Model

Prompt = str | Sequence[Mapping[str, Any]]


class LongLLaVA:
    """A multimodal language model ready to answer.

        model = LongLLaVA.from_pretrained("nano")
        model.generate("What is this?", images=["cat.jpg"])
        album = model.session(images=paths)  # read once
        album.ask("In which picture is the red panda?")

    Images: paths, PIL images, arrays (H, W, 3) uint8, bytes of files, files open for reading bytes, "world:..."
    references, "data:..." addresses.
    Faults of inputs, settings and files are LongLLaVAError, in one sentence that names what is wrong.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, *, tokens_per_image: int | None = None, kv_dtype: str | None = None
    ):
        from longllava.inputs.processor import Processor

        self.model = model.eval()
        self.tokenizer = tokenizer
        self.processor = Processor(model.config, tokenizer)
        self.int8_cache = checked_kv_dtype(kv_dtype)
        if tokenizer.vocab_size > model.config.backbone.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only"
                f" {model.config.backbone.vocab_size}; they do not belong together"
            )
        asked = tokens_per_image
        self.tokens_per_image = None if asked is None else self.processor.tokens_per_image(asked)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        tokens_per_image: int | None = None,
        int8: bool | Int8Config = False,
        kv_dtype: str | None = None,
        device_map: str | Mapping[str, str | torch.device] | None = None,
    ) -> LongLLaVA:
        """Load a shipped model ("nano"), a folder, or a model of the hub ("owner/model").

        device: None takes a GPU if there is one. dtype: None takes bfloat16 where the hardware multiplies it
        (GPUs; CPUs with AVX512-BF16 or AMX), else float32. tokens_per_image: None for the model's own.
        int8: quantise the linear layers while they are read, so that the floats are never in memory together; True, or
        an Int8Config that says which. A folder of int8 weights needs no word. kv_dtype: "int8" keeps keys and values of
        attention so, each token and head with a scale of its own: half of bfloat16's memory, more time; None as dtype.
        device_map: instead of device, layers over several devices: "auto" takes as few GPUs as hold the model, a table
        says which, such as {"": "cuda:0", "backbone.layers.20": "cuda:1"}.
        Raises: CheckpointError, ConfigError; InputError when the devices cannot hold it.
        """
        import torch

        from longllava.checkpoints import find_folder, load_model
        from longllava.inputs.tokenizer import Tokenizer

        folder = find_folder(name)
        target, devices = checked_device(device), checked_map(device_map, device)
        floats = checked_dtype(dtype, target)
        with torch.inference_mode(False):
            model = load_model(folder, device=target, dtype=floats, int8=checked_int8(int8),
                               device_map=devices)  # fmt: skip
        tokenizer = Tokenizer.from_folder(folder, model.config.prompt)
        return cls(model, tokenizer, tokens_per_image=tokens_per_image, kv_dtype=kv_dtype)

    def save_pretrained(self, folder: str | Path, *, dtype: str | torch.dtype | None = None) -> Path:
        """Write config.json, tokenizer.json and model.safetensors. dtype: stored dtype, None as loaded."""
        from longllava.checkpoints import save_model

        target = None if dtype is None else checked_dtype(dtype, None)
        return save_model(self.model, self.tokenizer, folder, dtype=target)

    @overload
    def generate(
        self, prompt: Prompt, images: Any = None, video: Any = None, *, stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> str: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: Prompt, images: Any = None, video: Any = None, *, stream: Literal[True],
        **options: Unpack[Options],
    ) -> Iterator[str]: ...  # fmt: skip
    def generate(
        self,
        prompt: Prompt,
        images: Any = None,
        video: Any = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        **reading: Unpack[Reading],
    ) -> str | Iterator[str]:
        """Answer a prompt: a string, or an iterator of its pieces with stream=True.

        prompt: a string, where <image> marks a picture's place (without marks pictures come first), or a list
        of messages {"role": "user", "content": text or parts}, whose text is never searched for marks.
        video: a file, or a folder of frames. temperature 0 takes the likeliest token, else one drawn by `seed`.
        stop: strings that end the answer. reading: fps, max_frames, tiles, allow_hosts (see MediaOptions), and
        chunk_tokens, tokens prefilled at a time.
        Raises: InputError naming what cannot be used (for pictures: "image 417 of 1000: path: reason").
        """
        from longllava.generation import Sampling

        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                            seed=seed, stop=stop)  # fmt: skip
        session = self.opened(self.generate, reading)
        pieces, sources = self.pieces(prompt, images, video, session)
        answer = session.respond(pieces, sources, sampling)
        return answer if stream else "".join(answer)

    def generate_batch(
        self,
        prompts: Iterable[Prompt],
        images: Iterable[Any] | None = None,
        *,
        batch_size: int = 8,
        **options: Unpack[Options],
    ) -> list[str]:
        """Answer prompts of any lengths together; each as `generate` would alone (with the same seed).

        images: for each prompt its picture, its pictures, or None. Each prompt is read by itself; decoding, where a
        model's weights are moved for every token, is shared by batch_size prompts.
        Raises: InputError naming the prompt, before any is answered where that can be known.
        """
        from longllava.generation import Sampling
        from longllava.generation.batch import answer_prompts, numbered
        from longllava.generation.keywords import Options, Reading, check_keywords

        check_keywords(self.generate_batch, options, Options)
        reading: dict[str, Any] = {name: value for name, value in options.items() if name in Reading.__annotations__}
        settings: dict[str, Any] = {name: value for name, value in options.items() if name not in reading}
        for name, given in (("prompts", prompts), ("images", () if images is None else images)):
            if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
                got = "one string" if isinstance(given, (str, bytes)) else f"one {type(given).__name__}"
                raise InputError(f"{name}: got {got}; expected a list with an entry for each prompt")
        prompts, images = list(prompts), None if images is None else list(images)
        if images is not None and len(images) != len(prompts):
            raise InputError(f"prompts: got {len(prompts)}, and images for {len(images)}; expected an entry for each")
        batch_size = check_count("batch_size", batch_size)
        session = self.fresh(**reading)
        rows = []
        for number, (prompt, own) in enumerate(zip(prompts, images or [None] * len(prompts)), 1):
            with numbered("prompt", number, len(prompts)):
                pieces, sources = self.pieces(prompt, own, None, session)
                rows.append((session.encode(pieces), sources))
        return answer_prompts(session.reader, rows, Sampling(**settings), batch_size)

    def score(
        self, prompt: Prompt, answer: str, images: Any = None, video: Any = None, **reading: Unpack[Reading]
    ) -> Score:
        """How likely `answer` is after `prompt`, token by token, and whether greedy decoding gives it."""
        session = self.opened(self.score, reading)
        pieces, sources = self.pieces(prompt, images, video, session)
        return session.score_pieces(pieces, answer, sources)

    def encode(self, images: Any) -> list[torch.Tensor]:
        """Pooled features (M, C) of each image, which stand for it wherever images are given to this model.

        For pictures that many prompts read: the encoder sees each of them once. They are on the model's device, in the
        encoder's dtype, each in memory of its own. Raises: InputError naming the image.
        """
        import torch

        reader = self.fresh().reader
        sources, _, _ = reader.media(images, None)
        with torch.inference_mode():
            return [features_MC.clone() for batch_NMC in reader.features(sources) for features_MC in batch_NMC]

    def session(
        self,
        images: Any = None,
        text: str | None = None,
        video: Any = None,
        **reading: Unpack[Reading],
    ) -> Session:
        """Read pictures (and text) once; then `ask`, `append`, `fork` and `save` as often as wanted.

        reading: fps, max_frames, tiles, allow_hosts, chunk_tokens, as in `generate`; for all that the session reads.
        """
        session = self.opened(self.session, reading)
        if images is not None or text is not None or video is not None:
            session.append(images=images, text=text, video=video)
        return session

    def load_session(self, path: str | Path, **reading: Unpack[Reading]) -> Session:
        """A session that Session.save wrote. It reads on by its own fps, max_frames and tiles, unless others are given.

        Raises: CheckpointError when another model made it.
        """
        from longllava.generation import saving

        return saving.load_into_(self.opened(self.load_session, reading), path, reading)

    def opened(self, method: Callable[..., Any], reading: Reading) -> Session:
        """`fresh` for a method that passes its keywords on, which tells of a wrong one itself."""
        from longllava.generation.keywords import Reading, check_keywords

        check_keywords(method, reading, Reading)
        return self.fresh(**reading)

    def fresh(self, chunk_tokens: int | None = None, **media: Any) -> Session:
        """A session that has read nothing. media: fields of MediaOptions. Raises: InputError for unusable values."""
        from longllava.data.images import open_reference
        from longllava.generation import Session
        from longllava.generation.prefill import Reader
        from longllava.inputs.media import MediaOptions

        options = MediaOptions(**media)
        return Session(
            Reader(
                self.model, self.processor, self.tokens_per_image, chunk_tokens, options, open_reference,
                self.int8_cache,
            )
        )  # fmt: skip

    def pieces(self, prompt: Prompt, images: Any, video: Any, session: Session) -> tuple[list[Piece], list[Any]]:
        """A prompt up to where its answer begins, and its images in order."""
        from longllava.inputs.prompts import prompt_turns

        turns, sources = prompt_turns(prompt, images, video, self.processor, session.reader.media)
        return [*turns, self.processor.assistant_open()], sources
