"""Picture tokenizers written by their publishers' own libraries, loaded by mm: equal latents, ids and pictures."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mm
from mm.errors import CheckpointError, ConfigError, UserError
from mm.published.image_tokenizers import import_image_tokenizer
from mm.systems.dalle import DalleConfig, build
from mm.tokenizers.library_image import DvaeConfig, LibraryImageTokenizer, VqModelConfig, build_library_image_tokenizer
from mm.types import Batch, Sampling, TextBatch

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-4
SIDE = 32

VQ_MODEL: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 1,
    "latent_channels": 6,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 48,
    "norm_num_groups": 4,
    "sample_size": SIDE,
    "scaling_factor": 0.5,
}
F16 = {"ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "z_channels": 12}
SMALL = {"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [128], "z_channels": 4}
F8 = {"ch_mult": [1, 1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [32], "z_channels": 8}
DDCONFIG = {"ch": 32, "in_channels": 3, "out_ch": 3, "resolution": 256, "double_z": False, "dropout": 0.0}


def shaken(module: nn.Module, seed: int) -> nn.Module:
    """With every vector of weights moved, so that exchanged norms and forgotten biases show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def pictures(count: int = 3) -> Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (255 * nn.functional.interpolate(coarse, SIDE, mode="bicubic").clamp(0, 1)).round().to(torch.uint8)


def loaded(path: Path, **options: Any) -> Any:
    """As a user's program would: the configuration through JSON, the weights strictly."""
    imported = import_image_tokenizer(path, **options)
    assert imported is not None
    config = type(imported.config).model_validate_json(imported.config.model_dump_json())
    tokenizer = build_library_image_tokenizer(config).eval()
    tokenizer.load_state_dict(dict(imported.state))
    return tokenizer


def assert_same_pictures(tokenizer: LibraryImageTokenizer, ids: Tensor, expected: Tensor) -> None:
    """``expected`` in 0..1, before clamping and rounding."""
    rows, columns = tokenizer.grid
    with torch.no_grad():
        pixels = tokenizer.network.pixels(rearrange(ids, "b (h w) -> b h w", h=rows, w=columns))
    assert (pixels - expected).abs().max() < TOLERANCE
    made = tokenizer.decode(ids)
    assert made.dtype == torch.uint8
    assert (made.float() - 255 * expected.clamp(0, 1)).abs().max() < 0.5 + 255 * TOLERANCE
    assert len(made.unique()) > 50, "flat pictures would agree by chance"


def several(ids: Tensor, least: int = 4) -> bool:
    return len(ids.unique()) >= least


def some(latents: Tensor, count: int) -> Tensor:
    """A codebook that pictures use: latents at random places, moved a little."""
    generator = torch.Generator().manual_seed(8)
    rows = rearrange(latents, "b d h w -> (b h w) d")
    chosen = rows[torch.randint(len(rows), (count,), generator=generator)]
    return chosen + 0.1 * rows.std() * torch.randn(chosen.shape, generator=generator)


# diffusers


