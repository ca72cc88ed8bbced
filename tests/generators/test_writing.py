"""Writing equals its definition: everything computed from scratch, every continuation enumerated, every text alone."""

import functools
import itertools

import pytest
import torch

from mm.generators.language_model import LanguageModelConfig, build_language_model
from mm.generators.sampling import draw, sample_generators
from mm.generators.writing import search, write
from mm.types import Decoding, Written

END = 0


@functools.cache
def model(vocabulary=12, seed=0, **changes):
    sizes = {"vocab_size": vocabulary, "context_length": 40, "width": 16, "layers": 2, "heads": 4, "tied": False} | changes
    built = build_language_model(LanguageModelConfig(**sizes)).eval().requires_grad_(False)
    torch.manual_seed(seed)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return built


def prompts(count, vocabulary=12, longest=5):
    """Ids and unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (count, longest), generator=generator)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    return ids, torch.cat([lengths[:-1], torch.tensor([longest])])


def written(lm, ids, lengths, decoding, *, seeds=None, end=END, steps=None, on_tokens=None):
    seeds = range(len(ids)) if seeds is None else seeds
    logits, state = lm.prefill(lm.embed(ids), lengths, decoding.max_tokens)
    return write(steps or lm, logits, state, decoding, seeds, end=end, on_tokens=on_tokens)


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
    logits, state = lm.prefill(lm.embed(ids), lengths, 4)
    found = search(lm, logits, state, decoding, end=END, keep=5)
    for texts, row, length in zip(found, ids.tolist(), lengths, strict=True):
        best = sorted(every_continuation(lm, row[:length], decoding), key=lambda pair: -pair[0])
        same(texts, [text for _, text in best[:5]])
    same(written(lm, ids, lengths, decoding), [texts[0] for texts in found])
