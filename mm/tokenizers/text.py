"""Text to token ids and back: byte-level BPE, so every text of every language has ids and comes back whole.

Source: https://arxiv.org/abs/1508.07909 (BPE), on the ``tokenizers`` library.
"""

import gzip
import html
import importlib.util
import json
import os
import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from mm.errors import UserError
from mm.types import TextBatch

# Loader workers are forked processes, in which the library's own threads would not survive.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FORMAT = "mm-text-tokenizer-1"
MAX_FILE_BYTES = 64 << 20
PAD, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unk>"
NUM_BYTES = 256

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
CLIP_VOCAB_SIZE = 49408
CLIP_WORD_END = "</w>"
CLIP_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
"""Contractions, words, single digits and runs of the rest. The original's pattern loses U+0345, so this one does too."""


@dataclass(frozen=True)
class Cleaning:
    """What happens to a text before it is split, in this order; stored with the vocabulary.

    Args:
        repair: Undo wrong decodings and HTML escapes (CLIP does).
        whitespace: Every run of whitespace becomes one space; none at the ends.
        lowercase: Unicode lower case.
        nfc: Compose characters, so that a letter has the same ids however it was typed.
        punctuation: Keep ASCII punctuation; False deletes it, after underscores have become spaces (SigLIP).
    """

    repair: bool = False
    whitespace: bool = True
    lowercase: bool = True
    nfc: bool = True
    punctuation: bool = True

    def __call__(self, text: str) -> str:
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate has no UTF-8 form
        if self.repair:
            text = _repair(text)
        if not self.punctuation:
            text = text.replace("_", " ").translate(NO_PUNCTUATION)
        if self.whitespace:
            text = " ".join(text.split())
        if self.lowercase:
            text = text.lower()
        return unicodedata.normalize("NFC", text) if self.nfc else text


