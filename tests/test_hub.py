"""Models on disk: what is saved comes back equal, and what is damaged or foreign is refused in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mm
from mm.encoders.image import ImageEncoderConfig
from mm.encoders.text import TextEncoderConfig
from mm.errors import CheckpointError, ConfigError, UserError
from mm.hub import Model
from mm.media.image import ImageSpec
from mm.processor import Processor
from mm.run.training import assemble, load_run_config
from mm.systems import build
from mm.systems.clip import ClipConfig
from mm.tokenizers.text import TextTokenizer

TEXTS = ["a red disc", "ein roter Kreis", "红色", "a blue square"]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    tokenizer = TextTokenizer.train_bpe(TEXTS, 300)
    config = ClipConfig(
        image=ImageEncoderConfig(backbone="resnet18", image_size=32, options={"channels": [8, 8, 8, 8]}),
        text=TextEncoderConfig(width=16, layers=1, heads=2, vocab_size=tokenizer.vocab_size),
        embed_dim=16,
    )
    processor = Processor(image=ImageSpec(size=32), tokenizer=tokenizer, context_length=32, templates=("{}", "a {}"))
    return Model(system=build(config).eval(), processor=processor, config=config, name="tiny", card={"summary": "tiny"})


@pytest.fixture
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(5)]


def test_saved_model_comes_back_equal(model: Model, pictures: list[Image.Image], tmp_path: Path) -> None:
    loaded = mm.load(mm.save(model, tmp_path / "model"), device="cpu")
    assert torch.equal(loaded.embed_images(pictures), model.embed_images(pictures))
    assert torch.equal(loaded.embed_texts(TEXTS), model.embed_texts(TEXTS))
    assert loaded.fingerprint == model.fingerprint
    assert loaded.config == model.config
    assert loaded.card == {"summary": "tiny"}
    assert loaded.processor.templates == ("{}", "a {}")


def test_half_precision_is_half_the_size_and_close(model: Model, pictures: list[Image.Image], tmp_path: Path) -> None:
    whole, half = mm.save(model, tmp_path / "whole"), mm.save(model, tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = mm.load(half, device="cpu")
    assert loaded.embed_images(pictures).dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(loaded.embed_texts(TEXTS), model.embed_texts(TEXTS)).min() > 0.999
    assert loaded.fingerprint != model.fingerprint


def test_order_and_batching_of_texts_do_not_matter(model: Model) -> None:
    together = model.embed_texts(TEXTS)
    apart = torch.cat([model.embed_texts([text]) for text in TEXTS])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.embed_texts(TEXTS[::-1], batch_size=2), together.flip(0), rtol=1e-5, atol=1e-6)


def test_nothing_to_embed_gives_no_rows_of_the_right_width(model: Model) -> None:
    assert model.embed_texts([]).shape == (0, 16)
    assert model.embed_images([]).shape == (0, 16)


def test_a_folder_with_a_model_is_not_overwritten(model: Model, tmp_path: Path) -> None:
    mm.save(model, tmp_path)
    with pytest.raises(UserError, match="already holds a model"):
        mm.save(model, tmp_path)


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model 'emoji-clop'; did you mean 'emoji-clip'"):
        mm.load("emoji-clop")
    with pytest.raises(CheckpointError, match="neither a model nor a complete checkpoint"):
        mm.load(tmp_path)


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _forget_a_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state.pop(next(iter(state)))
    save_file(state, folder / "model.safetensors")


def _reshape_a_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in state.items() if tensor.ndim == 2)
    state[name] = state[name][:-1].clone()
    save_file(state, folder / "model.safetensors")


def _name_code(folder: Path) -> None:
    (folder / "config.yaml").write_text("system: !!python/object/apply:os.system [true]\n")


def _add_a_key(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("embed_dim", "_target_: os.system\n  embed_dim"))


def _break_the_processor(folder: Path) -> None:
    values = json.loads((folder / "processor.json").read_text())
    (folder / "processor.json").write_text(json.dumps(values | {"context_length": "long"}))


def _drop_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_truncate, "cannot be read as safetensors"),
        (_forget_a_weight, "does not fit its configuration; missing"),
        (_reshape_a_weight, "its configuration says"),
        (_name_code, "not valid YAML"),
        (_add_a_key, "unknown key '_target_'"),
        (_break_the_processor, "'context_length'"),
        (_drop_the_tokenizer, "tokenizer.json"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(model: Model, tmp_path: Path, damage: object, expected: str) -> None:
    mm.save(model, tmp_path)
    assert callable(damage)
    damage(tmp_path)
    with pytest.raises((CheckpointError, ConfigError, UserError)) as error:
        mm.load(tmp_path, device="cpu")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_whatever_changes_a_vector_changes_the_fingerprint(model: Model) -> None:
    image, spec, tokenizer = model.config.image, model.processor.image_spec, model.processor.tokenizer
    assert isinstance(image, ImageEncoderConfig)
    other_mean = model.config.model_copy(update={"image": image.model_copy(update={"mean": (0.1, 0.2, 0.3)})})
    other_margin = Processor(image=spec.model_copy(update={"margin": 0.1}), tokenizer=tokenizer, context_length=32)
    other_length = Processor(image=spec, tokenizer=tokenizer, context_length=16, templates=("{}", "a {}"))
    others = [replace(model, config=other_mean), replace(model, processor=other_margin), replace(model, processor=other_length)]
    assert model.fingerprint == replace(model, name="another name").fingerprint
    assert len({model.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_weights_cast_for_speed_are_not_saved_as_if_they_were_whole(model: Model, tmp_path: Path) -> None:
    mm.save(model, tmp_path / "model")
    fast = mm.load(tmp_path / "model", device="cpu", precision="bf16")
    with pytest.raises(UserError, match="precision='fp32'"):
        mm.save(fast, tmp_path / "again")
    mm.save(fast, tmp_path / "half", dtype=torch.bfloat16)


def test_bf16_vectors_are_close_to_fp32(model: Model, pictures: list[Image.Image], tmp_path: Path) -> None:
    mm.save(model, tmp_path / "model")
    exact, fast = (mm.load(tmp_path / "model", device="cpu", precision=name) for name in ("fp32", "bf16"))
    assert {p.dtype for p in fast.system.encoders()["text"].parameters()} == {torch.bfloat16}
    pairs = [(m.embed_images(pictures), m.embed_texts(TEXTS)) for m in (exact, fast)]
    for ours, theirs in zip(*pairs, strict=True):
        assert float((ours * theirs).sum(1).min()) > 0.999


@pytest.mark.parametrize("precision", ["fp16", "float32"])
def test_an_unknown_precision_is_refused(precision: str) -> None:
    with pytest.raises(UserError, match="auto, fp32 and bf16"):
        mm.load("emoji-clip", precision=precision)


def follower(clip: Model) -> Model:
    """A network that keeps the towers of the shipped model and adds a fusion of its own."""
    options = [
        "init_from=emoji-clip",
        "data.train=emoji:train/core/noto/novel/seen",
        "data.validation=null",
        "train.batch_size=16",
    ]
    run = assemble(load_run_config(Path("configs/albef.yaml"), options))
    return Model(run.system.eval(), clip.processor, run.config.system, "follower")


def test_weights_of_a_shipped_base_are_not_stored_again(tmp_path: Path) -> None:
    clip = mm.load("emoji-clip", device="cpu", precision="fp32")
    model = follower(clip)
    mm.save(model, tmp_path / "alone", dtype=torch.bfloat16)
    mm.save(model, tmp_path / "beside", dtype=torch.bfloat16, base="emoji-clip")
    alone, beside = (mm.load(tmp_path / name, device="cpu", precision="fp32") for name in ("alone", "beside"))
    for (name, one), other in zip(alone.system.state_dict().items(), beside.system.state_dict().values(), strict=True):
        if not name.startswith(alone.system.only_for_training):
            assert torch.equal(one, other), name
    assert alone.fingerprint == beside.fingerprint
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("alone", "beside")]
    assert sizes[1] < sizes[0] - 2 * sum(p.numel() for p in clip.system.parameters()) + 10_000


@pytest.mark.parametrize("change", [{"queue_size": 64}, {"momentum": 0, "queue_size": 0, "distillation": 0}])
def test_a_base_gives_only_what_a_saved_model_holds(tmp_path: Path, change: dict[str, Any]) -> None:
    """Its momentum copies and queues are of other sizes, or there are none."""
    base = mm.load("emoji-albef", device="cpu", precision="fp32")
    config = base.config.model_copy(update=change)
    system = build(config).eval()
    kept = {name: tensor for name, tensor in base.system.state_dict().items() if not name.startswith("queues.")}
    system.load_state_dict(kept, strict=False)
    model = replace(base, system=system, config=config)
    mm.save(model, tmp_path / "beside", base="emoji-albef")
    mm.save(model, tmp_path / "alone")
    alone, beside = (mm.load(tmp_path / name, device="cpu", precision="fp32") for name in ("alone", "beside"))
    assert alone.fingerprint == beside.fingerprint


def test_a_base_that_changed_is_noticed(tmp_path: Path) -> None:
    model = follower(mm.load("emoji-clip", device="cpu", precision="fp32"))
    mm.save(model, tmp_path / "beside", base="emoji-clip")
    config = tmp_path / "beside" / "config.yaml"
    written = config.read_text()
    config.write_text(written.replace("digest: ", "digest: 0"))
    with pytest.raises(CheckpointError, match="its base 'emoji-clip' has other weights than when this model was saved"):
        mm.load(tmp_path / "beside")
    config.write_text(written.replace("model: emoji-clip", "model: elsewhere"))
    with pytest.raises(CheckpointError, match="'base' names no shipped model"):
        mm.load(tmp_path / "beside")
    with pytest.raises(UserError, match="base 'elsewhere': is not shipped"):
        mm.save(model, tmp_path / "other", base="elsewhere")


def test_a_run_that_kept_other_weights_of_a_shipped_part_is_refused(tmp_path: Path) -> None:
    """Weights of two versions of a part must never be mixed."""
    model = mm.load("emoji-dalle", device="cpu", precision="fp32")
    mm.save(model, tmp_path / "run")
    weights = tmp_path / "run" / "model.safetensors"
    whole = {name: tensor.contiguous() for name, tensor in model.system.state_dict().items()}
    save_file(whole, weights)
    assert mm.load(tmp_path / "run", device="cpu").fingerprint
    changed = next(name for name in whole if name.startswith("tokenizer.") and whole[name].is_floating_point())
    for kept in (whole | {changed: whole[changed] + 1}, {name: tensor for name, tensor in whole.items() if name != changed}):
        save_file(kept, weights)
        with pytest.raises(CheckpointError, match="its tokenizer 'emoji-vq' has other weights than when this run began"):
            mm.load(tmp_path / "run", device="cpu")
