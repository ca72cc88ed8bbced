"""Systems that hear: CLAP and ImageBind learn, are exact where gradients are cached, and leave a fixed hub as it is."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mm.config import validate
from mm.errors import ConfigError
from mm.run.config import RunConfig
from mm.systems.clap import Clap, ClapConfig
from mm.systems.clap import build as build_clap
from mm.systems.clip import Clip, ClipConfig
from mm.systems.clip import build as build_clip
from mm.systems.imagebind import Imagebind, ImagebindConfig
from mm.systems.imagebind import build as build_imagebind
from mm.types import AudioBatch, Batch, CachesGradients, Embeds, Hears, TextBatch, capabilities

AUDIO = {"mels": 16, "width": 16, "layers": 1, "heads": 2, "stride": 4}
TEXT = {"width": 16, "layers": 1, "heads": 2, "context_length": 8, "vocab_size": 32}
CLIP = {
    "name": "clip",
    "image": {"backbone": "convnext_atto", "image_size": 32, "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}},
    "text": TEXT,
    "embed_dim": 8,
}


def clap(**options: object) -> Clap:
    torch.manual_seed(0)
    return build_clap(validate(ClapConfig, {"audio": AUDIO, "text": TEXT, "embed_dim": 8} | options, "test"))


def hub() -> Clip:
    torch.manual_seed(1)
    return build_clip(validate(ClipConfig, CLIP, "test"))


def imagebind(given: Clip | None = None, **options: object) -> Imagebind:
    torch.manual_seed(0)
    config = validate(ImagebindConfig, {"audio": AUDIO, "hub": CLIP} | options, "test")
    return build_imagebind(config, {} if given is None else {"hub": given})


def batch(size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3_000, 6_000, (size,), generator=generator)
    pitches = 150 * 1.7 ** torch.arange(size)[:, None]  # in Hz; noises would all sound alike
    waves = torch.sin(torch.arange(6_000) * pitches * 2 * torch.pi / 16_000)
    waves = (waves + 0.05 * torch.randn(size, 6_000, generator=generator)) * (torch.arange(6_000) < lengths[:, None])
    return Batch(
        ids=tuple(map(str, range(size))),
        image=torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator),
        text=TextBatch(torch.randint(1, 32, (size, 8), generator=generator), torch.full((size,), 8)),
        audio=AudioBatch(waves, lengths),
    )


WAVES = {
    "kind": "wav2vec2",
    "extractor": "layer_norm",
    "conv_layers": [[8, 20, 20], [8, 8, 8]],
    "width": 16,
    "layers": 1,
    "heads": 2,
    "hidden": 16,
    "position_kernel": 4,
    "position_groups": 2,
    "dropout": 0,
    "projection_dropout": 0,
    "attention_dropout": 0,
    "layer_drop": 0,
}
BOTH = {
    "clap": clap,
    "waves": lambda: clap(audio=WAVES),
    "hub": lambda: imagebind(likeness_weight=0.5),
    "queued": lambda: imagebind(likeness_weight=0.5, queue_size=64),
    "all": lambda: imagebind(train_hub=True),
}


@pytest.mark.parametrize("kind", BOTH)
def test_every_trainable_parameter_learns_and_one_batch_is_learned(kind: str) -> None:
    system, data = BOTH[kind]().train(), batch()
    optimizer = torch.optim.Adam([p for p in system.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for step in range(150):
        optimizer.zero_grad()
        loss = system(data, step)
        loss.total.backward()
        if step == 0:
            assert all(p.grad is not None and p.grad.any() for p in system.parameters() if p.requires_grad)
        optimizer.step()
        system.after_step(step)
        losses.append(float(loss.total.detach()))
    assert losses[-1] < 0.3 * losses[0]
    sounds, texts = system.eval().embed_audio(data.audio), system.embed_text(data.text)
    assert torch.equal((sounds @ texts.T).argmax(1), torch.arange(6))


@pytest.mark.parametrize("kind", BOTH)
def test_representations_and_loss_are_the_same_work_in_two_parts(kind: str) -> None:
    system, data = BOTH[kind]().eval(), batch()
    assert isinstance(system, CachesGradients)
    with torch.no_grad():
        vectors = system.represent(data)
        halves = [system.represent(data[rows]) for rows in (slice(0, 3), slice(3, 6))]
        losses = system.loss_from(vectors, data, 0).total, system.loss(data, 0).total
    assert torch.equal(*losses)
    for name, whole in vectors.items():
        torch.testing.assert_close(torch.cat([half[name] for half in halves]), whole, atol=1e-5, rtol=0)


def test_a_fixed_hub_stays_as_it_is() -> None:
    given = hub()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    pictures, texts = given.eval().embed_image(batch().image), given.embed_text(batch().text)
    system = imagebind(given).train()
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=1.0)
    for step in range(3):
        optimizer.zero_grad()
        system.loss(batch(), step).total.backward()
        optimizer.step()
        system.after_step(step)
    assert all(torch.equal(tensor, system.hub.state_dict()[name]) for name, tensor in before.items())
    system.eval()
    assert torch.equal(system.embed_image(batch().image), pictures)
    assert torch.equal(system.embed_text(batch().text), texts)
    assert not any(p.requires_grad for p in system.hub.parameters())


def test_each_weight_counts_for_its_pair_alone() -> None:
    data = batch()
    names = {"image_weight": "audio_image", "text_weight": "audio_text", "likeness_weight": "unlike"}
    off = dict.fromkeys(names, 0.0)
    for option, part in names.items():
        with torch.no_grad():
            losses = imagebind(**off | {option: 2.0}).eval().loss(data, 0)
        assert set(losses.parts) == {"logit_scale", part}
        assert float(losses.total) == pytest.approx(2 * float(losses.parts[part]), rel=1e-6)
    assert imagebind(**off | {"text_weight": 1.0}).config.learns_pictures is False


def test_queued_texts_are_negatives_seen_from_their_mean() -> None:
    system = imagebind(image_weight=0, queue_size=8).train()
    first, second = batch()[:4], replace(batch()[2:], groups=torch.tensor([7, 8, 9, 10]))
    first = replace(first, groups=torch.tensor([5, 6, 7, 8]))  # the last two of them show what the first two of `second` show
    with torch.no_grad():
        system.loss(first, 0)
    assert len(system.queues["text"]) == 0
    system.loss(first, 1)
    system.loss(first, 2)  # the step before was not applied
    system.after_step(2)
    assert len(system.queues["text"]) == 4

    past = system.embed_text(first.text)
    vectors = system.represent(second)
    text, past = (F.normalize(x - past.mean(0), dim=1) for x in (vectors["text"], past))
    logits = system.towers.scale() * vectors["audio"] @ torch.cat([text, past]).T
    logits[0, 4 + 2] = logits[1, 4 + 3] = -torch.inf
    rows = F.cross_entropy(logits, torch.arange(4))
    columns = F.cross_entropy(logits[:, :4].T, torch.arange(4))
    found = system.loss_from(vectors, second, 3).parts["audio_text"]
    torch.testing.assert_close(found, ((rows + columns) / 2).detach(), atol=1e-5, rtol=0)
    assert system.config.for_inference().queue_size == 0
    assert system.only_for_training[0] == "queues."


def test_what_is_remembered_draws_what_is_heard() -> None:
    system, data = imagebind(image_weight=0, queue_size=8).train(), batch()
    assert torch.equal(system.centre, torch.zeros(8))
    system.loss(data, 0)
    system.after_step(0)
    texts = system.embed_text(data.text)
    torch.testing.assert_close(system.centre, texts.mean(0), atol=1e-6, rtol=0)
    system.eval()
    heard = system.towers.embed("audio", data.audio)
    plain = system.embed_audio(data.audio)
    torch.testing.assert_close(plain, F.normalize(system.centre + heard, dim=1), atol=1e-6, rtol=0)

    system.remember(texts[:4])
    read = system.embed_audio(data.audio)
    torch.testing.assert_close(read.norm(dim=1), torch.ones(6), atol=1e-5, rtol=0)
    nearest = (heard @ F.normalize(texts[:4] - system.centre, dim=1).T).argmax(1)
    closer = (read * texts[nearest]).sum(1) - (plain * texts[nearest]).sum(1)
    assert (closer > 0).all()
    again = imagebind(image_weight=0, memory_size=4).eval()
    again.load_state_dict({name: value for name, value in system.state_dict().items() if not name.startswith("queues.")})
    assert torch.equal(again.embed_audio(data.audio), read)


def test_capabilities_and_modalities() -> None:
    assert capabilities(clap()) == {"hears"}
    assert not isinstance(clap(), Embeds)
    both = imagebind()
    assert isinstance(both, Embeds)
    assert isinstance(both, Hears)
    assert set(both.encoders()) == {"image", "text", "audio"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"image_weight": 0, "text_weight": 0}, "nothing is learned"),
        ({"train_hub": True, "hub": "emoji-clip"}, "not as the MODEL 'emoji-clip'"),
        ({"train_hub": True, "hub": CLIP, "queue_size": 8}, "hub.queue_size instead"),
    ],
)
def test_impossible_configurations_stop_early(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validate(ImagebindConfig, options, "test")


@pytest.mark.parametrize("name", ["clap", "imagebind"])
def test_spectrograms_are_of_the_rate_that_recordings_are_brought_to(name: str) -> None:
    values = {"system": {"name": name, "audio": AUDIO | {"rate": 8_000}}, "data": {"train": "emoji-speech:train"}}
    with pytest.raises(ConfigError, match=r"processor\.audio\.rate 16000 and system\.audio\.rate 8000 must be equal"):
        validate(RunConfig, values, "test")
    assert validate(RunConfig, values | {"processor": {"audio": {"rate": 8_000}}}, "test").system.audio_rate == 8_000
    waves = {"system": {"name": name, "audio": WAVES}, "processor": {"audio": {"rate": 8_000}}}
    assert validate(RunConfig, values | waves, "test").system.audio_rate is None


def test_a_hub_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="no dual tower of pictures and texts"):
        build_imagebind(validate(ImagebindConfig, {}, "test"), {"hub": clap()})
    with pytest.raises(ConfigError, match="names a model"):
        build_imagebind(validate(ImagebindConfig, {}, "test"))
