"""Autoregressive decoding equals decoding without caches, in every way that a sequence can be begun, guided and batched."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from mm.errors import UserError
from mm.generators.autoregressive import Compiled, generate, stream
from mm.generators.sampling import draw, guided, sample_generators
from mm.nn.attention import KVCache, MultiHeadAttention
from mm.nn.embeddings import LearnedPositions, Rotary
from mm.nn.linear import Linear
from mm.nn.masks import Mask, attention_mask
from mm.nn.transformer import Block, FeedForward, GatedFeedForward, Transformer
from mm.types import Sampling

WIDTH, HEADS, VOCABULARY, TEXT, TOKENS = 16, 4, 11, 3, 8
KINDS = ("learned", "rotary", "cross", "sparse")


class Painter(nn.Module):
    """A small decoder of a prompt of TEXT ids.

    "cross" attends to the prompt instead of continuing it; "rotary" and "sparse" group their queries; in "sparse" heads see
    different positions.
    """

    def __init__(self, kind: str, num_layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.start = 1 if kind == "cross" else TEXT
        self.text, self.image = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.positions = LearnedPositions(TEXT + TOKENS, WIDTH)
        rotary = Rotary(WIDTH // HEADS) if kind == "rotary" else None
        self.transformer = Transformer(self._block, num_layers, final_norm=nn.LayerNorm(WIDTH), rotary=rotary)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        far = torch.arange(TEXT + TOKENS)[:, None] - torch.arange(TEXT + TOKENS)
        heads = torch.arange(HEADS)[:, None, None]
        self.visible = [far % (2 + layer + heads) <= 1 for layer in range(num_layers)]  # (H, Q, K), later ones included
        self.eval()

    def _block(self, layer: int) -> Block:
        cross = MultiHeadAttention(WIDTH, HEADS, context_width=WIDTH) if self.kind == "cross" and layer else None
        return Block(
            attention=MultiHeadAttention(WIDTH, HEADS, num_kv_heads=2 if self.kind in ("rotary", "sparse") else None),
            feed_forward=GatedFeedForward(WIDTH, 32) if self.kind == "rotary" else FeedForward(WIDTH, 32, nn.GELU()),
            norm=functools.partial(nn.LayerNorm, WIDTH),
            cross_attention=cross,
        )

    def _embed(self, prompt: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sequence, and the context."""
        text = self.text(prompt)
        first = text[:, :1] if self.kind == "cross" else text
        x = torch.cat([first, self.image(ids)], 1)
        if self.kind != "rotary":
            x = x + self.positions(x.shape[1])
        return x, text if self.kind == "cross" else None

    def _masks(self, length: int) -> Mask | list[Mask]:
        if self.kind == "sparse":
            return [Mask(visible[:, :length, :length].tril()) for visible in self.visible]
        return attention_mask(length, causal=True)

    def uncached(self, prompt: Tensor, ids: Tensor) -> Tensor:
        """Logits of the token behind ``ids``, everything computed from scratch."""
        x, context = self._embed(prompt, ids)
        return self.head(self.transformer(x, context, mask=self._masks(x.shape[1]))[:, -1])

    def prefill(self, prompt: Tensor, prefix: Tensor, num_tokens: int) -> tuple[Tensor, list[KVCache]]:
        x, context = self._embed(prompt, prefix)
        caches = self.transformer.caches(len(prompt), self.start + num_tokens)
        hidden = self.transformer(x, context, mask=self._masks(x.shape[1]), caches=caches)
        return self.head(hidden[:, -1]), caches

    def step(self, ids: Tensor, index: int | Tensor, caches: list[KVCache]) -> Tensor:
        position = self.start + index
        x = self.image(ids)
        if self.kind != "rotary":
            x = x + self.positions.weight[position]
        masks: Mask | list[Mask] = Mask()
        if self.kind == "sparse":
            masks = [Mask(visible[:, position].view(HEADS, 1, -1)) for visible in self.visible]
        return self.head(self.transformer(x[:, None], mask=masks, caches=caches, position=position)[:, 0])


class Static:
    """Gives the index as a tensor, as the compiled step does, and compiles nothing."""

    def __init__(self, painter: Painter) -> None:
        self.prefill, self.painter = painter.prefill, painter

    def step(self, ids: Tensor, index: int | Tensor, caches: list[KVCache]) -> Tensor:
        return self.painter.step(ids, torch.tensor([index]), caches)


class Listener:
    """Keeps the logits of every pass."""

    def __init__(self, painter: Painter) -> None:
        self.painter = painter
        self.passes: list[Tensor] = []

    @property
    def rows(self) -> list[int]:
        return [len(logits) for logits in self.passes]

    def prefill(self, prompt: Tensor, prefix: Tensor, num_tokens: int) -> tuple[Tensor, list[KVCache]]:
        logits, caches = self.painter.prefill(prompt, prefix, num_tokens)
        self.passes.append(logits)
        return logits, caches

    def step(self, ids: Tensor, index: int | Tensor, caches: list[KVCache]) -> Tensor:
        self.passes.append(self.painter.step(ids, index, caches))
        return self.passes[-1]


