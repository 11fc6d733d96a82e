"""nano's tokenizer, made from the world's words: every name of a thing is one token.

    python -m longllava.data.worlds.tokenizer            # writes longllava/assets/nano/tokenizer.json

A Unigram model over bytes, without splitting at spaces: the segmentation of fewest pieces wins, so
"water buffalo" is one token and "water buffalos" two. Every byte is a piece: any text comes back as it was.
Each line begins with a space of the tokenizer's own, so that a word is the same token at the start of a line
and inside it; decoding takes it away again.
"""

from __future__ import annotations

import json
from pathlib import Path

from longllava.config import PromptConfig
from longllava.data.worlds import questions, words
from longllava.data.worlds.render import COLOUR_NAMES, PLACES
from longllava.data.worlds.sheets import things
from longllava.files import write_text

PATH = Path(__file__).parents[2] / "assets" / "nano" / "tokenizer.json"
# More words for text about the world, beside those of the questions' wordings.
WORDS = """
a an and are as at be both but by can do does find for from has have here how I in into is it its kind like
many me more much my next no none not number of on one or other out picture pictures say see show shows so
some tell than that the their them then there these they thing things this those to too up us was we what
where which who why with word words write yes you your after again all also any before between come comes
count describe each else every first follow following last list look name names nothing only order please
put read same second seen shown sort third two three about another called known neither either belong
belongs repeat false true correct wrong image images photo answer question video frame tile row column left
right top bottom middle corner centre side big small new old few
""".split()
PUNCTUATION = [".", ",", "?", "!", ":", ";", "...", " -", " (", ")", "'s", "s", "es", '"', ' "']
# Scores: a path's is the sum of its pieces', so one long piece beats any two, and bytes are a last resort.
WHOLE, BYTE, NEVER = -1.0, -10.0, -100_000.0


def byte_characters() -> dict[int, str]:
    """Each byte as one printable character, as `tokenizers` spells bytes (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def spelled(text: str) -> str:
    table = byte_characters()
    return "".join(table[byte] for byte in text.encode("utf-8"))


def wording_words() -> list[str]:
    """Every word that a question's wording holds, without its punctuation."""
    found: list[str] = []
    for value in vars(questions).values():
        for wordings in value.values() if isinstance(value, dict) else [value]:
            if isinstance(wordings, tuple):
                found += " ".join(map(str, wordings)).replace("{}", " ").split()
    return [word.strip(".,?") for word in found]


def pieces() -> list[str]:
    """Every piece that is more than a byte, as text; the order is part of the format (it gives the ids)."""
    prompt = PromptConfig()
    marks = (prompt.image_open, prompt.image_close, prompt.video_open, prompt.video_close, prompt.frame_join)
    layout = [f" {prompt.user}", f" {prompt.assistant}", *marks, *(f" {mark}" for mark in marks)]
    names = [thing.name for thing in things()]
    values = [*words.DIGITS, *COLOUR_NAMES, *PLACES, *words.COUNTS, *words.ORDINALS]
    values += [*words.GROUPS, *words.GROUPS_PLURAL.values()]
    vocabulary = [*wording_words(), *WORDS]
    vocabulary += [word.capitalize() for word in vocabulary]
    vocabulary += [word for name in names for word in name.split()]
    spaced = [f" {word}" for word in (*values, *names, *vocabulary) if word]
    found = [*layout, *PUNCTUATION, *spaced]
    return [piece for piece in dict.fromkeys(found) if len(piece.encode("utf-8")) > 1]


def build_tokenizer() -> str:
    """The text of tokenizer.json; the same bytes on every machine."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import ByteLevel

    prompt = PromptConfig()
    specials = [prompt.pad_token, prompt.bos_token, prompt.eos_token]
    vocabulary = [(token, NEVER) for token in specials]
    for byte, character in byte_characters().items():
        vocabulary.append((character, WHOLE if chr(byte) in PUNCTUATION or chr(byte) == "\n" else BYTE))
    vocabulary += [(spelled(piece), WHOLE) for piece in pieces()]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=None, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend(" "),
        normalizers.Replace(Regex(r"\A \n"), "\n"),
        normalizers.Replace(Regex(r"\n(?=[^\n])"), "\n "),
    ])  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.Sequence([
        decoders.ByteLevel(), decoders.Replace("\n ", "\n"), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1) + "\n"


def main() -> None:
    text = build_tokenizer()
    write_text(PATH, text)
    print(f"{PATH}: {len(json.loads(text)['model']['vocab'])} pieces, {len(text) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
