"""Quantizers against their definitions, one by one and over processes, and the counting of codes."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.nn import quantize
from mm.nn.quantize import CodeUsage, FiniteScalarQuantizer, GumbelQuantizer, VectorQuantizer

LEVELS = [(8, 5, 5, 5), (2, 3), (4,), (7, 6, 2)]

QUANTIZERS: dict[str, Callable[[], nn.Module]] = {
    "fsq": lambda: FiniteScalarQuantizer((8, 5, 5, 2)),
    "vq": lambda: VectorQuantizer(32, 4),
    "vq-learned": lambda: VectorQuantizer(32, 4, ema_decay=0.0),
    "vq-unit": lambda: VectorQuantizer(32, 4, unit_length=True),
    "gumbel": lambda: GumbelQuantizer(4, 6),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ready(codebook: Tensor, **options: float) -> VectorQuantizer:
    """A quantizer in training whose codebook has started, at these codes."""
    quantizer = VectorQuantizer(len(codebook), codebook.shape[1], **options).train()
    with torch.no_grad():
        quantizer.codebook.copy_(codebook)
        quantizer.started.fill_(True)
        if quantizer.ema_decay:
            quantizer.sums.copy_(codebook)
    return quantizer


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


# All quantizers


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_fp32_whatever_surrounds_it(name: str, training: bool) -> None:
    """With what bf16 layers hand over, results are those of the same numbers outside of autocast."""
    torch.manual_seed(0)
    quantizer, z = QUANTIZERS[name]().train(training), 2 * noise(4, 64, 4).bfloat16()
    quantizer(z.float())  # starts a codebook
    torch.manual_seed(1)
    outside = quantizer(z.float())
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(z)
    assert {inside.codes.dtype, inside.loss.dtype} == {torch.float32}
    assert torch.equal(inside.ids, outside.ids)
    assert torch.equal(inside.codes, outside.codes)
    assert torch.equal(inside.loss, outside.loss)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_ids_are_in_range_and_name_the_codes(name: str) -> None:
    torch.manual_seed(0)
    quantizer = QUANTIZERS[name]()
    for training in (True, False):
        quantized = quantizer.train(training)(5 * noise(8, 16, 4))
        assert quantized.ids.shape == (8, 16)
        assert quantized.ids.dtype == torch.int64
        assert 0 <= int(quantized.ids.min()) <= int(quantized.ids.max()) < quantizer.codebook_size
        assert quantized.loss.shape == ()
    assert torch.equal(quantized.codes, quantizer.lookup(quantized.ids))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_is_not_a_number_reaches_the_loss_but_not_the_ids(name: str) -> None:
    quantizer, z = QUANTIZERS[name]().train(), noise(2, 40, 4)
    z[0, 3], z[1, 2] = math.nan, math.inf
    quantized = quantizer(z)
    assert 0 <= int(quantized.ids.min()) <= int(quantized.ids.max()) < quantizer.codebook_size
    assert not (quantized.codes.sum() + quantized.loss).isfinite()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_evaluation_changes_nothing(name: str) -> None:
    quantizer = QUANTIZERS[name]().eval()
    before = state(quantizer)
    quantizer(noise(2, 40, 4))
    if isinstance(quantizer, VectorQuantizer):
        quantizer.update_()
        with torch.no_grad():  # as in `encode` during training
            quantizer.train()(noise(2, 40, 4))
        quantizer.update_()
    assert_same_state(state(quantizer), before)


# Finite scalar quantization


def digits_of(z: list[float], levels: tuple[int, ...]) -> list[int]:
    """The paper's listing, a channel at a time: the step of each channel, counted from 0."""
    found = []
    for value, count in zip(z, levels, strict=True):
        half = (count - 1) * (1 - 1e-3) / 2
        offset = 0.5 if count % 2 == 0 else 0.0
        found.append(round(math.tanh(value + math.tan(offset / half)) * half - offset) + count // 2)
    return found


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_equals_its_definition(levels: tuple[int, ...]) -> None:
    quantizer, z = FiniteScalarQuantizer(levels), 2 * noise(2, 200, len(levels))
    quantized = quantizer(z)
    for vector, code, number in zip(z.flatten(0, 1), quantized.codes.flatten(0, 1), quantized.ids.flatten(), strict=True):
        digits = digits_of(vector.tolist(), levels)
        assert int(number) == sum(digit * math.prod(levels[:place]) for place, digit in enumerate(digits))
        expected = [(digit - count // 2) / (count // 2) for digit, count in zip(digits, levels, strict=True)]
        assert code.tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("levels", LEVELS)
def test_every_fsq_code_exists_once_and_comes_back(levels: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    ids = torch.arange(quantizer.codebook_size)[None]
    codes = quantizer.lookup(ids)
    assert quantizer.codebook_size == math.prod(levels) == len(codes[0].unique(dim=0))
    assert codes.shape == (1, math.prod(levels), quantizer.width)
    assert codes.abs().max() <= 1
    counts = torch.tensor(levels)
    half, offset = (counts - 1) * (1 - 1e-3) / 2, (counts % 2 == 0) / 2
    z = ((codes * (counts // 2) + offset) / half).clamp(-0.9999, 0.9999).atanh() - (offset / half).tan()
    quantized = quantizer(z)
    assert torch.equal(quantized.ids, ids)
    assert torch.equal(quantized.codes, codes)


def test_fsq_gradients_are_those_without_rounding() -> None:
    quantizer, weight = FiniteScalarQuantizer((8, 5, 5, 2)), noise(3, 7, 4, seed=1)
    z = noise(3, 7, 4).requires_grad_()
    [through] = torch.autograd.grad((quantizer(z).codes * weight).sum(), z)
    counts = torch.tensor([8, 5, 5, 2])
    half, offset = (counts - 1) * (1 - 1e-3) / 2, (counts % 2 == 0) / 2
    smooth = (torch.tanh(z + (offset / half).tan()) * half - offset) / (counts // 2)
    torch.testing.assert_close(through, torch.autograd.grad((smooth * weight).sum(), z)[0])
    assert through.abs().min() > 0


@pytest.mark.parametrize("levels", [(), (5, 1), (0,)])
def test_fsq_needs_a_choice_in_every_channel(levels: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="at least 2 values"):
        FiniteScalarQuantizer(levels)


# Vector quantization


@pytest.mark.parametrize("at_once", [1 << 26, 100])
@pytest.mark.parametrize("unit_length", [False, True])
def test_the_nearest_code_is_taken(monkeypatch: pytest.MonkeyPatch, unit_length: bool, at_once: int) -> None:
    monkeypatch.setattr(quantize, "DISTANCES_AT_ONCE", at_once)
    codes, z = noise(24, 4), noise(2, 50, 4, seed=1)
    quantized = ready(codes, unit_length=unit_length)(z)
    if unit_length:
        expected = nn.functional.cosine_similarity(z[:, :, None], codes, dim=-1).argmax(-1)
        torch.testing.assert_close(quantized.codes.norm(dim=-1), torch.ones(2, 50))
    else:
        expected = (z[:, :, None] - codes).square().sum(-1).argmin(-1)
        assert torch.equal(quantized.codes, codes[expected])
    assert torch.equal(quantized.ids, expected)


def test_gradients_pass_straight_through_to_the_features() -> None:
    quantizer, weight = ready(noise(9, 3), ema_decay=0.0), noise(2, 5, 3, seed=1)
    z = noise(2, 5, 3, seed=2).requires_grad_()
    (quantizer(z).codes * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    assert quantizer.codebook.grad is None


@pytest.mark.parametrize("commitment", [0.25, 2.0])
def test_the_commitment_weight_is_on_the_term_of_the_features(commitment: float) -> None:
    codes, z = noise(9, 3), noise(2, 5, 3, seed=1).requires_grad_()
    learned = ready(codes, ema_decay=0.0, commitment=commitment)
    quantized = learned(z)
    quantized.loss.backward()
    error = (z - codes[quantized.ids]).detach() * 2 / z.numel()
    torch.testing.assert_close(z.grad, commitment * error)
    pull = torch.zeros(9, 3).index_add(0, quantized.ids.flatten(), -error.flatten(0, 1))
    torch.testing.assert_close(learned.codebook.grad, pull)

    again = z.detach().clone().requires_grad_()
    averaged = ready(codes, commitment=commitment)
    averaged(again).loss.backward()
    torch.testing.assert_close(again.grad, z.grad)
    assert not list(averaged.parameters())


def test_moving_averages_equal_a_loop_over_features() -> None:
    """Two forward passes a step, five steps, in plain numbers."""
    decay, codes = 0.8, noise(6, 2)
    quantizer = ready(codes, ema_decay=decay, dead_after=0.0)
    book, uses = codes.tolist(), [1.0] * 6
    sums = codes.tolist()
    for step in range(5):
        counts, totals = [0] * 6, [[0.0, 0.0] for _ in range(6)]
        for part in range(2):
            z = noise(2, 7, 2, seed=10 * step + part)
            quantizer(z)
            for x, y in z.flatten(0, 1).tolist():
                nearest = min(range(6), key=lambda k: (book[k][0] - x) ** 2 + (book[k][1] - y) ** 2)
                counts[nearest] += 1
                totals[nearest] = [totals[nearest][0] + x, totals[nearest][1] + y]
        for k in range(6):
            uses[k] = decay * uses[k] + (1 - decay) * counts[k]
            sums[k] = [decay * old + (1 - decay) * new for old, new in zip(sums[k], totals[k], strict=True)]
            book[k] = [total / uses[k] for total in sums[k]]
        quantizer.update_()
        torch.testing.assert_close(quantizer.codebook, torch.tensor(book))
        torch.testing.assert_close(quantizer.uses, torch.tensor(uses))
        torch.testing.assert_close(quantizer.sums, torch.tensor(sums))


def test_an_update_is_applied_once() -> None:
    quantizer = ready(noise(6, 2), dead_after=0.0)
    quantizer(noise(1, 20, 2))
    quantizer.update_()
    before = state(quantizer)
    quantizer.update_()
    assert_same_state(state(quantizer), before)


def test_a_code_without_features_stays_where_it_is() -> None:
    """Long enough for its averages to have vanished."""
    codes = torch.tensor([[0.0, 0.0], [70.0, -90.0]])
    quantizer = ready(codes, ema_decay=0.5, dead_after=0.0)
    for step in range(200):
        quantizer(noise(1, 20, 2, seed=step))
        quantizer.update_()
    assert float(quantizer.uses[1]) == 0
    torch.testing.assert_close(quantizer.codebook[1], codes[1])


@pytest.mark.parametrize("dead_after", [0.3, 4.0])
@pytest.mark.parametrize("decay", [0.5, 0.0])
def test_dead_codes_start_anew_with_their_averages(decay: float, dead_after: float) -> None:
    codes = torch.tensor([[0.0, 0.0], [70.0, -90.0], [800.0, 60.0]])
    quantizer = ready(codes, ema_decay=decay, dead_after=dead_after)
    for step in range(200):
        z = noise(1, 30, 2, seed=step)
        quantizer(z)
        quantizer.update_()
        if quantizer.codebook.abs().max() < 50:
            break
    fresh = quantizer.codebook[1:].detach()
    assert all((z[0] == code).all(1).any() for code in fresh), "new codes are features of the latest batch"
    assert not torch.equal(*fresh), "features are drawn without repetition"
    assert (quantizer.uses[1:] >= dead_after).all()
    if decay:
        assert torch.equal(quantizer.sums[1:], quantizer.uses[1:, None] * fresh)
        quantizer(noise(1, 300, 2, seed=999))
        quantizer.update_()
        assert quantizer.codebook.abs().max() < 5, "old sums would have drawn the codes back"


def test_dead_codes_stay_where_that_is_asked_for() -> None:
    codes = torch.tensor([[0.0, 0.0], [70.0, -90.0]])
    quantizer = ready(codes, ema_decay=0.0, dead_after=0.0)
    for step in range(20):
        quantizer(noise(1, 30, 2, seed=step))
        quantizer.update_()
    assert torch.equal(quantizer.codebook, codes)


def test_the_codebook_starts_at_centres_of_the_features() -> None:
    """Each code is the mean of the features that are nearest to it, far better than codes drawn among the features."""
    places = 10 * noise(16, 3)
    features = (places[:, None] + 0.1 * noise(16, 20, 3, seed=1)).flatten(0, 1)[None]
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 3).train()
    quantized = quantizer(features)
    assert bool(quantizer.started)
    for number in quantized.ids.unique():
        torch.testing.assert_close(quantizer.codebook[number], features[quantized.ids == number].mean(0))
    torch.testing.assert_close(quantizer.sums, quantizer.uses[:, None] * quantizer.codebook)
    drawn = torch.stack(
        [(features - features[0, torch.randperm(320)[:16], None]).square().sum(-1).amin(0).mean() for _ in "abcdef"]
    )
    assert (features - quantized.codes).square().sum(-1).mean() < drawn.mean() / 1.5

    before = quantizer.codebook.clone()
    quantizer(noise(1, 40, 3))
    assert torch.equal(quantizer.codebook, before), "it starts once"


def test_as_many_features_as_codes_become_the_codebook() -> None:
    features = noise(1, 12, 3)
    quantizer = VectorQuantizer(12, 3).train()
    assert torch.equal(quantizer(features).codes, features)
    assert len(quantizer.codebook.unique(dim=0)) == 12


def test_fewer_features_than_codes_start_the_codebook_near_them() -> None:
    features = noise(1, 5, 3)
    quantizer = VectorQuantizer(32, 3).train()
    quantizer(features)
    assert torch.cdist(quantizer.codebook, features[0]).amin(1).max() < 0.2
    assert len(quantizer.codebook.unique(dim=0)) == 32


def test_random_choices_follow_the_global_generator() -> None:
    def codebook(seed: int) -> Tensor:
        torch.manual_seed(0)
        quantizer = VectorQuantizer(8, 3, dead_after=0.9, ema_decay=0.5).train()
        for step in range(4):
            torch.manual_seed(seed + step)
            quantizer(noise(1, 10, 3, seed=step))
            quantizer.update_()
        return quantizer.codebook

    assert torch.equal(codebook(1), codebook(1))
    assert not torch.equal(codebook(1), codebook(11))


def test_what_is_not_finite_enters_no_statistics() -> None:
    """Its step is skipped, so `update_` is not called, but the next step's call applies what is left."""
    quantizer, expected = (VectorQuantizer(6, 2, dead_after=0.0).train() for _ in range(2))
    expected.load_state_dict(quantizer.state_dict())
    broken = noise(1, 20, 2)
    broken[0, :] = math.nan
    quantizer(broken)
    assert not bool(quantizer.started)
    for each in (quantizer, expected):
        torch.manual_seed(0)
        each(noise(1, 20, 2, seed=1))
    quantizer(broken)
    for each in (quantizer, expected):
        each(noise(1, 20, 2, seed=2))
        each.update_()
    assert_same_state(state(quantizer), state(expected))


@pytest.mark.parametrize("decay", [0.6, 0.0])
def test_a_restored_codebook_continues_with_the_same_bits(decay: float) -> None:
    def steps(quantizer: VectorQuantizer, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            loss = quantizer(noise(2, 20, 3, seed=step)).loss
            if not decay:
                [gradient] = torch.autograd.grad(loss, [quantizer.codebook])
                quantizer.codebook.data -= 0.1 * gradient
            quantizer.update_()

    options = {"ema_decay": decay, "dead_after": 0.9}
    straight, resumed = VectorQuantizer(16, 3, **options), VectorQuantizer(16, 3, **options)
    steps(straight, 0, 3)
    resumed.load_state_dict(load(save(straight.state_dict())))
    before = straight.codebook.clone()
    for each in (straight, resumed):
        steps(each, 3, 9)
    assert_same_state(state(resumed), state(straight))
    assert not torch.equal(straight.codebook, before)


def data_parallel_worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    try:
        for name, quantizer in run_both(slice(rank, None, 2), seed=rank).items():
            save_file(quantizer.state_dict(), folder / f"{name}-{rank}.safetensors")
    finally:
        dist.destroy_process_group()


def run_both(rows: slice, seed: int) -> dict[str, VectorQuantizer]:
    """Quantizers trained on these rows of each batch: without, and with choices that are random."""
    followed = ready(noise(16, 3), ema_decay=0.8, dead_after=0.0)
    torch.manual_seed(9)
    chosen = VectorQuantizer(16, 3, ema_decay=0.8, dead_after=0.9)
    torch.manual_seed(seed)
    for step in range(6):
        for part in range(2):
            for quantizer in (followed, chosen):
                quantizer(noise(4, 10, 3, seed=10 * step + part)[rows])
        followed.update_()
        chosen.update_()
    return {"followed": followed, "chosen": chosen}


def test_two_processes_hold_the_codebook_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(data_parallel_worker, (tmp_path,), nprocs=2)
    states = {path.stem: load_file(path) for path in tmp_path.glob("*.safetensors")}
    for name in ("followed", "chosen"):
        assert_same_state(states[f"{name}-0"], states[f"{name}-1"])
    whole = run_both(slice(None), seed=0)["followed"].state_dict()
    assert torch.equal(states["followed-0"]["uses"], whole["uses"])
    for name in ("codebook", "sums"):
        torch.testing.assert_close(states["followed-0"][name], whole[name])


# Gumbel quantization


def test_the_divergence_is_that_of_torch() -> None:
    logits = 3 * noise(2, 7, 5)
    uniform = torch.distributions.Categorical(logits=torch.zeros(5))
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logits), uniform).mean()
    torch.testing.assert_close(GumbelQuantizer(5, 3)(logits).loss, expected)
    torch.testing.assert_close(GumbelQuantizer(5, 3)(torch.zeros(2, 7, 5)).loss, torch.tensor(0.0), atol=1e-6, rtol=0)


def test_draws_follow_the_posterior() -> None:
    """At a low temperature a mixture is one code, as often as its probability says."""
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    quantizer = GumbelQuantizer(4, 4, temperature=0.01).train()
    quantizer.codebook.data = torch.eye(4)
    shares = quantizer(logits.expand(10, 2000, 4)).codes
    torch.testing.assert_close(shares.sum(-1), torch.ones(10, 2000))
    torch.testing.assert_close(shares.mean((0, 1)), logits.softmax(-1), atol=0.015, rtol=0)
    quantizer.temperature = 100.0
    assert quantizer(logits.expand(10, 2000, 4)).codes.std() < 0.02, "a high temperature mixes all codes alike"


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_gradients_reach_logits_and_codebook(hard: bool) -> None:
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(5, 3, temperature=0.7, hard=hard).train()
    logits = noise(4, 9, 5).requires_grad_()
    quantized = quantizer(logits)
    (quantized.codes * noise(4, 9, 3, seed=1)).sum().backward()
    assert all(tensor.grad.abs().sum(-1).min() > 0 for tensor in (logits, quantizer.codebook))
    distances = torch.cdist(quantized.codes.flatten(0, 1), quantizer.codebook).amin(1)
    assert (distances.max() < 1e-3) == hard
    assert torch.equal(quantized.ids, logits.argmax(-1))


# Use of codes


def test_usage_and_perplexity_equal_their_definition() -> None:
    ids = torch.randint(0, 30, (4, 25), generator=torch.Generator().manual_seed(0)) ** 2 // 30
    usage = CodeUsage(40)
    assert (usage.usage, usage.perplexity) == (0.0, 0.0)
    for row in ids:
        usage.update(row)
    found = ids.flatten().tolist()
    shares = [found.count(number) / len(found) for number in set(found)]
    assert usage.usage == pytest.approx(len(set(found)) / 40)
    assert usage.perplexity == pytest.approx(math.prod(share**-share for share in shares))

    halves = CodeUsage(40), CodeUsage(40)
    halves[0].update(ids[:2])
    halves[1].update(ids[2:])
    halves[0].merge(halves[1])
    assert torch.equal(halves[0].counts, usage.counts)
    usage.reset()
    assert (usage.usage, usage.perplexity) == (0.0, 0.0)


def test_perplexity_spans_one_to_all_codes() -> None:
    usage = CodeUsage(64)
    usage.update(torch.full((50,), 63))
    assert usage.perplexity == pytest.approx(1)
    usage.reset()
    usage.update(torch.arange(64).repeat(3))
    assert usage.perplexity == pytest.approx(64)
    assert usage.usage == 1
