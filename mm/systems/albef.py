"""ALBEF: a picture and a text are aligned as vectors before their tokens are fused by cross-attention.

Paper: ALBEF https://arxiv.org/abs/2107.07651 (image-text contrastive learning with momentum encoders and queues, image-text
matching with hard negatives, masked language modelling, both soft targets of momentum distillation).

Deviations: samples of the same group are positives of each other, in the queue, too, and never negatives (the reference's
pretraining knows only pairs); momentum features of all processes are columns before they are queued; hard negatives are drawn
by the similarities of the trained encoders; one logit tells whether a pair matches, which is the paper's two-way softmax; the
temperature is learned as the logarithm of its inverse, as CLIP does: steps are relative to its size, and none can change its
sign. Its range is the reference's, 0.001 to 0.5. Negatives are drawn from the samples of all processes, and matching and hidden
words averaged over all that these have, where the reference knows those of a process; ``whole_words`` can be hidden instead of
tokens. With ``caption_weight``
the same layers also learn to write, as in BLIP https://arxiv.org/abs/2201.12086, whose decoder has self-attention of its own;
here only the mask is another. Convolutional picture encoders (``feature_map``) and norms before the branches are allowed.
Weights are fresh; those of a published checkpoint, or of BERT as in the paper, come by way of ``mm convert`` and ``init_from``.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.draws import Draws
from mm.encoders.image import ImageEncoderConfig, build_image_encoder
from mm.encoders.text import TextEncoder, TextEncoderConfig
from mm.errors import ConfigError, UserError
from mm.fusion.align_before_fuse import AlignBeforeFuse, FeatureMap
from mm.fusion.cross_attention import CoAttention, CrossAttention
from mm.fusion.dual_tower import DualTower
from mm.fusion.grounding import word_heat
from mm.generators.language_model import LanguageModel
from mm.generators.writing import describe
from mm.losses.contrastive import info_nce
from mm.losses.distillation import Views, distilled_contrastive, ramped
from mm.losses.gather import Gather, current_gather
from mm.losses.groups import lasting_groups
from mm.losses.masked import MASK_RATE, MaskedTokens, hide_words, masked_cross_entropy
from mm.losses.matching import draw_negatives, matching_loss
from mm.losses.queue import FeatureQueue
from mm.nn.attention import MultiHeadAttention
from mm.nn.embeddings import LearnedPositions, TokenEmbedding
from mm.nn.ends import end
from mm.nn.freeze import freeze
from mm.nn.initialise import initialise
from mm.nn.momentum import Momentum
from mm.nn.transformer import Block, FeedForward, Stack, Transformer
from mm.systems.clip import ClipConfig
from mm.systems.settings import SystemSettings
from mm.types import Batch, Decoding, Encoded, Losses, OnTokens, System, TextBatch, Written

WORDS = "network.towers.encoders.text.embedding.tokens.weight"

LOGIT_SCALE_RANGE = (math.log(1 / 0.5), math.log(1 / 0.001))


class AlbefSizes(SystemSettings):
    """The network alone: a picture encoder, a transformer over words, their fusion.

    Args:
        image: The picture encoder; its tokens are what words attend to, its pooled vector is what is aligned.
        feature_map: The tokens are a bare feature map, as of a convolutional encoder: normalise them, project them to
            ``width`` and add trained positions.
        vocab_size: Number of token ids; at least that of the tokenizer.
        context_length: Longest text in tokens, start and end included.
        width: Feature width of words.
        text_layers: Blocks over words alone.
        fusion_layers: Blocks over words that also attend to the picture.
        two_streams: In the fusion the picture tokens also attend to the words, in layers of their own (ViLBERT, LXMERT).
        heads: Attention heads; divides ``width``.
        mlp_ratio: Hidden width of the feed-forward over ``width``.
        norm_place: Norms behind each branch (``post``, BERT) or before it (``pre``), which trains more easily from nothing.
        norm_eps: Added to the variance in the norms; BERT's is 1e-12.
        dropout: Of each block's branches and of the words, in training.
        text_pooling: What of a text is aligned: its ``first`` token, or the ``mean`` of all.
        embed_dim: Width of the space in which both are aligned.
        lock: Towers whose encoders keep their weights; what stands behind them is trained.
    """

    image: ImageEncoderConfig = ImageEncoderConfig()
    feature_map: bool = False
    vocab_size: int = Field(default=4096, ge=3)
    context_length: int = Field(default=32, ge=3)
    width: int = Field(default=256, ge=1)
    text_layers: int = Field(default=2, ge=1)
    fusion_layers: int = Field(default=2, ge=1)
    two_streams: bool = False
    heads: int = Field(default=4, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    norm_place: Literal["post", "pre"] = "post"
    norm_eps: float = Field(default=1e-5, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    text_pooling: Literal["first", "mean"] = "first"
    embed_dim: int = Field(default=256, ge=1)
    lock: tuple[Literal["image", "text"], ...] = ()

    @property
    def picture_side(self) -> int:
        return self.image.image_size

    @property
    def text_limits(self) -> tuple[int, int]:
        return self.vocab_size, self.context_length

    def with_vocabulary(self, size: int) -> Self:
        return self.model_copy(update={"vocab_size": size})

    def check_start(self, start: SystemSettings | None) -> None:
        """Towers that are followed have to be of the same kind, not only of the same sizes."""
        if not isinstance(start, ClipConfig) or not isinstance(start.text, TextEncoderConfig):
            return
        text, parts = start.text, ("tokens", "patch_dropout", "drop_path", "gradient_checkpointing")
        theirs = {
            "causal": text.causal,
            "attend_padding": text.attend_padding,
            "activation": text.activation,
            "norm_place": "pre",
        }
        theirs |= {"heads": text.heads, "norm_eps": text.norm_eps, "text_pooling": text.pooling}
        own = {"causal": False, "attend_padding": False, "activation": "gelu"}
        own |= {name: getattr(self, name) for name in ("norm_place", "heads", "norm_eps", "text_pooling")}
        for side, config in ((theirs, start.image), (own, self.image)):
            side |= {f"image.{name}": value for name, value in config.model_dump().items() if name not in parts}
        for name, value in own.items():
            if theirs.get(name, value) != value:
                raise ConfigError(
                    f"init_from: its towers have {name} {theirs[name]}, this network {value}; with the same weights that is "
                    "another function, so take towers like this network's"
                )

    @model_validator(mode="after")
    def _possible_sizes(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.image.patch_dropout and self.feature_map:
            raise ValueError("feature_map needs every patch; leave image.patch_dropout out")
        return self


class AlbefConfig(AlbefSizes):
    """The network with the tasks that it learns.

    Args:
        contrastive_weight: Of aligning pictures and texts.
        matching_weight: Of telling matching pairs from others; with 0 the network cannot match, so nothing is re-ranked.
        masked_weight: Of predicting hidden words.
        caption_weight: Of predicting the next word, by the same layers read causally; with 0 the network does not write.
        beginnings: Texts that captions may begin with, by name, as training gave them; the first is the usual one.
        mask_rate: Share of the words to predict.
        whole_words: Hide all tokens of a word together, so that none is told by the others; else each token counts as a word.
        momentum: Share of the momentum encoders that stays at each step; 0 for none, plain InfoNCE without queue.
        queue_size: Past momentum features of each side kept as further negatives; ``Batch.groups`` must then number things
            alike in all batches.
        distillation: Share of soft targets from the momentum encoders; 0 switches momentum distillation off.
        distillation_ramp_steps: Steps over which that share rises from 0; the paper takes those of the first epoch.
        hard_negatives: Draw the negatives of matching by contrastive similarity, else evenly.
    """

    name: Literal["albef"] = "albef"
    contrastive_weight: float = Field(default=1.0, gt=0)
    matching_weight: float = Field(default=1.0, ge=0)
    masked_weight: float = Field(default=1.0, ge=0)
    caption_weight: float = Field(default=0.0, ge=0)
    beginnings: dict[str, str] = Field(default={"caption": ""}, min_length=1)
    mask_rate: float = Field(default=MASK_RATE, gt=0, lt=1)
    whole_words: bool = False
    momentum: float = Field(default=0.995, ge=0, lt=1)
    queue_size: int = Field(default=4096, ge=0)
    distillation: float = Field(default=0.4, ge=0, le=1)
    distillation_ramp_steps: int = Field(default=1000, ge=0)
    hard_negatives: bool = True

    def for_inference(self) -> Self:
        return self.model_copy(update={"momentum": 0.0, "queue_size": 0, "distillation": 0.0})

    @property
    def learns_whole_words(self) -> bool:
        return self.whole_words and self.masked_weight > 0

    @model_validator(mode="after")
    def _possible(self) -> "AlbefConfig":
        if not self.momentum and (self.queue_size or self.distillation):
            option = "queue_size" if self.queue_size else "distillation"
            raise ValueError(f"{option} is of momentum features; set momentum above 0, or {option} to 0")
        if self.caption_weight and self.two_streams:
            raise ValueError("two_streams cannot write: the picture would tell the words what follows; set caption_weight to 0")
        return self


class Albef(System):
    """Two encoders that are aligned, and a fusion that reads pairs.

    Args:
        network: Encoders and fusion.
        config: Sizes, weights of the tasks, momentum.
    """

    def __init__(self, network: AlignBeforeFuse, config: AlbefConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.matching_head = end(nn.Linear(config.width, 1))
        self.momentum = Momentum(network, config.momentum) if config.momentum else None
        sides = Views._fields if config.queue_size else ()
        self._queues = {side: FeatureQueue(config.queue_size, config.embed_dim) for side in sides}
        self.queues = nn.ModuleDict(self._queues)  # the same modules, whose type is known above
        self._freeze_what_no_task_trains()

    @property
    def lacks(self) -> frozenset[str]:
        lacking = frozenset() if self.config.caption_weight else frozenset({"captions"})
        if not self.config.matching_weight:
            return lacking | {"matches", "grounds"}
        return lacking if self.grounding_layers else lacking | {"grounds"}

    @property
    def only_for_training(self) -> tuple[str, ...]:
        return "momentum.", "queues."

    def encode_image(self, image: Tensor) -> Encoded:
        """Pixels ``(B, 3, H, W)`` to tokens; what is pooled is the unit vector of the picture."""
        return self.network.encode_image(image)

    def encode_text(self, text: TextBatch) -> Encoded:
        """Token ids to words that have not seen a picture; what is pooled is the unit vector of the text."""
        return self.network.encode_text(text)

    def fuse(self, image: Encoded, text: Encoded, *, maps: list[dict[str, Tensor]] | None = None) -> Encoded:
        """Read pairs: row i of the pictures with row i of the texts, both encoded; ``maps`` as `CrossAttention` fills it."""
        return self.network.fusion(text, image, maps=maps)

    def match(self, image: Encoded, text: Encoded) -> Float[Tensor, " b"]:
        """Logits of row i of the pictures and row i of the texts, both encoded, belonging together, fp32."""
        return self._matching_logits(self.fuse(image, text))

    @property
    def grounding_layers(self) -> range:
        """All but the last layer of the fusion, after which the logit of matching looks at the first word alone."""
        return range(self.config.fusion_layers - 1)

    def ground(self, image: Encoded, text: Encoded, *, layers: Sequence[int] | None = None) -> Float[Tensor, "b t h w"]:
        """Where row i of the pictures has the words of row i of the texts, both encoded, see `mm.fusion.grounding.word_heat`.

        Args:
            image: Picture tokens.
            text: Words.
            layers: Of the fusion, counted from 0, to average over; default: the middle one of `grounding_layers`, which in
                the paper's network of six is the one that its authors chose.

        Raises:
            UserError: A layer is none of `grounding_layers`.
        """
        able = self.grounding_layers
        layers = layers or [len(able) // 2]
        unable = [layer for layer in layers if layer not in able]
        if unable:
            raise UserError(
                f"layer {unable[0]}: words are grounded by layers 0 to {len(able) - 1} of this model; take of these"
            )
        judge = lambda *pair, maps: self._matching_logits(self.fuse(*pair, maps=maps))  # noqa: E731
        return word_heat(judge, image, text, layers)

    @property
    def beginnings(self) -> Mapping[str, str]:
        """See `mm.types.Captions`."""
        return self.config.beginnings

    @property
    def writer(self) -> LanguageModel:
        """The layers of the network, read causally; all of its weights are theirs."""
        text, fusion = self.network.towers.encoders["text"], self.network.fusion
        assert isinstance(text, TextEncoder)
        return LanguageModel(
            embedding=text.embedding,
            transformer=Stack(text.transformer, fusion.transformer),
            head=self.network.words,
            context_length=text.context_length,
        )

    @torch.no_grad()
    def caption(
        self,
        image: Tensor,
        beginning: TextBatch,
        decoding: Decoding,
        seeds: Sequence[int],
        *,
        on_tokens: OnTokens | None = None,
    ) -> list[Written]:
        """See `mm.types.Captions`."""
        return describe(self.writer, self.encode_image(image).tokens, beginning, decoding, seeds, on_tokens)

    @torch.no_grad()
    def caption_likelihoods(self, image: Tensor, text: TextBatch) -> Tensor:
        """See `mm.types.Captions`."""
        return self.writer.next_words(text, self.encode_image(image).tokens).log_likelihoods(len(text))

    def embed_image(self, image: Tensor) -> Tensor:
        """Pixels ``(B, 3, H, W)`` to unit vectors ``(B, D)``, fp32."""
        return self.network.towers.embed("image", image)

    def embed_text(self, text: TextBatch) -> Tensor:
        """Token ids to unit vectors ``(B, D)``, fp32."""
        return self.network.towers.embed("text", text)

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Contrastive logits ``(Q, M)`` of vectors from either side."""
        return self.network.towers.scores(queries, items)

    def encoders(self) -> Mapping[str, nn.Module]:
        """The ``image`` and ``text`` encoders."""
        return dict(self.network.towers.encoders.items())

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the network in another floating type, for inference; projections and matching stay in fp32."""
        self.network.cast_(dtype)

    def state_from(self, start: System) -> dict[str, Tensor]:
        """An aligned dual tower gives both encoders, their projections and the temperature."""
        if isinstance(start, Albef):
            return super().state_from(start)
        return given_by_towers(self, start) or super().state_from(start)

    def loss(self, batch: Batch, step: int) -> Losses:
        """Weighted sum of the losses of all tasks, this rank's share of the global batch."""
        assert batch.image is not None
        assert batch.text is not None
        config, gather = self.config, current_gather()
        image, text = self.encode_image(batch.image), self.encode_text(batch.text)
        groups = lasting_groups(batch, image.tokens.device)
        draws = batch.draws(groups.device)
        alpha = ramped(config.distillation, step, config.distillation_ramp_steps)
        taught = self._momentum_views(batch.image, batch.text)
        parts = self._contrastive_losses(Views(image.pooled, text.pooled), taught, groups, alpha, step)
        total = config.contrastive_weight * parts["contrastive"]
        if config.matching_weight:
            parts |= self._matching_losses(image, text, groups, draws, gather)
            total = total + config.matching_weight * parts["matching"]
        if config.masked_weight:
            masked = hide_words(batch.text, config.vocab_size, rate=config.mask_rate, whole=config.whole_words, draws=draws)
            parts["masked"] = self._masked_loss(image, batch.text, masked, taught and taught[0], alpha, gather)
            total = total + config.masked_weight * parts["masked"]
        if config.caption_weight:
            parts["caption"] = self.writer.next_words(batch.text, image.tokens).loss(len(batch))
            total = total + config.caption_weight * parts["caption"]
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def after_step(self, step: int) -> None:
        """Clamp the temperature, move the momentum encoders, queue the features of the step that was applied."""
        self.network.towers.clamp_()
        if self.momentum is not None:
            self.momentum.update()
        for queue in self._queues.values():
            queue.commit(current_gather())

    @torch.no_grad()
    def _momentum_views(self, image: Tensor, text: TextBatch) -> tuple[Encoded, Encoded] | None:
        """What the momentum encoders make of pictures and texts."""
        if self.momentum is None:
            return None
        average = self.momentum.average
        return average.encode_image(image), average.encode_text(text)

    def _contrastive_losses(
        self, student: Views, taught: tuple[Encoded, Encoded] | None, groups: Tensor, alpha: float, step: int
    ) -> dict[str, Tensor]:
        scale, gather = self.network.towers.scale(), current_gather()
        candidates = len(groups) * (1 if gather is None else gather.world_size)
        if taught is None:
            loss = info_nce(student.image, student.text, scale, groups=groups, gather=gather)
        else:
            teacher = Views(taught[0].pooled, taught[1].pooled)
            queued = (self._queues["image"].content(), self._queues["text"].content()) if self._queues else None
            candidates += 0 if queued is None else len(queued[0].ids)
            loss = distilled_contrastive(student, teacher, scale, groups, alpha=alpha, queued=queued, gather=gather)
            if self.training and torch.is_grad_enabled():
                for side, queue in self._queues.items():
                    queue.stage(getattr(teacher, side), groups, step)
        guessing = torch.tensor(math.log(candidates), device=scale.device)
        return {"contrastive": loss, "guessing": guessing, "logit_scale": scale}

    def _matching_losses(
        self, image: Encoded, text: Encoded, groups: Tensor, draws: Draws, gather: Gather | None
    ) -> dict[str, Tensor]:
        """Of each pair, of each picture with another text, of each text with another picture."""
        if gather is not None:
            text = _filled_up(text, gather.longest(text.mask))
        everyone = groups, image.pooled.detach(), text.pooled.detach()
        columns, images, texts = everyone if gather is None else map(gather, everyone)
        to_texts, to_images = self.scores(everyone[1], texts), self.scores(everyone[2], images)
        if not self.config.hard_negatives:
            to_texts, to_images = torch.zeros_like(to_texts), torch.zeros_like(to_images)
        other_texts, other_images = (draw_negatives(logits, groups, columns, draws) for logits in (to_texts, to_images))
        valid = torch.cat([torch.ones_like(other_texts.valid), other_texts.valid, other_images.valid])
        pictures = _one_after_another(image, image, _of_all_ranks(image, other_images.rows, gather))[valid]
        words = _one_after_another(text, _of_all_ranks(text, other_texts.rows, gather), text)[valid]
        matched = torch.arange(len(words.mask), device=groups.device) < len(groups)
        logits = self._matching_logits(self.fuse(pictures, words))
        loss = matching_loss(logits, matched, gather)
        return {"matching": loss, "matching_accuracy": ((logits > 0) == matched).float().mean()}

    def _matching_logits(self, fused: Encoded) -> Tensor:
        return self.matching_head(fused.pooled.to(self.matching_head.weight.dtype))[:, 0].float()

    def _masked_loss(
        self,
        image: Encoded,
        text: TextBatch,
        masked: MaskedTokens,
        taught_image: Encoded | None,
        alpha: float,
        gather: Gather | None,
    ) -> Tensor:
        changed = TextBatch(masked.ids, text.lengths)
        teacher = self._taught_words(taught_image, changed, masked) if taught_image is not None and alpha else None
        fused = self.fuse(image, self.network.towers.encoders["text"](changed))
        return masked_cross_entropy(fused.tokens, masked, self.network.words, teacher=teacher, alpha=alpha, gather=gather)

    @torch.no_grad()
    def _taught_words(self, image: Encoded, text: TextBatch, masked: MaskedTokens) -> Tensor:
        """Logits of the hidden words by the momentum network, which sees its own picture tokens."""
        assert self.momentum is not None
        average = self.momentum.average
        fused = average.fusion(average.towers.encoders["text"](text), image)
        return average.words(fused.tokens[masked.chosen])

    def _freeze_what_no_task_trains(self) -> None:
        """It is kept, so that a later training may take it up with the same weights."""
        config, network = self.config, self.network
        if not (config.masked_weight or config.caption_weight):
            freeze(network.masked_head)
            network.word_bias.requires_grad_(False)
        if not config.matching_weight:
            freeze(self.matching_head)
        if not (config.masked_weight or config.matching_weight or config.caption_weight):
            freeze(network.fusion)
            freeze(network.picture_tokens)


