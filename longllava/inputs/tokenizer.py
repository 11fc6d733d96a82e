"""Text to ids and back, by a tokenizer.json, or a SentencePiece model, alone (no transformers import).

Special tokens exist only as ids that the library inserts: "<|endoftext|>" typed by a person is plain text.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

from longllava.config import PromptConfig
from longllava.errors import CheckpointError, InputError
from longllava.files import write_text
from longllava.inputs.sentencepiece import tokenizer_json
from longllava.settings import read_mapping

FILE_NAME = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
SETTINGS = "tokenizer_config.json"


class Tokenizer:
    """A tokenizer.json and the three special tokens that the prompt layout names.

    Raises: CheckpointError when the file is missing or torn, or has no such special token.
    """

    def __init__(self, text: str, prompt: PromptConfig, where: str = FILE_NAME):
        import tokenizers

        try:
            self.backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust side raises bare Exception
            raise CheckpointError(f"{where}: cannot be read: {' '.join(str(error).split())}") from None
        self.backend.encode_special_tokens = True  # specials inside text are encoded as text
        self.backend.no_padding()
        self.backend.no_truncation()
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = {token.content: number for number, token in added.items() if token.special}
        missing = [name for name in (prompt.bos_token, prompt.eos_token, prompt.pad_token)
                   if name not in self.special_ids]  # fmt: skip
        if missing:
            raise CheckpointError(
                f"{where}: no special token {', '.join(map(repr, missing))}; the prompt layout needs it"
            )
        self.bos_id = self.special_ids[prompt.bos_token]
        self.eos_id = self.special_ids[prompt.eos_token]
        self.pad_id = self.special_ids[prompt.pad_token]
        self.spelled = {number: self.spell(name) for name, number in self.special_ids.items()}
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self.specials = re.compile("|".join(map(re.escape, longest_first)))
        self.cache: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}

    @classmethod
    def from_folder(cls, folder: str | Path, prompt: PromptConfig) -> Tokenizer:
        """Read folder/tokenizer.json, or tokenizer.model; bos, eos and pad are named by `prompt`."""
        path = Path(folder) / FILE_NAME
        try:
            if path.is_file():
                return cls(path.read_text("utf-8"), prompt, str(path))
            path = path.with_name(SENTENCEPIECE)
            if not path.is_file():
                raise CheckpointError(f"{folder}: no {FILE_NAME} or {SENTENCEPIECE}; a model folder holds one of them")
            text = tokenizer_json(path.read_bytes())
        except CheckpointError:
            raise
        except (OSError, ValueError, struct.error) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        tokenizer = cls(text, prompt, str(path))
        tokenizer.check_added(path.with_name(SETTINGS))
        return tokenizer

    def check_added(self, path: Path) -> None:
        """Tokens that were added to a SentencePiece model stand beside it. Raises: CheckpointError if it lacks one."""
        added = read_mapping(path).get("added_tokens_decoder") if path.is_file() else None
        for number, token in added.items() if isinstance(added, dict) else ():
            name = token.get("content") if isinstance(token, dict) else token
            if str(self.backend.token_to_id(str(name))) != number:
                raise CheckpointError(
                    f"{path}: {name!r} was added to {SENTENCEPIECE} as {number}; write a {FILE_NAME} with transformers:"
                    " AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
                )

    def save(self, folder: str | Path) -> Path:
        """Write tokenizer.json, one value a line, so that a change shows as what it is."""
        text = json.dumps(json.loads(self.backend.to_str()), ensure_ascii=False, indent=1)
        return write_text(Path(folder) / FILE_NAME, text + "\n")

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no bos or eos. Raises: InputError for lone surrogates."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters of `text` it covers, as (start, end)."""
        if text in self.cache:
            ids, offsets = self.cache[text]
            return list(ids), list(offsets)
        check_text(text)
        encoding = self.backend.encode(text, add_special_tokens=False)
        ids, offsets = self.as_text(encoding.ids, encoding.offsets)
        if len(text) <= 64 and len(self.cache) < 4096:  # "</img><img>" stands a thousand times in a prompt
            self.cache[text] = (list(ids), list(offsets))
        return ids, offsets

    def as_text(self, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Special ids out of plain text, spelled in characters and bytes.

        A Unigram model whose vocabulary lists its special tokens matches them in any text.
        """
        if not any(number in self.spelled for number in ids):
            return ids, offsets
        pairs = [(piece, span) for number, span in zip(ids, offsets) for piece in self.spelled.get(number, [number])]
        return [piece for piece, _ in pairs], [span for _, span in pairs]

    def spell(self, name: str) -> list[int]:
        """`name` as single characters of the vocabulary, or their UTF-8 bytes."""
        ids = []
        for character in name:
            number = self.backend.token_to_id(character)
            options = [number] if number is not None else [
                self.backend.token_to_id(f"<0x{byte:02X}>") for byte in character.encode("utf-8")
            ]  # fmt: skip
            ids += [option for option in options if option is not None]
        return ids

    def split_specials(self, markup: str) -> list[str | int]:
        """Template text as strings and ids of the special tokens it names. Never for a person's text."""
        parts: list[str | int] = []
        position = 0
        for match in self.specials.finditer(markup):
            parts += [markup[position : match.start()], self.special_ids[match.group()]]
            position = match.end()
        return [part for part in (*parts, markup[position:]) if part != ""]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=True)


def check_text(text: str, what: str = "text") -> None:
    if not isinstance(text, str):
        raise InputError(f"{what}: expected a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what}: character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X}), not"
            " Unicode text; decode the source with its right encoding"
        ) from None
