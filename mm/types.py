"""The vocabulary that all parts share: what an encoder returns, what a batch holds, what a system can do.

Shapes: B batch, N tokens of a modality, T text positions, D width, H and W pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mm.draws import Draws


@dataclass(frozen=True)
class Encoded:
    """What every encoder returns and every fusion takes.

    Args:
        tokens: Features, ``(B, N, D)``.
        mask: True where a token may be attended to, ``(B, N)``.
        pooled: One vector per sample, ``(B, D)``.
        extras: Named by-products of a modality (grid shape, quantiser targets, media index).
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, rows: slice | Tensor) -> "Encoded":
        """Some samples, which an index may repeat; without extras, which need not have a row a sample."""
        return Encoded(self.tokens[rows], self.mask[rows], self.pooled[rows])

    def to(self, device: torch.device) -> "Encoded":
        """On another device, without extras."""
        tokens, mask, pooled = (tensor.to(device, non_blocking=True) for tensor in (self.tokens, self.mask, self.pooled))
        return Encoded(tokens, mask, pooled)


@dataclass(frozen=True)
class Sample:
    """One undecoded sample.

    Args:
        id: Unique in its source and stable over time.
        media: Encoded bytes by modality (``"image"``, ``"audio"``).
        texts: Captions, best first; may be empty.
        fields: Label and metadata fields, JSON values only.
    """

    id: str
    media: Mapping[str, bytes]
    texts: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextBatch:
    """Token ids of texts.

    Args:
        ids: ``(B, T)`` int64, padded on the right.
        lengths: Number of real tokens of each row, ``(B,)`` int64.
        words: Where it was asked for: number of the word of its row that a token is part of, ``(B, T)`` int64, from 0; means
            nothing for what is no word.
        seeds: Of what an encoder draws at random for each text in training, ``(B,)`` int64, see `Batch.seeded`.
    """

    ids: Tensor
    lengths: Tensor
    words: Tensor | None = None
    seeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> "TextBatch":
        words, seeds = (None if value is None else value[rows] for value in (self.words, self.seeds))
        return TextBatch(self.ids[rows], self.lengths[rows], words, seeds)

    def draws(self) -> Draws:
        """Random numbers for each text, from the start of its stream; from torch's generators where there are no seeds."""
        return Draws(self.seeds, len(self), self.ids.device)

    def valid(self) -> Tensor:
        """True for real tokens, False for padding, ``(B, T)``."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    def inner(self) -> Tensor:
        """True for words, ``(B, T)``: what is neither start nor end nor padding."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (positions > 0) & (positions < self.lengths[:, None] - 1)

    def to(self, device: torch.device) -> "TextBatch":
        words, seeds = (None if value is None else value.to(device, non_blocking=True) for value in (self.words, self.seeds))
        return TextBatch(self.ids.to(device, non_blocking=True), self.lengths.to(device, non_blocking=True), words, seeds)


@dataclass(frozen=True)
class AudioBatch:
    """Waves of one channel.

    Args:
        waves: fp32 about -1..1, ``(B, T)``, zeros behind the end.
        lengths: Number of real samples of each row, ``(B,)`` int64.
        seeds: Of what an encoder draws at random for each recording in training, ``(B,)`` int64, see `Batch.seeded`.
    """

    waves: Tensor
    lengths: Tensor
    seeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.waves)

    def __getitem__(self, rows: slice | Tensor) -> "AudioBatch":
        return AudioBatch(self.waves[rows], self.lengths[rows], None if self.seeds is None else self.seeds[rows])

    def draws(self) -> Draws:
        """Random numbers for each recording, from the start of its stream; from torch's generators where there are no seeds."""
        return Draws(self.seeds, len(self), self.waves.device)

    def valid(self) -> Tensor:
        """True for real samples, False behind the end, ``(B, T)``."""
        return torch.arange(self.waves.shape[1], device=self.waves.device) < self.lengths[:, None]

    def to(self, device: torch.device) -> "AudioBatch":
        seeds = None if self.seeds is None else self.seeds.to(device, non_blocking=True)
        return AudioBatch(self.waves.to(device, non_blocking=True), self.lengths.to(device, non_blocking=True), seeds)


