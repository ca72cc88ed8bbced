"""Checkpoints of ALBEF's authors: the configuration is read off the shapes of the weights.

Source: https://github.com/salesforce/ALBEF (formats of its weights and texts), https://arxiv.org/abs/2107.07651.

Deviation: pairs are ordered by the odds that they match; the authors' evaluation orders them by the logit of "yes" alone, which
leaves out what speaks for "no".
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, normalizers
from torch import Tensor, nn

from mm.encoders.image import ImageEncoderConfig
from mm.errors import CheckpointError, UserError
from mm.media.geometry import ImageSpec
from mm.processor import Processor
from mm.published import bert
from mm.published.imported import PROMPTS, Imported, one_line, put, take
from mm.published.open_clip import PREPROCESSING
from mm.systems.albef import AlbefConfig
from mm.tokenizers.text import Cleaning

BACKBONE = "vit_base_patch16_224"
"""The member of timm's family that all others are made from by options."""

HEAD_WIDTH = 64
CONTEXT_LENGTH = 30
"""Tokens that are read of a text in retrieval, start and end included; the network has positions for more."""

DROPOUT = 0.1
"""As BERT was trained, and trained on."""

USED = ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head", "temp")

BARE_WORDS = (
    normalizers.Replace(Regex(r"""[,.'!?"()*#:;~]"""), ""),
    normalizers.Replace(Regex("[-/]"), " "),
    normalizers.Replace("<person>", "person"),
)
"""What is done to the punctuation of a text in lower case."""


def is_albef(state: Mapping[str, Tensor]) -> bool:
    """Whether weights have the names of ALBEF's, or of what was made after it."""
    return any(name.startswith("visual_encoder.") for name in state) and any(name.startswith("text_encoder.") for name in state)


def import_albef(
    state: Mapping[str, Tensor], *, vocabulary: Path | None, image_size: int | None = None, where: str
) -> Imported:
    """ALBEF as pretrained, or as fine-tuned for retrieval, which has no head that predicts words.

    Args:
        state: All weights; momentum encoders and queues are left out.
        vocabulary: The ``vocab.txt`` of bert-base-uncased, which no checkpoint holds.
        image_size: Side of the pictures in pixels; positions are interpolated as the authors do. None for the checkpoint's own.
        where: Name for messages.

    Raises:
        UserError: There is no vocabulary.
        CheckpointError: Weights are missing or those of another network, or the vocabulary is another.
    """
    with one_line(where):
        if "vision_proj.weight" not in state:
            raise CheckpointError(
                f"{where}: has encoders like ALBEF's and nothing that aligns them, as checkpoints for questions or for pairs "
                "of pictures; take a pretrained one, or one for retrieval"
            )
        words = bert.plain_names(take(state, "text_encoder."))
        text_layers = _text_layers(words, where)
        if vocabulary is None:
            raise UserError(
                f"{where}: ALBEF, whose words are those of bert-base-uncased; give its vocabulary: --vocab vocab.txt"
            )
        return _import_albef(state, words, text_layers, vocabulary, image_size, where)


def _text_layers(words: Mapping[str, Tensor], where: str) -> int:
    """Number of layers over words alone. Raises `CheckpointError` where they are not those below the others."""
    layers, crossed = (bert.layer_numbers(words, part) for part in ("attention", "crossattention"))
    alone = len(layers) - len(crossed)
    if layers != list(range(len(layers))) or crossed != layers[alone:] or not crossed or not alone:
        raise CheckpointError(
            f"{where}: no ALBEF, in which the upper layers of words attend to the picture: here {len(crossed)} of "
            f"{len(layers)} do"
        )
    return alone


