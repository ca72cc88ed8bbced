"""Beam search equals transformers', on the same network."""

import pytest
import torch

from mm.generators.writing import write
from mm.types import Decoding

transformers = pytest.importorskip("transformers")

END = 0


class Whole:
    """A writing state that keeps the text instead of what was computed from it."""

    def __init__(self, ids):
        self.ids = ids

    def __getitem__(self, rows):
        return Whole(self.ids[rows])

    def exchange(self, rows, num_tokens):
        self.ids = self.ids[rows]


class Theirs:
    """Their network, which reads the whole of each text again at every step."""

    def __init__(self, network):
        self.network = network

    def step(self, ids, index, state):
        state.ids = torch.cat([state.ids, ids[:, None]], 1)
        return self.network(state.ids).logits[:, -1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("penalty", [-0.5, 0.0, 0.7, 2.0])
@pytest.mark.parametrize("beams", [2, 5])
@torch.no_grad()
def test_beam_search_equals_that_of_transformers(seed, penalty, beams):
    """Theirs goes on until nothing open can win, too, where it is told never to stop early."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 4, "n_positions": 40, "vocab_size": 12, "initializer_range": 0.7}
    config = transformers.GPT2Config(**sizes, bos_token_id=END, eos_token_id=END, pad_token_id=END)
    network = transformers.GPT2LMHeadModel(config).eval()
    prompts = torch.randint(1, 12, (6, 4))
    expected = network.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=10,
        num_beams=beams,
        length_penalty=penalty,
        early_stopping="never",
        do_sample=False,
    )[:, 4:].tolist()
    decoding = Decoding(max_tokens=10, beams=beams, length_penalty=penalty)
    found = write(Theirs(network), network(prompts).logits[:, -1], Whole(prompts), decoding, range(6), end=END)
    assert [text.ids for text in found] == [tuple(row[: row.index(END)] if END in row else row) for row in expected]
