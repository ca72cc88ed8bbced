"""Adapters, prefixes and prompts: nothing at first, then what their formulas say by brute force, under masks, with caches."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.errors import UserError
from mm.nn.adapters import Adapter, AdapterConfig, add_adapters
from mm.nn.attention import MultiHeadAttention
from mm.nn.embeddings import Rotary
from mm.nn.initialise import initialise
from mm.nn.lora import LoraConfig
from mm.nn.masks import EVERYTHING, Mask, attention_mask
from mm.nn.momentum import Momentum
from mm.nn.prefixes import Prefix, PrefixConfig, PromptConfig, add_prefixes
from mm.nn.transformer import Block, FeedForward, GatedFeedForward, Transformer
from mm.nn.tuning import FullConfig, TuneConfig, merge, tune

WIDTH, HEADS, LAYERS = 16, 4, 3
METHODS: dict[str, TuneConfig] = {
    "lora": LoraConfig(rank=2),
    "adapter": AdapterConfig(width=4, behind=("attention", "cross_attention", "feed_forward")),
    "prefix": PrefixConfig(length=3),
    "prompt": PromptConfig(length=3),
}
MASKS: dict[str, Mask] = {
    "everything": EVERYTHING,
    "causal": attention_mask(5, causal=True),
    "padding": attention_mask(5, keys=torch.tensor([[True] * 5, [True, True, False, False, False]])),
    "causal padding": attention_mask(5, causal=True, keys=torch.tensor([[True] * 5, [False, True, True, True, False]])),
}


def transformer(*, gated: bool = False, kv_heads: int = HEADS, cross: bool = False, rotary: bool = False) -> Transformer:
    torch.manual_seed(0)

    def block(layer: int) -> Block:
        return Block(
            attention=MultiHeadAttention(WIDTH, HEADS, num_kv_heads=kv_heads),
            feed_forward=GatedFeedForward(WIDTH, 24) if gated else FeedForward(WIDTH, 32, nn.GELU()),
            norm=lambda: nn.LayerNorm(WIDTH),
            norm_place="pre" if gated else "post",
            cross_attention=MultiHeadAttention(WIDTH, HEADS) if cross else None,
        )

    result = Transformer(block, LAYERS, rotary=Rotary(WIDTH // HEADS) if rotary else None)
    initialise(result)
    return result.eval()


def spread(module: nn.Module) -> None:
    """Trained parts as they may be after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def sequence(length: int = 5) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", METHODS)
def test_at_first_nothing_changes_to_the_bit(method: str, mask: str) -> None:
    net, x = transformer(cross=True), sequence()
    before = net(x, sequence(7), mask=MASKS[mask])
    names = list(net.state_dict())
    assert tune(net, METHODS[method])
    assert torch.equal(net(x, sequence(7), mask=MASKS[mask]), before)
    spread(net)
    assert not torch.allclose(net(x, sequence(7), mask=MASKS[mask]), before, atol=1e-2)
    if method != "lora":
        assert [name for name in net.state_dict() if name in names] == names, "a weight lost its name"


