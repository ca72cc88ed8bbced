"""Autoregressive decoding: one token after the other, from static caches, with guidance in the same batch.

Guidance (https://arxiv.org/abs/2207.12598) doubles the rows: the first B are conditional, the last B unconditional. It may act
in a part of the progress only (https://arxiv.org/abs/2404.07724): before it, the unconditional rows fill their caches; behind
it, they leave the batch and the caches.

Shapes: B samples, R rows (B, or 2 B with guidance), P known first tokens, N tokens in all, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mm.errors import UserError
from mm.generators.sampling import check_sampling, draw, guided, guided_range, sample_generators
from mm.nn.attention import KVCache
from mm.nn.freeze import folded_weights
from mm.types import Sampling

S = TypeVar("S")


class NextToken(Protocol):
    """What a model offers to be decoded. It alone knows what a prompt is and where tokens are behind it."""

    def prefill(
        self, prompt: Tensor, prefix: Int64[Tensor, "r p"], num_tokens: int
    ) -> tuple[Float[Tensor, "r v"], list[KVCache]]:
        """Read all that is known in one pass.

        Args:
            prompt: Rows of whatever the model is conditioned on, R of them.
            prefix: Known first tokens; P may be 0.
            num_tokens: N, for which the caches need room behind the prompt.

        Returns:
            The logits of token P, and the caches.
        """
        ...

    def step(self, ids: Int64[Tensor, " r"], index: int | Tensor, caches: list[KVCache], /) -> Float[Tensor, "r v"]:
        """Read token number ``index``, counted from 0 behind the prompt, and return the logits of the next one.

        The index is a number, or where the step is compiled an int64 tensor ``(1,)``. Either may be added to, select a row of
        a tensor, and become the ``position`` of `mm.nn.transformer.Transformer`.
        """
        ...


class Compiled:
    """A model whose step is compiled by torch.compile, once for each number of rows and of tokens. Keep it for later calls.

    Args:
        model: Its weights must not change any more: on CPUs they become part of what is compiled, in the layout that suits it.
    """

    def __init__(self, model: NextToken) -> None:
        self.prefill = model.prefill
        self.step = compiled_step(model.step)


def compiled_step(step: Callable[[Tensor, int | Tensor, S], Tensor]) -> Callable[[Tensor, int | Tensor, S], Tensor]:
    """A step from ids, index and state that is compiled for all indices at once; see `Compiled`."""
    compiled = torch.compile(step, dynamic=False)

    def run(ids: Tensor, index: int | Tensor, state: S) -> Tensor:
        with folded_weights(ids.device):
            return compiled(ids, torch.as_tensor(index, device=ids.device).view(1), state)

    return run


def generate(
    model: NextToken,
    prompt: Tensor,
    seeds: Sequence[int],
    sampling: Sampling,
    num_tokens: int,
    *,
    unconditional: Tensor | None = None,
    prefix: Int64[Tensor, "b p"] | None = None,
) -> Int64[Tensor, "b n"]:
    """All tokens ``(B, N)``; arguments and errors as in `stream`."""
    *_, ids = stream(model, prompt, seeds, sampling, num_tokens, unconditional=unconditional, prefix=prefix, every=num_tokens)
    return ids


@torch.no_grad()
def stream(
    model: NextToken,
    prompt: Tensor,
    seeds: Sequence[int],
    sampling: Sampling,
    num_tokens: int,
    *,
    unconditional: Tensor | None = None,
    prefix: Int64[Tensor, "b p"] | None = None,
    every: int = 1,
) -> Iterator[Int64[Tensor, "b n"]]:
    """Decode, handing out what is known so far after every ``every`` tokens and at the end.

    The tokens of a sample depend on its seed, its prompt and its prefix, not on the batch. Nothing that is given is changed,
    and what is handed out is the caller's.

    Args:
        model: What to decode.
        prompt: Rows of what `NextToken.prefill` takes, B of them.
        seeds: One a sample.
        sampling: ``temperature``, ``top_k``, ``top_p``, ``guidance`` and its interval; token i is at ``i / (N - 1)``.
        num_tokens: N, known ones included.
        unconditional: The prompts without a condition, of the shape of ``prompt``; needed where there is guidance.
        prefix: Known first tokens, read in one pass.
        every: Tokens from one partial result to the next.

    Yields:
        Ids ``(B, n)`` that grow up to ``(B, N)``.

    Raises:
        UserError: counts that do not fit each other, `check_sampling`, or guidance without ``unconditional``.
    """
    batch_size = len(prompt)
    known = torch.empty(batch_size, 0, dtype=torch.int64, device=prompt.device) if prefix is None else prefix
    start = known.shape[1]
    check_sampling(sampling)
    _check(batch_size, seeds, known, num_tokens, every)
    ids = known.new_empty(batch_size, num_tokens)
    ids[:, :start] = known
    if start == num_tokens:
        yield ids
        return
    active = guided_range(sampling, num_tokens)
    doubled = start < active.stop
    if doubled and unconditional is None:
        raise UserError(f"guidance {sampling.guidance} needs unconditional prompts; give them, or take guidance 1")
    rows = torch.cat([prompt, unconditional]) if doubled and unconditional is not None else prompt
    logits, caches = model.prefill(rows, torch.cat([known, known]) if doubled else known, num_tokens)
    noise = sample_generators(seeds)
    options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    for index in range(start, num_tokens):
        if index in active:
            logits = guided(logits[:batch_size].float(), logits[batch_size:].float(), sampling.guidance)
        drawn = draw(logits[:batch_size], noise, **options)
        ids[:, index] = drawn
        done = index + 1
        if done == num_tokens:
            break
        if (done - start) % every == 0:
            yield ids[:, :done].clone()
        if doubled and done >= active.stop:
            caches, doubled = [cache.first(batch_size) for cache in caches], False
        logits = model.step(torch.cat([drawn, drawn]) if doubled else drawn, index, caches)
    yield ids


def _check(batch_size: int, seeds: Sequence[int], known: Tensor, num_tokens: int, every: int) -> None:
    if num_tokens < 1:
        raise UserError(f"{num_tokens} tokens; take at least 1")
    if len(seeds) != batch_size:
        raise UserError(f"{len(seeds)} seeds for {batch_size} prompts; give one each")
    if len(known) != batch_size or known.shape[1] > num_tokens:
        raise UserError(f"known tokens {tuple(known.shape)} for {batch_size} prompts of {num_tokens} tokens; give no more")
    if every < 1:
        raise UserError(f"partial results every {every} tokens; take at least 1")
