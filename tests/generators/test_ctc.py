"""CTC decoding against the sum over all paths, of tiny cases."""

import itertools
import math

import pytest
import torch

from mm.generators.ctc import at_rests, best_path, prefix_search


def tokens_of(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(path) if token != blank)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("blank", [0, 2])
def test_prefix_search_sums_over_all_paths(seed: int, blank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shares = (2 * torch.randn(5, 3, generator=generator)).log_softmax(-1)
    expected: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(3), repeat=5):
        share = math.exp(sum(float(shares[frame, token]) for frame, token in enumerate(path)))
        expected[tokens_of(path, blank)] = expected.get(tokens_of(path, blank), 0.0) + share
    found = dict(prefix_search(shares, 1000, blank))
    assert found.keys() == expected.keys()
    assert all(math.exp(found[tokens]) == pytest.approx(share, rel=1e-5) for tokens, share in expected.items())
    best = max(expected, key=lambda tokens: expected[tokens])
    assert prefix_search(shares, 1000, blank)[0][0] == best
    target = torch.tensor([best])
    loss = torch.nn.functional.ctc_loss(
        shares[:, None], target, torch.tensor([5]), torch.tensor([len(best)]), blank=blank, reduction="sum"
    )
    assert -float(loss) == pytest.approx(prefix_search(shares, 1000, blank)[0][1], rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_best_path_is_the_likeliest_of_all_paths(seed: int) -> None:
    shares = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    paths = itertools.product(range(3), repeat=4)
    best = max(paths, key=lambda path: sum(float(shares[frame, token]) for frame, token in enumerate(path)))
    assert best_path(shares, 0) == tokens_of(best, 0)


def test_the_likeliest_tokens_need_not_be_those_of_the_likeliest_path() -> None:
    shares = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    assert best_path(shares, 0) == ()
    tokens, likelihood = prefix_search(shares, 8, 0)[0]
    assert tokens == (1,)
    assert math.exp(likelihood) == pytest.approx(0.64)


def test_fewer_beams_keep_the_best_and_no_frame_gives_no_token() -> None:
    shares = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert len(prefix_search(shares, 3, 0)) == 3
    assert prefix_search(shares[:0], 3, 0) == [((), 0.0)]
    assert best_path(shares[:0], 0) == ()


def test_a_search_may_stop_where_surely_nothing_is_said() -> None:
    shares = torch.randn(90, 4, generator=torch.Generator().manual_seed(3)).mul(8).log_softmax(-1)
    shares[16::17] = torch.tensor([0.0, -50.0, -50.0, -50.0])
    parts = at_rests(shares, 0, longest=34)
    assert torch.equal(torch.cat(parts), shares)
    assert all(len(part) <= 34 and part[-1, 0] == 0 for part in parts[:-1])
    assert len(parts) > 2
    found = [prefix_search(part, 200, 0)[0][0] for part in parts]
    assert sum(found, ()) == prefix_search(shares, 200, 0)[0][0]
