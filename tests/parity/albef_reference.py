"""ALBEF of published parts, with random weights: timm's transformer, transformers' BERT with cross-attention, and the heads."""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import mm
from mm.types import TextBatch

TOLERANCE = 1e-4
SIDE, PATCH = 32, 8
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = [
    *("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "person", "##ing", "un", "##able", "日"),
    *("<", ">", "$", "[", "]", "sep", *LETTERS, *("##" + letter for letter in LETTERS)),
]
HIDDEN = WORDS.index("[MASK]")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Reference(nn.Module):
    """ALBEF of published parts: a timm transformer, BERT with cross-attention in its upper layers, and the heads."""

    def __init__(
        self, *, width: int = 128, picture_width: int = 128, text_layers: int = 2, fusion_layers: int = 2, side: int = SIDE
    ) -> None:
        super().__init__()
        self.text_layers = text_layers
        self.visual_encoder: Any = timm.create_model(
            "vit_base_patch16_224",
            num_classes=0,
            img_size=side,
            patch_size=PATCH,
            embed_dim=picture_width,
            depth=2,
            num_heads=picture_width // 64,
            mlp_ratio=1.5,
        )
        config = transformers.BertConfig(
            vocab_size=len(WORDS),
            hidden_size=width,
            num_hidden_layers=text_layers + fusion_layers,
            num_attention_heads=width // 64,
            intermediate_size=3 * width,
            max_position_embeddings=40,
            is_decoder=True,
            add_cross_attention=True,
            attn_implementation="eager",
        )
        self.text_encoder: Any = transformers.BertLMHeadModel(config)
        for number, layer in enumerate(self.text_encoder.bert.encoder.layer):
            if number < text_layers:
                del layer.crossattention
            else:
                attention = layer.crossattention.self
                attention.key, attention.value = nn.Linear(picture_width, width), nn.Linear(picture_width, width)
        self.vision_proj, self.text_proj = nn.Linear(picture_width, 24), nn.Linear(width, 24)
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(0.03))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * 0.1 + (1 if "norm" in name.lower() and name.endswith("weight") else 0))
        self.eval()

    def picture_tokens(self, pixels: Tensor) -> Tensor:
        values = pixels.float() / 255
        return self.visual_encoder.forward_features(
            (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        )

    def text_tokens(self, text: TextBatch) -> Tensor:
        x = self.text_encoder.bert.embeddings(text.ids)
        for layer in self.text_encoder.bert.encoder.layer[: self.text_layers]:
            x = layer(x, attention_mask(text))
        return x

    def fused(self, words: Tensor, text: TextBatch, picture: Tensor) -> Tensor:
        for layer in self.text_encoder.bert.encoder.layer[self.text_layers :]:
            words = layer(words, attention_mask(text), picture, None)
        return words

    def checkpoint(self, *, retrieval: bool = False) -> dict[str, Any]:
        """What the authors save: momentum encoders, queues and the state of training beside the weights."""
        state: dict[str, Any] = self.state_dict()
        if retrieval:
            state = {name.replace("text_encoder.bert.", "text_encoder."): tensor for name, tensor in state.items()}
            state = {name: tensor for name, tensor in state.items() if not name.startswith("text_encoder.cls.")}
        else:
            state["text_encoder.bert.embeddings.position_ids"] = torch.arange(40)[None]
        for part in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
            state |= {
                name.replace(part, f"{part}_m", 1): torch.zeros_like(tensor)
                for name, tensor in state.items()
                if name.startswith(f"{part}.")
            }
        state |= {"image_queue": torch.randn(24, 16), "text_queue": torch.randn(24, 16), "queue_ptr": torch.zeros(1).long()}
        return {"model": state, "optimizer": {"state": {}}, "config": {"image_res": 32, "optimizer": {"lr": 1e-4}}, "epoch": 29}


def attention_mask(text: TextBatch) -> Tensor:
    return (~text.valid()).float()[:, None, None, :] * torch.finfo(torch.float32).min


def bert_tokenizer() -> Any:
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def pictures(count: int = 3, side: int = SIDE) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def drawn_set(folder: Path, count: int = 6) -> Path:
    rows = ["file,caption"]
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        rows.append(f"{number}.png,the dog {LETTERS[number]}")
    (folder / "pictures.csv").write_text("\n".join(rows) + "\n")
    return folder / "pictures.csv"


def tuned(model: Path, data: Path, run: Path) -> None:
    """A few steps from a converted model on, whose network stays as it is."""
    changes = {"init_from": model, "system": "null", "data.train": data, "data.workers": 0, "data.validation": "null"}
    changes |= {"train.steps": 2, "train.batch_size": 4, "train.warmup_steps": 1, "train.tensorboard": "false"}
    config = Path(__file__).parents[2] / "configs" / "finetune.yaml"
    mm.train(config, [f"{key}={value}" for key, value in changes.items()], out=run)
