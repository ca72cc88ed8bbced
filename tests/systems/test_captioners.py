"""Captioner and CoCa: they learn to write what they see, decode what they compute at once, and keep what is locked."""

import pytest
import torch

from mm.data.sources import Subset, open_source
from mm.encoders.image import ImageEncoderConfig
from mm.errors import ConfigError
from mm.generators.language_model import LanguageModelConfig
from mm.media.image import ImageSpec
from mm.nn.masks import attention_mask
from mm.processor import Processor
from mm.run.validation import Validator
from mm.systems import build, read_system
from mm.systems.albef import Albef, AlbefConfig
from mm.systems.albef import build as build_albef
from mm.systems.captioner import Captioner, CaptionerConfig
from mm.systems.captioner import build as build_captioner
from mm.systems.clip import ClipConfig
from mm.systems.clip import build as build_clip
from mm.systems.coca import Coca, CocaConfig
from mm.systems.coca import build as build_coca
from mm.tokenizers.text import TextTokenizer
from mm.types import Batch, Decoding, TextBatch, capabilities

END = 2
IMAGE = ImageEncoderConfig(
    backbone="resnet18", image_size=16, options={"channels": [8, 8, 16, 16]}, pool="pyramid", tokens="pyramid"
)
TEXT = LanguageModelConfig(vocab_size=40, context_length=12, width=32, layers=3, heads=4)


def captioner(**changes) -> Captioner:
    torch.manual_seed(0)
    options = {"image": IMAGE, "text": TEXT, "feature_map": True, "embed_dim": 8} | changes
    return build_captioner(CaptionerConfig(**options))


def coca(**changes) -> Coca:
    torch.manual_seed(0)
    options = {"image": IMAGE, "text": TEXT, "feature_map": True, "embed_dim": 8, "text_layers": 1} | changes
    return build_coca(CocaConfig(**options))


MAKERS = [captioner, coca]
FORMS = [
    (captioner, {}),
    (captioner, {"feature_map": False, "embed_dim": 0}),
    (coca, {}),
    (coca, {"image_queries": 3}),
    (coca, {"feature_map": False, "image_queries": 3}),
]


