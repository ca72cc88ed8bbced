"""Experts: equal to a loop over tokens, capacity, routing, balance, and their loss in every way of computing a step."""

import functools
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from mm.config import ConfigError, validate
from mm.encoders.text import TextEncoder, TextEncoderConfig, build_text_encoder
from mm.fusion.dual_tower import DualTower
from mm.generators.language_model import LanguageModelConfig, build_language_model
from mm.nn.experts import Experts, ExpertsConfig, hashed
from mm.nn.transformer import FeedForward
from mm.systems.clip import Clip
from mm.training.gradients import backward
from mm.types import Batch, Losses, System, TextBatch, auxiliary_losses

WIDTH, COUNT = 6, 4
PINNED = [3, 7, 5, 0, 3]  # must never change: trained weights depend on it


def experts(**options: object) -> Experts:
    torch.manual_seed(0)
    config = validate(ExpertsConfig, {"count": COUNT, "capacity": None, **options}, "test")
    layer = Experts(lambda: FeedForward(WIDTH, 8, nn.GELU()), WIDTH, config, layer=1).double()
    if layer.router is not None:
        nn.init.normal_(layer.router.weight)
    return layer


def tokens(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def one_by_one(layer: Experts, x: Tensor, ids: Tensor | None) -> Tensor:
    """The definition: each token by itself."""
    results = []
    for place, token in enumerate(x.flatten(0, 1)):
        if layer.router is None:
            assert ids is not None
            chosen, weights = [int(hashed(ids.flatten()[place], layer.layer, COUNT))], torch.ones(1)
        else:
            likely = (layer.router.weight @ token).softmax(0)
            chosen = likely.argsort(descending=True)[: layer.config.top_k].tolist()
            weights = likely[chosen] if len(chosen) == 1 else likely[chosen] / likely[chosen].sum()
        results.append(sum(weight * layer.experts[i](token[None])[0] for i, weight in zip(chosen, weights, strict=True)))
    return torch.stack(results).view_as(x)  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize("capacity", [None, float(COUNT)])
@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 2}, {"top_k": COUNT}, {"routing": "hash"}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_equals_a_loop_over_the_tokens(options: dict[str, object], capacity: float | None, training: bool) -> None:
    """Values and all gradients; a capacity of all tokens drops none."""
    layer = experts(capacity=capacity, **options).train(training)
    ids = torch.arange(21).view(3, 7)
    gradients = []
    for compute in (layer, functools.partial(one_by_one, layer)):
        x = tokens().requires_grad_()
        result = compute(x, ids)
        loss = (result * torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view_as(result)).sum()
        used = [p for p in layer.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, [x, *used], allow_unused=True)
        gradients.append([result, *(torch.zeros(()) if g is None else g for g in found)])
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def test_gradients_reach_the_router_and_every_used_expert() -> None:
    layer = experts(capacity=1.25).train()
    with auxiliary_losses(layer) as told:
        result = layer(tokens(8, 16))
        losses = Losses(result.square().sum()).plus(told())
    losses.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_capacity_drops_what_comes_last() -> None:
    """Two of five tokens for one expert find no place; a token beyond the capacity gets nothing; padding takes no place."""
    layer = experts(capacity=1.0, top_k=1).train()
    assert layer.router is not None
    nn.init.zeros_(layer.router.weight)
    layer.router.weight.data[2, 0] = 1.0  # tokens with a positive first component all want expert 2
    x = tokens(1, 12).abs()
    ids = torch.zeros(1, 12, dtype=torch.int64)
    ids[0, 1] = -1
    with auxiliary_losses(layer) as told:
        result = layer(x, ids)
        found = told()
    assert found is not None
    reached = result.abs().sum(-1)[0] > 0
    assert reached.tolist() == [True, False, True, True] + [False] * 8  # 12 tokens / 4 experts: 3 places
    assert found.parts["dropped_tokens"] == pytest.approx(8 / 11)
    assert (layer.eval()(x, ids).abs().sum(-1) > 0).all()