MEDIUM = -1
"""Stands in the ids of a text for a medium, such as a picture."""


@dataclass(frozen=True)
class Interleaved:
    """Texts with pictures between the words.

    Args:
        text: Ids, `MEDIUM` where a picture stands; without an end where they are to be continued.
        image: Pixels uint8 ``(M, 3, H, W)``, of all pictures in the order of rows, then of positions.
        learned: True for the words that training predicts, ``(B, T)``; None for all that stand behind a picture.
    """

    text: TextBatch
    image: Tensor
    learned: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, rows: slice) -> "Interleaved":
        ends = ((self.text.ids == MEDIUM) & self.text.valid()).sum(1).cumsum(0).tolist()
        first, last, _ = rows.indices(len(ends))
        pictures = slice(ends[first - 1] if first else 0, ends[last - 1] if last else 0)
        return Interleaved(self.text[rows], self.image[pictures], None if self.learned is None else self.learned[rows])

    def to(self, device: torch.device) -> "Interleaved":
        learned = None if self.learned is None else self.learned.to(device, non_blocking=True)
        return Interleaved(self.text.to(device), self.image.to(device, non_blocking=True), learned)


@dataclass(frozen=True)
class Batch:
    """Decoded samples of one step, modalities that are absent being None.

    Args:
        ids: Sample ids, B of them.
        image: Pixels, ``(B, 3, H, W)``, uint8 in 0..255 (encoders normalise on their own device).
        text: One caption a sample.
        groups: Samples with equal numbers show the same thing, so they are positives of each other, ``(B,)`` int64.
        fields: Metadata of each sample.
        captions: All captions of each sample, where an evaluation needs them.
        answers: Right answers to each text, which is a question, and how right they are in 0..1, where a system learns them.
        interleaved: Texts in which pictures stand, where these are what is learned from instead of ``image`` and ``text``.
        latents: What a frozen part made of the pictures (`Compresses`), ``(B, C, h, w)`` in half precision; in place of
            ``image``.
        features: What a frozen part made of the captions, words and a vector each, in half precision; in place of ``text``.
        audio: One recording a sample.
        seeds: Of what is drawn at random for each sample in a step of training, ``(B,)`` int64, see `draws`.
    """

    ids: tuple[str, ...]
    image: Tensor | None = None
    text: TextBatch | None = None
    groups: Tensor | None = None
    fields: tuple[Mapping[str, Any], ...] = ()
    captions: tuple[tuple[str, ...], ...] = ()
    answers: tuple[Mapping[str, float], ...] = ()
    interleaved: Interleaved | None = None
    latents: Tensor | None = None
    features: Encoded | None = None
    audio: AudioBatch | None = None
    seeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def seeded(self, seeds: Tensor) -> "Batch":
        """The same with seeds; those of texts and recordings are others, so that what is drawn for them is independent."""
        return replace(
            self,
            seeds=seeds,
            text=None if self.text is None else replace(self.text, seeds=seeds + 1),
            audio=None if self.audio is None else replace(self.audio, seeds=seeds + 2),
        )

    def draws(self, device: torch.device) -> Draws:
        """Random numbers for each sample, from the start of its stream; from torch's generators where there are no seeds."""
        return Draws(self.seeds, len(self), device)

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(
            ids=self.ids[rows],
            image=None if self.image is None else self.image[rows],
            text=None if self.text is None else self.text[rows],
            groups=None if self.groups is None else self.groups[rows],
            fields=self.fields[rows],
            captions=self.captions[rows],
            answers=self.answers[rows],
            interleaved=None if self.interleaved is None else self.interleaved[rows],
            latents=None if self.latents is None else self.latents[rows],
            features=None if self.features is None else self.features[rows],
            audio=None if self.audio is None else self.audio[rows],
            seeds=None if self.seeds is None else self.seeds[rows],
        )

    def to(self, device: torch.device) -> "Batch":
        return replace(
            self,
            image=None if self.image is None else self.image.to(device, non_blocking=True),
            text=None if self.text is None else self.text.to(device),
            groups=None if self.groups is None else self.groups.to(device, non_blocking=True),
            interleaved=None if self.interleaved is None else self.interleaved.to(device),
            latents=None if self.latents is None else self.latents.to(device, non_blocking=True),
            features=None if self.features is None else self.features.to(device),
            audio=None if self.audio is None else self.audio.to(device),
            seeds=None if self.seeds is None else self.seeds.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Losses:
    """The scalar to minimise and the named parts worth logging (detached scalars)."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def plus(self, other: "Losses | None", weight: float = 1.0) -> "Losses":
        """The sum with ``weight`` times other losses; parts of the same name are added, too."""
        if other is None:
            return self
        parts = dict(self.parts)
        for name, value in other.parts.items():
            parts[name] = parts[name] + weight * value if name in parts else weight * value
        return Losses(self.total + weight * other.total, parts)


class Auxiliary(nn.Module):
    """A layer with a loss of its own, beside that of the system it is in: experts are to be used evenly, for instance.

    Attributes:
        records: What the layer notes in the passes of a training step, whatever `auxiliary` needs; None while nobody asks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] | None = None

    def auxiliary(self) -> Losses:
        """The loss of all records, of which there is at least one, weighted, and detached figures to log."""
        raise NotImplementedError


