"""Writing equals its definition: everything computed from scratch, every continuation enumerated, every text alone."""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mm.errors import UserError
from mm.generators import writing
from mm.generators.language_model import LanguageModelConfig, build_language_model
from mm.generators.sampling import draw, sample_generators
from mm.generators.writing import CompiledSteps, check_decoding, search, write
from mm.types import Decoding, Written

END, LONGEST = 0, 5


@functools.cache
def model(vocabulary=12, seed=0, **changes):
    sizes = {"vocab_size": vocabulary, "context_length": 40, "width": 16, "layers": 2, "heads": 4, "tied": False} | changes
    built = build_language_model(LanguageModelConfig(**sizes)).eval().requires_grad_(False)
    torch.manual_seed(seed)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return built


def prompts(count, vocabulary=12):
    """Ids and unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (count, LONGEST), generator=generator)
    lengths = torch.randint(1, LONGEST + 1, (count,), generator=generator)
    return ids, torch.cat([lengths[:-1], torch.tensor([LONGEST])])


def written(lm, ids, lengths, decoding, *, seeds=None, end=END, steps=None, on_tokens=None):
    seeds = range(len(ids)) if seeds is None else seeds
    logits, state = lm.prefill(lm.embed(ids), lengths, decoding.max_tokens)
    return write(steps or lm, logits, state, decoding, seeds, end=end, on_tokens=on_tokens)


def searched(lm, ids, lengths, decoding, *, keep=1, end=END):
    logits, state = lm.prefill(lm.embed(ids), lengths, decoding.max_tokens)
    return search(lm, logits, state, decoding, end=end, keep=keep)


def same(found, expected):
    assert [(text.ids, text.finished) for text in found] == [(text.ids, text.finished) for text in expected]
    for text, other in zip(found, expected, strict=True):
        assert text.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-4, abs=1e-4)


def from_scratch(lm, prompt, decoding, seed, end=END):
    """One text by the definition, without caches."""
    ids, noise, total = [], sample_generators([seed]), 0.0
    options = {"temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": decoding.top_p}
    for _ in range(decoding.max_tokens):
        logits = lm.logits(lm(lm.embed(torch.tensor([[*prompt, *ids]]))))[:, -1]
        allowed = logits.clone()
        for word in range(logits.shape[1]):
            text = (*ids, word)
            runs = [text[i : i + decoding.no_repeat] for i in range(len(text) - decoding.no_repeat + 1)]
            if decoding.no_repeat and runs[-1:] and runs[-1] in runs[:-1]:
                allowed[0, word] = -torch.inf
        word = int(draw(allowed, noise, **options))
        total += float(logits.log_softmax(1)[0, word])
        if word == end:
            return Written(tuple(ids), total, finished=True)
        ids.append(word)
    return Written(tuple(ids), total, finished=False)


DECODINGS = [
    Decoding(max_tokens=12),
    Decoding(max_tokens=12, no_repeat=2),
    Decoding(max_tokens=12, no_repeat=1),
    Decoding(max_tokens=1),
    Decoding(max_tokens=12, temperature=1.0),
    Decoding(max_tokens=12, temperature=1.4, top_k=6, top_p=0.9, no_repeat=3),
]


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("style", [{}, {"positions": "rotary", "norm": "rms", "activation": "swiglu", "kv_heads": 2}])
def test_writing_unequal_prompts_together_equals_writing_each_from_scratch(decoding, style):
    lm = model(**style)
    ids, lengths = prompts(7)
    found = written(lm, ids, lengths, decoding, seeds=range(20, 27))
    rows = zip(ids.tolist(), lengths, range(20, 27), strict=True)
    same(found, [from_scratch(lm, row[:length], decoding, seed) for row, length, seed in rows])
    assert decoding.max_tokens == 1 or len({len(text.ids) for text in found}) > 2  # some end before others


def every_continuation(lm, prompt, decoding):
    """All of a tiny vocabulary, with their log-likelihoods from a plain forward pass."""
    vocabulary, longest = lm.embedding.tokens.num_embeddings, decoding.max_tokens
    inner = [word for word in range(vocabulary) if word != END]
    for length in range(longest + 1):
        for ids in itertools.product(inner, repeat=length):
            text = [*ids, END] if length < longest else [*ids]
            runs = [tuple(text[i : i + decoding.no_repeat]) for i in range(len(text) - decoding.no_repeat + 1)]
            if decoding.no_repeat and len(set(runs)) < len(runs):
                continue
            whole = torch.tensor([[*prompt, *text]])
            logs = lm.logits(lm(lm.embed(whole)))[0, len(prompt) - 1 : -1].log_softmax(1)
            value = float(logs.gather(1, whole[0, len(prompt) :, None]).sum())
            yield value / len(text) ** decoding.length_penalty, Written(ids, value, length < longest)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("no_repeat", [0, 1, 2])
def test_a_wide_enough_beam_finds_the_best_of_all_continuations(penalty, no_repeat):
    lm = model(4)
    ids, lengths = prompts(3, 4)
    decoding = Decoding(max_tokens=4, beams=4**4, length_penalty=penalty, no_repeat=no_repeat)
    found = searched(lm, ids, lengths, decoding, keep=5)
    for texts, row, length in zip(found, ids.tolist(), lengths, strict=True):
        best = sorted(every_continuation(lm, row[:length], decoding), key=lambda pair: -pair[0])
        same(texts, [text for _, text in best[:5]])
    same(written(lm, ids, lengths, decoding), [texts[0] for texts in found])


class Whole:
    """Keeps the text instead of what was computed from it."""

    def __init__(self, ids):
        self.ids = ids

    def __getitem__(self, rows):
        return Whole(self.ids[rows])

    def exchange(self, rows, num_tokens):
        assert self.ids.shape[1] == LONGEST + num_tokens
        self.ids = self.ids[rows]


class Uncached:
    """Reads the whole of each text again at every step."""

    def __init__(self, lm):
        self.lm = lm

    def prefill(self, ids):
        return self.lm.logits(self.lm(self.lm.embed(ids)))[:, -1], Whole(ids)

    def step(self, ids, index, state):
        state.ids = torch.cat([state.ids, ids[:, None]], 1)
        return self.prefill(state.ids)[0]


@pytest.mark.parametrize("decoding", [*DECODINGS, *(replace(decoding, beams=3) for decoding in DECODINGS[:3])])
def test_cached_writing_equals_uncached_writing(decoding):
    lm = model()
    ids, _ = prompts(5)
    lengths = torch.full((5,), LONGEST)
    uncached = Uncached(lm)
    same(written(lm, ids, lengths, decoding), write(uncached, *uncached.prefill(ids), decoding, range(5), end=END))


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 2.0])
@pytest.mark.parametrize("beams", [2, 4])
def test_beams_of_unequal_prompts_together_equal_those_of_each_alone(penalty, beams):
    lm = model()
    ids, lengths = prompts(6)
    decoding = Decoding(max_tokens=12, beams=beams, length_penalty=penalty, no_repeat=2)
    together = searched(lm, ids, lengths, decoding, keep=2)
    for row, texts in enumerate(together):
        length = lengths[row : row + 1]
        same(texts, searched(lm, ids[row : row + 1, :length], length, decoding, keep=2)[0])


@pytest.mark.parametrize("no_repeat", [0, 2])
def test_a_beam_of_width_one_is_greedy(no_repeat):
    """By the search itself, where length counts for nothing: with a penalty it also looks behind the first end."""
    lm = model()
    ids, lengths = prompts(7)
    decoding = Decoding(max_tokens=12, length_penalty=0.0, no_repeat=no_repeat)
    found = [texts[0] for texts in searched(lm, ids, lengths, decoding)]
    same(found, written(lm, ids, lengths, decoding))
    assert len({len(text.ids) for text in found}) > 2


class Counting:
    """Keeps the number of rows of every step."""

    def __init__(self, lm):
        self.lm, self.rows = lm, []

    def step(self, ids, index, state):
        self.rows.append(len(ids))
        return self.lm.step(ids, index, state)


@pytest.mark.parametrize("decoding", [Decoding(max_tokens=12, no_repeat=2), Decoding(max_tokens=12, beams=2, no_repeat=2)])
def test_texts_that_have_ended_leave_the_batch_and_change_nothing(decoding, monkeypatch):
    lm = model()
    ids, lengths = prompts(7)
    counting, whole = Counting(lm), Counting(lm)
    found = written(lm, ids, lengths, decoding, steps=counting)
    monkeypatch.setattr(writing, "_pays", lambda *_: False)
    same(found, written(lm, ids, lengths, decoding, steps=whole))
    assert set(whole.rows) == {7 * decoding.beams}
    assert counting.rows == sorted(counting.rows, reverse=True)
    assert counting.rows[-1] < counting.rows[0]
    assert len(counting.rows) == len(whole.rows)


def test_nothing_is_computed_when_all_have_ended():
    lm = model()
    ids, lengths = prompts(1)
    for decoding in (Decoding(max_tokens=30, no_repeat=1), Decoding(max_tokens=30, no_repeat=1, beams=2, length_penalty=0.0)):
        counting = Counting(lm)
        (text,) = written(lm, ids, lengths, decoding, steps=counting)
        assert text.finished
        assert len(counting.rows) < 12


@pytest.mark.parametrize("decoding", [*DECODINGS, Decoding(max_tokens=12, beams=4, no_repeat=3)])
def test_likelihood_is_that_of_one_pass_and_no_run_is_written_twice(decoding):
    lm = model()
    ids, lengths = prompts(7)
    found = written(lm, ids, lengths, decoding)
    for row, length, text in zip(ids.tolist(), lengths, found, strict=True):
        tokens = [*text.ids, END] if text.finished else [*text.ids]
        assert END not in text.ids
        assert text.finished or len(tokens) == decoding.max_tokens
        whole = torch.tensor([[*row[:length], *tokens]])
        logs = lm.logits(lm(lm.embed(whole)))[0, length - 1 : -1].log_softmax(1)
        assert text.log_likelihood == pytest.approx(float(logs.gather(1, whole[0, length:, None]).sum()), abs=1e-4)
        if decoding.no_repeat:
            runs = list(zip(*(tokens[i:] for i in range(decoding.no_repeat)), strict=False))
            assert len(runs) == len(set(runs))


def test_without_an_end_all_is_written():
    lm = model()
    ids, lengths = prompts(3)
    for decoding in (Decoding(max_tokens=10), Decoding(max_tokens=10, beams=3), Decoding(max_tokens=10, temperature=2.0)):
        for text in written(lm, ids, lengths, decoding, end=None):
            assert len(text.ids) == 10
            assert not text.finished


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_parts_are_the_beginnings_of_what_is_written(temperature):
    lm, parts = model(), []
    ids, lengths = prompts(7)
    decoding = Decoding(max_tokens=12, temperature=temperature, no_repeat=2)

    def on_tokens(tokens):
        parts.append(tokens.clone())
        tokens.fill_(3)  # what is handed out is the receiver's

    found = written(lm, ids, lengths, decoding, on_tokens=on_tokens)
    same(found, written(lm, ids, lengths, decoding))
    assert [part.shape for part in parts] == [(7, index + 1) for index in range(max(len(text.ids) + 1 for text in found))][:12]
    for part in parts:
        for row, text in zip(part.tolist(), found, strict=True):
            assert tuple(row[: len(text.ids)]) == text.ids[: len(row)]
            assert set(row[len(text.ids) :]) <= {END}


def test_what_is_drawn_depends_on_the_seed_alone():
    lm = model()
    ids, lengths = torch.full((4, 3), 5), torch.full((4,), 3)
    decoding = Decoding(max_tokens=12, temperature=1.5)
    first, second, again, other = written(lm, ids, lengths, decoding, seeds=[5, 6, 5, 7])
    assert first.ids == again.ids
    assert len({first.ids, second.ids, other.ids}) == 3
    same(written(lm, ids[:1], lengths[:1], decoding, seeds=[7]), [other])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"beams": 0}, "beams is 0"),
        ({"beams": 2, "temperature": 1.0}, "2 beams do not draw"),
        ({"length_penalty": math.inf}, "length_penalty is inf"),
        ({"no_repeat": -1}, "no_repeat is -1"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
    ],
)
def test_settings_that_mean_nothing_are_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        check_decoding(replace(Decoding(), **changes))
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused():
    lm = model()
    ids, lengths = prompts(2)
    with pytest.raises(UserError, match="3 seeds for 2 texts"):
        written(lm, ids, lengths, Decoding(), seeds=[1, 2, 3])
    with pytest.raises(UserError, match="no_repeat 1 may leave none of 12 words"):
        written(lm, ids, lengths, Decoding(max_tokens=13, no_repeat=1), end=None)
    with pytest.raises(UserError, match="0 continuations"):
        searched(lm, ids, lengths, Decoding(), keep=0)


@pytest.mark.parametrize("longest", [[5, 5, 5], [2, 5, 4]])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_step_is_one_graph_for_all_positions(longest, beams, monkeypatch):
    torch._dynamo.reset()
    lm, counter = model(), CompileCounter()
    compile_with = functools.partial(torch.compile, backend=counter, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_with)
    steps = CompiledSteps(lm)
    ids, decoding = prompts(3)[0], Decoding(max_tokens=8, beams=beams, no_repeat=2)
    found = written(lm, ids, torch.tensor(longest), decoding, steps=steps)
    assert counter.frame_count == 1
    same(found, written(lm, ids, torch.tensor(longest), decoding))
    written(lm, ids, torch.tensor(longest), decoding, steps=steps)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inside of torch
def test_compiled_writing_equals_eager_writing():
    torch._dynamo.reset()
    lm = model()
    ids, lengths = prompts(3)
    for beams in (1, 2):
        decoding = Decoding(max_tokens=8, beams=beams, no_repeat=2)
        same(written(lm, ids, lengths, decoding, steps=CompiledSteps(lm)), written(lm, ids, lengths, decoding))


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(temperature=1.0), Decoding(beams=3)])
def test_nan_is_told_and_not_written(decoding):
    lm = build_language_model(LanguageModelConfig(vocab_size=12, context_length=8, width=8, layers=1, heads=2))
    ids = torch.ones(2, 3, dtype=torch.int64)
    with torch.no_grad():
        logits, state = lm.prefill(lm.embed(ids), torch.tensor([3, 3]), 4)
    logits[1, 5] = torch.nan
    with pytest.raises(UserError, match="computes NaN"):
        write(lm, logits, state, replace(decoding, max_tokens=4), [0, 1], end=2)
