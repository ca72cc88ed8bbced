"""DALL-E and Muse: they learn, decoding with caches changes nothing, guidance acts, seeds and kept parts are honoured."""

from typing import Any

import pytest
import torch

from mm.config import validate
from mm.errors import ConfigError, UserError
from mm.generators.autoregressive import Compiled, generate
from mm.systems import CONFIGS, build
from mm.systems.dalle import Dalle, DalleConfig
from mm.systems.muse import Muse, hide
from mm.systems.vq import Vq
from mm.tokenizers.memory import TokenMemory
from mm.types import Batch, Paints, Sampling, System, TextBatch

VQ = {"tokenizer": {"image_size": 16, "patch": 2, "widths": [8, 16], "quantizer": {"kind": "fsq", "levels": [5, 5, 3]}}}
SIZES: dict[str, Any] = {"tokenizer": VQ, "width": 16, "layers": 3, "heads": 2}
TEXT = {"width": 16, "layers": 1, "heads": 2, "context_length": 6, "vocab_size": 20, "causal": False, "pooling": "mean"}
VARIANTS: dict[str, dict[str, Any]] = {
    "dalle": {"name": "dalle", "text": {"vocab_size": 20, "context_length": 6}},
    "dalle-sparse": {"name": "dalle", "text": {"vocab_size": 20, "context_length": 6}, "sparse_attention": True},
    "cogview": {"name": "dalle", "text": {"vocab_size": 20, "context_length": 6}, "norm": "sandwich", "text_loss_weight": 7.0},
    "muse": {"name": "muse", "text": TEXT},
    "muse-concat": {"name": "muse", "text": TEXT, "text_fusion": "concat"},
}


def small(variant: str, **options: object) -> System:
    torch.manual_seed(0)
    values = SIZES | VARIANTS[variant] | options
    return build(validate(CONFIGS[values["name"]], values, "test"))


def spread(system: System) -> System:
    """Weights large enough that the text makes a difference."""
    torch.manual_seed(1)
    for name, parameter in system.named_parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("no_words"):
            torch.nn.init.normal_(parameter)
    return system.eval()


def texts(*lengths: int) -> TextBatch:
    generator = torch.Generator().manual_seed(3)
    return TextBatch(torch.randint(1, 20, (len(lengths), 6), generator=generator), torch.tensor(lengths))


def batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(2)
    image = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Batch(tuple(map(str, range(size))), image, texts(*[6, 3, 5, 4][:size]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trainable_parameter_learns_and_the_tokenizer_stays(variant: str) -> None:
    system = small(variant, caption_dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in system.tokenizer.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=0.1)
    reached: set[str] = set()
    for step in range(4):
        optimizer.zero_grad()
        system.loss(batch(), step).total.backward()
        reached |= {n for n, p in system.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        system.after_step(step)
    assert {n for n, p in system.named_parameters() if p.requires_grad} == reached
    assert all(torch.equal(tensor, before[name]) for name, tensor in system.tokenizer.state_dict().items())
    assert not system.tokenizer.training


@pytest.mark.parametrize("variant", VARIANTS)
def test_overfits_one_batch(variant: str) -> None:
    options = {"label_smoothing": 0.0} if variant.startswith("muse") else {}
    system, data = small(variant, caption_dropout=0.0, **options).train(), batch()
    optimizer = torch.optim.Adam(
        [p for p in system.parameters() if p.requires_grad], lr=1e-2 if isinstance(system, Dalle) else 3e-3
    )
    losses = None
    for step in range(150 if isinstance(system, Dalle) else 400):
        optimizer.zero_grad()
        losses = system.loss(data, step)
        losses.total.backward()
        optimizer.step()
    system.eval()
    if isinstance(system, Muse):
        assert losses is not None
        assert float(losses.parts["token_accuracy"]) > 0.8  # where all tokens of a picture are hidden, the text alone must do
        return
    text = TextBatch(data.text.ids, data.text.lengths)
    made = system.paint(text, [0] * 4, Sampling(guidance=1.0, temperature=0.0, steps=16))
    wanted = system.tokenizer.decode(system.tokenizer.encode(data.image))
    assert (made == wanted).flatten(1).all(1).sum() >= 3, "the pictures of a learned batch come back from their texts"


@pytest.mark.parametrize("indices", ["numbers", "tensors"])
@pytest.mark.parametrize("variant", ["dalle", "dalle-sparse", "cogview"])
def test_cached_decoding_gives_the_logits_of_whole_sequences(variant: str, indices: str) -> None:
    system = spread(small(variant))
    assert isinstance(system, Dalle)
    ids = torch.randint(0, system.tokenizer.vocab_size, (3, system.num_image))
    prompt = system.prompt(texts(6, 2, 4))
    _, whole = system.forward_logits(prompt, ids)
    logits, caches = system.prefill(prompt, ids[:, :3], system.num_image)
    found = [logits]
    for index in range(3, system.num_image - 1):
        found.append(system.step(ids[:, index], torch.tensor([index]) if indices == "tensors" else index, caches))
    torch.testing.assert_close(torch.stack(found, 1), whole[:, 3:], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inside of torch
@pytest.mark.parametrize("variant", ["dalle", "dalle-sparse"])
def test_compiled_steps_choose_the_same_tokens(variant: str) -> None:
    torch._dynamo.reset()
    system = spread(small(variant))
    assert isinstance(system, Dalle)
    prompt, nothing = system.prompt(texts(6, 2)), system.prompt(texts(0, 0))
    options = {
        "prompt": prompt,
        "unconditional": nothing,
        "seeds": [1, 2],
        "sampling": Sampling(),
        "num_tokens": system.num_image,
    }
    assert torch.equal(generate(Compiled(system), **options), generate(system, **options))


def test_what_is_behind_a_text_makes_no_difference() -> None:
    system = spread(small("dalle"))
    assert isinstance(system, Dalle)
    text = texts(4, 2)
    longer = TextBatch(torch.cat([text.ids[:, :4], torch.full((2, 2), 7)], 1), text.lengths)
    assert torch.equal(system.prompt(TextBatch(text.ids[:, :4], text.lengths)), system.prompt(longer))
    with pytest.raises(UserError, match="7 tokens where the model takes 6"):
        system.prompt(TextBatch(torch.ones(1, 7, dtype=torch.int64), torch.tensor([7])))


@pytest.mark.parametrize("variant", VARIANTS)
def test_pictures_depend_on_their_seed_and_text_not_on_their_batch(variant: str) -> None:
    system = spread(small(variant))
    assert isinstance(system, Paints)
    text, seeds, sampling = texts(6, 2, 4), [5, 6, 7], Sampling(guidance=2.0, steps=5)
    together = system.paint(text, seeds, sampling)
    for row in range(3):
        alone = system.paint(text[row : row + 1], seeds[row : row + 1], sampling)
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(system.paint(text, [8, 9, 10], sampling), together)


@pytest.mark.parametrize("variant", VARIANTS)
def test_guidance_changes_pictures_and_nothing_that_was_given(variant: str) -> None:
    system = spread(small(variant))
    text, data = texts(6, 2, 4), batch(3)
    keep = torch.zeros(3, 16, 16, dtype=torch.bool)
    keep[:, :8] = True
    given = [text.ids.clone(), text.lengths.clone(), data.image.clone(), keep.clone()]
    made = [system.paint(text, [1, 2, 3], Sampling(guidance=g), image=data.image, keep=keep) for g in (1.0, 4.0)]
    assert not torch.equal(*made)
    assert all(torch.equal(*pair) for pair in zip(given, [text.ids, text.lengths, data.image, keep], strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_kept_keeps_its_tokens(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system, data = spread(small(variant)), batch(2)
    keep = torch.zeros(2, 16, 16, dtype=torch.bool)
    keep[:, :9] = True  # one row of pixels more than two rows of tokens
    decoded: list[torch.Tensor] = []
    decode = system.tokenizer.decode
    monkeypatch.setattr(system.tokenizer, "decode", lambda ids: (decoded.append(ids), decode(ids))[1])
    seen: list[tuple[torch.Tensor, float]] = []
    made = system.paint(
        texts(6, 2), [1, 2], Sampling(), image=data.image, keep=keep, on_picture=lambda *given: seen.append(given)
    )
    known = system.tokenizer.encode(data.image)[:, :8]
    assert len(decoded) > 2
    assert all(torch.equal(ids[:, :8], known) for ids in decoded)
    assert torch.equal(seen[-1][0], made)
    assert [progress for _, progress in seen] == sorted(progress for _, progress in seen)
    assert seen[-1][1] == 1


def test_only_the_upper_part_can_be_kept_by_an_autoregressive_model() -> None:
    system, data = spread(small("dalle")), batch(2)
    keep = torch.zeros(2, 16, 16, dtype=torch.bool)
    keep[:, 8:] = True
    with pytest.raises(UserError, match="from the top left on"):
        system.paint(texts(6, 2), [1, 2], Sampling(), image=data.image, keep=keep)
    muse = spread(small("muse"))
    with pytest.raises(UserError, match="solver: is for generators from noise"):
        muse.paint(texts(6, 2), [1, 2], Sampling(solver="euler"))
    with pytest.raises(UserError, match="not changed as a whole"):
        muse.paint(texts(6, 2), [1, 2], Sampling(), image=data.image)
    made = muse.paint(texts(6, 2), [1, 2], Sampling(), image=data.image, keep=keep)
    assert made.shape == data.image.shape


def test_padding_is_not_predicted_and_losses_are_weighted() -> None:
    system = small("dalle", caption_dropout=0.0)
    assert isinstance(system, Dalle)
    data = batch()
    losses = system.loss(data, 0)
    expected = (losses.parts["text"] + 7 * losses.parts["image"]) / 8
    torch.testing.assert_close(losses.total.detach(), expected)
    prompt = system.prompt(data.text)
    logits, _ = system.forward_logits(prompt, system.tokenizer.encode(data.image))
    terms = [
        [-logits[row, place].log_softmax(-1)[prompt[row, place + 1]] for place in range(int(data.text.lengths[row]) - 1)]
        for row in range(4)
    ]
    expected = torch.stack([torch.stack(of_sample).mean() for of_sample in terms]).mean()
    torch.testing.assert_close(losses.parts["text"], expected.detach())


def test_slices_of_a_batch_have_the_gradient_of_the_whole() -> None:
    system = small("dalle", caption_dropout=0.0)
    data = batch()
    system.loss(data, 0).total.backward()
    whole = {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}
    system.zero_grad()
    for row in range(4):
        (system.loss(data[row : row + 1], 0).total / 4).backward()
    for name, parameter in system.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["dalle", "muse"])
def test_remembered_tokens_are_those_that_the_tokenizer_gives(variant: str) -> None:
    system = small(variant, remember_tokens=3, caption_dropout=0.0)
    data, encoded = batch(), []
    tokenizer = system.tokenizer
    assert isinstance(tokenizer, Vq)
    memory = TokenMemory(lambda image: encoded.append(image) or tokenizer.encode(image), 3)
    assert data.image is not None
    for expected in (4, 5, 6):  # the fourth picture is never remembered
        assert torch.equal(memory(data.image), tokenizer.encode(data.image))
        assert len(encoded) == expected
    plain = small(variant, caption_dropout=0.0)
    torch.manual_seed(5)
    first = system.loss(data, 0).total
    torch.manual_seed(5)
    assert torch.equal(first, plain.loss(data, 0).total)


def test_tokens_are_the_same_within_autocast() -> None:
    tokenizer = small("dalle").tokenizer
    assert isinstance(tokenizer, Vq)
    image = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = tokenizer.encode(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(image), ids)
        assert torch.equal(tokenizer.decode(ids), tokenizer.tokenizer.decode(ids))
    with pytest.raises(UserError, match=r"pictures of shape \(3, 20, 20\) where \(3, 16, 16\)"):
        tokenizer.encode(torch.zeros(1, 3, 20, 20, dtype=torch.uint8))
    with pytest.raises(UserError, match="ids from 0 to 75 where 0 to 74 are known"):
        tokenizer.decode(torch.full((1, 16), 75).triu(1))
    with pytest.raises(UserError, match="12 tokens where 4 x 4"):
        tokenizer.decode(ids[:, :12])


@pytest.mark.parametrize("variant", ["dalle", "muse"])
def test_only_a_tokenizer_can_be_stood_on(variant: str) -> None:
    config = validate(CONFIGS[variant], SIZES | VARIANTS[variant], "test")
    with pytest.raises(ConfigError, match="does not turn pictures into tokens"):
        build(config, {"tokenizer": torch.nn.Identity()})


def test_the_share_of_hidden_tokens_follows_the_cosine() -> None:
    torch.manual_seed(0)
    ids = torch.zeros(20_000, 64)
    hidden = hide(ids)
    counts = hidden.sum(1).float()
    assert int(counts.min()) >= 1
    share = counts / 64
    assert share.mean().item() == pytest.approx(2 / torch.pi, abs=0.01)
    assert (share > 0.5).float().mean().item() == pytest.approx(2 / 3, abs=0.02)  # cos(pi u / 2) > 1 / 2 for u < 2 / 3
    assert hidden.float().mean(0).std() < 0.01, "no place is preferred"


def test_configurations_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="multiple of heads"):
        validate(DalleConfig, {"width": 10, "heads": 3}, "test")
    assert isinstance(small("muse"), Muse)