@contextmanager
def auxiliary_losses(module: nn.Module) -> Iterator[Callable[[], Losses | None]]:
    """Within it the layers of a module note what their own losses need; what it gives tells the sum of these losses.

    Notes are taken in passes with gradients alone, and not when a layer is computed again in the backward pass, so it is to be
    closed before that. The parts are means over layers; ``auxiliary`` is what is added to the total. None where no layer has
    noted anything.
    """
    layers = [part for part in module.modules() if isinstance(part, Auxiliary) and part.records is None]
    for layer in layers:
        layer.records = []

    def told() -> Losses | None:
        losses = [layer.auxiliary() for layer in layers if layer.records]
        if not losses:
            return None
        total = torch.stack([loss.total for loss in losses]).sum()
        names = dict.fromkeys(name for loss in losses for name in loss.parts)
        means = {name: torch.stack([loss.parts[name] for loss in losses if name in loss.parts]).mean() for name in names}
        return Losses(total, {"auxiliary": total.detach()} | means)

    try:
        yield told
    finally:
        for layer in layers:
            layer.records = None


class System(nn.Module):
    """A trainable multimodal system. Only `loss` must be written; the rest has defaults that suit most systems."""

    @property
    def lacks(self) -> frozenset[str]:
        """Capabilities that its class has and this network, as configured, has not."""
        return frozenset()

    def loss(self, batch: Batch, step: int) -> Losses:
        """Training loss of this rank's batch; gradients averaged over the ranks are those of the global batch."""
        raise NotImplementedError

    def forward(self, batch: Batch, step: int) -> Losses:
        """`loss`, and the losses that layers have of their own (`Auxiliary`): what training minimises."""
        with auxiliary_losses(self) as told:
            losses = self.loss(batch, step)
            return losses.plus(told())

    def after_step(self, step: int) -> None:
        """Called after each optimizer step: momentum encoders, queues, clamps, schedules."""

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the weights in another floating type, cast once, for inference; what must stay in fp32 does."""
        self.to(dtype)

    def state_from(self, start: "System") -> dict[str, Tensor]:
        """What this network takes over from one that its training starts with, by the names that it has here.

        A network of another kind gives what fits where this one is made to follow it; what it does not give starts fresh.
        """
        return start.state_dict()

    def part_state(self, name: str) -> dict[str, Tensor]:
        """The weights that a part brought, which `SystemSettings.parts` names: held fixed, and saved with that part alone.

        Names are those below the part, ``NAME.*`` in this network; what the network added inside of it is not of the part.
        """
        return getattr(self, name).state_dict()

    @property
    def left_out(self) -> tuple[str, ...]:
        """Beginnings of the names of weights that its configuration has and this network was built without."""
        return ()

    @property
    def may_be_added(self) -> tuple[str, ...]:
        """Beginnings of the names of parameters that change nothing at first, so that a trained network may be given them."""
        return ()

    @property
    def only_for_training(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors that training alone needs: a saved or loaded model does without them, so may
        `init_from`."""
        return ()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups: matrices decay; gains, biases and scales (``ndim < 2`` or a ``no_decay`` attribute) do not."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        plain = [p for p in trainable if p.ndim < 2 or getattr(p, "no_decay", False)]
        chosen = {id(p) for p in plain}
        return [
            {"params": [p for p in trainable if id(p) not in chosen]},
            {"params": plain, "weight_decay": 0.0},
        ]


