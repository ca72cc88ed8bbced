"""Every way of tuning on every system that learns: only what was added changes, models keep it, runs resume exactly."""

import copy
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import mm
from mm.errors import UserError
from mm.hub import Model, load_parts
from mm.media.geometry import ImageSpec
from mm.nn.tuning import TuneConfig, merge, tune
from mm.processor import Processor
from mm.run.catalogue import describe
from mm.run.config import RunConfig
from mm.systems import MODULES, SystemConfig, build, read_system
from mm.tokenizers.text import TextTokenizer
from mm.training.parameters import count_parameters, parameter_lines
from mm.types import AudioBatch, Batch, System, TextBatch

VIT = {"backbone": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 8}
VIT = VIT | {"options": {"embed_dim": 16, "depth": 1, "num_heads": 2}}
TEXT = {"width": 16, "layers": 2, "heads": 2, "context_length": 8, "vocab_size": 40}
WHOLE = TEXT | {"causal": False, "pooling": "mean"}
CLIP: dict[str, Any] = {"name": "clip", "image": VIT, "text": TEXT, "embed_dim": 8}
VQ = {"tokenizer": {"image_size": 16, "patch": 2, "widths": [8, 16], "quantizer": {"kind": "fsq", "levels": [5, 5, 3]}}}
ALBEF: dict[str, Any] = {"image": VIT, "width": 16, "heads": 2, "text_layers": 1, "fusion_layers": 2, "embed_dim": 8}
ALBEF = ALBEF | {"vocab_size": 40, "context_length": 8}
WORDS = {"width": 16, "layers": 2, "heads": 2, "context_length": 12, "vocab_size": 40}
READER: dict[str, Any] = {"image": VIT, "language": {"network": WORDS}, "train_language": True}
DIT = {"patch": 8, "width": 16, "layers": 2, "heads": 2}
SOUND = {"mels": 16, "stride": 4, "width": 16, "layers": 2, "heads": 2}
SYSTEMS: dict[str, dict[str, Any]] = {
    "clip": CLIP,
    "albef": ALBEF | {"queue_size": 8},
    "albef-vqa": ALBEF | {"head": "classes", "answers": ["yes", "no", "x"]},
    "vilt": {"image_size": 16, "patch_size": 8, "vocab_size": 40, "context_length": 8, "width": 16, "layers": 2, "heads": 2},
    "dalle": {"tokenizer": VQ, "width": 16, "layers": 2, "heads": 2, "text": {"vocab_size": 40, "context_length": 8}},
    "muse": {"tokenizer": VQ, "width": 16, "layers": 2, "heads": 2, "text": WHOLE},
    "flow": {"latents": VQ | {"name": "vq"}, "text": WHOLE, "denoiser": {"width": 16, "layers": 2, "heads": 2}},
    "captioner": {"image": VIT, "embed_dim": 8, "text": WORDS},
    "coca": {"image": VIT, "embed_dim": 8, "text": WORDS, "text_layers": 1},
    "language-model": {"network": WORDS},
    "frozen": READER,
    "flamingo": READER | {"latents": 2, "resampler_layers": 1, "resampler_heads": 2},
    "imagen": {"text": CLIP, "base": {"image_size": 16, "denoiser": DIT}},
    "clap": {"audio": SOUND, "text": TEXT, "embed_dim": 8},
    "imagebind": {"hub": CLIP, "train_hub": True, "audio": SOUND},
    "dalle2": {"text": CLIP, "latents": {"image_size": 16}, "denoiser": DIT, "prior": {"width": 16, "layers": 1, "heads": 2}},
}
WITHOUT_BLOCKS = {"vq", "kl", "published-vq", "image-tower", "text-tower", "published-vae", "wav2vec2", "wav2vec2-ctc"}
LIBRARY_BLOCKS = {"latent-diffusion"}
"""Has LoRA alone: tests/systems/test_latent_diffusion.py."""

METHODS: dict[str, Any] = {
    "lora": {"rank": 2},
    "adapter": {"width": 4, "behind": ["attention", "cross_attention", "feed_forward"]},
    "prefix": {"length": 3},
    "prompt": {"length": 3},
}
CLOSED = ("gated.", "denoiser.", "stages.")
"""Beginnings of the names of parameters that begin at zero."""