def test_second_choices_wait_for_all_first_ones() -> None:
    layer = experts(capacity=1.0, top_k=2, count=2).train()
    assert layer.router is not None
    layer.router.weight.data.zero_()
    layer.router.weight.data[:, 0] = torch.tensor([1.0, 0.0])
    x = tokens(1, 4)
    x[0, :, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert layer.config.capacity == 1.0  # 4 places for each: every first and every second choice fits
    torch.testing.assert_close(layer(x), one_by_one(layer, x, None))
    x[0, :, 0] = 1.0
    half = experts(capacity=0.5, top_k=2, count=2).train()
    half.load_state_dict(layer.state_dict())
    mixed = half(x)[0]  # 2 places: expert 0 takes the first choices of tokens 0 and 1, expert 1 their second ones
    torch.testing.assert_close(mixed[:2], one_by_one(half, x, None)[0, :2])
    assert not mixed[2:].any()


def test_balance_is_the_formula_of_the_paper() -> None:
    """Whether a batch comes in one call or in two; E where all go to one expert for sure, 1 where all are even."""
    layer = experts(balance_weight=0.5).train()
    assert layer.router is not None
    x, ids = tokens(4, 6), torch.zeros(4, 6, dtype=torch.int64)
    ids[3, 2:] = -1
    likely = (x[ids >= 0] @ layer.router.weight.T).softmax(1)
    share = torch.bincount(likely.argmax(1), minlength=COUNT) / len(likely)
    expected = COUNT * (share * likely.mean(0)).sum()
    for parts in ((slice(0, 4),), (slice(0, 1), slice(1, 4))):
        with auxiliary_losses(layer) as told:
            for rows in parts:
                layer(x[rows], ids[rows])
            found = told()
        assert found is not None
        torch.testing.assert_close(found.parts["balance"].double(), expected.detach(), rtol=1e-5, atol=0.0)
        torch.testing.assert_close(found.total.double(), 0.5 * expected, rtol=1e-5, atol=0.0)
    layer.router.weight.data.zero_()
    layer.router.weight.data[1, 0] = 1e3
    with auxiliary_losses(layer) as told:
        layer(x.abs() + 1)
        worst = told()
    assert worst is not None
    assert worst.parts["balance"] == pytest.approx(COUNT)


def test_hash_is_deterministic_even_and_another_one_in_each_layer() -> None:
    ids = torch.arange(4096)
    first, second = hashed(ids, 1, 8), hashed(ids, 3, 8)
    assert first[:10].tolist() == hashed(torch.arange(10), 1, 8).tolist()
    assert torch.bincount(first, minlength=8).float().std() < 40
    assert (first == second).float().mean() < 0.2
    assert hashed(torch.tensor([0, 1, 2, 3, 49407]), 1, 8).tolist() == PINNED


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top_k": 5}, "lower top_k"), ({"routing": "hash", "top_k": 2}, "leave top_k at 1")],
)
def test_impossible_experts_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ExpertsConfig, {"count": 4, **options}, "test")
    with pytest.raises(ConfigError, match="text encoders"):
        validate(LanguageModelConfig, {"experts": {"count": 2, "routing": "hash"}}, "test")


def text_encoder(**options: object) -> TextEncoder:
    torch.manual_seed(0)
    given = {"count": COUNT, "balance_weight": 1.0, "capacity": None} | options.pop("experts", {})  # pyright: ignore
    sizes = {"width": 8, "layers": 4, "heads": 2, "context_length": 12, "vocab_size": 50}
    encoder = build_text_encoder(validate(TextEncoderConfig, {**sizes, **options, "experts": given}, "test"))
    for part in encoder.modules():
        if isinstance(part, Experts) and part.router is not None:
            nn.init.normal_(part.router.weight)
    return encoder


def texts(rows: int = 40) -> TextBatch:
    generator = torch.Generator().manual_seed(2)
    return TextBatch(torch.randint(3, 50, (rows, 12), generator=generator), torch.randint(3, 13, (rows,), generator=generator))


@pytest.mark.parametrize("options", [{}, {"causal": False, "pooling": "mean"}, {"experts": {"routing": "hash"}}], ids=str)
def test_padding_and_neighbours_change_nothing(options: dict[str, object]) -> None:
    """Other ids behind the end, and other texts in the batch: the same vector, and the same balance in training."""
    encoder = text_encoder(**options)
    text = texts()
    other = TextBatch(torch.where(text.valid(), text.ids, 49), text.lengths)
    balances = []
    for given in (text, other):
        with auxiliary_losses(encoder.train()) as told:
            encoder(given)
            found = told()
        assert found is not None
        balances.append(found.total)
    torch.testing.assert_close(*balances)
    encoder.eval()
    with torch.no_grad():
        together = encoder(text).pooled
        alone = torch.cat([encoder(other[row : row + 1]).pooled for row in range(4)])
    torch.testing.assert_close(together[:4], alone, rtol=1e-5, atol=1e-6)