@runtime_checkable
class CachesGradients(Protocol):
    """Systems whose loss couples the whole batch and that can be accumulated exactly (GradCache)."""

    def represent(self, batch: Batch) -> Mapping[str, Tensor]:
        """Per-sample representations, each ``(B, D)``, differentiable."""
        ...

    def loss_from(self, representations: Mapping[str, Tensor], batch: Batch, step: int) -> Losses:
        """The loss of the whole batch given its representations."""
        ...


@runtime_checkable
class Follows(Protocol):
    """Parts of a system that hold a copy of others' weights."""

    def take_over(self) -> None:
        """Copy the weights that training begins with."""
        ...


@runtime_checkable
class Embeds(Protocol):
    """Systems with a shared embedding space. Vectors have unit length, ``(B, D)``, fp32."""

    def embed_image(self, image: Tensor) -> Tensor: ...

    def embed_text(self, text: TextBatch) -> Tensor: ...

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Logits ``(Q, M)`` with the system's own scale and bias."""
        ...

    def encoders(self) -> Mapping[str, nn.Module]:
        """The encoder of each modality, for what concerns encoders alone (compilation, adaptation, export)."""
        ...


@runtime_checkable
class Hears(Protocol):
    """Systems with recordings and texts, and maybe pictures (`Embeds`), in a shared space. Vectors have unit length."""

    def embed_audio(self, audio: AudioBatch) -> Tensor:
        """Unit vectors ``(B, D)``, fp32; a recording's does not depend on the others of its batch."""
        ...

    def embed_text(self, text: TextBatch) -> Tensor: ...

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """See `Embeds.scores`."""
        ...

    def encoders(self) -> Mapping[str, nn.Module]:
        """See `Embeds.encoders`."""
        ...


@runtime_checkable
class Transcribes(Protocol):
    """Systems that write down what is said."""

    def transcribe(self, audio: AudioBatch, *, beams: int = 1, window: int | None = None) -> list[tuple[int, ...]]:
        """Token ids of what recording i says, by the most likely path, or with ``beams`` the most likely words.

        Args:
            audio: Recordings of any length.
            beams: Texts that are kept from frame to frame; 1 takes the most likely path.
            window: Samples that are heard at once of longer recordings, in windows that overlap; None hears all at once.
        """
        ...


@runtime_checkable
class ReadsTexts(Protocol):
    """Systems that tell another network, which makes something of a text, what the text says."""

    def read_texts(self, text: TextBatch) -> Encoded:
        """Features of the words, the mask of those that count, and as ``pooled`` one vector for the whole text."""
        ...


@runtime_checkable
class Tokenizes(Protocol):
    """Systems that turn pictures into token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens of a picture, which are in raster order."""
        ...

    def encode(self, image: Tensor) -> Tensor:
        """Pixels uint8 ``(B, 3, H, W)`` to ids ``(B, N)``."""
        ...

    def decode(self, ids: Tensor) -> Tensor:
        """Ids ``(B, N)`` to pixels uint8 ``(B, 3, H, W)``."""
        ...


@runtime_checkable
class Matches(Protocol):
    """Systems that judge a picture and a text together."""

    def encode_image(self, image: Tensor) -> Encoded:
        """The part of a picture's computation that does not depend on a text."""
        ...

    def encode_text(self, text: TextBatch) -> Encoded:
        """The part of a text's computation that does not depend on a picture."""
        ...

    def match(self, image: Encoded, text: Encoded) -> Tensor:
        """Logits ``(B,)``, fp32, of picture i and text i belonging together."""
        ...


