"""Captions to words, as the Penn Treebank splits them and as COCO's evaluation then cleans them: lower case, no punctuation.

What pycocoevalcap gets from Stanford's PTBTokenizer 3.4.1 (https://nlp.stanford.edu/software/tokenizer.html), without Java: of
all kinds of token that fit at a place the longest is taken. Its quirks are kept, because figures are comparable only so: round
and square brackets become the words ``-lrb-`` and ``-lsb-``, ``?!`` is a word, pictographs vanish. Not covered are tokens with
a space in them (``1 1/2``), rare smileys and all but the usual abbreviations.

One thing differs on purpose: Chinese and Japanese, which have no spaces, are split into characters.
"""

import re
from functools import lru_cache

PUNCTUATION = frozenset(('"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""Tokens that are not counted. The evaluation lists ``-LRB-`` and its like, too, but meets them in lower case."""

TOKENIZER = "PTB words in lower case without punctuation (as pycocoevalcap), Chinese and Japanese by characters"
"""What protocols say."""

MAX_CHUNKS = 1 << 16
"""Strings between spaces whose words are remembered."""

_LIKE = str.maketrans(
    {"‘": "`", "’": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "–": "--", "—": "--", "…": "...", "\u00ad": ""}
    | {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "€": "$", "£": "#"}
)
"""What is written as something else before it is split, as the tokenizer writes it afterwards."""
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'"}

_RUN = re.compile(r"-{2,}|\.{3,}")
"""Tokens that are one with the shortest of their kind."""

_CHARACTER = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_BEYOND = re.compile(r"[\U00010000-\U0010ffff\ufe0e\ufe0f]")
"""Above the basic plane, and the marks that choose between text and picture: the tokenizer deletes them."""

_MARKS = r"\u0300-\u036f\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0d7f\u0e30-\u0e4e\u200c\u200d"
"""Vowel signs and accents that are characters of their own, which Python's classes do not count as part of a word."""

_L = rf"(?:[^\W\d_]|[{_MARKS}])"
_A = rf"(?:[^\W_]|[{_MARKS}])"
_NUM = r"(?:\d+(?:[.:,]\d+)*|(?:[.,]\d+)+)"
_WORD = rf"{_L}{_A}*(?:[.!?]{_L}{_A}*)*"
_THING = rf"(?:[dol]'{_A})?(?:[-+]?{_NUM}(?!{_A})|{_A}+)(?:-(?:[dol]'{_A})?(?:{_NUM}(?!{_A})|{_A}+))*"
_ABBREVIATIONS = (
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|inc|cos?|corp|ltd|jr|sr|bros|ph\\.d|esq|etc|al|"
    "mrs?|ms|drs?|profs?|sens?|reps?|lt|col|gen|govs?|rev|maj|sgt|capt|st|ste|ave|pres|hon|mt|ft|dept|blvd|rd|vs"
)
_NUMBERED = r"(?:nos?|figs?|vols?|ca|pp?|chs?|approx)\."
"""Abbreviations only before a number."""
_TOKENS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"</?[a-z][a-z0-9]*>",
        r"(?:https?|ftp)://[^\s<>|()]+[^\s<>|.!?,;:&\"'()\-]",
        r"(?:[^\s\"`'<>|.!?(){},:/$]+\.)+(?:com|net|org|edu)(?![a-z])",
        r"[a-z0-9._%+\-]+@[a-z0-9][a-z0-9.\-]*[a-z0-9]",
        r"@[a-z_]\w*",
        rf"#{_L}\w*{_A}",
        # a word before what hangs on it: the group is the token, the whole says how well it fits
        rf"(can)not(?!{_L})|(gon|wan)na(?!{_L})|(got)ta(?!{_L})|(lem|gim)me(?!{_L})|('t)(?:is|was)(?!{_L})",
        rf"({_L}*(?!n){_L})n't(?![a-z])|(n't)(?![a-z])",
        rf"({_THING})'(?:s|m|d|re|ve|ll)(?![a-z])",
        r"'(?:s|m|d|re|ve|ll|em|til|till|cause)(?![a-z])|'n(?:'|(?![a-z]))|'\d0s",
        _WORD,
        rf"({_WORD}\.)[,;:]",
        _THING,
        rf"[-+]?{_NUM}",
        rf"{_A}+(?:-{_L}+){{0,2}}(?:/{_A}+(?:-{_L}+){{0,2}}){{1,2}}",
        rf"{_A}(?:{_A}|[.,])*(?:[-_]{_A}+(?:\.\d+)?)+",
        rf"{_L}+[aeiouy]'[aeiou]{_L}*|ma'am|c'mon|(?:y|ol)'|(?-i:[A-HJ-XZ])'{_L}{_L}+|(?-i:[A-Z]+(?:&[A-Z]+)+)",
        rf"(?:{_ABBREVIATIONS})\.|[a-z](?:\.[a-z])*\.|{_NUMBERED}(?=\d)",
        r"\.{3,}|-{2,}|[?!]+|\*+|_+|#+|@+|<<|>>",
        r"[<>]?[:;=][-o*']?[()dpo\\{@|\[\]](?![a-z])",
        r"``|''|c\+\+|c#|(?:anti|pro)-",
        r".",
    )
)


def words(caption: str) -> list[str]:
    """The words of a caption that count, in lower case; none where it is empty or nothing but punctuation."""
    text = _BEYOND.sub("", caption.translate(_LIKE))
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    chunks = _CHARACTER.sub(r" \1 ", text).split()
    found: list[str] = []
    for chunk, following in zip(chunks, (*chunks[1:], ""), strict=False):
        numbered = following[:1].isdigit() and re.fullmatch(_NUMBERED, chunk, re.IGNORECASE)
        found += (chunk.lower(),) if numbered else _chunk_words(chunk)
    return found


@lru_cache(MAX_CHUNKS)
def _chunk_words(chunk: str) -> tuple[str, ...]:
    """The words of what stands between two spaces."""
    found: list[str] = []
    place = 0
    while place < len(chunk):
        fitting = [one for pattern in _TOKENS if (one := pattern.match(chunk, place)) is not None]
        longest = max(fitting, key=lambda one: one.end())
        token = longest[longest.lastindex or 0]
        place += len(token)
        found.append(token)
    cleaned = (token.lower().translate(_BRACKETS) for token in found)
    return tuple(token for token in cleaned if token not in PUNCTUATION and not _RUN.fullmatch(token))
