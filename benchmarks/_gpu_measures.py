"""What gpu_first_token.py measures, one method a kind of row."""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _limits import decode_limit, prompt_limit, settle
from _models import key_value_bytes
from _peers import jamba_times, vision_times
from scaling import random_pixels, slope
from torch import Tensor

from longllava.errors import InputError
from longllava.evals.memory import PeakMemory
from longllava.generation.batch import decode_many
from longllava.generation.decoding import static_tokens
from longllava.generation.sampling import Sampling
from longllava.inputs.processor import Encoded
from longllava.nn import Context, join_states

N_PIXELS = 1000  # pictures on the device; longer prompts read them again and again, each encoded anew
BATCH_CONTEXT = 8192
QUESTION = "What number is on the last picture?"


class Run:
    """One model, its measurements so far, and the time after which no other begins."""

    def __init__(self, model: Any, name: str, random: bool, save: Path | None, deadline: float):
        from longllava.train.record import environment

        self.model, self.name, self.save, self.deadline = model, name, save, deadline
        self.device = model.fresh().reader.device
        self.on_gpu = self.device.type == "cuda"
        self.weights = ""
        drawn = "random, in the true shape; nano's tokenizer" if random else "trained"
        self.report: dict[str, Any] = {**environment(self.device), "model": name, "weights": drawn, "rows": []}
        self.memory = PeakMemory()
        side = model.model.config.encoder.image_size
        few = random_pixels(side, self.device)
        self.pixels = list(few.repeat(4, 1, 1, 1)[:N_PIXELS])

    def note(self, **facts: Any) -> None:
        self.report |= facts
        print(", ".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
        self.write()

    def add(self, **row: Any) -> None:
        self.report["rows"].append({"weights": self.weights, **row})
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.report["rows"][-1].items())
        print("; ".join(shown), flush=True)
        self.write()

    def write(self) -> None:
        if self.save is not None:
            from longllava.files import write_json

            write_json(self.save, self.report)

    def late(self, **row: Any) -> bool:
        """Whether there is no time left, and if so a row that says it was not measured."""
        if time.perf_counter() < self.deadline:
            return False
        self.add(**row, not_measured="no time was left")
        return True

    def begin(self, weights: str) -> None:
        self.weights = weights
        self.collect()
        self.note(**{f"weight_bytes_{weights}": sum(x.nbytes for x in self.model.model.state_dict().values())})

    def collect(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        settle(self.device)

    def text(self, n_tokens: int) -> Encoded:
        highest = self.model.tokenizer.vocab_size
        return Encoded(torch.randint(3, highest, (n_tokens,), generator=torch.Generator().manual_seed(0)).tolist())

    def images(self, n_images: int) -> list[Tensor]:
        return [self.pixels[i % N_PIXELS] for i in range(n_images)]

    def encoded(self, n_images: int, tokens: int) -> tuple[Encoded, list[Tensor], Any]:
        """The prompt's tokens, its pictures, and a session to read it with. Text of n tokens without pictures."""
        self.model.tokens_per_image = tokens if n_images else None
        session = self.model.fresh()
        if not n_images:
            return self.text(tokens), [], session
        pieces, sources = self.model.pieces(QUESTION, self.images(n_images), None, session)
        return session.encode(pieces), sources, session

    def first_token(self, n_images: int, tokens: int, room: int = 0) -> tuple[float, int, Tensor, Any, Any]:
        """Seconds to the first token, the prompt's tokens, and what decoding goes on from."""
        settle(self.device)
        started = time.perf_counter()
        encoded, sources, session = self.encoded(n_images, tokens)
        state = session.reader.empty_state(len(encoded.ids) + room)
        hidden_1D, state = session.reader.read(encoded, sources, state, 0)
        with torch.inference_mode():
            session.reader.logits(hidden_1D).argmax(-1).tolist()
        return time.perf_counter() - started, len(encoded.ids), hidden_1D, state, session

    def warm(self) -> None:
        """What is done once a process: kernels are compiled, buffers and threads made."""
        for tokens in (36, 144):
            if self.model.model.config.encoder.grid() ** 2 >= tokens:
                self.first_token(70 if self.on_gpu else 2, tokens)
        _, length, hidden_1D, state, session = self.first_token(0, 9000 if self.on_gpu else 90)
        self.decode(hidden_1D, state, length, session, 8)
        self.collect()

    def decode(self, hidden_1D: Tensor, state: Any, length: int, session: Any, n_tokens: int) -> float:
        """Tokens a second, after the first four: these capture the graph."""
        generator = static_tokens(
            session.reader, hidden_1D, state, torch.tensor([length]), Sampling(max_new_tokens=n_tokens), []
        )
        times = [time.perf_counter() for _ in generator]
        return (len(times) - 5) / (times[-1] - times[4])

    def prompt(self, n_images: int, tokens: int, repeat: bool, answer: int = 0) -> None:
        kind = {"row": "prompt", "images": n_images, "tokens": tokens}
        if self.late(**kind):
            return
        self.collect()
        held = torch.cuda.memory_allocated() if self.on_gpu else 0
        self.memory.start()
        first, length, hidden_1D, state, session = self.first_token(n_images, tokens, answer)
        seconds = first
        if repeat and time.perf_counter() < self.deadline:
            hidden_1D = state = None  # type: ignore[assignment]
            seconds, length, hidden_1D, state, session = self.first_token(n_images, tokens, answer)
        config, found = self.model.model.config, self.report["ceilings"]
        limit = prompt_limit(config, length, n_images, found, self.weights != "bf16")
        kept = length * key_value_bytes(self.model)
        row = {**kind, "prompt_tokens": length, "first": first, "seconds": seconds, "limit": limit["total"],
               "over_limit": seconds / limit["total"], "limit_parts": limit,
               "tokens_per_second": length / seconds, "key_value_bytes": kept}  # fmt: skip
        if self.on_gpu:
            row["beyond_weights_and_keys_bytes"] = self.memory.bytes() - held - kept
        self.add(**row)
        if answer:
            rate = self.decode(hidden_1D, state, length, session, answer)
            most = decode_limit(config, self.model.model, length, found)
            self.add(row="decode", context=length, rows=1, new_tokens=answer, tokens_per_second=rate, limit=most,
                     of_limit=rate / most)  # fmt: skip

    def batch(self, n_rows: int) -> None:
        """Rows of their own context each, decoded together."""
        if self.late(row="decode", context=BATCH_CONTEXT, rows=n_rows):
            return
        self.collect()
        context, new = (BATCH_CONTEXT, 64) if self.on_gpu else (64, 8)
        _, length, hidden_1D, state, session = self.first_token(0, context)
        reader = session.reader
        eos, self.model.tokenizer.eos_id = self.model.tokenizer.eos_id, -1  # no answer ends early
        with torch.inference_mode():
            joined, last = join_states([state] * n_rows, new), hidden_1D.expand(n_rows, -1)
            place = torch.full((n_rows,), length, device=self.device)
            spent = []
            for count in (new, new // 2, new):  # the last two's difference leaves out what is done once an answer
                settle(self.device)
                started = time.perf_counter()
                decode_many(reader, last, joined, place, Sampling(max_new_tokens=count))
                spent.append(time.perf_counter() - started)
        self.model.tokenizer.eos_id = eos
        self.add(row="decode", context=length, rows=n_rows, new_tokens=new,
                 tokens_per_second=n_rows * (new - new // 2) / (spent[2] - spent[1]))  # fmt: skip

    def session(self, prompt: tuple[int, int] | None) -> None:
        """One more picture, one more turn, many questions, on a session that has read its pictures: each twice."""
        if prompt is None or self.late(row="session"):
            return
        n_images, tokens = prompt
        self.collect()
        self.model.tokens_per_image = tokens
        album = self.model.session(images=self.images(n_images))
        album.ask(QUESTION, max_new_tokens=1)

        def timed(call: Any) -> float:
            settle(self.device)
            started = time.perf_counter()
            call()
            settle(self.device)
            return time.perf_counter() - started

        row = {"row": "session", "images": n_images, "tokens": tokens, "prompt_tokens": album.n_tokens}
        row["append_picture_seconds"] = min(timed(lambda: album.append(images=self.images(1))) for _ in range(2))
        row["append_turn_seconds"] = min(
            timed(lambda: album.ask(QUESTION, keep=True, max_new_tokens=1)) for _ in range(2)
        )
        row["first_token_of_a_question_seconds"] = min(
            timed(lambda: album.ask(QUESTION, max_new_tokens=1)) for _ in range(2)
        )
        held = torch.cuda.memory_allocated() if self.on_gpu else 0
        self.memory.start()
        row["questions"] = 32 if self.on_gpu else 2
        questions = [QUESTION] * row["questions"]
        row["answers_of_8_tokens_seconds"] = min(
            timed(lambda: album.ask_many(questions, max_new_tokens=8)) for _ in range(2)
        )
        row["answering_bytes"] = self.memory.bytes() - held if self.on_gpu else None
        self.add(**row)

    def files(self, n_files: int) -> None:
        """JPEG files of 1280 x 720 on disk to the first token."""
        if not n_files or self.late(row="files", images=n_files):
            return
        import numpy as np
        from PIL import Image

        self.collect()
        self.model.tokens_per_image = 36
        random = np.random.default_rng(0)
        with tempfile.TemporaryDirectory(prefix="longllava-pictures-") as folder:
            different = min(n_files, 64)
            for number in range(different):  # of few colours, enlarged: their files are of a photograph's size
                small = Image.fromarray(random.integers(0, 256, (90, 160, 3), dtype=np.uint8))
                small.resize((1280, 720), Image.Resampling.BICUBIC).save(f"{folder}/{number}.jpg", quality=90)
            paths = [f"{folder}/{number % different}.jpg" for number in range(n_files)]
            size = sum(Path(path).stat().st_size for path in paths) / n_files
            spent = []
            for _ in range(2 if self.on_gpu else 1):
                started = time.perf_counter()
                self.model.generate(QUESTION, paths, max_new_tokens=1)
                spent.append(time.perf_counter() - started)
        self.add(row="files", images=n_files, tokens=36, bytes_a_file=size, first=spent[0], seconds=spent[-1])

    def fit(self, poolings: list[int]) -> None:
        """The most pictures: keys and values of so many are allocated, and the prompt's last chunk is read."""
        if not self.on_gpu or self.late(row="fit"):
            return
        self.collect()
        per_token, reader = key_value_bytes(self.model), self.model.fresh().reader
        chunk, images = reader.chunk, torch.stack(self.pixels[:64])
        wanted = (torch.cuda.mem_get_info()[0] - 25 * 10**8) // per_token
        for _ in range(6):
            try:
                with torch.inference_mode():
                    state = reader.empty_state(wanted)
                    for number, layer in enumerate(state):
                        if hasattr(layer, "buffer"):
                            layer.buffer.keys_BSGK.zero_()
                            layer.buffer.values_BSGK.zero_()
                            layer.buffer.filled = wanted - chunk
                            state[number] = type(layer)((), layer.buffer, wanted - chunk)
                    self.model.model.encode(images)
                    ids_1L = torch.zeros(1, chunk, dtype=torch.int64, device=self.device)
                    self.model.model(self.model.model.embed(ids_1L), Context(), state)
                settle(self.device)
                break
            except (torch.OutOfMemoryError, InputError):
                state = layer = None  # type: ignore[assignment]
                self.collect()
                wanted -= 5 * 10**8 // per_token
        else:
            self.add(row="fit", not_measured="no length was found in six tries")
            return
        tags = {n: self.encoded(100, n)[0].ids for n in dict.fromkeys(poolings)}
        few = {n: self.encoded(50, n)[0].ids for n in tags}
        fitting = {n: int(wanted / ((len(tags[n]) - len(few[n])) / 50)) for n in tags}
        self.add(row="fit", tokens=wanted, images_by_tokens_each=fitting, how="keys and values of all tokens allocated,"
                 " the last chunk read; the prompt itself was not read", published=1173)  # fmt: skip

    def release(self) -> None:
        """Our model leaves the GPU."""
        self.config = self.model.model.config
        if self.on_gpu:
            self.model.model.to("meta")
        self.collect()

    def peer(self, prompts: list[tuple[int, int]]) -> None:
        """transformers in the same run: the same numbers of tokens as text, and CLIP by itself."""
        done = {row["prompt_tokens"] for row in self.report["rows"] if row["row"] == "prompt" and "first" in row}
        lengths = sorted(length for length in done if length <= 150_000)  # it reads a prompt in one piece
        self.weights = "bf16"
        n_images = max((images for images, _ in prompts), default=0)
        if n_images and not self.late(row="transformers CLIP"):
            found = vision_times(self.config.encoder, self.pixels, n_images, self.device)
            self.add(row="transformers CLIP", images=n_images, **found)
        if not self.late(row="transformers Jamba"):
            for row in jamba_times(self.config.backbone, lengths, self.device, lambda: self.late(row="Jamba")):
                self.add(row="transformers Jamba", **row)

    def finish(self) -> None:
        """Log-log slopes of seconds over pictures, from 100 on."""
        slopes = {}
        read = [row for row in self.report["rows"] if row["row"] == "prompt" and row["images"] and "seconds" in row]
        for key in sorted({(row["weights"], row["tokens"]) for row in read}):
            found = slope([row for row in read if (row["weights"], row["tokens"]) == key], "seconds")
            if found is not None:
                slopes[f"{key[0]}, {key[1]} tokens a picture"] = found
        self.note(slopes=slopes, finished=True)
