"""Dual towers small enough to export in a second, with random weights and a vocabulary of their own, and their input."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mm.hub import Model
from mm.media.geometry import ImageSpec
from mm.processor import Processor
from mm.systems.clip import ClipConfig, build
from mm.tokenizers.text import TextTokenizer

TEXTS = ["a red heart", "two   blue DOGS run in", "<end> of it", "é"]
CAPTIONS = ["a red heart", "a red cat", "two blue dogs run", "the green house of cats"] * 3

VISION = {
    "backbone": "vit_base_patch32_clip_224",
    "image_size": 32,
    "patch_size": 16,
    "options": {"embed_dim": 32, "depth": 2, "num_heads": 2},
}
PYRAMID = {"backbone": "test_resnet", "image_size": 32, "pool": "pyramid"}
SIGLIP_VISION = {
    "backbone": "vit_base_patch16_siglip_224",
    "image_size": 32,
    "options": {"embed_dim": 24, "depth": 2, "num_heads": 2},
}
SIGLIP_TEXT = {"causal": False, "attend_padding": True, "pooling": "final", "activation": "gelu_tanh", "norm_eps": 1e-6}


def tiny(
    image: dict[str, Any],
    text: dict[str, Any],
    *,
    tokenizer: TextTokenizer | None = None,
    fit: Literal["crop", "squash", "content"] = "crop",
    **options: Any,
) -> Model:
    """A model whose every parameter is away from its initial value, so that a lost bias or gain is seen."""
    tokenizer = TextTokenizer.train_bpe(CAPTIONS, 300) if tokenizer is None else tokenizer
    small = {"width": 32, "layers": 2, "heads": 2, "context_length": 16, "vocab_size": tokenizer.vocab_size}
    if "library" not in text:
        text = small | text
    config = ClipConfig.model_validate({"image": image, "text": text, "embed_dim": 24, **options})
    torch.manual_seed(0)
    system = build(config).eval()
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    spec = ImageSpec(size=config.image.image_size, fit=fit, background=(0, 0, 0))
    processor = Processor(image=spec, tokenizer=tokenizer, context_length=config.text.context_length)
    return Model(system=system, processor=processor, config=config, name="tiny")


def pictures(model: Model, rows: int) -> Tensor:
    size = model.config.image.image_size
    return torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def run_onnx(path: Path, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(["vector"], inputs)
    assert isinstance(outputs[0], np.ndarray)
    return outputs[0]


def tokenized(folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
    """As docs/export.md does it: nothing but the tokenizers library and numpy."""
    rows = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
    ids = np.array([row.ids for row in rows], dtype=np.int64)
    return {"ids": ids, "lengths": np.array([sum(row.attention_mask) for row in rows], dtype=np.int64)}
