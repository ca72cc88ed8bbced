"""Published checkpoints that are damaged, foreign, pickled or ambiguous: converted exactly, or refused in one line."""

import json
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.pretrained import _PRETRAINED, _pcfg, _slpcfg, get_pretrained_cfg
from safetensors.torch import save_file
from torch import Tensor

import mm
from mm.encoders.image import ImageEncoderConfig
from mm.errors import CheckpointError, UserError
from mm.hub import from_imported
from mm.published import open_clip as importer
from mm.published.convert import import_file
from mm.published.openai import import_openai
from mm.published.resolve import import_model, published_as

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VIT = {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
CONFIG: dict[str, Any] = {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT}
RESIDUAL = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}


def weights(**changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = open_clip.CLIP(**{**CONFIG, **changes})
    return {name: tensor for name, tensor in model.state_dict().items() if name != "attn_mask"}


def one_line(caught: pytest.ExceptionInfo[Exception]) -> None:
    assert "\n" not in str(caught.value)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Small architectures on open_clip's list, with tags like those of its own, and their weights in a file."""
    tags = {
        "tiny": {"squashed": _slpcfg(hf_hub="someone/tiny/"), "plain": _pcfg(hf_hub="someone/tiny/")},
        "tiny-one": {"squashed": _slpcfg(hf_hub="someone/tiny/"), "other": _slpcfg(hf_hub="someone/tiny/")},
        "tiny-two": {"quick": _pcfg(hf_hub="someone/tiny/", quick_gelu=True), "plain": _pcfg(hf_hub="someone/tiny/model.bin")},
        "tiny-none": {},
    }
    for name, published in tags.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, CONFIG)
        monkeypatch.setitem(_PRETRAINED, name, published)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights" / "tiny.safetensors"
    path.parent.mkdir()
    save_file(weights(), path)
    return path


