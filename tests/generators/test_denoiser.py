"""Networks that denoise: what is prepared once equals what every step would compute, compiled they answer the same."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from mm.generators.denoiser import LENGTH_MULTIPLE, Compiled, Condition, joined
from mm.generators.diffusion import diffuse
from mm.generators.dit import DitConfig, build_dit
from mm.generators.unet import UnetConfig, build_unet
from mm.losses.diffusion import StraightPath
from mm.types import Sampling

SHAPE, WIDTH, VECTOR = (3, 8, 8), 12, 6
PLAIN: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
OTHER = {
    "simple": {
        "down_block_types": ["DownBlock2D", "SimpleCrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ["SimpleCrossAttnUpBlock2D", "UpBlock2D"],
    },
    "words too": {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
    "only words": {"only_cross_attention": True},
}
KINDS = ["dit", "unet", *OTHER]


def network(kind: str, seed: int = 0) -> Any:
    """Weights large enough that everything makes a difference."""
    if kind == "dit":
        made: nn.Module = build_dit(DitConfig(width=16, layers=2, heads=2, patch=2), SHAPE, WIDTH, VECTOR)
    else:
        made = build_unet(UnetConfig(options=PLAIN | OTHER.get(kind, {})), SHAPE, WIDTH, VECTOR)
    torch.manual_seed(seed)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False).eval()


def told(*lengths: int, longest: int = 5, seed: int = 1) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    known = torch.arange(longest) < torch.tensor(lengths)[:, None]
    words = torch.randn(rows, longest, WIDTH, generator=generator)
    return Condition(words, known, torch.randn(rows, VECTOR, generator=generator))


def noisy(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(2)), torch.tensor(300.0)


@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 2, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_prepared_equals_unprepared(kind: str, lengths: tuple[int, ...]) -> None:
    made, condition, (x, time) = network(kind), told(*lengths), noisy(3)
    plain, prepared = made(x, time, condition), made.prepare(condition)
    torch.testing.assert_close(made(x, time, prepared), plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(made(x[1:], time, prepared[1:]), plain[1:], rtol=0, atol=1e-5)
    assert (made(x, time, made.prepare(told(*lengths, seed=3))) - plain).abs().max() > 1e-2, "words must count"


@pytest.mark.parametrize("lengths", [(5, 5), (5, 2)])
def test_a_unet_answers_as_diffusers_own_network(lengths: tuple[int, ...]) -> None:
    """Before and after the suite's attention to the words has taken its place."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    made, condition, (x, time) = network("unet"), told(*lengths), noisy(2)
    found = made(x, time, made.prepare(condition))
    made.network.set_attn_processor(AttnProcessor2_0())
    options = {"encoder_attention_mask": condition.known, "timestep_cond": condition.vector}
    torch.testing.assert_close(found, made.network(x, time, condition.words, **options).sample, rtol=0, atol=1e-5)


def test_steps_compute_no_keys_of_words_again() -> None:
    made, condition, (x, time) = network("unet"), told(5, 3), noisy(2)
    layers = [part for name, part in made.network.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    calls: list[nn.Module] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    prepared = made.prepare(condition)
    assert len(calls) == len(layers) == 8
    made(x, time, prepared)
    assert len(calls) == len(layers)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_bf16_is_close(kind: str) -> None:
    made, condition, (x, time) = network(kind), told(5, 3), noisy(2)
    exact = made(x, time, made.prepare(condition))
    short = made.to(torch.bfloat16)
    found = short(x, time, short.prepare(condition)).float()
    assert torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.995


def sampled(denoiser: Any, condition: Condition, other: Condition, **options: Any) -> Tensor:
    rows = len(condition.words)
    both = denoiser.prepare(joined(condition, other))
    single = both[:rows]

    def denoise(x: Tensor, time: Tensor, *, guided: bool) -> Tensor:
        return denoiser(x, time, both if guided else single)

    sampling = Sampling(guidance=2.0, steps=5, **options)
    with torch.no_grad():
        *_, last = diffuse(denoise, StraightPath(), "velocity", SHAPE, range(rows), sampling)
    return last.sample


@pytest.mark.parametrize("kind", ["dit", pytest.param("unet", marks=pytest.mark.slow)])
def test_a_step_is_one_graph_for_all_moments_and_prompts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    made, counter = network(kind), CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    compiled = Compiled(made)
    for longest in (3, 5):
        prompts = told(longest, 2, longest=longest), told(1, 1, longest=1)
        found = sampled(compiled, *prompts)
        torch.testing.assert_close(found, sampled(made, *prompts), rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 1
    sampled(compiled, *prompts, guidance_interval=(0.0, 0.5))
    assert counter.frame_count == 2


def test_words_are_filled_up_only_where_some_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    compiled = Compiled(network("dit"))
    for condition, length in ((told(5, 2), LENGTH_MULTIPLE), (told(5, 5), 5)):
        assert compiled.prepare(condition).known.shape[1] == length


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inside of torch
@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_compiled_sampling_equals_eager_sampling(kind: str) -> None:
    torch._dynamo.reset()
    made, prompts = network(kind), (told(5, 2), told(1, 1))
    expected = sampled(made, *prompts, guidance_interval=(0.0, 0.5))
    torch.testing.assert_close(
        sampled(Compiled(made), *prompts, guidance_interval=(0.0, 0.5)), expected, rtol=1e-4, atol=1e-4 * expected.std().item()
    )
