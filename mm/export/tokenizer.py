"""The suite's tokenizers as a ``tokenizer.json`` that the tokenizers library and transformers read on their own."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, processors

from mm.errors import UserError
from mm.export.towers import Towers
from mm.processor import TOKENIZER_FILE
from mm.tokenizers.text import CLIP_VOCAB_SIZE, Cleaning, TextTokenizer

SETTINGS_FILE = "tokenizer_config.json"

SPACES = r"[\s\x1c-\x1f\x85]+"
"""What Python's ``str.split`` takes for whitespace."""

PUNCTUATION = r"[!-/:-@\[-`{-~]"

CLIP_NAMES = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
"""How transformers spells the special tokens of OpenAI's CLIP."""

SAMPLES = (
    "a photo of a cat",
    "  Two   red HEARTS,\tand a blue_one!  ",
    "smiling face with open mouth & cold sweat",
    "été 漢字",
    "",
)
"""What a written tokenizer is compared on."""


def is_clip(tokenizer: TextTokenizer) -> bool:
    """Whether this is the vocabulary and the cleaning of OpenAI's CLIP."""
    return tokenizer.vocab_size == CLIP_VOCAB_SIZE and tokenizer.to_json() == TextTokenizer.clip_bpe().to_json()


def write_preparation(towers: Towers, folder: Path) -> None:
    """Write ``processor.json`` (geometry of the pictures, context length, templates) and a plain ``tokenizer.json``."""
    towers.processor.save(folder)
    length = towers.context_length if towers.fixed_length else None
    limit = towers.processor.context_length
    plain = plain_tokenizer(towers.processor.tokenizer, limit, fill=length)
    require_same_ids(towers, lambda text: [i for i, real in zip(*_row(plain, text), strict=True) if real], "onnx or torch")
    plain.save(str(folder / TOKENIZER_FILE))


def _row(plain: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    row = plain.encode(text)
    return row.ids, row.attention_mask


def require_same_ids(
    towers: Towers, encode: Callable[[str], list[int]], to: str, exchange: Mapping[int, int] = MappingProxyType({})
) -> None:
    """Compare a written tokenizer with the model's own on `SAMPLES`.

    Args:
        towers: With the reference.
        encode: Text to ids, start and end included.
        to: Name of the export for the message.
        exchange: Ids that were given another number on purpose.

    Raises:
        UserError: An id differs.
    """
    for sample in SAMPLES:
        expected = [exchange.get(i, i) for i in towers.processor.text([sample]).ids[0].tolist()]
        if encode(sample) != expected:
            raise UserError(f"export to {to}: its tokenizer cannot be written, it would give other tokens for {sample!r}")


def plain_tokenizer(tokenizer: TextTokenizer, context_length: int, *, fill: int | None = None) -> Tokenizer:
    """A tokenizer that gives the ids of `TextTokenizer` by itself: cleaning, start and end, cut and padding included.

    Only CLIP's repair of wrongly decoded text has no counterpart there (`mm.export.towers.REPAIR`).

    Args:
        tokenizer: The suite's.
        context_length: Longest row.
        fill: Pad to this many ids; None pads to the longest row of a batch.
    """
    plain = _cleaned(_content(tokenizer), tokenizer.cleaning, {})
    _surround(plain, tokenizer.start, tokenizer.end)
    plain.enable_truncation(context_length)
    plain.enable_padding(pad_id=tokenizer.pad, pad_token=str(plain.id_to_token(tokenizer.pad)), length=fill)
    return plain


def write_transformers(
    tokenizer: TextTokenizer, folder: Path, context_length: int, *, pad: int, swapped: tuple[int, int] | None = None
) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for transformers' ``AutoTokenizer``.

    Args:
        tokenizer: The suite's.
        folder: Where to.
        context_length: Longest row.
        pad: Id of the padding.
        swapped: Two ids that are exchanged.
    """
    content = _content(tokenizer)
    exchange = {} if swapped is None else {swapped[0]: swapped[1], swapped[1]: swapped[0]}
    plain = _cleaned(content, tokenizer.cleaning, exchange)
    start, end = (None if i is None else exchange.get(i, i) for i in (tokenizer.start, tokenizer.end))
    _surround(plain, start, end)
    plain.save(str(folder / TOKENIZER_FILE))
    named = {"bos_token": start, "eos_token": end, "pad_token": exchange.get(pad, pad)}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: plain.id_to_token(i) for name, i in named.items() if i is not None},
        "model_max_length": context_length,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def padding(tokenizer: TextTokenizer) -> int:
    """Id to pad with where padding is not seen: the vocabulary's own padding token, else the end token.

    CLIP pads with the id of an exclamation mark, which transformers would then take for padding in every text.
    """
    special = {token["id"] for token in _content(tokenizer)["added_tokens"] if token["special"]}
    return tokenizer.pad if tokenizer.pad in special or tokenizer.end is None else tokenizer.end


def _content(tokenizer: TextTokenizer) -> dict[str, Any]:
    """The tokenizers library's own part of a saved tokenizer; CLIP's special tokens in transformers' spelling."""
    content = json.loads(tokenizer.to_json())["tokenizer"]
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        content["model"]["vocab"] = {CLIP_NAMES.get(token, token): i for token, i in vocabulary.items()}
    return content


def _cleaned(content: dict[str, Any], cleaning: Cleaning, exchange: Mapping[int, int]) -> Tokenizer:
    """A tokenizer that cleans first, to which special tokens are characters like any others."""
    model = content["model"]
    if exchange:
        model = {**model, "vocab": {token: exchange.get(i, i) for token, i in model["vocab"].items()}}
    known = set(model["vocab"]) if isinstance(model["vocab"], dict) else {token for token, _ in model["vocab"]}
    added = [token for token in content["added_tokens"] if not (token["special"] and token["content"] in known)]
    plain = Tokenizer.from_str(json.dumps({**content, "model": model, "added_tokens": added}))
    steps = _steps(cleaning) + ([] if plain.normalizer is None else [plain.normalizer])
    if steps:
        plain.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return plain


def _steps(cleaning: Cleaning) -> list[Any]:
    """`Cleaning` in the library's terms, in the same order."""
    steps: list[Any] = []
    if not cleaning.punctuation:
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(PUNCTUATION), "")]
    if cleaning.whitespace:
        steps += [normalizers.Replace(Regex(SPACES), " "), normalizers.Strip()]
    if cleaning.lowercase:
        steps.append(normalizers.Lowercase())
    if cleaning.nfc:
        steps.append(normalizers.NFC())
    return steps


def _surround(plain: Tokenizer, start: int | None, end: int | None) -> None:
    """Put start and end around every text, and nothing else."""
    before, behind = ([] if i is None else [(str(plain.id_to_token(i)), i)] for i in (start, end))
    pieces = [*(token for token, _ in before), "$A", *(token for token, _ in behind)]
    template = processors.TemplateProcessing(single=pieces, special_tokens=[*before, *behind])
    plain.post_processor = template  # pyright: ignore[reportAttributeAccessIssue]
