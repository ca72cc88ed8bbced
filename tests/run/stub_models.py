"""Painters that do something known, so that figures about them are known, and dual towers with random weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm.config import validate
from mm.hub import Model
from mm.media.image import ImageSpec
from mm.processor import Processor
from mm.systems import CONFIGS, build
from mm.systems.vq import VqConfig
from mm.tokenizers.text import TextTokenizer
from mm.types import OnPicture, Sampling, System, TextBatch

SIDE = 16
CONTEXT = 16
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40), "black": (0, 0, 0)}
TEXT = TextTokenizer.train_bpe([*COLOURS, "a photo depicts"], 300)
CLIP: dict[str, Any] = {
    "name": "clip",
    "image": {"backbone": "resnet18", "image_size": SIDE, "options": {"channels": [8, 8, 8, 8]}},
    "text": {"width": 16, "layers": 1, "heads": 2, "vocab_size": TEXT.vocab_size, "context_length": CONTEXT},
    "embed_dim": 8,
}

Answer = Callable[[str, int], Tensor]


class StubPainter(System):
    """Paints what ``answer`` gives for a prompt and a seed; ``batches`` counts what it was asked for."""

    def __init__(self, answer: Answer, tokenizer: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answer, self.batches = answer, list[int]()
        if tokenizer is not None:
            self.tokenizer = tokenizer

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
        prompts = [TEXT.decode(row[:length].tolist()) for row, length in zip(text.ids, text.lengths.tolist(), strict=True)]
        pictures = torch.stack([self.answer(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)])
        self.batches.append(len(seeds))
        if on_picture:
            on_picture(pictures // 2, 0.5)
            on_picture(pictures, 1.0)
        return pictures


def noise(_: str, seed: int) -> Tensor:
    return torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def processor() -> Processor:
    return Processor(image=ImageSpec(size=SIDE, fit="squash"), tokenizer=TEXT, context_length=CONTEXT)


def painter(answer: Answer = noise, tokenizer: nn.Module | None = None) -> tuple[Model, StubPainter]:
    system = StubPainter(answer, tokenizer).eval()
    return Model(system=system, processor=processor(), config=VqConfig(), name="stub"), system


def clip(seed: int = 0, **changes: Any) -> Model:
    config = validate(CONFIGS["clip"], CLIP | changes, "test")
    torch.manual_seed(seed)
    return Model(system=build(config).eval(), processor=processor(), config=config, name=f"clip-{seed}")