class TextTokenizer:
    """Makes batches of ids; can be pickled, also into loader workers.

    The names of special tokens are ordinary characters in a text: no caption can end itself early.

    Args:
        tokenizer: Splits cleaned text; adds no special tokens.
        cleaning: Done before.
        start: Id put before a text, None for none.
        end: Id put behind a text, also where it was cut; None for none.
        pad: Id that fills up a batch.
    """

    def __init__(self, tokenizer: Tokenizer, *, cleaning: Cleaning, start: int | None, end: int | None, pad: int) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self.cleaning = cleaning
        self.start, self.end, self.pad = start, end, pad

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self._tokenizer.get_vocab_size()

    def id_of(self, token: str) -> int | None:
        """The id of a piece of the vocabulary, special ones included; None where there is no such piece."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end."""
        return self._tokenizer.encode(self.cleaning(text), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text that has these ids, up to the first end token; spaces at its ends are not kept."""
        ids = list(ids)
        if ids and ids[0] == self.start:  # which may be the token that ends a text, too
            ids = ids[1:]
        if self.end is not None and self.end in ids:
            ids = ids[: ids.index(self.end)]
        return self._tokenizer.decode([i for i in ids if i != self.start], skip_special_tokens=False).strip()

    def __call__(self, texts: Sequence[str], context_length: int, *, words: bool = False) -> TextBatch:
        """Ids and lengths of texts, padded to the longest of them.

        Args:
            texts: Any number of texts.
            context_length: Longest row, start and end included; longer texts are cut, their last id is still the end token.
            words: Also number the words: what the tokenizer takes apart before it looks for pieces. Punctuation is apart.
        """
        if context_length < 3:
            raise UserError(f"context_length {context_length} leaves no room between start and end; use at least 3")
        encode = self._tokenizer.encode_batch if words else self._tokenizer.encode_batch_fast
        encoded = encode([self.cleaning(text) for text in texts], add_special_tokens=False)
        before, behind = ([] if i is None else [i] for i in (self.start, self.end))
        room = context_length - len(before) - len(behind)
        rows = [[*before, *row.ids[:room], *behind] for row in encoded]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        ids = _padded(rows, lengths, self.pad)
        if not words:
            return TextBatch(ids, lengths)
        numbers = [[*(0 for _ in before), *(number or 0 for number in row.word_ids[:room])] for row in encoded]
        return TextBatch(ids, lengths, _padded(numbers, lengths, 0))

    def words(self, text: str, context_length: int) -> list[tuple[str, tuple[int, ...]]]:
        """The words of a cleaned text, with the positions of their pieces in the row that ``self([text], context_length)`` is.

        Words are what whitespace separates, without punctuation around them. Left out are words of which nothing fits into the
        row; pieces that hold nothing of a word (punctuation, spaces) belong to none.
        """
        text = self.cleaning(text)
        before, behind = (int(token is not None) for token in (self.start, self.end))
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets[: context_length - before - behind]
        word_of = {}
        spans = [_without_punctuation(text, *match.span()) for match in re.finditer(r"\S+", text)]
        for number, (start, end) in enumerate(spans):
            word_of |= dict.fromkeys(range(start, end), number)
        pieces: dict[int, list[int]] = {}
        for position, (start, end) in enumerate(offsets, start=before):
            for number in sorted({word_of[place] for place in range(start, end) if place in word_of}):
                pieces.setdefault(number, []).append(position)
        return [(text[slice(*spans[number])], tuple(places)) for number, places in sorted(pieces.items())]

    def without_start(self) -> "TextTokenizer":
        """The same, but nothing is put before a text."""
        return TextTokenizer(self._tokenizer, cleaning=self.cleaning, start=None, end=self.end, pad=self.pad)

    def to_json(self) -> str:
        """Everything as JSON text; equal tokenizers give equal texts."""
        content = {
            "format": FORMAT,
            "cleaning": asdict(self.cleaning),
            "start": self.start,
            "end": self.end,
            "pad": self.pad,
            "tokenizer": json.loads(self._tokenizer.to_str()),
        }
        return json.dumps(content, ensure_ascii=False)

    def save(self, path: Path) -> None:
        """Write `to_json` to a file."""
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Read what `save` wrote. Raises `UserError` for anything else."""
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            tokenizer = Tokenizer.from_str(json.dumps(content["tokenizer"]))
            special = {name: content[name] for name in ("start", "end", "pad")}
            if not all(_is_id(i, tokenizer) or (i is None and name != "pad") for name, i in special.items()):
                raise ValueError(f"special ids {special} are not in the vocabulary")
            return cls(tokenizer, cleaning=Cleaning(**content["cleaning"]), **special)
        except Exception as error:  # the library raises plain Exception for a damaged vocabulary
            raise UserError(f"{path}: cannot be read as a text tokenizer: {error!r}; train or save the model again") from None

    @classmethod
    def from_file(cls, path: Path, *, pad: int, cleaning: Cleaning, end: int | None = None) -> "TextTokenizer":
        """Take over a ``tokenizer.json`` of the tokenizers library, as Hugging Face checkpoints bring it.

        Start and end are what the file itself puts around an empty text.

        Args:
            path: The file.
            pad: Id that fills up a batch.
            cleaning: What the checkpoint's publisher does to a text before this file's own normalisation.
            end: Id to put behind a text instead of the file's own.

        Raises:
            UserError: Unreadable, or special tokens that are not at most one before and one behind a text.
        """
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a damaged file
            raise UserError(f"{path}: cannot be read as a tokenizer: {error}; download the checkpoint again") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        probe = tokenizer.encode("a").ids
        plain = tokenizer.encode("a", add_special_tokens=False).ids
        places = [i for i in range(len(probe) - len(plain) + 1) if probe[i : i + len(plain)] == plain]
        if not places or places[0] > 1 or len(probe) - len(plain) - places[0] > 1:
            raise UserError(f"{path}: puts more than one special token before or behind a text; that is not supported")
        before, behind = probe[: places[0]], probe[places[0] + len(plain) :]
        own_end = behind[0] if behind else None
        return cls(
            tokenizer, cleaning=cleaning, start=before[0] if before else None, end=own_end if end is None else end, pad=pad
        )

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int, *, cleaning: Cleaning | None = None) -> "TextTokenizer":
        """Learn a vocabulary; the same texts, in any order, give the same file.

        Args:
            texts: As many as there are; each is cleaned first.
            vocab_size: Upper bound, at least 259 (256 bytes and three special tokens); pairs seen only once are not merged.
            cleaning: As in `Cleaning` if None.
        """
        smallest = NUM_BYTES + len((PAD, START, END))
        if vocab_size < smallest:
            raise UserError(f"vocab_size {vocab_size}: 256 bytes and three special tokens need at least {smallest}")
        cleaning = Cleaning() if cleaning is None else cleaning
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[PAD, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((cleaning(text) for text in texts), trainer)
        return cls(tokenizer, cleaning=cleaning, pad=0, start=1, end=2)

    @classmethod
    def train_characters(cls, texts: Iterable[str]) -> "TextTokenizer":
        """The characters of texts as they are spoken: letters and digits with a space between words, in lower case, of which
        nothing else is left. For recognition of speech: the padding, id 0, stands for no character; there is no start or end.

        Args:
            texts: As many as there are.
        """
        cleaning = Cleaning()
        spoken = _spoken()
        found = {character for text in texts for character in spoken.normalize_str(cleaning(text))}
        return cls.of_characters([PAD, UNKNOWN, *sorted(found)], pad=0, cleaning=cleaning, normalizer=spoken)

    @classmethod
    def of_characters(
        cls,
        vocabulary: Sequence[str],
        *,
        pad: int,
        cleaning: Cleaning,
        unknown: str = UNKNOWN,
        normalizer: normalizers.Normalizer | None = None,
    ) -> "TextTokenizer":
        """A token for each character of a text.

        Args:
            vocabulary: Characters, and special tokens of more than one, in the order of their ids.
            pad: Id that fills up a batch.
            cleaning: What happens to a text first.
            unknown: Stands for all other characters.
            normalizer: What happens to a text then.
        """
        tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        return cls(tokenizer, cleaning=cleaning, start=None, end=None, pad=pad)

    @classmethod
    def clip_bpe(cls) -> "TextTokenizer":
        """The tokenizer of OpenAI's CLIP, with the ids of ``open_clip.tokenizer.SimpleTokenizer``.

        Texts that spell out a special token, ``<end_of_text>``, differ on purpose. Raises `UserError` where open_clip, which
        brings the vocabulary, is not installed.
        """
        merges = _clip_merges()
        alphabet = [chr(point) for point in _byte_characters()]
        tokens = [*alphabet, *(character + CLIP_WORD_END for character in alphabet), *map("".join, merges)]
        tokens += ["<start_of_text>", "<end_of_text>"]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=CLIP_WORD_END))
        words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(CLIP_WORD_END, " ")])
        cleaning = Cleaning(repair=True, nfc=False)
        return cls(tokenizer, cleaning=cleaning, start=CLIP_VOCAB_SIZE - 2, end=CLIP_VOCAB_SIZE - 1, pad=0)

    def __reduce__(self) -> tuple[Any, ...]:
        # Built anew, because the library's own pickle forgets encode_special_tokens.
        return _rebuild, (self._tokenizer.to_str(), self.cleaning, self.start, self.end, self.pad)


