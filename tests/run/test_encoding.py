"""Training from what frozen parts computed before: the losses are those from pictures, and what cannot be is told."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as to_safetensors
from toy_training import newest, weights

import mm
from mm.config import validate
from mm.data.features import encoding_of, read_features
from mm.data.sources import Concat, open_source
from mm.data.write import pack, write_shards
from mm.errors import BadSample, ConfigError, UserError
from mm.hub import Model, save
from mm.media.image import ImageSpec
from mm.processor import Processor
from mm.run.config import RunConfig
from mm.run.encoding import encode_samples
from mm.run.training import Assembled, assemble
from mm.systems import build, read_system
from mm.tokenizers.text import TextTokenizer
from mm.training.tracking import Event
from mm.types import Batch, Sample

VQ = {"name": "vq", "tokenizer": {"image_size": 16, "patch": 2, "widths": [8, 16]}}
CLIP = {
    "name": "clip",
    "image": {"backbone": "test_resnet", "image_size": 32, "pool": "avg"},
    "text": {"width": 16, "layers": 1, "heads": 2, "context_length": 12, "vocab_size": 262, "causal": False, "pooling": "mean"},
    "embed_dim": 12,
}
FLOW = {"name": "flow", "denoiser": {"width": 16, "layers": 1, "heads": 2}}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, some transparent, with one or two captions, and models with large random weights."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "pictures").mkdir()
    random = np.random.default_rng(0)
    for number in range(8):
        coarse = random.integers(0, 256, (3, 3, 3 + number % 2), dtype=np.uint8)
        Image.fromarray(coarse).resize((16, 16)).save(folder / "pictures" / f"{number}.png")
        captions = [f"picture {number}", "abab"][: 1 + number % 2]
        (folder / "pictures" / f"{number}.txt").write_text("\n".join(captions))
    make_model(folder / "vq", VQ, 16)
    make_model(folder / "other-vq", VQ, 16, seed=1)
    make_model(folder / "clip", CLIP, 32)
    return folder


def make_model(folder: Path, system: dict[str, Any], side: int, seed: int = 0) -> None:
    config = read_system(system, "test")
    torch.manual_seed(seed)
    network = build(config)
    tokenizer = TextTokenizer.train_bpe(["picture abab 0 1 2 3"], 262) if system["name"] == "clip" else None
    if tokenizer is not None:
        config = config.with_vocabulary(tokenizer.vocab_size)
        network = build(config)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    length = 0 if tokenizer is None else 12
    processor = Processor(image=ImageSpec(size=side), tokenizer=tokenizer, context_length=length)
    save(Model(system=network.eval(), processor=processor, config=config, name="made"), folder)


def encoded(workshop: Path, name: str, **options: Any) -> str:
    folder = workshop / name
    if not folder.exists():
        encode_samples(str(workshop / "pictures"), folder, workshop / "vq", device="cpu", **options)
    return str(folder)


def run(workshop: Path, source: str, system: dict[str, Any] | None = None, **data: Any) -> Assembled:
    return assemble(validate(RunConfig, values(workshop, source, system, **data), "test"))


def values(workshop: Path, source: str, system: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    parts = {"latents": str(workshop / "vq"), "text": str(workshop / "clip")}
    train = {
        "steps": 4,
        "batch_size": 4,
        "tensorboard": False,
        "precision": "fp32",
        "device": "cpu",
        "checkpoint_every_steps": 2,
    }
    return {"system": FLOW | parts | (system or {}), "data": {"train": source, **data}, "train": train}


def batch_of(one: Assembled, keys: list[str], visit: int = 0) -> Batch:
    """The batch of these samples, as training would make it."""
    source, fetcher = one.stream.source, one.stream._fetcher
    rows = {source.key(index): index for index in range(len(source))}
    items = [fetcher._prepare(source.read(rows[key]), visit) for key in keys]
    return fetcher._collate(items, 0)


def packed(workshop: Path) -> str:
    """The pictures as shards, so that their ids are those of encoded ones."""
    folder = workshop / "packed"
    if not folder.exists():
        pack(open_source(str(workshop / "pictures")), folder)
    return str(folder)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_loss_from_latents_is_the_loss_from_pictures(workshop: Path, text: bool, dtype: str) -> None:
    name = f"encoded-{dtype}-{text}"
    source = encoded(workshop, name, flip=True, dtype=dtype, text=workshop / "clip" if text else None)
    augment = {"flip": 0.5, "no_flip": ["abab"]}
    raw, cached = run(workshop, packed(workshop), augment=augment), run(workshop, source, augment=augment)
    keys = [cached.stream.source.key(index) for index in range(8)]
    assert keys == [raw.stream.source.key(index) for index in range(8)]
    tolerance = 2e-3 if dtype == "fp16" else 2e-2
    for visit in range(3):
        pictures, latents = batch_of(raw, keys, visit), batch_of(cached, keys, visit)
        assert pictures.image is not None
        assert latents.latents is not None
        assert (pictures.ids, latents.image) == (latents.ids, None)
        assert (latents.text is None) == (latents.features is not None) == text
        straight = raw.system.latents.to_latents(pictures.image)  # pyright: ignore[reportAttributeAccessIssue]
        torch.testing.assert_close(latents.latents.float(), straight, rtol=tolerance, atol=tolerance)
        losses = []
        for one, batch in ((raw, pictures), (cached, latents)):
            torch.manual_seed(visit)
            losses.append(one.system.train().loss(batch, 0).total)
        torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=0)
    assert not torch.equal(batch_of(cached, keys, 0).latents, batch_of(cached, keys, 1).latents), "pictures are mirrored anew"


def test_neither_pictures_nor_their_encoder_are_needed(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = run(workshop, encoded(workshop, "encoded-text", text=workshop / "clip"))
    for part in (cached.system.latents, cached.system.text):
        monkeypatch.setattr(part, "_call_impl", None)
    monkeypatch.setattr(cached.system.latents, "to_latents", None)
    monkeypatch.setattr("mm.run.preparation.decode_image", None)
    assert torch.isfinite(cached.system.train().loss(next(iter(cached.stream)), 0).total)


def test_a_resumed_run_ends_as_one_without_a_break(workshop: Path, tmp_path: Path) -> None:
    source = encoded(workshop, "encoded-flip", flip=True)
    config = validate(RunConfig, values(workshop, source, augment={"flip": 0.5}), "test")
    mm.train(config, out=tmp_path / "whole", progress=False)

    def stop(event: Event) -> None:
        if event.kind == "checkpoint":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mm.train(config, out=tmp_path / "broken", progress=False, on_event=stop)
    assert newest(tmp_path / "broken").name == "step-00000002"
    mm.train(config, out=tmp_path / "broken", progress=False)
    whole, broken = (weights(tmp_path / name) for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    for file, tensors in whole.items():
        assert all(torch.equal(tensor, broken[file][name]) for name, tensor in tensors.items())


def test_what_does_not_go_together_is_told(workshop: Path) -> None:
    source, both = encoded(workshop, "encoded-plain"), encoded(workshop, "encoded-text", text=workshop / "clip")
    with pytest.raises(ConfigError, match=r"system\.latents: not the model that encoded"):
        run(workshop, source, {"latents": str(workshop / "other-vq")})
    with pytest.raises(ConfigError, match=r"system\.latents: not the model that encoded"):
        run(workshop, source, {"latents": VQ})
    with pytest.raises(ConfigError, match=r"data\.augment: .* cannot be changed at random"):
        run(workshop, source, augment={"hue": 0.1})
    with pytest.raises(ConfigError, match="no mirror images"):
        run(workshop, source, augment={"flip": 0.5})
    with pytest.raises(ConfigError, match="holds latents, no pictures, which 'flow' needs"):
        run(workshop, source, {"latents": {"image_size": 16}})
    with pytest.raises(ConfigError, match="holds latents, no pictures, which 'vq' needs"):
        assemble(validate(RunConfig, values(workshop, source) | {"system": VQ}, "test"))
    dalle2 = {"name": "dalle2", "latents": str(workshop / "vq"), "text": str(workshop / "clip")}
    with pytest.raises(ConfigError, match="holds latents, no pictures, which 'dalle2' needs"):
        assemble(validate(RunConfig, values(workshop, source) | {"system": dalle2}, "test"))
    with pytest.raises(ConfigError, match="features of its texts as they are"):
        run(workshop, both, captions=[{"template": "a {text}"}])
    with pytest.raises(ConfigError, match="is an encoder of its own"):
        run(workshop, both, {"text": {"width": 16, "layers": 1, "heads": 2}})
    with pytest.raises(ConfigError, match="prepared otherwise"):
        assemble(validate(RunConfig, values(workshop, source) | {"processor": {"fit": "squash"}}, "test"))
    with pytest.raises(UserError, match="holds latents already"):
        encode_samples(source, workshop / "again", workshop / "vq")
    with pytest.raises(UserError, match="does not compress pictures"):
        encode_samples(str(workshop / "pictures"), workshop / "again", workshop / "clip")
    with pytest.raises(UserError, match="not all encoded by the same"):
        Concat([open_source(source), open_source(packed(workshop))])
    assert not (workshop / "again").exists()


def test_damaged_entries_are_counted_and_replaced(workshop: Path) -> None:
    """Whatever bytes stand in an entry whose checksum fits: a bad sample, never a crash, never other shapes."""
    source = open_source(encoded(workshop, "encoded-text", text=workshop / "clip"))
    encoding = encoding_of(source)
    assert encoding is not None
    good = source.read(1)
    data = good.media["features"]
    read = read_features(good, encoding)
    latents, words = read.latents, torch.cat([text.words for text in read.texts])
    vectors = torch.stack([text.vector for text in read.texts])
    lengths = torch.tensor([len(text.words) for text in read.texts])
    whole = {"latents": latents, "words": words, "lengths": lengths, "vectors": vectors}
    assert to_safetensors(whole) == data
    large = 1 << 62
    wrong: list[bytes] = [
        b"",
        data[:-3],
        b"\xff" * 8 + data[8:],
        to_safetensors(whole | {"latents": latents.float()}),
        to_safetensors(whole | {"latents": latents[:, :, :1].contiguous()}),
        to_safetensors(whole | {"latents": latents.clone().fill_(torch.nan)}),
        to_safetensors(whole | {"lengths": lengths + 1}),
        to_safetensors(whole | {"lengths": torch.tensor([large, large])}),
        to_safetensors({"latents": latents}),
        to_safetensors(whole | {"more": latents.clone()}),
    ]
    for member in wrong:
        with pytest.raises(BadSample, match="bad features"):
            read_features(Sample(good.id, {"features": member}, good.texts), encoding)
    with pytest.raises(BadSample, match="no features"):
        read_features(Sample(good.id, {}, good.texts), encoding)

    samples = [source.read(index) for index in range(8)]
    samples[3] = Sample(samples[3].id, {"features": wrong[1]}, samples[3].texts, samples[3].fields)
    write_shards(samples, workshop / "damaged", attributes=encoding.attributes)
    damaged = run(workshop, str(workshop / "damaged"))
    batches = list(damaged.stream.one_epoch())
    assert all(batch.latents is not None and len(batch.latents) == 4 for batch in batches)
    assert damaged.stream.accounting.causes == {"bad features": 1}


def test_a_header_that_nobody_wrote_is_told(workshop: Path) -> None:
    for number, text in enumerate(("{", json.dumps({"model": "x"}), json.dumps({"shape": [1, 2]}))):
        folder = workshop / f"strange-{number}"
        write_shards([Sample("a", {}, ("b",))], folder, attributes={"MM.encoding": text})
        with pytest.raises(UserError, match="header of its shards is damaged"):
            encoding_of(open_source(str(folder)))


def test_shards_are_plain_tar_files_that_keep_ids_texts_and_fields(workshop: Path, tmp_path: Path) -> None:
    folder = encoded(workshop, "encoded-text", text=workshop / "clip")
    raw, cached = open_source(packed(workshop)), open_source(folder)
    for index in range(8):
        one, other = raw.read(index), cached.read(index)
        assert (one.id, one.texts, dict(one.fields)) == (other.id, other.texts, dict(other.fields))
        assert set(other.media) == {"features"}
    [shard] = Path(folder).glob("*.tar")
    with tarfile.open(shard) as archive:
        assert {"0_png.features.safetensors", "0_png.txt"} <= set(archive.getnames())
    pack(cached, tmp_path / "again")
    assert encoding_of(open_source(str(tmp_path / "again"))) == encoding_of(cached)
    encode_samples(str(workshop / "pictures"), tmp_path / "twice", workshop / "vq", text=workshop / "clip", device="cpu")
    assert (tmp_path / "twice" / shard.name).read_bytes() == shard.read_bytes(), "equal sources give equal shards"


def test_pictures_that_cannot_be_used_are_left_out(workshop: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "good.png").write_bytes(buffer.getvalue())
    (tmp_path / "pictures" / "bad.png").write_bytes(buffer.getvalue()[:40])
    outcome = encode_samples(str(tmp_path / "pictures"), tmp_path / "out", workshop / "vq", device="cpu")
    assert outcome.samples == 1
    assert sum(outcome.bad.values()) == 1


def test_an_autoencoder_is_trained_measured_and_generated_with(workshop: Path, tmp_path: Path) -> None:
    pictures, out = str(workshop / "pictures"), tmp_path / "kl"
    network = {"image_size": 16, "patch": 2, "widths": [8, 16]}
    settings = values(workshop, pictures) | {"system": {"name": "kl", "autoencoder": network}}
    settings["data"]["validation"] = pictures
    mm.train(validate(RunConfig, settings, "test"), out=out, progress=False)
    told = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["validation"]
    measured = mm.evaluate("reconstruction", str(out), pictures, device="cpu", precision="fp32")
    assert set(told) == set(measured.metrics) == {"psnr", "ssim"}
    for name, value in told.items():
        assert measured.metrics[name].value == pytest.approx(value, rel=1e-4)
    assert measured.protocol["latents"] == "4 x 4 of 4 numbers"
    encode_samples(pictures, tmp_path / "encoded", out, device="cpu")
    shards = str(tmp_path / "encoded" / "*.tar")
    config = validate(RunConfig, values(workshop, shards, {"latents": str(out)}), "test")
    mm.train(config, out=tmp_path / "flow", progress=False)
    model = mm.load(tmp_path / "flow", device="cpu")
    assert mm.generate(model, ["abab"])[0].pixels.shape == (3, 16, 16)
    assert mm.load(out, device="cpu").system.autoencoder.measured == 4  # pyright: ignore[reportAttributeAccessIssue]