def test_every_tag_has_its_own_preparation_and_activation() -> None:
    for architecture, tags in _PRETRAINED.items():
        for tag in tags:
            published = get_pretrained_cfg(architecture, tag)
            config, preprocessing = published_as(architecture, tag)
            assert all(preprocessing[key] == published[key] for key in importer.PREPROCESSING), (architecture, tag)
            assert config.get("quick_gelu", False) or not published.get("quick_gelu"), (architecture, tag)
    assert published_as("roberta-ViT-B-32", "laion2b_s12b_b32k")[0]["quick_gelu"]  # the list does not say it, its config does


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("ViT-L-14", "several preparations of pictures; name one: ViT-L-14/TAG"),
        ("ViT-H-14-quickgelu", "several preparations"),
        ("ViT-B-32", "give ViT-B-32-quickgelu or ViT-B-32/TAG"),
    ],
)
def test_what_tags_do_not_agree_on_is_not_guessed(architecture: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        published_as(architecture)
    one_line(caught)


def test_what_all_tags_agree_on_needs_no_tag() -> None:
    assert published_as("MobileCLIP-S1")[1]["interpolation"] == "bilinear"
    assert published_as("ViT-B-16-SigLIP")[1]["resize_mode"] == "squash"
    for architecture in ("RN50", "ViT-B-32-quickgelu"):
        assert published_as(architecture)[0]["quick_gelu"]


@pytest.mark.parametrize("convert", [False, True])
def test_a_file_is_prepared_as_its_tag_is(convert: bool, tiny: Path) -> None:
    def imported(name: str) -> Any:
        if convert:
            return import_file(tiny, architecture=name, trusted=False)
        return import_model(f"{name}@{tiny}")

    for name in ("tiny/squashed", "tiny-one"):
        assert imported(name).processor.image_spec.fit == "squash"
        assert imported(name).config.image.mean == (0.5, 0.5, 0.5)
    for name in ("tiny/plain", "tiny-none"):
        assert imported(name).processor.image_spec.fit == "crop"
    assert imported("tiny-two/quick").config.text.activation == "quick_gelu"
    assert imported("tiny-two/plain").config.text.activation == "gelu"
    for name, message in (
        ("tiny", "name one: tiny/TAG"),
        ("tiny-two", "give tiny-two-quickgelu or tiny-two/TAG"),
        ("tiny/squished", "did you mean 'tiny/squashed'"),
        ("tiny-non", "did you mean 'tiny-none'"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            imported(name)
        one_line(caught)


@pytest.mark.parametrize("architecture", [None, "tiny"])
def test_the_configuration_beside_a_file_decides(architecture: str | None, tiny: Path) -> None:
    values = {"model_cfg": {**CONFIG, "quick_gelu": True}, "preprocess_cfg": {"resize_mode": "squash", "mean": [0, 0, 0]}}
    (tiny.parent / "open_clip_config.json").write_text(json.dumps(values))
    imported: Any = import_file(tiny, architecture=architecture, trusted=False)
    assert imported.processor.image_spec.fit == "squash"
    assert imported.config.image.mean == (0, 0, 0)
    assert imported.config.text.activation == "quick_gelu"
    named: Any = import_file(tiny, architecture="tiny/plain", trusted=False)
    assert named.processor.image_spec.fit == "crop"


def test_a_revision_of_a_tag_is_honoured_and_recorded(tiny: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--someone--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "open_clip_model.safetensors").write_bytes(tiny.read_bytes())
    model = mm.load(f"tiny/plain@{COMMIT}", device="cpu")
    assert model.card["revision"] == COMMIT
    with pytest.raises(CheckpointError, match="'someone/tiny@deadbeef'"):
        mm.load("tiny/plain@deadbeef")


def test_a_tag_that_is_published_pickled_names_the_commands(tmp_path: Path, tiny: Path) -> None:
    snapshot = tmp_path / "cache" / "models--someone--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        mm.load(f"tiny-two/plain@{COMMIT}")
    one_line(caught)
    assert "hf download someone/tiny model.bin --local-dir FOLDER" in str(caught.value)
    assert "mm convert FOLDER/model.bin --arch tiny-two/plain --i-trust-this-file" in str(caught.value)


def test_a_mistyped_folder_is_said_not_to_exist(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder 'runs/clip'; on the hub, 'runs/clip'") as caught:
        mm.load("runs/clip")
    one_line(caught)


@pytest.mark.parametrize("script", [False, True])
@pytest.mark.parametrize("vision", [VIT, RESIDUAL])
def test_openais_files_are_converted_whole(vision: dict[str, Any], script: bool, tmp_path: Path) -> None:
    """Half precision, sizes as extra tensors, and the counters of batch norms, as a pickle or as an archive of TorchScript."""
    state = weights(vision_cfg=vision, quick_gelu=True)
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    half |= {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}
    if script:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(Holder(half)).save(tmp_path / "file.pt")
    else:
        torch.save(half, tmp_path / "file.pt")
    model = from_imported(import_file(tmp_path / "file.pt", architecture=None, trusted=True), name="file", device="cpu")
    expected = from_imported(import_openai(state, "state"), name="state", device="cpu")
    config: Any = model.config
    assert isinstance(config.image, ImageEncoderConfig) == (vision is VIT)
    noise = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model.embed_pixels(noise), expected.embed_pixels(noise), rtol=0, atol=1e-2)


class Holder(torch.nn.Module):
    """Tensors under names with dots, nested as modules are."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for first in {name.partition(".")[0] for name in state}:
            below = {name.partition(".")[2]: tensor for name, tensor in state.items() if name.partition(".")[0] == first}
            if "" in below:
                self.register_buffer(first, below[""])
            else:
                self.add_module(first, Holder(below))

    def forward(self) -> int:
        return 0


def test_a_folder_with_pickled_weights_is_converted_as_the_refusal_says(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    torch.save(weights(), tmp_path / "open_clip_pytorch_model.bin")
    torch.save({"in": torch.ones(1)}, tmp_path / "pytorch_model.bin")  # transformers' copy, under its own names
    with pytest.raises(CheckpointError, match=f"mm convert {tmp_path} --i-trust-this-file -o DIR"):
        mm.load(tmp_path)
    from_imported(import_file(tmp_path, architecture=None, trusted=True), name="folder", device="cpu")
    with pytest.raises(UserError, match="leave out --arch"):
        import_file(tmp_path, architecture="ViT-B-32", trusted=True)
    with pytest.raises(UserError, match="no folder of open_clip or transformers"):
        import_file(tmp_path.parent, architecture=None, trusted=True)


@pytest.mark.parametrize("content", [b"", b"junk", b"hello, these are plain bytes", b"\x80\x02.", b"PK\x03\x04" + bytes(40)])
def test_bytes_that_are_no_pickle_are_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="holds no weights") as caught:
        import_file(tmp_path / "junk.pt", architecture=None, trusted=True)
    one_line(caught)


@pytest.mark.parametrize("architecture", [None, "ViT-B-32/openai", "RN50", "MobileCLIP-S1", "coca_ViT-B-32"])
def test_weights_of_something_else_are_one_line(architecture: str | None, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "junk.safetensors")
    with pytest.raises(CheckpointError, match=r"junk\.safetensors") as caught:
        import_file(tmp_path / "junk.safetensors", architecture=architecture, trusted=False)
    one_line(caught)


def without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def vision(**changes: Any) -> dict[str, Any]:
    return {"model_cfg": {**CONFIG, "vision_cfg": {**VIT, **changes}}}


def text(**changes: Any) -> dict[str, Any]:
    return {"model_cfg": {**CONFIG, "text_cfg": {**TEXT, **changes}}}


def preparation(**changes: Any) -> dict[str, Any]:
    return {"model_cfg": CONFIG, "preprocess_cfg": changes}


DAMAGED: dict[str, Any] = {
    "no model": {},
    "model is a list": {"model_cfg": [1]},
    "no width": {"model_cfg": without(CONFIG, "embed_dim")},
    "width is a word": {"model_cfg": {**CONFIG, "embed_dim": "x"}},
    "no text": {"model_cfg": without(CONFIG, "text_cfg")},
    "no vision": {"model_cfg": without(CONFIG, "vision_cfg")},
    "vision is null": {"model_cfg": {**CONFIG, "vision_cfg": None}},
    "text is a list": {"model_cfg": {**CONFIG, "text_cfg": []}},
    "vision width is a word": vision(width="x"),
    "layers are a word": vision(layers="x"),
    "head width 0": vision(head_width=0),
    "patch size 0": vision(patch_size=0),
    "patch size is null": vision(patch_size=None),
    "image size is a word": vision(image_size="x"),
    "image size is short": vision(image_size=[32]),
    "image size is null": vision(image_size=None),
    "image size is 0": vision(image_size=0),
    "pool type is a list": vision(pool_type=[1]),
    "backbone unknown": vision(timm_model_name="no_such_backbone"),
    "backbone is a list": vision(timm_model_name=[1]),
    "text width is a word": text(width="x"),
    "text width is a list": text(width=[64]),
    "heads 0": text(heads=0),
    "context is a word": text(context_length="x"),
    "vocabulary is null": text(vocab_size=None),
    "norm is a word": text(norm_kwargs="x"),
    "pool of text is a list": text(pool_type=[1]),
    "preparation is a list": {"model_cfg": CONFIG, "preprocess_cfg": [1]},
    "two means": preparation(mean=[0.5, 0.5]),
    "mean is a word": preparation(mean="x"),
    "std 0": preparation(std=0),
    "std is not a number": preparation(std=float("nan")),
    "resize mode is a list": preparation(resize_mode=["squash"]),
    "interpolation is a list": preparation(interpolation=["bicubic"]),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_configuration_is_one_line(fault: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(DAMAGED[fault]))
    save_file(weights(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError) as caught:
        mm.load(tmp_path, device="cpu")
    one_line(caught)


LACKING = {
    "logit_scale": "logit_scale",
    "visual.proj": "proj",
    "visual.class_embedding": "class_embedding",
    "visual.positional_embedding": "positional_embedding",
    "visual.conv1.weight": "patch_embed",
    "ln_final.weight": "ln_final.weight",
    "token_embedding.weight": "token_embedding.weight",
    "text_projection": "text_projection",
}


@pytest.mark.parametrize("name", LACKING)
def test_missing_weights_are_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    save_file(without(weights(), name), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=LACKING[name]) as caught:
        mm.load(tmp_path, device="cpu")
    one_line(caught)