def prompts(batch_size: int = 3) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, VOCABULARY, (batch_size, TEXT), generator=torch.Generator().manual_seed(1))
    return ids, torch.zeros_like(ids)


def brute_force(painter: Painter, seeds: list[int], sampling: Sampling, known: int = 0, prefix: Tensor | None = None) -> Tensor:
    """Decoding by its definition: no cache, one sample and one half at a time."""
    results = []
    for row, (prompt, nothing) in enumerate(zip(*prompts(len(seeds)), strict=True)):
        ids = torch.empty(1, 0, dtype=torch.int64) if prefix is None else prefix[row : row + 1]
        noise = sample_generators([seeds[row]])
        for index in range(known, TOKENS):
            logits = painter.uncached(prompt[None], ids)
            low, high = sampling.guidance_interval
            if low <= index / (TOKENS - 1) <= high:
                logits = guided(logits, painter.uncached(nothing[None], ids), sampling.guidance)
            settings = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
            ids = torch.cat([ids, draw(logits, noise, **settings)[:, None]], 1)
        results.append(ids)
    return torch.cat(results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("known", [0, 1, 5])
@torch.no_grad()
def test_cached_logits_equal_uncached_logits_at_every_position(kind: str, static: bool, known: int) -> None:
    painter = Painter(kind)
    model = Static(painter) if static else painter
    prompt, _ = prompts()
    ids = torch.randint(VOCABULARY, (3, TOKENS), generator=torch.Generator().manual_seed(2))
    logits, caches = model.prefill(prompt, ids[:, :known], TOKENS)
    torch.testing.assert_close(logits, painter.uncached(prompt, ids[:, :known]), atol=1e-5, rtol=1e-5)
    for index in range(known, TOKENS):
        logits = model.step(ids[:, index], index, caches)
        torch.testing.assert_close(logits, painter.uncached(prompt, ids[:, : index + 1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.6), (0.0, 0.2), (0.9, 1.0), (0.55, 0.65)])
def test_generation_equals_its_definition(kind: str, interval: tuple[float, float]) -> None:
    painter, seeds = Painter(kind), [7, 8, 9]
    listener = Listener(painter)
    prompt, nothing = prompts()
    sampling = Sampling(guidance=2.5, guidance_interval=interval, temperature=0.9, top_k=8, top_p=0.95)
    ids = generate(listener, prompt, seeds, sampling, TOKENS, unconditional=nothing)
    assert torch.equal(ids, brute_force(painter, seeds, sampling))
    active = [i for i in range(TOKENS) if interval[0] <= i / (TOKENS - 1) <= interval[1]]
    doubled = active[-1] + 1 if active else 0  # the pass before each guided token has both halves
    assert listener.rows == [6] * doubled + [3] * (TOKENS - doubled)


def test_guidance_changes_the_logits_of_every_step() -> None:
    listener = Listener(Painter("learned"))
    prompt, nothing = prompts()
    generate(listener, prompt, [0, 1, 2], Sampling(guidance=3.0), TOKENS, unconditional=nothing)
    assert len(listener.passes) == TOKENS
    for logits in listener.passes:
        difference = guided(logits[:3], logits[3:], 3.0) - logits[:3]
        assert (difference.abs().amax(1) > 1e-2).all()


def test_without_guidance_nothing_unconditional_is_computed() -> None:
    listener = Listener(Painter("learned"))
    prompt, nothing = prompts()
    ids = generate(listener, prompt, [0, 1, 2], Sampling(guidance=1.0), TOKENS, unconditional=nothing)
    assert listener.rows == [3] * TOKENS
    assert torch.equal(ids, generate(listener, prompt, [0, 1, 2], Sampling(guidance=1.0), TOKENS))


def test_nothing_that_is_given_changes() -> None:
    painter = Painter("cross")
    prefix = torch.ones(3, 2, dtype=torch.int64)
    given = (*prompts(), prefix, *painter.state_dict().values())
    copies = [tensor.clone() for tensor in given]
    prompt, nothing = given[:2]
    expected = generate(painter, prompt, [0, 1, 2], Sampling(), TOKENS, unconditional=nothing, prefix=prefix)
    for part in stream(painter, prompt, [0, 1, 2], Sampling(), TOKENS, unconditional=nothing, prefix=prefix):
        assert torch.equal(part, expected[:, : part.shape[1]])
        part.zero_()  # what was handed out is the caller's: later results do not see it
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_decide_whatever_the_batch(kind: str) -> None:
    painter, sampling = Painter(kind), Sampling(guidance=2.0, guidance_interval=(0.0, 0.7), top_p=0.9)
    prompt, nothing = prompts(4)
    together = generate(painter, prompt, [5, 6, 7, 6], sampling, TOKENS, unconditional=nothing)
    for row, seed in enumerate([5, 6, 7, 6]):
        one = slice(row, row + 1)
        alone = generate(painter, prompt[one], [seed], sampling, TOKENS, unconditional=nothing[one])
        assert torch.equal(alone, together[one])
    same = generate(painter, prompt[:1].expand(3, -1), [1, 2, 1], Sampling(guidance=1.0), TOKENS)
    assert torch.equal(same[0], same[2])
    assert not torch.equal(same[0], same[1])


@pytest.mark.parametrize("known", [1, 4, TOKENS - 1, TOKENS])
def test_a_prefix_is_kept_and_completed_as_if_its_tokens_had_been_drawn(known: int) -> None:
    painter, sampling = Painter("learned"), Sampling(guidance=2.0, guidance_interval=(0.2, 0.8))
    prompt, nothing = prompts()
    prefix = torch.randint(VOCABULARY, (3, known), generator=torch.Generator().manual_seed(3))
    listener = Listener(painter)
    ids = generate(listener, prompt, [1, 2, 3], sampling, TOKENS, unconditional=nothing, prefix=prefix)
    assert torch.equal(ids[:, :known], prefix)
    assert torch.equal(ids, brute_force(painter, [1, 2, 3], sampling, known, prefix))
    assert len(listener.passes) == TOKENS - known  # the prefix costs one pass, and the last token none


def test_partial_results_are_the_beginnings_of_the_result() -> None:
    painter, sampling = Painter("learned"), Sampling(guidance=1.0)
    prompt, _ = prompts()
    whole = generate(painter, prompt, [1, 2, 3], sampling, TOKENS)
    for every, lengths in ((1, [3, 4, 5, 6, 7, 8]), (3, [5, 8]), (4, [6, 8]), (100, [8])):
        parts = list(stream(painter, prompt, [1, 2, 3], sampling, TOKENS, prefix=whole[:, :2], every=every))
        assert [part.shape[1] for part in parts] == lengths
        again = generate(painter, prompt, [1, 2, 3], sampling, TOKENS, prefix=whole[:, :2])
        assert all(torch.equal(part, again[:, : part.shape[1]]) for part in parts)


def test_gradient_mode_of_the_consumer_is_left_alone() -> None:
    painter = Painter("learned")
    for part in stream(painter, prompts()[0], [1, 2, 3], Sampling(guidance=1.0), TOKENS):
        assert torch.is_grad_enabled()
        painter.image(part).sum().backward()


def test_cross_attention_computes_its_context_once() -> None:
    painter, calls = Painter("cross"), []
    cross = painter.transformer.blocks[1].cross_attention
    assert isinstance(cross, MultiHeadAttention)
    cross.key_value.register_forward_hook(lambda *_: calls.append(1))
    generate(painter, prompts()[0], [1, 2, 3], Sampling(guidance=1.0), TOKENS)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_one_graph_for_all_positions(kind: str) -> None:
    torch._dynamo.reset()
    painter, counter = Painter(kind), CompileCounter()
    step = torch.compile(painter.step, backend=counter, dynamic=False, fullgraph=True)
    with torch.no_grad():
        logits, caches = painter.prefill(prompts()[0], torch.empty(3, 0, dtype=torch.int64), TOKENS)
        for index in range(TOKENS):
            logits = step(logits.argmax(-1), torch.tensor([index]), caches)
    assert counter.frame_count == 1


def test_linear_of_few_rows_is_a_linear_layer() -> None:
    torch.manual_seed(0)
    layers = [Linear(6, 5, bias) for bias in (True, False)]
    for layer in layers:
        for shape in ((1, 6), (2, 6), (3, 6), (2, 1, 6), (1, 3, 6), (4, 6), (6,), (0, 6)):
            x = torch.randn(shape)
            for given in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
                expected = nn.functional.linear(given, layer.weight, layer.bias)
                with torch.no_grad():
                    torch.testing.assert_close(layer(given), expected, atol=1e-6, rtol=1e-6)
                torch.testing.assert_close(layer(given), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1]}, "1 seeds for 3 prompts"),
        ({"prefix": torch.zeros(3, 9, dtype=torch.int64)}, "known tokens"),
        ({"prefix": torch.zeros(2, 1, dtype=torch.int64)}, "known tokens"),
        ({"num_tokens": 0}, "0 tokens"),
        ({"every": 0}, "every 0 tokens"),
        ({"unconditional": None}, "guidance 3.0 needs unconditional prompts"),
        ({"sampling": Sampling(top_k=-1)}, "top_k"),
    ],
)
def test_what_does_not_fit_is_one_line(changes: dict[str, object], message: str) -> None:
    prompt, nothing = prompts()
    options = {"seeds": [1, 2, 3], "sampling": Sampling(), "num_tokens": TOKENS, "unconditional": nothing} | changes
    with pytest.raises(UserError, match=message):
        list(stream(Painter("learned"), prompt, **options))  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inside of torch
def test_compiled_generation_equals_eager_generation() -> None:
    torch._dynamo.reset()
    painter, sampling = Painter("rotary", num_layers=1), Sampling(guidance=2.0, guidance_interval=(0.0, 0.5))
    prompt, nothing = prompts()
    eager = generate(painter, prompt, [1, 2, 3], sampling, TOKENS, unconditional=nothing)
    compiled = Compiled(painter)
    assert torch.equal(generate(compiled, prompt, [1, 2, 3], sampling, TOKENS, unconditional=nothing), eager)