def _filled_up(text: Encoded, length: int) -> Encoded:
    """The same words with padding up to a length."""
    missing = length - text.tokens.shape[1]
    return Encoded(F.pad(text.tokens, (0, 0, 0, missing)), F.pad(text.mask, (0, missing)), text.pooled)


def _of_all_ranks(encoded: Encoded, rows: Tensor, gather: Gather | None) -> Encoded:
    """Some rows of what all ranks have, of one length."""
    if gather is None:
        return encoded[rows]
    tokens, pooled = gather.rows(encoded.tokens, rows), gather.rows(encoded.pooled, rows)
    return Encoded(tokens, gather.rows(encoded.mask.byte(), rows).bool(), pooled)


def _one_after_another(*parts: Encoded) -> Encoded:
    tokens, masks, pooled = zip(*((part.tokens, part.mask, part.pooled) for part in parts), strict=True)
    return Encoded(torch.cat(tokens), torch.cat(masks), torch.cat(pooled))


def build(config: AlbefConfig, parts: Mapping[str, Any] | None = None) -> Albef:
    """Build ALBEF with fresh weights; ``parts`` may hold a ready ``image`` encoder for the configured one."""
    return Albef(build_network(config, parts), config)


def given_by_towers(system: System, start: System) -> dict[str, Tensor]:
    """What an aligned dual tower gives a system with `AlignBeforeFuse` as its ``network``; nothing, where it is none."""
    towers = getattr(start, "towers", None)
    if not isinstance(towers, DualTower):
        return {}
    own, given = system.state_dict(), towers.state_dict(prefix="network.towers.")
    if WORDS in given:  # the last row stands for a hidden word, which no other encoder knows
        given[WORDS] = F.pad(given[WORDS], (0, 0, 0, 1))
    biases = own.keys() & {f"network.towers.projections.{side}.bias" for side in Views._fields}
    return {name: torch.zeros_like(own[name]) for name in biases} | given