def vq_model(**changes: Any) -> Any:
    torch.manual_seed(1)
    model = diffusers.VQModel(**{**VQ_MODEL, **changes})
    shaken(model, 2)
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(some(model.encode(pictures() / 127.5 - 1).latents, 48))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_type": "spatial", "block_out_channels": (32, 32, 32), "vq_embed_dim": None},
        {"mid_block_add_attention": False, "lookup_from_codebook": True, "force_upcast": True},
        {"vq_embed_dim": None, "layers_per_block": 2},
    ],
    ids=["attention", "spatial", "lookup", "wide codes"],
)
@torch.no_grad()
def test_folder_of_diffusers(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = vq_model(**changes)
    model.save_pretrained(tmp_path)
    tokenizer, image = loaded(tmp_path, image_size=SIDE), pictures()
    latents = model.encode(image / 127.5 - 1).latents
    ids = model.quantize(latents)[2][2].view(len(image), -1)
    assert several(ids, 10)
    assert (tokenizer.network.latents(image / 255) - latents).abs().max() < TOLERANCE
    assert torch.equal(tokenizer.encode(image), ids)
    assert (tokenizer.grid, tokenizer.vocab_size) == ((8, 8), 48)
    assert_same_pictures(tokenizer, ids, (model.decode(latents).sample + 1) / 2)
    if model.config.lookup_from_codebook:
        decoded = model.decode(ids.flatten(), force_not_quantize=True, shape=(len(image), 8, 8, 4)).sample
        assert_same_pictures(tokenizer, ids, (decoded + 1) / 2)


def test_a_published_tokenizer_is_a_model_and_carries_a_painter(tmp_path: Path) -> None:
    """Through the front door: `mm.load`, `mm.save`, and as the ``tokenizer`` of a system that stands on it."""
    vq_model(sample_size=64).save_pretrained(tmp_path / "published")
    model = mm.load(tmp_path / "published")
    assert model.capabilities == {"tokenizes"}
    assert model.processor.image_spec.size == 64
    image = torch.nn.functional.interpolate(pictures().float(), 64).round().to(torch.uint8)
    ids = model.system.encode(image)
    mm.save(model, tmp_path / "saved")
    again = mm.load(tmp_path / "saved")
    assert torch.equal(again.system.encode(image), ids)
    assert torch.equal(again.system.decode(ids), model.system.decode(ids))
    with pytest.raises(ConfigError, match="held fixed"):
        model.system.loss(Batch(("a",), image[:1]), 0)
    config = DalleConfig.model_validate({"tokenizer": model.config, "width": 16, "layers": 1, "heads": 2})
    assert config.picture_side == 64
    dalle = build(config, {"tokenizer": model.system})
    assert dalle.num_image == ids.shape[1]
    text = TextBatch(torch.ones(1, 3, dtype=torch.int64), torch.tensor([3]))
    assert dalle.paint(text, [0], Sampling(guidance=1.0)).shape == (1, 3, 64, 64)
    assert {name.partition(".")[0] for name, p in dalle.named_parameters() if not p.requires_grad} == {"tokenizer"}


def test_attention_as_diffusers_named_it_before(tmp_path: Path) -> None:
    vq_model().save_pretrained(tmp_path)
    image, file = pictures(), tmp_path / "diffusion_pytorch_model.safetensors"
    expected = loaded(tmp_path, image_size=SIDE)
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = load_file(file)
    for new, old in names.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    assert any(".query." in name for name in state)
    save_file(state, file)
    tokenizer = loaded(file, image_size=SIDE)
    assert torch.equal(tokenizer.encode(image), expected.encode(image))
    assert torch.equal(tokenizer.decode(tokenizer.encode(image)), expected.decode(expected.encode(image)))


@pytest.mark.parametrize(("stated", "expected"), [(64, 64), (32, 256)])
def test_side_of_the_pictures(tmp_path: Path, stated: int, expected: int) -> None:
    """diffusers writes 32 where nobody gave a size."""
    vq_model(sample_size=stated).save_pretrained(tmp_path)
    imported = import_image_tokenizer(tmp_path)
    assert imported is not None
    assert imported.config.image_size == expected


# taming-transformers


class Vqgan(nn.Module):
    """taming's VQModel and GumbelVQ without Lightning, made of its own modules."""

    def __init__(self, ddconfig: dict[str, Any], n_embed: int, embed_dim: int, gumbel: bool) -> None:
        super().__init__()
        model = pytest.importorskip("taming.modules.diffusionmodules.model")
        quantize = pytest.importorskip("taming.modules.vqvae.quantize")
        self.encoder, self.decoder = model.Encoder(**ddconfig), model.Decoder(**ddconfig)
        self.loss = nn.ModuleDict({"discriminator": nn.Linear(2, 2)})
        if gumbel:
            self.quantize = quantize.GumbelQuantize(ddconfig["z_channels"], embed_dim, n_embed)
        else:
            self.quantize = quantize.VectorQuantizer2(n_embed, embed_dim, beta=0.25)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def latents(self, image: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(image / 127.5 - 1))


def write_vqgan(folder: Path, monkeypatch: pytest.MonkeyPatch, *, gumbel: bool, ddconfig: dict[str, Any]) -> tuple[Vqgan, Path]:
    """A checkpoint as Lightning wrote it, with a class among its keys, and its YAML."""
    torch.manual_seed(3)
    values = {**DDCONFIG, **ddconfig}
    embed_dim = values["z_channels"] if gumbel else 4
    model = Vqgan(values, 40, embed_dim, gumbel)
    shaken(model, 4)
    if not gumbel:
        with torch.no_grad():
            model.quantize.embedding.weight.copy_(some(model.latents(pictures()), 40))
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    monkeypatch.setattr(sys.modules[callback.__module__], "ModelCheckpoint", callback, raising=False)
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    file = folder / "checkpoints" / "last.ckpt"
    torch.save(
        {"epoch": 1, "callbacks": {callback: {"best_model_score": torch.tensor(1.0)}}, "state_dict": model.state_dict()}, file
    )
    params = {"embed_dim": embed_dim, "n_embed": 40, "monitor": "val/rec_loss", "ddconfig": values}
    params["lossconfig"] = {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"}
    settings = {"model": {"base_learning_rate": 4.5e-6, "target": "taming.models.vqgan.VQModel", "params": params}}
    (folder / "configs" / "model.yaml").write_text(yaml.safe_dump(settings))
    (folder / "configs" / "lightning.yaml").write_text("lightning:\n  trainer:\n    gpus: 8\n")
    monkeypatch.undo()
    return model, file


@pytest.mark.parametrize(("ddconfig", "gumbel"), [(F16, False), (F8, True), (F8, False)], ids=["f16", "f8 gumbel", "f8"])
@torch.no_grad()
def test_vqgan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ddconfig: dict[str, Any], gumbel: bool) -> None:
    model, file = write_vqgan(tmp_path, monkeypatch, gumbel=gumbel, ddconfig=ddconfig)
    tokenizer, image = loaded(file, image_size=SIDE, trusted=True), pictures()
    side = SIDE // 2 ** (len(ddconfig["ch_mult"]) - 1)
    latents = model.latents(image)
    if gumbel:
        ids = model.quantize.proj(latents).argmax(1)
        codes = model.quantize.get_codebook_entry(ids.flatten(), (len(image), side, side, None))
    else:
        codes, _, (_, _, ids) = model.quantize(latents)
    ids = ids.view(len(image), -1)
    assert several(ids, 4 if gumbel else 8)
    assert (tokenizer.network.latents(image / 255) - latents).abs().max() < TOLERANCE
    assert torch.equal(tokenizer.encode(image), ids)
    assert tokenizer.grid == (side, side)
    assert_same_pictures(tokenizer, ids, (model.decoder(model.post_quant_conv(codes)) + 1) / 2)
    whole = import_image_tokenizer(tmp_path, trusted=True)
    assert whole is not None
    assert whole.config.image_size == 256


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"remap": "ade20k.npy"}, "remap"),
        ({"ddconfig": {**DDCONFIG, **SMALL, "double_z": True}}, "double_z"),
        ({"ddconfig": {**DDCONFIG, **SMALL, "out_ch": 182}}, "out_ch"),
        ({"ddconfig": {**DDCONFIG, **SMALL, "resamp_with_conv": False}}, "resamp_with_conv"),
        ({"ddconfig": {**DDCONFIG, **SMALL, "attn_resolutions": [64]}}, "does not fit its configuration"),
        ({"n_embed": 41}, "its configuration says (41, 4)"),
    ],
)
def test_vqgan_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], message: str
) -> None:
    _, file = write_vqgan(tmp_path, monkeypatch, gumbel=False, ddconfig=SMALL)
    settings = tmp_path / "configs" / "model.yaml"
    values = yaml.safe_load(settings.read_text())
    values["model"]["params"] |= params
    settings.write_text(yaml.safe_dump(values))
    assert message in refused(lambda: import_image_tokenizer(file, trusted=True))