def _padded(rows: Sequence[Sequence[int]], lengths: Tensor, pad: int) -> Tensor:
    """Rows of numbers as one tensor, as long as the longest of ``lengths``."""
    result = torch.full((len(rows), max(lengths.tolist(), default=0)), pad, dtype=torch.int64)
    for row, values in zip(result, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.int64)
    return result


def _without_punctuation(text: str, start: int, end: int) -> tuple[int, int]:
    """The range without the punctuation at its ends; empty where there is nothing else."""
    while start < end and unicodedata.category(text[start]).startswith("P"):
        start += 1
    while start < end and unicodedata.category(text[end - 1]).startswith("P"):
        end -= 1
    return start, end


def _spoken() -> normalizers.Normalizer:
    """Leaves letters and digits alone: apostrophes go, whatever else stands between words becomes a space."""
    return normalizers.Sequence(
        [
            normalizers.Replace(Regex("['\u2019]"), ""),
            normalizers.Replace(Regex(r"[^\p{L}\p{M}\p{N}]+"), " "),
            normalizers.Strip(),
        ]
    )


def _is_id(value: Any, tokenizer: Tokenizer) -> bool:
    return isinstance(value, int) and 0 <= value < tokenizer.get_vocab_size()


def _rebuild(tokenizer: str, cleaning: Cleaning, start: int | None, end: int | None, pad: int) -> TextTokenizer:
    return TextTokenizer(Tokenizer.from_str(tokenizer), cleaning=cleaning, start=start, end=end, pad=pad)


def _repair(text: str) -> str:
    if text.isascii() and text.isprintable() and "&" not in text:
        return text  # nothing to repair, and the check is a hundred times faster than the repair
    try:
        import ftfy
    except ImportError:
        raise UserError('CLIP\'s text cleaning needs ftfy; install it with: pip install "mm-suite[hub]"') from None
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _clip_merges() -> list[tuple[str, str]]:
    """The merges that CLIP uses: the file's first line is a title, and it lists more than the vocabulary has room for."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise UserError('CLIP\'s vocabulary comes with open_clip; install it with: pip install "mm-suite[hub]"')
    path = Path(package.submodule_search_locations[0]) / CLIP_VOCABULARY
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    pairs = (line.split() for line in lines[1 : CLIP_VOCAB_SIZE - 2 * NUM_BYTES - 1])
    return [(first, second) for first, second in pairs]


def _byte_characters() -> list[int]:
    """Code points that stand for the bytes, in the order of CLIP's vocabulary: printable Latin-1 first, then the others."""
    printable = [byte for byte in range(NUM_BYTES) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174]
    return printable + [NUM_BYTES + i for i in range(NUM_BYTES - len(printable))]