def batch(rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([7, 4, 6, 5])[:rows]
    ids = torch.randint(3, 40, (rows, 7), generator=generator)
    ids[:, 0] = 1
    ids[torch.arange(rows), lengths - 1] = END
    ids = ids * (torch.arange(7) < lengths[:, None])
    image = torch.randint(0, 256, (rows, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Batch(tuple(map(str, range(rows))), image, TextBatch(ids, lengths), groups=torch.arange(rows))


@pytest.mark.parametrize(("make", "changes"), FORMS)
def test_gradients_reach_every_parameter(make, changes) -> None:
    system = make(**changes)
    system.loss(batch(), 0).total.backward()
    still = [name for name, p in system.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    zero_gains = [name for name in still if "bn2.weight" not in name and "image" not in name]
    assert not zero_gains


@pytest.mark.parametrize("make", MAKERS)
def test_one_batch_is_learned_by_heart_and_written_down(make) -> None:
    system, data = make(), batch()
    optimizer = torch.optim.Adam(system.parameters(), lr=3e-3)
    for step in range(120):
        optimizer.zero_grad()
        system.loss(data, step).total.backward()
        optimizer.step()
        system.after_step(step)
    system.eval()
    beginnings = TextBatch(data.text.ids[:, :2], torch.tensor([1, 2, 1, 2]))
    for beams in (1, 3):
        found = system.caption(data.image, beginnings, Decoding(max_tokens=8, beams=beams, end=END), range(4))
        for row, written in enumerate(found):
            first, last = int(beginnings.lengths[row]), int(data.text.lengths[row]) - 1
            assert list(written.ids) == data.text.ids[row, first:last].tolist()
            assert written.finished


@pytest.mark.parametrize(("make", "changes"), FORMS)
def test_likelihood_of_what_was_written_is_that_of_reading_it(make, changes) -> None:
    system = make(**changes).eval()
    for parameter in system.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    data = batch()
    beginning = TextBatch(data.text.ids[:, :3], torch.tensor([3, 1, 2, 3]))
    decoding = Decoding(max_tokens=5, temperature=1.0, end=END)
    written = system.caption(data.image, beginning, decoding, range(4))
    for row, one in enumerate(written):
        before = beginning.ids[row, : beginning.lengths[row]].tolist()
        whole = [*before, *one.ids, *([END] if one.finished else [])]
        likelihoods = [
            float(system.caption_likelihoods(data.image[row, None], TextBatch(torch.tensor([ids]), torch.tensor([len(ids)]))))
            for ids in (whole, before)
            if len(ids) > 1
        ]
        expected = likelihoods[0] - (likelihoods[1] if len(before) > 1 else 0.0)
        assert one.log_likelihood == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_padding_and_neighbours_change_no_likelihood(make) -> None:
    system, data = make().eval(), batch()
    together = system.caption_likelihoods(data.image, data.text)
    alone = [
        system.caption_likelihoods(data.image[row, None], TextBatch(data.text.ids[row, None, :length], length[None]))
        for row, length in enumerate(data.text.lengths)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_vector_of_a_text_is_that_of_the_whole_text_and_sees_no_picture() -> None:
    system, data = coca().eval(), batch()
    together = system.embed_text(data.text)
    alone = system.embed_text(TextBatch(data.text.ids[1, None, :4], torch.tensor([4])))
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=1e-5)
    changed = data.text.ids.clone()
    changed[1, 3] = 9  # its last token
    assert not torch.allclose(together[1], system.embed_text(TextBatch(changed, data.text.lengths))[1], atol=1e-4)
    assert torch.equal(together[0], system.embed_text(TextBatch(changed, data.text.lengths))[0])


def test_losses_are_weighted_as_in_the_paper() -> None:
    system, data = coca().eval(), batch()
    losses = system.loss(data, 0)
    torch.testing.assert_close(losses.total.detach(), 2 * losses.parts["caption"] + losses.parts["contrastive"])
    image, text = system.embed_image(data.image), system.embed_text(data.text)
    logits = system.scores(image, text)
    target = torch.arange(4)
    both = torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
    torch.testing.assert_close(losses.parts["contrastive"], both.detach() / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_locked_pictures_keep_their_weights(make) -> None:
    system, data = make(lock=("image",)), batch()
    encoder = system.image if isinstance(system, Captioner) else system.towers.encoders["image"]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=0.1)
    system.train()
    for step in range(2):
        system.loss(data, step).total.backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("make", MAKERS)
def test_a_dual_tower_gives_its_picture_side(make) -> None:
    torch.manual_seed(5)
    start = build_clip(ClipConfig(image=IMAGE, embed_dim=8, image_projection="linear"))
    system, data = make(), batch()
    given = system.state_from(start)
    own = system.state_dict()
    assert given
    assert all(name in own and own[name].shape == value.shape for name, value in given.items())
    system.load_state_dict(own | given)
    system.eval(), start.eval()
    if isinstance(system, Coca):
        torch.testing.assert_close(system.embed_image(data.image), start.embed_image(data.image))
    else:
        encoded = system.image(data.image)
        vector = torch.nn.functional.normalize(system.projection(encoded.pooled), dim=1)
        torch.testing.assert_close(vector, start.embed_image(data.image))


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave none of 3 layers"):
        read_system({"name": "coca", "text": {"layers": 3}, "text_layers": 3}, "test")
    with pytest.raises(ConfigError, match="patch_dropout"):
        read_system({"name": "captioner", "feature_map": True, "image": {"patch_dropout": 0.5}}, "test")


def test_both_are_built_by_name() -> None:
    for name in ("captioner", "coca"):
        config = read_system({"name": name, "text": {"layers": 3}}, "test")
        assert build(config).beginnings == {"caption": ""}


def writing_albef(**changes) -> Albef:
    torch.manual_seed(0)
    options = {"image": IMAGE, "feature_map": True, "embed_dim": 8, "vocab_size": 40, "context_length": 12, "width": 32}
    return build_albef(AlbefConfig(**options | {"caption_weight": 1.0, "queue_size": 4} | changes))


@pytest.mark.parametrize("place", ["pre", "post"])
def test_layers_of_albef_write_when_they_are_read_causally(place) -> None:
    """What is decoded step by step is what the two transformers compute at once, and no word knows of those behind it."""
    system, data = writing_albef(norm_place=place).eval(), batch()
    seen = system.encode_image(data.image).tokens
    mask = attention_mask(6, causal=True)
    text = system.network.towers.encoders["text"]
    words = text.transformer(text.embedding(data.text.ids[:, :6]), mask=mask)
    logits = system.network.words(system.network.fusion.transformer(words, seen, mask=mask)).log_softmax(-1)
    each = logits.gather(2, data.text.ids[:, 1:7, None])[..., 0]
    expected = (each * data.text.valid()[:, 1:7]).sum(1)
    torch.testing.assert_close(system.caption_likelihoods(data.image, data.text), expected, atol=1e-4, rtol=1e-4)
    written = system.caption(
        data.image, TextBatch(data.text.ids[:, :1], torch.ones(4).long()), Decoding(max_tokens=3), range(4)
    )
    first = torch.tensor([one.ids[0] for one in written])
    assert torch.equal(first, logits[:, 0].argmax(-1))


def test_albef_learns_to_write_beside_its_other_tasks() -> None:
    system, data = writing_albef(dropout=0.0), batch()
    assert "captions" in capabilities(system)
    assert "captions" not in capabilities(writing_albef(caption_weight=0.0))
    losses = system.loss(data, 0)
    assert set(losses.parts) >= {"contrastive", "matching", "masked", "caption"}
    optimizer = torch.optim.Adam([p for p in system.parameters() if p.requires_grad], lr=3e-3)
    for step in range(150):
        optimizer.zero_grad()
        system.loss(data, step).total.backward()
        optimizer.step()
        system.after_step(step)
    system.eval()
    written = system.caption(data.image, TextBatch(data.text.ids[:, :1], torch.ones(4).long()), Decoding(8, end=END), range(4))
    for row, one in enumerate(written):
        assert list(one.ids) == data.text.ids[row, 1 : int(data.text.lengths[row]) - 1].tolist()


def test_two_streams_cannot_write() -> None:
    with pytest.raises(ConfigError, match="two_streams cannot write"):
        read_system({"name": "albef", "two_streams": True, "caption_weight": 1}, "test")


def test_validation_writes_only_with_networks_that_learn_to() -> None:
    """The class of ALBEF could write; a network without that task is not asked to."""
    source = Subset(open_source("emoji:validation/core", image_size=32), range(6))
    tokenizer = TextTokenizer.train_bpe([source.read(row).texts[0] for row in range(6)], 300)
    processor = Processor(image=ImageSpec(size=16, fit="squash"), tokenizer=tokenizer, context_length=12)
    for weight in (0.0, 1.0):
        system = writing_albef(caption_weight=weight, vocab_size=tokenizer.vocab_size).eval()
        found = Validator(source, processor, system.config, capabilities(system))(system)
        assert ("exact" in found) == bool(weight)