@runtime_checkable
class Grounds(Matches, Protocol):
    """Systems that can tell where in a picture the words of a text are."""

    def ground(self, image: Encoded, text: Encoded, *, layers: Sequence[int] | None = None) -> Tensor:
        """How much each token of text i at each place of picture i speaks for both belonging together.

        Args:
            image: From `encode_image`.
            text: From `encode_text`.
            layers: To average over, counted from 0; default: the system's own choice.

        Returns:
            Heat ``(B, T, h, w)``, not negative, fp32, on the grid of the picture tokens; zero where a text is padding.

        Raises:
            UserError: The system has no such layer, or its picture tokens are no grid.
        """
        ...


@dataclass(frozen=True)
class Candidates:
    """Answers to choose among: as words, and as the token ids that a system which reads or writes answers needs."""

    words: tuple[str, ...]
    text: TextBatch


@dataclass(frozen=True)
class RankedAnswers:
    """Answers to one question, best first, with their scores in 0..1.

    A score is how likely it is that the answer would be called right; where several answers are right the scores add up to more
    than 1, unless a system divides one belief among its candidates.
    """

    answers: tuple[str, ...]
    scores: tuple[float, ...]


@runtime_checkable
class Answers(Protocol):
    """Systems that answer questions about pictures: classifiers over a list, or decoders that rank answers by writing them."""

    @property
    def known_answers(self) -> tuple[str, ...]:
        """The answers among which it chooses by itself, normalised; empty where it needs candidates."""
        ...

    def answer(
        self, image: Tensor, question: TextBatch, candidates: Candidates | None = None, *, k: int = 1
    ) -> list[RankedAnswers]:
        """The ``k`` best answers to question i about picture i, fewer where there are no more to choose among.

        Args:
            image: Pixels uint8 ``(B, 3, H, W)``.
            question: One a picture.
            candidates: Answers to choose among, the same for all questions; default: `known_answers`.
            k: Answers wanted.

        Raises:
            UserError: A candidate cannot be given by this system.
        """
        ...


Solver = Literal["euler", "heun", "dpm++", "lcm"]
"""The suite's own ways from noise to data: of first order (DDIM), of second order with two looks at each step, and with one.
The last is for models distilled for consistency, which tell the data at once: fresh noise is added to it between the steps."""


@dataclass(frozen=True)
class Sampling:
    """How a generator chooses; a system reads what applies to it.

    Args:
        guidance: Scale of classifier-free guidance (https://arxiv.org/abs/2207.12598): 1 is none, more follows the text more.
        guidance_interval: Part of the progress, in 0..1, in which guidance acts.
        guidance_ramp: The scale grows from 1 at the start to ``guidance`` at the end (Muse); for generators that choose many
            tokens at once.
        temperature: Divides the logits; 0 takes the likeliest.
        top_k: Likeliest tokens that are drawn from; 0 for all.
        top_p: Smallest set of likeliest tokens with so much probability that is drawn from; 1 for all.
        steps: Number of steps of generators that choose many tokens at once, or go from noise to data.
        solver: How to go from noise to data: one of the suite's own (`Solver`), or a scheduler of diffusers by its class name,
            such as "DDIM" or "UniPCMultistep"; empty for the model's usual one.
        rescale: How far the spread of guided predictions is brought back to that without guidance, 0..1
            (https://arxiv.org/abs/2305.08891).
        threshold: Share of the pixels that dynamic thresholds are taken from (Imagen: 0.995); 0 for none. For pixels only.
        strength: Where a picture is changed: the share of the way from noise that is gone, above 0; 1 forgets the picture.
        shift: More than 1 spends more of the steps on noise (https://arxiv.org/abs/2403.03206).
    """

    guidance: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_ramp: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    steps: int = 12
    solver: str = ""
    rescale: float = 0.0
    threshold: float = 0.0
    strength: float = 1.0
    shift: float = 1.0


OnPicture = Callable[[Tensor, float], None]
"""Called with the pictures as far as they are known, uint8 ``(B, 3, H, W)``, and the progress in 0..1."""


