"""BERT in the suite's terms: its weights under the names of ALBEF's network, its word pieces as a text tokenizer.

Sources: https://arxiv.org/abs/1810.04805, https://github.com/huggingface/transformers (formats of weights and vocabularies).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from mm.errors import CheckpointError
from mm.published.imported import put
from mm.tokenizers.text import MAX_FILE_BYTES, Cleaning, TextTokenizer

PAD, UNKNOWN, START, END, HIDDEN = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
HEAD = "cls.predictions."
NORM_EPS = 1e-12

BLOCK_PARTS = {
    "attention.self.query": "attention.query",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_residual.norm",
    "intermediate.dense": "feed_forward.input",
    "output.dense": "feed_forward.output",
    "output.LayerNorm": "feed_forward_residual.norm",
}
CROSS_PARTS = {
    "crossattention.self.query": "cross_attention.query",
    "crossattention.output.dense": "cross_attention.output",
    "crossattention.output.LayerNorm": "cross_attention_residual.norm",
}
ATTENTIONS = {"attention": "attention.key_value", "crossattention": "cross_attention.key_value"}
"""Where keys and values are one layer."""

OLD_KINDS = {"gamma": "weight", "beta": "bias"}
"""Of the norms in the oldest files."""


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under one set of names, whether BERT was saved alone or below the heads that it was trained with."""
    result = {}
    for name, tensor in state.items():
        layer, _, kind = name.removeprefix("bert.").rpartition(".")
        result[f"{layer}.{OLD_KINDS.get(kind, kind)}"] = tensor
    return result


def layer_numbers(state: Mapping[str, Tensor], part: str) -> list[int]:
    """The numbers of the layers that have a part, ``attention`` or ``crossattention``; plain names."""
    places = (name.split(".") for name in state if name.startswith("encoder.layer."))
    return sorted({int(place[2]) for place in places if place[3] == part})


def has_head(state: Mapping[str, Tensor]) -> bool:
    """Whether there is a head that predicts words; plain names."""
    return f"{HEAD}bias" in state


def bert_weights(state: Mapping[str, Tensor], *, text_layers: int, hidden: int, where: str) -> dict[str, Tensor]:
    """Weights of the words, under the names of `mm.systems.albef.Albef`.

    Every text is of BERT's first type, so that type's vector is added to the positions. BERT has a word for what is hidden, the
    suite an id behind all words; that one begins with the same vector.

    Args:
        state: Plain names, see `plain_names`.
        text_layers: Layers over words alone; those that follow are the fusion's.
        hidden: Id of BERT's word for a hidden one.
        where: Name for messages.

    Raises:
        KeyError: A weight is missing.
        CheckpointError: Words are predicted by other vectors than they come in with.
    """
    words, positions = state["embeddings.word_embeddings.weight"], state["embeddings.position_embeddings.weight"]
    text = {
        "embedding.tokens.weight": torch.cat([words, words[hidden][None]]),
        "embedding.positions.weight": positions + state["embeddings.token_type_embeddings.weight"][0],
        "embedding.norm.weight": state["embeddings.LayerNorm.weight"],
        "embedding.norm.bias": state["embeddings.LayerNorm.bias"],
    }
    fusion = {}
    for layer in layer_numbers(state, "attention"):
        if layer < text_layers:
            text |= put(_block(state, layer), f"transformer.blocks.{layer}.")
        else:
            fusion |= put(_block(state, layer), f"transformer.blocks.{layer - text_layers}.")
    head = {}
    if has_head(state):
        if not torch.equal(state.get(f"{HEAD}decoder.weight", words), words):
            raise CheckpointError(f"{where}: predicts words by other vectors than they come in with; that is not supported")
        for ours, theirs in (("masked_head.0", "transform.dense"), ("masked_head.2", "transform.LayerNorm")):
            head |= {f"{ours}.{kind}": state[f"{HEAD}{theirs}.{kind}"] for kind in ("weight", "bias")}
        head["word_bias"] = state[f"{HEAD}bias"]
    return put(put(text, "towers.encoders.text.") | put(fusion, "fusion.") | head, "network.")


def _block(state: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """A layer under the names of `mm.nn.transformer.Block`."""
    prefix, result = f"encoder.layer.{layer}.", {}
    crossed = f"{prefix}crossattention.self.query.weight" in state
    for kind in ("weight", "bias"):
        for theirs, ours in (BLOCK_PARTS | CROSS_PARTS if crossed else BLOCK_PARTS).items():
            result[f"{ours}.{kind}"] = state[f"{prefix}{theirs}.{kind}"]
        for theirs, ours in ATTENTIONS.items():
            if crossed or theirs == "attention":
                pair = [state[f"{prefix}{theirs}.self.{side}.{kind}"] for side in ("key", "value")]
                result[f"{ours}.{kind}"] = torch.cat(pair)
    return result


def word_pieces(
    path: Path, cleaning: Cleaning, *, lowercase: bool = True, before: Sequence[normalizers.Normalizer] = ()
) -> TextTokenizer:
    """BERT's tokenizer from its ``vocab.txt``, a word a line.

    Args:
        path: The file.
        cleaning: Of the suite's kind, done first.
        lowercase: Whether the words are in lower case, without accents.
        before: Done to a text before BERT's own normalisation.

    Raises:
        CheckpointError: Unreadable, a word is there twice, or a special one is missing.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as a vocabulary: {error}; take the vocab.txt of BERT") from None
    vocabulary = {word: i for i, word in enumerate(lines)}
    missing = [word for word in (PAD, UNKNOWN, START, END, HIDDEN) if word not in vocabulary]
    if missing or len(vocabulary) != len(lines):
        fault = f"has no {missing[0]}" if missing else "has a word twice"
        raise CheckpointError(f"{path}: no vocabulary of BERT, it {fault}; take its vocab.txt")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.BertNormalizer(lowercase=lowercase)])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return TextTokenizer(tokenizer, cleaning=cleaning, start=vocabulary[START], end=vocabulary[END], pad=vocabulary[PAD])