def _import_albef(
    state: Mapping[str, Tensor],
    words: Mapping[str, Tensor],
    text_layers: int,
    vocabulary: Path,
    image_size: int | None,
    where: str,
) -> Imported:
    tokenizer = bert.word_pieces(vocabulary, Cleaning(whitespace=False, nfc=False), before=BARE_WORDS)
    num_words, width = words["embeddings.word_embeddings.weight"].shape
    if tokenizer.vocab_size != num_words:
        raise CheckpointError(
            f"{vocabulary}: holds {tokenizer.vocab_size} words, the checkpoint {num_words}; take the vocab.txt of "
            "bert-base-uncased"
        )
    image, image_state = vision_transformer(take(state, "visual_encoder."), image_size)
    config = AlbefConfig(
        image=image,
        vocab_size=num_words,
        context_length=len(words["embeddings.position_embeddings.weight"]),
        width=width,
        text_layers=text_layers,
        fusion_layers=len(bert.layer_numbers(words, "crossattention")),
        heads=width // HEAD_WIDTH,
        mlp_ratio=len(words["encoder.layer.0.intermediate.dense.weight"]) / width,
        norm_eps=bert.NORM_EPS,
        dropout=DROPOUT,
        embed_dim=len(state["text_proj.weight"]),
        masked_weight=1.0 if bert.has_head(words) else 0.0,
        queue_size=state["image_queue"].shape[1] if "image_queue" in state else 0,
    )
    hidden = tokenizer.id_of(bert.HIDDEN)
    assert hidden is not None
    return Imported(
        config=config,
        state={
            **put(image_state, "network.towers.encoders.image.trunk."),
            **bert.bert_weights(words, text_layers=text_layers, hidden=hidden, where=where),
            **({} if bert.has_head(words) else fresh_head(width, num_words)),
            **put(take(state, "vision_proj."), "network.towers.projections.image."),
            **put(take(state, "text_proj."), "network.towers.projections.text."),
            "network.towers.logit_scale": torch.tensor(math.log(1 / float(state["temp"]))),
            **_matching_head(state),
        },
        processor=Processor(
            image=ImageSpec(size=image.image_size, fit="squash", background=(0, 0, 0)),
            tokenizer=tokenizer,
            context_length=min(CONTEXT_LENGTH, config.context_length),
            templates=PROMPTS,
        ),
        card={
            "source": where,
            "format": "albef",
            "left_out": sorted({name.partition(".")[0] for name in state} - set(USED)),
        },
    )


def vision_transformer(
    state: Mapping[str, Tensor], image_size: int | None = None
) -> tuple[ImageEncoderConfig, dict[str, Tensor]]:
    """The encoder of a plain vision transformer with a class token, under timm's names, and its weights.

    Args:
        state: All of its weights.
        image_size: Side of the pictures in pixels; None for that of the weights.
    """
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    image_size = image_size or math.isqrt(state["pos_embed"].shape[1]) * patch_size
    if image_size % patch_size:
        raise UserError(f"image size {image_size}: is not a multiple of the patches' {patch_size} px")
    config = ImageEncoderConfig(
        backbone=BACKBONE,
        image_size=image_size,
        patch_size=patch_size,
        options={
            "embed_dim": width,
            "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            "num_heads": width // HEAD_WIDTH,
            "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
        },
        mean=PREPROCESSING["mean"],
        std=PREPROCESSING["std"],
    )
    return config, dict(state) | {"pos_embed": resized_positions(state["pos_embed"], image_size // patch_size)}


def resized_positions(positions: Tensor, side: int) -> Tensor:
    """Positions ``(1, P + n * n, D)`` of a vision transformer, for a grid of ``side * side`` patches.

    Interpolated bicubically without antialiasing, as ALBEF's authors do; the P before the grid, of the class token, stay.
    """
    own = math.isqrt(positions.shape[1])
    first, grid = positions.split([positions.shape[1] - own * own, own * own], dim=1)
    if own == side:
        return positions
    grid = F.interpolate(grid.mT.unflatten(2, (own, own)), size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).mT], dim=1)


def fresh_head(width: int, num_words: int) -> dict[str, Tensor]:
    """A head that predicts words, for checkpoints without one."""
    dense = nn.Linear(width, width)
    nn.init.normal_(dense.weight, std=width**-0.5)
    nn.init.zeros_(dense.bias)
    return {
        **put(dense.state_dict(), "network.masked_head.0."),
        **put(nn.LayerNorm(width).state_dict(), "network.masked_head.2."),
        "network.word_bias": torch.zeros(num_words),
    }


def _matching_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The softmax over "no" and "yes" is the sigmoid of what "yes" has more."""
    result = {}
    for kind in ("weight", "bias"):
        no, yes = state[f"itm_head.{kind}"]
        result[f"matching_head.{kind}"] = (yes - no)[None]
    return result