WALK = pytest.mark.parametrize("method", METHODS)
OVER = pytest.mark.parametrize("name", SYSTEMS)


def small(name: str) -> tuple[SystemConfig, System]:
    torch.manual_seed(0)
    config = read_system({"name": name} | SYSTEMS[name], "test")
    system = build(config)
    for parameter in (one for part, one in system.named_parameters() if part.startswith(CLOSED) and not one.any()):
        torch.nn.init.normal_(parameter, std=0.1)  # a closed gate lets no gradient through
    return config, system


def way(method: str) -> TuneConfig:
    data = {"train": "emoji:train"}
    found = RunConfig.model_validate({"system": CLIP, "data": data, "tune": {"method": method, **METHODS[method]}}).tune
    assert found is not None
    return found


def batch(seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(6, 3, 4, 4, generator=generator)
    return Batch(
        ids=tuple(f"{seed}/{i}" for i in range(6)),
        image=(F.interpolate(coarse, 16) * 255).to(torch.uint8),
        text=TextBatch(torch.randint(3, 40, (6, 8), generator=generator), torch.tensor([8, 5, 6, 3, 7, 4])),
        groups=torch.tensor([0, 0, 1, 2, 3, 4]),
        answers=({"yes": 1.0}, {"no": 1.0}, {"x": 1.0}) * 2,
        audio=AudioBatch(torch.randn(6, 3_000, generator=generator), torch.full((6,), 3_000)),
    )


def outcome(system: System) -> Tensor:
    """The loss of a batch in evaluation mode, for fixed random numbers: it depends on all that a system computes."""
    mode = system.training
    torch.manual_seed(7)
    with torch.no_grad():
        loss = system.eval().loss(batch(), 0).total
    system.train(mode)
    return loss


def trained(system: System, steps: int = 3) -> set[str]:
    """Names of the parameters that gradients reached in some steps."""
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=0.05)
    reached: set[str] = set()
    system.train()
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        system.loss(batch(step), step).total.backward()
        reached |= {name for name, p in system.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        system.after_step(step)
    return reached


def test_the_walk_knows_every_system() -> None:
    assert SYSTEMS.keys() | WITHOUT_BLOCKS | LIBRARY_BLOCKS == MODULES.keys()


@WALK
@OVER
def test_gradients_reach_what_was_added_and_nothing_else_changes(name: str, method: str) -> None:
    _, system = small(name)
    before, state = outcome(system), copy.deepcopy(system.state_dict())
    tune(system, way(method))
    assert torch.equal(outcome(system), before)
    learning = {n for n, p in system.named_parameters() if p.requires_grad}
    assert trained(system) == learning
    assert not torch.equal(outcome(system), before)
    after = system.state_dict()
    frozen = [n for n in state if not n.startswith(("momentum.", "queues.")) and n not in learning]
    assert frozen
    for key in frozen:
        layer, _, weight = key.rpartition(".")
        original = f"{layer}.parametrizations.{weight}.original"
        assert torch.equal(after[original if original in after else key], state[key]), key


@WALK
@OVER
def test_a_state_brings_a_tuned_network_back_also_in_bf16(name: str, method: str) -> None:
    _, system = small(name)
    tune(system, way(method))
    trained(system)
    expected = outcome(system)
    _, again = small(name)
    tune(again, way(method))
    again.load_state_dict(system.state_dict())
    assert torch.equal(outcome(again), expected)
    merge(again, way(method))
    torch.testing.assert_close(outcome(again), expected, atol=1e-4, rtol=1e-4)
    again.cast_(torch.bfloat16)
    assert float(outcome(again)) == pytest.approx(float(expected), rel=0.05, abs=0.05)


@OVER
def test_counts_tell_what_is_trained(name: str) -> None:
    _, system = small(name)
    whole = count_parameters(system)
    held = sum(part["total"] - part["trained"] for part in whole["parts"].values())
    assert whole["trained"] + held == whole["total"]
    tune(system, way("adapter"))
    counts = count_parameters(system)
    assert counts["trained"] == sum(p.numel() for p in system.parameters() if p.requires_grad)
    added = sum(p.numel() for n, p in system.named_parameters() if ".adapter." in n and p.requires_grad)
    assert counts["total"] == whole["total"] + added
    head, *lines = parameter_lines(counts)
    assert head.startswith("trained: ")
    assert head.endswith(f"({counts['trained']:,} of {counts['total']:,} parameters)")
    assert [line.split()[0] for line in lines] == list(counts["parts"])


def tuned_model(method: str) -> Model:
    tokenizer = TextTokenizer.train_bpe(["a red heart", "two blue dogs run"] * 3, 300)
    config = read_system(CLIP | {"text": TEXT | {"vocab_size": tokenizer.vocab_size}}, "test")
    torch.manual_seed(0)
    system = build(config)
    tune(system, way(method))
    for parameter in system.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    processor = Processor(image=ImageSpec(size=16, fit="squash", background=(0, 0, 0)), tokenizer=tokenizer, context_length=8)
    return Model(system.eval(), processor, config, "tuned", tune=merge(system, way(method)))


@WALK
def test_a_saved_model_is_the_same_model(method: str, tmp_path: Path) -> None:
    model = tuned_model(method)
    folder = mm.save(model, tmp_path / "model")
    again = mm.load(folder, device="cpu", precision="fp32")
    texts = ["a red heart", "dogs"]
    assert torch.equal(again.embed_texts(texts), model.embed_texts(texts))
    assert again.fingerprint == model.fingerprint
    assert again.tune == model.tune == (None if method == "lora" else way(method))
    half = mm.load(folder, device="cpu", precision="bf16").embed_texts(texts)
    assert F.cosine_similarity(half, model.embed_texts(texts)).min() > 0.99
    assert describe(again).get("tune", {}).get("method") == (None if method == "lora" else method)


def test_a_tuned_part_of_another_network_is_refused(tmp_path: Path) -> None:
    folder = mm.save(tuned_model("prefix"), tmp_path / "model")
    with pytest.raises(UserError, match=r"system\.text: .* was tuned by 'prefix'"):
        load_parts({"text": str(folder)})


DATA = "data.train=emoji:train/core/noto/novel"
UNLOCKED = "system.lock=[image]"  # emoji-clip has blocks in its text tower alone
SHORT = ["train.steps=4", "train.batch_size=4", "train.checkpoint_every_steps=2", "train.tensorboard=false", DATA, UNLOCKED]


@pytest.mark.parametrize("method", ["adapter", "prefix"])
def test_a_run_resumes_exactly_and_tells_what_it_trained(method: str, tmp_path: Path) -> None:
    changes, log = [*SHORT, f"tune={method}"], StringIO()
    mm.train("configs/finetune.yaml", changes, out=tmp_path / "whole", console=Console(file=log, width=200))
    mm.train("configs/finetune.yaml", [*changes, "train.steps=2"], out=tmp_path / "part")
    mm.train("configs/finetune.yaml", changes, out=tmp_path / "part")
    whole, part = (mm.load(tmp_path / name, device="cpu") for name in ("whole", "part"))
    assert whole.tune is not None
    assert whole.tune.method == method
    second = part.system.state_dict()
    for name, tensor in whole.system.state_dict().items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)
    counts = describe(whole)["card"]["parameters"]
    assert parameter_lines(counts)[0] in log.getvalue()
    assert 0 < counts["trained"] < 0.1 * counts["total"]
    base = mm.load("emoji-clip", device="cpu")
    assert whole.fingerprint != base.fingerprint
    other = "adapter" if method == "prefix" else "prefix"
    with pytest.raises(UserError, match="can only be tuned as before"):
        mm.train("configs/finetune.yaml", [*SHORT, f"init_from={tmp_path / 'whole'}", f"tune={other}"], out=tmp_path / "other")
    further = [*SHORT, f"init_from={tmp_path / 'whole'}", f"tune={method}", "train.steps=1", "train.lr=1e-12"]
    mm.train("configs/finetune.yaml", further, out=tmp_path / "further")
    texts = ["zebra", "red apple"]
    torch.testing.assert_close(mm.load(tmp_path / "further", device="cpu").embed_texts(texts), whole.embed_texts(texts))


def test_full_by_name_is_no_tuning_at_all(tmp_path: Path) -> None:
    for number, changes in enumerate(([], ["tune=full"])):
        mm.train("configs/finetune.yaml", [*SHORT, "train.steps=1", *changes], out=tmp_path / str(number))
    first, second = (mm.load(tmp_path / str(number), device="cpu") for number in range(2))
    assert first.fingerprint == second.fingerprint