def test_an_adapter_is_its_formula_behind_its_branches() -> None:
    net, x = transformer(), sequence()
    plain = copy.deepcopy(net)
    assert add_adapters(net, AdapterConfig(width=4, targets=("blocks.1",), behind=("attention", "feed_forward"))) == [
        "blocks.1.attention.output",
        "blocks.1.feed_forward.output",
    ]
    spread(net)

    def detour(adapter: Any, value: Tensor) -> Tensor:
        hidden = F.gelu(value @ adapter.down.weight.T + adapter.down.bias)
        return value + hidden @ adapter.up.weight.T + adapter.up.bias

    for layer, (block, adapted) in enumerate(zip(plain.blocks, net.blocks, strict=True)):
        expected: Any
        own: Any = adapted
        expected = block
        if layer != 1:
            x = expected(x)
            continue
        x = expected.attention_residual.norm(x + detour(own.attention.output.adapter, expected.attention(x)[0]))
        x = expected.feed_forward_residual.norm(x + detour(own.feed_forward.output.adapter, expected.feed_forward(x)))
    torch.testing.assert_close(net(sequence()), x)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_a_prefix_is_its_formula_whatever_the_mask(mask: str, kv_heads: int) -> None:
    """Head by head and query by query; attention weights are those without the prefix."""
    torch.manual_seed(0)
    block = transformer(kv_heads=kv_heads).blocks[0]
    assert isinstance(block, Block)
    plain, x = copy.deepcopy(block.attention), sequence()
    holder = nn.ModuleDict({"block": block})
    assert add_prefixes(holder, PrefixConfig(length=3)) == ["block.attention"]
    spread(holder)
    prefix: Any = block.attention.prefix
    queries, expected = plain.query(x).view(2, 5, HEADS, -1), torch.zeros(2, 5, HEADS, WIDTH // HEADS)
    for row in range(2):
        for position in range(5):
            for head in range(HEADS):
                kv = head * kv_heads // HEADS
                logits = [float(queries[row, position, head] @ key) / (WIDTH // HEADS) ** 0.5 for key in prefix.keys[kv]]
                shares = torch.tensor(logits).softmax(0)
                expected[row, position, head] = sum(
                    share * value for share, value in zip(shares, prefix.values[kv], strict=True)
                )
    own, weights = plain(x, mask=MASKS[mask], need_weights=True)
    added = F.linear(expected.flatten(2), plain.output.weight)
    torch.testing.assert_close(block.attention(x, mask=MASKS[mask])[0], own + added, atol=1e-5, rtol=1e-5)
    found, same = block.attention(x, mask=MASKS[mask], need_weights=True)
    torch.testing.assert_close(found, own + added, atol=1e-5, rtol=1e-5)
    assert torch.equal(same, weights)


@pytest.mark.parametrize("method", METHODS)
def test_step_by_step_with_a_cache_is_all_at_once(method: str) -> None:
    """Also with positions in tensors, as compiled decoding gives them, and with rotary positions and grouped queries."""
    net, x = transformer(gated=True, kv_heads=2, rotary=True), sequence().double()
    tune(net, METHODS[method])
    spread(net)
    net.double()  # spread weights make large numbers, whose rounding in fp32 is not what is asked about
    expected = net(x, mask=attention_mask(5, causal=True))
    with torch.no_grad():
        caches = net.caches(2, 5)
        parts = [net(x[:, :2], mask=attention_mask(2, causal=True), caches=caches)]
        parts += [net(x[:, i : i + 1], caches=caches) for i in range(2, 4)]
        parts += [net(x[:, 4:], caches=caches, position=torch.tensor([4]))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-4)


def test_padding_changes_nothing_with_a_prefix() -> None:
    net, x = transformer(), sequence()
    tune(net, METHODS["prefix"])
    spread(net)
    valid = torch.tensor([[True, True, True, False, False]] * 2)
    padded = net(x, mask=attention_mask(5, keys=valid))[:, :3]
    torch.testing.assert_close(padded, net(x[:, :3]), atol=1e-5, rtol=1e-5)


def test_a_prompt_is_a_prefix_of_the_first_layer_of_each_transformer() -> None:
    both = nn.ModuleDict({"text": transformer(), "fusion": transformer(cross=True)})
    assert tune(copy.deepcopy(both), METHODS["prompt"]) == ["text.blocks.0.attention", "fusion.blocks.0.attention"]
    assert len(tune(both, METHODS["prefix"])) == 2 * LAYERS
    assert not any("cross_attention.prefix" in name for name, _ in both.named_modules())


@pytest.mark.parametrize("method", METHODS)
def test_only_what_was_added_learns_and_all_of_it_does(method: str) -> None:
    net = transformer(cross=True)
    tune(net, METHODS[method])
    frozen = {name: tensor.detach().clone() for name, tensor in net.named_parameters() if not tensor.requires_grad}
    trained = {name: tensor.detach().clone() for name, tensor in net.named_parameters() if tensor.requires_grad}
    assert frozen
    assert trained
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    target = torch.randn(2, 5, WIDTH)
    for _ in range(3):
        optimizer.zero_grad()
        (net(sequence(), sequence(7)) - target).square().mean().backward()
        optimizer.step()
    state = dict(net.named_parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in frozen.items())
    assert not [name for name, tensor in trained.items() if torch.equal(state[name], tensor)]


def test_timm_blocks_get_adapters_where_their_branches_end_with_a_linear_layer() -> None:
    options: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    net, x = timm.create_model("vit_tiny_patch16_224", **options).eval(), torch.randn(2, 3, 16, 16)
    before = net(x)
    config = AdapterConfig(width=4, behind=("attention", "feed_forward"))
    assert add_adapters(net, config) == [f"blocks.{i}.{end}" for i in range(2) for end in ("attn.proj", "mlp.fc2")]
    assert torch.equal(net(x), before)
    net(x).square().mean().backward()
    ups = [part.up.weight.grad for part in net.modules() if isinstance(part, Adapter)]
    assert len(ups) == 4
    assert all(gradient is not None and bool(gradient.any()) for gradient in ups)


@torch.no_grad()
def test_blocks_of_open_clip_get_adapters_behind_their_feed_forward() -> None:
    from open_clip.transformer import ResidualAttentionBlock

    both = nn.ModuleDict({"block": ResidualAttentionBlock(WIDTH, 2).eval()})
    before = both["block"](sequence())
    config = AdapterConfig(width=4, behind=("attention", "feed_forward"))
    assert add_adapters(both, config) == ["block.mlp.c_proj"]
    assert torch.equal(both["block"](sequence()), before)
    spread(both)
    assert not torch.allclose(both["block"](sequence()), before, atol=1e-2)


def test_what_is_locked_gets_nothing() -> None:
    both = nn.ModuleDict({"locked": transformer().requires_grad_(False), "free": transformer()})
    for method, config in METHODS.items():
        added = tune(copy.deepcopy(both), config)
        assert added, method
        assert all(name.startswith("free.") for name in added), method


@pytest.mark.parametrize(("method", "kind"), [("lora", "layer"), ("adapter", "block"), ("prefix", "self-attention")])
def test_patterns_choose_and_one_without_a_match_is_refused(method: str, kind: str) -> None:
    net = transformer()
    first = METHODS[method].model_copy(update={"targets": ("*blocks.0*",)})
    added = tune(copy.deepcopy(net), first)
    assert added
    assert all(name.startswith("blocks.0") for name in added)
    wrong = METHODS[method].model_copy(update={"targets": ("*blocks.0*", "*.blokcs.7")})
    with pytest.raises(UserError, match=rf"'\*\.blokcs\.7' matches no {kind}.*; there are such as blocks\.") as error:
        tune(net, wrong)
    assert "\n" not in str(error.value)
    assert all(parameter.requires_grad for parameter in net.parameters()), "a refused configuration changed the network"
    with pytest.raises(UserError, match="nothing that is not locked has one"):
        tune(nn.ReLU(), METHODS[method])


def test_parameters_named_beside_are_trained_whole() -> None:
    net = transformer()
    tune(net, PrefixConfig(train=("*norm*",)))
    learning = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in net.named_parameters() if "norm" in name or ".prefix." in name}
    with pytest.raises(UserError, match=r"'\*\.nrm' matches no parameter"):
        tune(transformer(), PrefixConfig(train=("*.nrm",)))


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_has_parts_of_its_own(method: str) -> None:
    net = transformer()
    tune(net, METHODS[method])
    twin = copy.deepcopy(net)
    before = twin(sequence())
    spread(net)
    assert torch.equal(twin(sequence()), before)
    spread(twin)
    assert torch.equal(twin(sequence()), net(sequence()))


@pytest.mark.parametrize("method", METHODS)
def test_momentum_copies_follow_what_was_added(method: str) -> None:
    owner = nn.Module()
    owner.net = net = transformer()
    owner.momentum = momentum = Momentum(net, 0.5)
    tune(owner, METHODS[method])
    assert not any(parameter.requires_grad for parameter in momentum.parameters())
    spread(net)
    torch.testing.assert_close(momentum.average(sequence()), net(sequence()), atol=1e-5, rtol=1e-5)
    momentum.update()
    held = net(sequence())
    for _ in range(40):
        momentum.update()
    torch.testing.assert_close(momentum.average(sequence()), held, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_under_autocast_and_in_bf16_outputs_are_near(method: str) -> None:
    net = transformer()
    tune(net, METHODS[method])
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    x = sequence()
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.cosine_similarity(net(x).float(), expected, dim=-1).min() > 0.99
    merge(net, METHODS[method])
    half = net.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float(), expected, dim=-1).min() > 0.99


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_folded_in_stays(method: str) -> None:
    net = transformer()
    names = set(net.state_dict())
    tune(net, METHODS[method])
    spread(net)
    expected = net(sequence())
    left = merge(net, METHODS[method])
    torch.testing.assert_close(net(sequence()), expected, atol=1e-4, rtol=1e-4)
    assert (left is None) == (method == "lora") == (set(net.state_dict()) == names)


def test_full_is_the_network_as_it_is() -> None:
    net = transformer()
    assert tune(net, FullConfig()) == []
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert merge(net, FullConfig()) is None


def test_counts_are_those_of_the_docstrings() -> None:
    net = transformer(kv_heads=2)
    block: Any = net.blocks[0]
    assert sum(p.numel() for p in Prefix(block.attention, 5).parameters()) == 2 * 5 * 2 * 4
    assert sum(p.numel() for p in Adapter(WIDTH, 4).parameters()) == 2 * 4 * WIDTH + 4 + WIDTH