# OpenAI's dVAE


def write_dvae(folder: Path) -> tuple[Any, Any]:
    dall_e = pytest.importorskip("dall_e")
    torch.manual_seed(5)
    encoder: Any = shaken(dall_e.Encoder(n_hid=64, vocab_size=512), 6)
    decoder: Any = shaken(dall_e.Decoder(n_hid=64, n_init=16, vocab_size=512), 7)
    with torch.no_grad():
        decoder.blocks.input.w.mul_(512**0.5)  # codes that differ
    folder.mkdir(exist_ok=True)
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        torch.save(module, folder / f"{name}.pkl")
    return encoder, decoder


@torch.no_grad()
def test_dvae(tmp_path: Path) -> None:
    dall_e = pytest.importorskip("dall_e")
    encoder, decoder = write_dvae(tmp_path)
    tokenizer, image = loaded(tmp_path / "encoder.pkl", image_size=SIDE, trusted=True), pictures()
    logits = encoder(dall_e.map_pixels(image / 255))
    ids = logits.argmax(1)
    assert several(ids)
    assert (tokenizer.network.logits(image / 255) - logits).abs().max() < TOLERANCE
    assert torch.equal(tokenizer.encode(image), ids.flatten(1))
    assert tokenizer.grid == (4, 4)
    one_hot = nn.functional.one_hot(ids, 512).permute(0, 3, 1, 2).float()
    expected = dall_e.unmap_pixels(decoder(one_hot)[:, :3].sigmoid())
    made = tokenizer.network.pixels(ids).clamp(0, 1)
    assert (made - expected).abs().max() < TOLERANCE
    assert (tokenizer.decode(ids.flatten(1)).float() - 255 * expected).abs().max() < 0.5 + 255 * TOLERANCE
    assert len((255 * expected).round().unique()) > 20


