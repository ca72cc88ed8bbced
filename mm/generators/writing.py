"""Writing: words chosen one after the other by a language model, from its static caches, many texts at a time.

Greedy, drawn (temperature, top-k, nucleus https://arxiv.org/abs/1904.09751) or by beam search with a length penalty. What a
text becomes depends on its prompt and its seed, not on the texts beside it; texts that have ended leave the batch.

Beam search keeps the best ``beams`` open continuations of each text. One that ends is kept if no ``beams`` candidates of its
step are likelier; what is still open at ``max_tokens`` competes with those that ended. A text is done as soon as nothing open
can overtake the best: its log-likelihood only falls, so over length to a power it stays below what it would be at the most
favourable length to come, which is ``max_tokens`` where the power is above 0, and otherwise the next one.

Shapes: B texts, R rows of the batch (B, or fewer, or each text once a beam), K beams, N tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mm.errors import UserError
from mm.generators.autoregressive import compiled_step
from mm.generators.language_model import LanguageModel, WritingState
from mm.generators.sampling import check_sampling, draw, sample_generators
from mm.nn.masks import EVERYTHING, Mask
from mm.types import Decoding, OnTokens, Sampling, TextBatch, Written


class Continues(Protocol):
    """What a model offers to be written with, such as `mm.generators.language_model.LanguageModel`."""

    def step(self, ids: Int64[Tensor, " r"], index: int | Tensor, state: WritingState, /) -> Float[Tensor, "r v"]:
        """Read word number ``index`` behind the prompts, counted from 0, and return the logits of the next one."""
        ...


class CompiledSteps:
    """A model whose step is compiled by torch.compile, once for each number of rows and size of the caches. Keep it for later
    calls; texts that have ended stay in the batch, whose size would be another one without them.

    Args:
        model: Its weights must not change any more: on CPUs they become part of what is compiled, in the layout that suits it.
    """

    def __init__(self, model: Continues) -> None:
        self.step = compiled_step(model.step)


def check_decoding(decoding: Decoding) -> None:
    """Raises `UserError` for a setting that means nothing."""
    if decoding.max_tokens < 1:
        raise UserError(f"max_tokens is {decoding.max_tokens}; take at least 1")
    if decoding.beams < 1:
        raise UserError(f"beams is {decoding.beams}; take 1 for none, or more")
    if not math.isfinite(decoding.length_penalty):
        raise UserError(f"length_penalty is {decoding.length_penalty}; take 0 for none, or more to favour longer texts")
    if decoding.no_repeat < 0:
        raise UserError(f"no_repeat is {decoding.no_repeat}; take 0 for no rule, or the length of runs not to be repeated")
    check_sampling(Sampling(temperature=decoding.temperature, top_k=decoding.top_k, top_p=decoding.top_p))
    if decoding.beams > 1 and decoding.temperature > 0:
        raise UserError(f"{decoding.beams} beams do not draw; take temperature 0, or a single beam")


def write(
    model: Continues,
    logits: Float[Tensor, "b v"],
    state: WritingState,
    decoding: Decoding,
    seeds: Sequence[int],
    *,
    end: int | None,
    on_tokens: OnTokens | None = None,
) -> list[Written]:
    """Continue each text.

    Args:
        model: What to write with.
        logits: Of the first word behind each prompt, with ``state`` from a prefill with room for ``decoding.max_tokens``.
        state: Changed, and of no use afterwards.
        decoding: How to choose.
        seeds: One a text.
        end: The token that ends a text; None for none.
        on_tokens: Receives the tokens so far ``(B, n)``, in memory of its own, after each step, where there is a single beam.

    Raises:
        UserError: `check_decoding`, another number of seeds than of texts, or ``no_repeat`` with too few words to go on.
    """
    if len(seeds) != len(logits):
        raise UserError(f"{len(seeds)} seeds for {len(logits)} texts; give one each")
    if decoding.beams > 1:
        found = search(model, logits, state, decoding, end=end, keep=decoding.beams)
        return [replace(best, others=tuple(others)) for best, *others in found]
    return _follow(model, logits, state, decoding, seeds, end, on_tokens)


def fitted(decoding: Decoding, model: LanguageModel, length: int) -> Decoding:
    """No more tokens than fit behind prompts of at most ``length`` positions. Raises `UserError` where none does."""
    room = model.context_length - length + 1
    if room < 1:
        raise UserError(f"a prompt of {length} positions does not fit a context of {model.context_length}; shorten it")
    return replace(decoding, max_tokens=min(decoding.max_tokens, room))


@torch.no_grad()
def describe(
    model: LanguageModel,
    seen: Float[Tensor, "b s c"],
    beginning: TextBatch,
    decoding: Decoding,
    seeds: Sequence[int],
    on_tokens: OnTokens | None = None,
    *,
    context_mask: Mask = EVERYTHING,
) -> list[Written]:
    """Continue text i, whose words attend to row i of the context; arguments and errors as in `mm.types.Captions.caption`.

    What they may see of the context is the same for all words of a row.
    """
    decoding = fitted(decoding, model, beginning.ids.shape[1])
    vectors = model.embed(beginning.ids)
    logits, state = model.prefill(vectors, beginning.lengths, decoding.max_tokens, seen, context_mask=context_mask)
    return write(model, logits, state, decoding, seeds, end=decoding.end, on_tokens=on_tokens)


@torch.no_grad()
def _follow(
    model: Continues,
    logits: Tensor,
    state: WritingState,
    decoding: Decoding,
    seeds: Sequence[int],
    end: int | None,
    on_tokens: OnTokens | None,
) -> list[Written]:
    """Write with a single beam."""
    stop = _checked(decoding, end, logits)
    noise = sample_generators(seeds)
    options = {"temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": decoding.top_p}
    ids = torch.full((len(logits), decoding.max_tokens), stop, device=logits.device)
    likelihood = torch.zeros(len(logits), device=logits.device)
    rows = torch.arange(len(logits), device=logits.device)  # which text each row of the batch is
    ended = torch.zeros_like(rows, dtype=torch.bool)
    for index in range(decoding.max_tokens):
        scores = logits.float()
        tokens = draw(_unrepeated(scores, ids[rows, :index], decoding.no_repeat), noise, **options)
        tokens = tokens.masked_fill(ended, stop)
        ids[rows, index] = tokens
        gained = scores.gather(1, tokens.clamp(min=0)[:, None])[:, 0] - scores.logsumexp(1)
        likelihood[rows] += gained.masked_fill(ended, 0.0)
        ended = tokens == stop
        if on_tokens is not None:
            on_tokens(ids[:, : index + 1].clone())
        num_ended = int(ended.sum())
        if num_ended == len(rows) or index + 1 == decoding.max_tokens:
            break
        if _pays(num_ended, len(rows), model):
            going = (~ended).nonzero()[:, 0]
            rows, state, tokens, ended = rows[going], state[going], tokens[going], ended[going]
            noise = [noise[row] for row in going.tolist()]
        logits = model.step(tokens, index, state)
    return [_written(row, value, stop) for row, value in zip(ids.tolist(), likelihood.tolist(), strict=True)]


def _written(ids: list[int], log_likelihood: float, stop: int) -> Written:
    finished = stop in ids
    return Written(tuple(ids[: ids.index(stop)] if finished else ids), log_likelihood, finished)


def _checked(decoding: Decoding, end: int | None, logits: Tensor) -> int:
    """The token that ends a text, which may be one that there is not."""
    check_decoding(decoding)
    if logits.isnan().any():
        raise UserError("the model computes NaN for what it should go on from; its weights are damaged, or bf16 is too coarse")
    if end is None and decoding.no_repeat and decoding.max_tokens > logits.shape[1]:
        raise UserError(
            f"no_repeat {decoding.no_repeat} may leave none of {logits.shape[1]} words to go on with for "
            f"{decoding.max_tokens} tokens without an end; take 0, or fewer tokens"
        )
    return -1 if end is None else end


def _pays(num_ended: int, num_rows: int, model: Continues) -> bool:
    """Whether to copy the caches of those that go on."""
    return 2 * num_ended >= num_rows and not isinstance(model, CompiledSteps)


def _unrepeated(scores: Float[Tensor, "r v"], ids: Int64[Tensor, "r n"], run: int) -> Float[Tensor, "r v"]:
    """Minus infinity for words that would end a run of ``run`` tokens for the second time; 0 keeps all."""
    if not 0 < run <= ids.shape[1]:
        return scores
    runs = ids.unfold(1, run, 1)  # (R, N - run + 1, run)
    begun = ids[:, None, ids.shape[1] - run + 1 :]
    rows, places = (runs[..., :-1] == begun).all(-1).nonzero(as_tuple=True)
    return scores.index_put((rows, runs[rows, places, -1]), scores.new_tensor(-torch.inf))


@dataclass
class _Found:
    """The best continuations of one text that need no more words, with their scores, best first."""

    keep: int
    best: list[tuple[float, Written]] = field(default_factory=list)

    def add(self, written: Written, score: float) -> None:
        self.best = sorted([*self.best, (score, written)], key=lambda pair: -pair[0])[: self.keep]

    def beats(self, score: float) -> bool:
        return len(self.best) == self.keep and self.best[-1][0] >= score


@torch.no_grad()
def search(
    model: Continues,
    logits: Float[Tensor, "b v"],
    state: WritingState,
    decoding: Decoding,
    *,
    end: int | None,
    keep: int = 1,
) -> list[list[Written]]:
    """The ``keep`` best continuations of each text by beam search, best first; fewer where there are no more.

    Arguments and errors as in `write`; the search goes on until nothing open can be among the ``keep`` best.
    """
    stop = _checked(decoding, end, logits)
    if keep < 1:
        raise UserError(f"{keep} continuations of each text; take at least 1")
    device, length, penalty = logits.device, decoding.max_tokens, decoding.length_penalty
    results = [_Found(keep) for _ in logits]
    texts = list(range(len(logits)))  # those that are in the batch, each with all its beams
    going = [True] * len(logits)
    ids = torch.empty(len(logits), 1, 0, dtype=torch.int64, device=device)
    likelihood = torch.zeros(len(logits), 1, device=device)
    for index in range(length):
        num_texts, num_open = likelihood.shape
        scores = _unrepeated(logits.float().log_softmax(1), ids.flatten(0, 1), decoding.no_repeat)
        gained, tokens = scores.topk(min(decoding.beams + 1, scores.shape[1]))  # enough, as one of them may be the end
        num_each = gained.shape[1]
        sums = (likelihood.view(-1, 1) + gained).view(num_texts, -1)
        sums, order = sums.sort(dim=1, descending=True, stable=True)
        parents, tokens = order // num_each, tokens.view(num_texts, -1).gather(1, order)
        ids = torch.cat([ids.gather(1, parents[..., None].expand(-1, -1, index)), tokens[..., None]], 2)
        ended = tokens == stop
        closed = (ended if index + 1 < length else torch.ones_like(ended)) & sums.isfinite()
        closed[:, decoding.beams :] = False
        for row, place in closed.nonzero().tolist():
            if going[texts[row]]:
                value = sums[row, place].item()
                results[texts[row]].add(_written(ids[row, place].tolist(), value, stop), value / (index + 1) ** penalty)
        if index + 1 == length:
            break
        likelihood, chosen = sums.masked_fill(ended, -torch.inf).topk(min(decoding.beams, sums.shape[1]))
        best_length = length if penalty > 0 else index + 2
        for text, value in zip(texts, likelihood[:, 0].tolist(), strict=True):
            going[text] = going[text] and value > -math.inf and not results[text].beats(value / best_length**penalty)
        num_done = sum(not going[text] for text in texts)
        if num_done == num_texts:
            break
        rows = parents.gather(1, chosen) + num_open * torch.arange(num_texts, device=device)[:, None]
        ids = ids.gather(1, chosen[..., None].expand(-1, -1, index + 1))
        drop = _pays(num_done, num_texts, model)
        if drop:
            left = [row for row, text in enumerate(texts) if going[text]]
            texts = [texts[row] for row in left]
            rows, ids, likelihood = rows[left], ids[left], likelihood[left]
        if drop or rows.shape[1] != num_open:
            state = state[rows.flatten()]
        else:
            state.exchange(rows.flatten(), index)
        logits = model.step(ids[..., -1].flatten().contiguous(), index, state)  # of one layout, for what is compiled
    return [[written for _, written in found.best] for found in results]