def build_network(config: AlbefSizes, parts: Mapping[str, Any] | None = None) -> AlignBeforeFuse:
    """The network without the heads of its tasks; ``parts`` as in `build`."""
    image = (parts or {}).get("image") or build_image_encoder(config.image)
    text = TextEncoder(
        embedding=TokenEmbedding(
            config.vocab_size + 1,
            config.width,
            positions=LearnedPositions(config.context_length, config.width),
            norm=_norm(config) if config.norm_place == "post" else None,
            dropout=config.dropout,
        ),
        transformer=_transformer(config, config.text_layers),
        causal=False,
        pooling=config.text_pooling,
        context_length=config.context_length,
    )
    projections = {"image": nn.Linear(image.width, config.embed_dim), "text": nn.Linear(config.width, config.embed_dim)}
    for projection in projections.values():  # keeps the variance of its input
        nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        nn.init.zeros_(projection.bias)
    context_width = config.width if config.feature_map else image.token_width
    network = AlignBeforeFuse(
        DualTower(
            {"image": (image, projections["image"]), "text": (text, projections["text"])},
            logit_scale_range=LOGIT_SCALE_RANGE,
            locked=config.lock,
        ),
        FeatureMap(image.num_tokens, image.token_width, config.width) if config.feature_map else nn.Identity(),
        _build_co_attention(config, context_width) if config.two_streams else build_fusion(config, context_width),
        config.width,
        config.vocab_size,
        norm_eps=config.norm_eps,
    )
    for part in (text, network.picture_tokens, network.fusion):
        initialise(part)
    return network