def test_dvae_as_safetensors(tmp_path: Path) -> None:
    """Without a word of trust; the published size of 256 pixels where none is given."""
    modules = write_dvae(tmp_path / "pickled")
    for name, module in zip(("encoder", "decoder"), modules, strict=True):
        save_file(module.state_dict(), tmp_path / f"{name}.safetensors")
    imported = import_image_tokenizer(tmp_path)
    assert imported is not None
    assert imported.config == DvaeConfig(vocab_size=512, width=64, code_width=16)
    pickled = import_image_tokenizer(tmp_path / "pickled", trusted=True)
    assert pickled is not None
    assert all(torch.equal(imported.state[name], tensor) for name, tensor in pickled.state.items())


# Files that are not what they should be


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pickles_need_trust(tmp_path: Path) -> None:
    write_dvae(tmp_path)
    assert "--i-trust-this-file" in refused(lambda: import_image_tokenizer(tmp_path))


class Program:
    """Writes a file when it is unpickled by anything that runs programs."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_nothing_in_a_trusted_pickle_is_executed(tmp_path: Path) -> None:
    write_dvae(tmp_path)
    mark = tmp_path / "ran"
    torch.save({"state_dict": {"blocks.input.w": torch.zeros(1)}, "extra": Program(mark)}, tmp_path / "encoder.pkl")
    assert "mkdir" in refused(lambda: import_image_tokenizer(tmp_path, trusted=True))
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 not an archive", b"\x80\x02}q\x00."])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    for name in ("encoder.pkl", "decoder.pkl"):
        (tmp_path / name).write_bytes(content)
    assert "encoder.pkl" in refused(lambda: import_image_tokenizer(tmp_path, trusted=True))


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")
def test_modules_in_files_of_old(tmp_path: Path) -> None:
    """torch's restricted unpickler does not read them; the way out is named."""
    encoder, decoder = write_dvae(tmp_path)
    torch.save(encoder, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=False)
    assert "state_dict()" in refused(lambda: import_image_tokenizer(tmp_path, trusted=True))
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        torch.save(module.state_dict(), tmp_path / f"{name}.pkl", _use_new_zipfile_serialization=False)
    assert import_image_tokenizer(tmp_path, trusted=True) is not None