@runtime_checkable
class Paints(Protocol):
    """Systems that make pictures of texts."""

    def paint(
        self,
        text: TextBatch,
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        image: Tensor | None = None,
        keep: Tensor | None = None,
        on_picture: OnPicture | None = None,
        negative: TextBatch | None = None,
    ) -> Tensor:
        """Pictures uint8 ``(B, 3, H, W)``, one a text; in fp32 equal seeds give equal pictures whatever the batch.

        Args:
            text: What to paint.
            seeds: One a text.
            sampling: How to choose.
            image: Pictures uint8 ``(B, 3, H, W)`` to be finished or changed.
            keep: True for the pixels of ``image`` that stay, ``(B, H, W)``, as far as tokens or latents allow.
            on_picture: Receives pictures in the making.
            negative: What guidance leads away from, one a text; nothing in particular if None.
        """
        ...


@runtime_checkable
class Expects(Protocol):
    """Systems that tell how much a text lets them expect a picture."""

    def picture_likelihoods(self, image: Tensor, text: TextBatch) -> Tensor:
        """Log-likelihood ``(B,)`` of picture i, uint8 ``(B, 3, H, W)``, behind text i: nats, mean over its tokens, fp32."""
        ...


@runtime_checkable
class Varies(Protocol):
    """Systems that make other pictures of what a picture shows."""

    def vary(self, image: Tensor, seeds: Sequence[int], sampling: Sampling, *, on_picture: OnPicture | None = None) -> Tensor:
        """Pictures uint8 ``(B, 3, H, W)``, one of each given.

        Args:
            image: Pixels uint8, of the size that the system's preparation for its own pictures gives.
            seeds: One a picture, as in `Paints.paint`.
            sampling: How to choose.
            on_picture: Receives pictures in the making.

        Raises:
            UserError: The network was trained without vectors of pictures or texts.
        """
        ...


@runtime_checkable
class Compresses(Protocol):
    """Systems that turn pictures into a small grid of numbers and back, for generators to work in."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the latents of a picture."""
        ...

    def to_latents(self, image: Tensor) -> Tensor:
        """Pixels uint8 ``(B, 3, H, W)`` to latents ``(B, C, h, w)``, fp32, about zero mean and unit spread; no gradients."""
        ...

    def from_latents(self, latents: Tensor) -> Tensor:
        """Latents to pixels uint8, for any values."""
        ...


@dataclass(frozen=True)
class Decoding:
    """How text is written, token by token.

    Args:
        max_tokens: Longest continuation, its end included; less where the model's context has less room.
        beams: Continuations that are kept at each step; 1 is greedy, or drawing where the temperature is above 0.
        length_penalty: Beams are compared by log-likelihood over length to this power; above 0 favours longer ones.
        no_repeat: No run of so many tokens is written twice; 0 for no such rule.
        temperature: Divides the logits; 0 takes the likeliest.
        top_k: Likeliest tokens that are drawn from; 0 for all.
        top_p: Smallest set of likeliest tokens with so much probability that is drawn from (nucleus); 1 for all.
        end: The token that ends a text, which the caller takes from the model's tokenizer; None where nothing ends.
    """

    max_tokens: int = 32
    beams: int = 1
    length_penalty: float = 1.0
    no_repeat: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    end: int | None = None


@dataclass(frozen=True)
class Written:
    """A continuation.

    Args:
        ids: Tokens, without the end.
        log_likelihood: In nats, the sum over its tokens and its end, of the model's own distribution.
        finished: Whether it ended by itself.
        others: What else a beam search found, best first.
    """

    ids: tuple[int, ...]
    log_likelihood: float
    finished: bool
    others: "tuple[Written, ...]" = ()


OnTokens = Callable[[Tensor], None]
"""Called with the tokens so far, ``(B, n)`` int64; what stands behind an end means nothing."""


@runtime_checkable
class AnswersFreely(Answers, Protocol):
    """Systems that also write answers, word by word, which then need not be in any list."""

    def write_answer(self, image: Tensor, question: TextBatch, decoding: Decoding, seeds: Sequence[int]) -> list[Written]:
        """An answer to question i about picture i.

        Args:
            image: Pixels uint8 ``(B, 3, H, W)``.
            question: One a picture.
            decoding: How to choose the words.
            seeds: One a question; in fp32 what is drawn depends on it, not on the batch.
        """
        ...