def build_fusion(config: AlbefSizes, context_width: int) -> CrossAttention:
    """Layers over words that also attend to tokens of ``context_width``."""
    return CrossAttention(_transformer(config, config.fusion_layers, context_width=context_width))


def _build_co_attention(config: AlbefSizes, context_width: int) -> CoAttention:
    if context_width % config.heads:
        raise ConfigError(f"two_streams: picture tokens of width {context_width} must be a multiple of {config.heads} heads")
    words = _transformer(config, config.fusion_layers, context_width=context_width)
    picture = _transformer(config, config.fusion_layers - 1, width=context_width, context_width=config.width, final=False)
    return CoAttention(words, picture)


def _norm(config: AlbefSizes, width: int | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(width or config.width, eps=config.norm_eps)


def _transformer(
    config: AlbefSizes, num_layers: int, *, width: int | None = None, context_width: int | None = None, final: bool = True
) -> Transformer:
    """Blocks over words, or over what is ``width`` wide, with cross-attention where there is a context."""
    width, heads = width or config.width, config.heads

    def make_block(_: int) -> Block:
        return Block(
            attention=MultiHeadAttention(width, heads),
            feed_forward=FeedForward(width, int(width * config.mlp_ratio), nn.GELU()),
            norm=functools.partial(_norm, config, width),
            norm_place=config.norm_place,
            cross_attention=MultiHeadAttention(width, heads, context_width=context_width) if context_width else None,
            dropout=config.dropout,
        )

    ends_in_norm = final and config.norm_place == "pre"
    return Transformer(make_block, num_layers, final_norm=_norm(config, width) if ends_in_norm else None)