def test_weights_of_something_else(tmp_path: Path) -> None:
    for name in ("encoder", "decoder"):
        save_file({"weight": torch.zeros(2, 2)}, tmp_path / f"{name}.safetensors")
    assert "OpenAI's dVAE" in refused(lambda: import_image_tokenizer(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 1}, "in_channels is not 3"),
        ({"num_vq_embeddings": 10**15}, "its configuration says"),
        ({"act_fn": "nonsense"}, "nonsense"),
        ({"norm_num_groups": 3}, "cannot build this VQModel"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "one entry a stage"),
        ({"down_block_types": ["DownBlock2D"] * 3}, "down_block_types"),
        ({"layer_per_block": 2}, "did you mean 'layers_per_block'"),
        ({"layers_per_block": 2}, "missing"),
        ({"norm_type": "spatial"}, "vq_embed_dim"),
        ({"sample_size": 30}, "multiple of the token's side"),
    ],
)
def test_vq_model_with_other_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    vq_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert message in refused(lambda: import_image_tokenizer(tmp_path))


def test_places_without_a_tokenizer(tmp_path: Path) -> None:
    assert import_image_tokenizer(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "config.yaml").write_text("system: {name: clip}\nmodel: clip\n")
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert import_image_tokenizer(tmp_path) is None
    assert "YAML" in refused(lambda: import_image_tokenizer(tmp_path / "model.safetensors"))
    assert "no such file" in refused(lambda: import_image_tokenizer(tmp_path / "missing.ckpt"))
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(UserError, match="required"):
        import_image_tokenizer(tmp_path)


def test_folder_of_a_training_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several checkpoints has to be named."""
    _, file = write_vqgan(tmp_path, monkeypatch, gumbel=False, ddconfig=SMALL)
    file.with_name("epoch=1.ckpt").write_bytes(file.read_bytes())
    assert "2 files of weights" in refused(lambda: import_image_tokenizer(tmp_path, trusted=True))
    assert import_image_tokenizer(file, trusted=True) is not None


def test_folder_without_weights(tmp_path: Path) -> None:
    vq_model().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        import_image_tokenizer(tmp_path)


def test_interface_of_the_suites_own_tokenizers() -> None:
    config = DvaeConfig(image_size=SIDE, vocab_size=16, width=8, code_width=4, num_blocks=1)
    tokenizer = build_library_image_tokenizer(config)
    ids = tokenizer.encode(pictures())
    assert (ids.shape, ids.dtype) == ((3, 16), torch.int64)
    assert tokenizer.decode(ids).shape == (3, 3, SIDE, SIDE)
    assert (tokenizer.grid, tokenizer.vocab_size) == ((4, 4), 16)
    assert "(3, 32, 32) is expected" in refused(lambda: tokenizer.encode(pictures()[..., :-1]))
    assert "15 tokens where 4 x 4" in refused(lambda: tokenizer.decode(ids[:, :-1]))


@pytest.mark.parametrize("values", [{"image_size": 30}, {"width": 6}])
def test_sizes_that_a_dvae_cannot_have(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be a multiple"):
        DvaeConfig.model_validate(values)


def test_gradients_reach_every_part(tmp_path: Path) -> None:
    """The networks can be tuned: nothing between pixels and latents, or codes and pixels, is cut off."""
    torch.manual_seed(0)
    config = VqModelConfig.model_validate(
        {**{k: v for k, v in VQ_MODEL.items() if k not in ("sample_size", "scaling_factor")}, "image_size": SIDE}
    )
    network: Any = build_library_image_tokenizer(config).network
    ids = torch.zeros(1, 8, 8, dtype=torch.long)
    (network.latents(pictures() / 255).square().mean() + network.pixels(ids).mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