@runtime_checkable
class Captions(Protocol):
    """Systems that describe pictures in words."""

    @property
    def beginnings(self) -> Mapping[str, str]:
        """Texts that a caption may be begun with, by name, such as the one for a language; the first is the usual one."""
        ...

    def caption(
        self,
        image: Tensor,
        beginning: TextBatch,
        decoding: Decoding,
        seeds: Sequence[int],
        *,
        on_tokens: OnTokens | None = None,
    ) -> list[Written]:
        """Continue text i, which describes picture i.

        Args:
            image: Pixels uint8 ``(B, 3, H, W)``.
            beginning: First tokens of each caption, without an end; their numbers may differ.
            decoding: How to choose.
            seeds: One a picture; in fp32 what is drawn depends on it, not on the batch.
            on_tokens: Receives what is written, step by step, where there is a single beam.
        """
        ...

    def caption_likelihoods(self, image: Tensor, text: TextBatch) -> Tensor:
        """Log-likelihood in nats ``(B,)``, fp32, of text i, given whole, start and end included, as a caption of picture i."""
        ...


@runtime_checkable
class Writes(Protocol):
    """Systems that continue texts in which pictures stand, so that examples may be shown before a question."""

    def write(
        self, prompt: Interleaved, decoding: Decoding, seeds: Sequence[int], *, on_tokens: OnTokens | None = None
    ) -> list[Written]:
        """Continue text i; arguments as in `Captions.caption`."""
        ...

    def continuation_likelihoods(self, prompt: Interleaved, candidates: TextBatch) -> Tensor:
        """Log-likelihood in nats ``(B, A)``, fp32, of each candidate as the continuation of each text.

        Args:
            prompt: B texts.
            candidates: A continuations, without a start, with an end where it counts.
        """
        ...


@runtime_checkable
class CompilesDecoding(Protocol):
    """Systems whose decoding, step by step, can be compiled."""

    def compile_decoding(self) -> None:
        """Compile the step, once for each number of rows when it is first met; weights must not change afterwards."""
        ...


@runtime_checkable
class CompilesSampling(Protocol):
    """Systems whose way from noise to data, step by step, can be compiled."""

    def compile_sampling(self) -> None:
        """Compile the step, once for each number of rows when it is first met; weights must not change afterwards."""
        ...


CAPABILITIES: Mapping[str, type] = {
    "embeds": Embeds,
    "hears": Hears,
    "transcribes": Transcribes,
    "tokenizes": Tokenizes,
    "compresses": Compresses,
    "matches": Matches,
    "grounds": Grounds,
    "answers": Answers,
    "answers_freely": AnswersFreely,
    "captions": Captions,
    "writes": Writes,
    "paints": Paints,
    "expects": Expects,
    "varies": Varies,
}
"""Every declared capability. Evaluation, command line and demos ask for one of these, never for a class or a name."""


def capabilities(system: nn.Module) -> frozenset[str]:
    """Names of the capabilities that a system really has."""
    able = frozenset(name for name, protocol in CAPABILITIES.items() if isinstance(system, protocol))
    return able - system.lacks if isinstance(system, System) else able


class Source(Protocol):
    """A random-access collection of samples. Cheap to open, picklable, safe to read from several processes."""

    @property
    def name(self) -> str:
        """What the user called it, for messages and protocol stamps."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of which samples there are and in which order; a different digest means a different training order."""
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Id of a sample without reading its media."""
        ...

    def fields(self, index: int) -> Mapping[str, Any]:
        """Metadata of a sample without decoding its media."""
        ...

    def read(self, index: int) -> Sample:
        """The sample with its bytes. Raises `mm.errors.BadSample` when it cannot be had."""
        ...


class BatchStream(Protocol):
    """An endless, resumable supply of batches whose content is a pure function of its seed and its position."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state(self) -> dict[str, Any]:
        """JSON position after the last batch that was handed out, with the sample accounting."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...