class Texts(System):
    """The simplest system with experts: texts that are to be long."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def loss(self, batch: Batch, step: int) -> Losses:
        assert batch.text is not None
        return Losses(self.encoder(batch.text).pooled.square().sum(1).mean())


def gradients_of(system: System, compute: Callable[[], Losses]) -> tuple[Losses, dict[str, Tensor]]:
    system.zero_grad(set_to_none=True)
    losses = compute()
    return losses, {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}


def batch(rows: int = 40) -> Batch:
    text = texts(rows)
    image = torch.randint(0, 256, (rows, 3, 2, 2), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    return Batch(tuple(map(str, range(rows))), image=image, text=text)


def test_total_holds_the_balance_and_tells_its_share() -> None:
    system = Texts(text_encoder()).train()
    losses = system(batch(), 0)
    own = system.loss(batch(), 0)
    torch.testing.assert_close(losses.total, own.total + losses.parts["auxiliary"])
    assert losses.parts["auxiliary"] == pytest.approx(2 * losses.parts["balance"].item())  # of two layers, at weight 1
    assert set(losses.parts) == {"auxiliary", "balance", "dropped_tokens"}
    with torch.no_grad():
        assert system(batch(), 0).parts == {}
    assert system.eval()(batch(), 0).parts == {}


def test_checkpointing_gives_the_same_gradients() -> None:
    results = []
    for checkpointing in (False, True):
        system = Texts(text_encoder(gradient_checkpointing=checkpointing, experts={"capacity": 1.0})).train()
        results.append(gradients_of(system, lambda: backward(system, batch(), 0, 1, nullcontext)))  # noqa: B023
    (plain, first), (recomputed, second) = results
    torch.testing.assert_close(plain.total, recomputed.total)
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient)


def test_accumulation_averages_the_balance_of_slices() -> None:
    system = Texts(text_encoder()).train()
    halves = [batch()[:20], batch()[20:]]

    def by_hand() -> Losses:
        losses = [system(half, 0) for half in halves]
        (sum(loss.total for loss in losses) / 2).backward()  # pyright: ignore[reportAttributeAccessIssue]
        return Losses((losses[0].total + losses[1].total).detach() / 2)

    expected, wanted = gradients_of(system, by_hand)
    found, gradients = gradients_of(system, lambda: backward(system, batch(), 0, 2, nullcontext))
    torch.testing.assert_close(found.total, expected.total)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient)


class Pixels(nn.Module):
    def forward(self, image: Tensor) -> object:
        from mm.types import Encoded

        pooled = image.flatten(1).float() / 255
        return Encoded(pooled[:, None], torch.ones(len(pooled), 1, dtype=torch.bool), pooled)


def test_cached_gradients_hold_the_balance() -> None:
    """Exact accumulation of a contrastive loss: the loss of all pairs, and the balance of each slice."""
    torch.manual_seed(0)
    towers = {"image": (Pixels(), nn.Linear(12, 6, bias=False)), "text": (text_encoder(), nn.Linear(8, 6, bias=False))}
    system = Clip(DualTower(towers)).train()  # pyright: ignore[reportArgumentType]
    data, cuts = batch(), (slice(0, 20), slice(20, 40))

    def by_hand() -> Losses:
        parts, auxiliary = [], []
        for rows in cuts:
            with auxiliary_losses(system) as told:
                parts.append(system.represent(data[rows]))
                found = told()
            assert found is not None
            auxiliary.append(found.total)
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        total = system.loss_from(joined, data, 0).total + torch.stack(auxiliary).mean()
        total.backward()
        return Losses(total.detach(), {"auxiliary": torch.stack(auxiliary).mean().detach()})

    expected, wanted = gradients_of(system, by_hand)
    found, gradients = gradients_of(system, lambda: backward(system, data, 0, 2, nullcontext))
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(found.parts["auxiliary"], expected.parts["auxiliary"])
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inside of torch
@pytest.mark.parametrize("capacity", [None, 1.0])
def test_compiled_experts_are_the_same(capacity: float | None) -> None:
    system = Texts(text_encoder(experts={"capacity": capacity})).train()
    expected, wanted = gradients_of(system, lambda: backward(system, batch(8), 0, 1, nullcontext))
    system.encoder.compile(backend="aot_eager")  # captured as for any backend; generating code would take minutes
    found, gradients = gradients_of(system, lambda: backward(system, batch(8), 0, 1, nullcontext))
    torch.testing.assert_close(found.total, expected.total)
    assert found.parts.keys() == expected.parts.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_decoding_from_caches_agrees_with_the_whole_pass() -> None:
    torch.manual_seed(0)
    sizes = {"width": 8, "layers": 4, "heads": 2, "context_length": 12, "vocab_size": 50}
    config = validate(LanguageModelConfig, {**sizes, "experts": {"count": COUNT, "top_k": 2}}, "test")
    model = build_language_model(config).eval()
    ids = texts(3).ids
    with torch.no_grad():
        whole = model.logits(model(model.embed(ids)))
        logits, state = model.prefill(model.embed(ids[:, :5]), torch.full((3,), 5), 8)
        steps = [logits, *(model.step(ids[:, 5 + index], index, state) for index in range(6))]
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 4:11], rtol=1e-4, atol=1e-5)
