"""The moving average follows its formula, covers what it should, and can be swapped in and out."""

import pytest
import torch
from torch import nn
from toy_training import ToyRegression, make

from mm.training.ema import Ema


def test_average_is_the_formula() -> None:
    system = make(ToyRegression)
    ema = Ema(system, decay=0.5)
    weight = system.net[0].weight
    expected = weight.detach().clone()
    for n in range(12):
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight.detach()
    assert ema.num_updates == 12
    assert torch.allclose(ema.state_dict(system)["net.0.weight"], expected, atol=1e-6)


def test_covers_parameters_and_running_statistics_and_takes_the_rest_as_it_is() -> None:
    system = make(ToyRegression)
    ema = Ema(system, decay=0.9)
    with torch.no_grad():
        for tensor in (*system.parameters(), *system.buffers()):
            tensor.add_(1)
    averaged, live = ema.state_dict(system), system.state_dict()
    assert averaged.keys() == live.keys()
    followed = {name for name in live if not torch.equal(averaged[name], live[name])}
    assert followed == live.keys() - {"frozen", "net.1.num_batches_tracked"}


def test_swap_and_back_is_exact() -> None:
    system = make(ToyRegression)
    ema = Ema(system, decay=0.9)
    with torch.no_grad():
        system.net[0].weight.add_(1)
    ema.update()
    live = {name: tensor.clone() for name, tensor in system.state_dict().items()}
    averaged = {name: tensor.clone() for name, tensor in ema.state_dict(system).items()}
    held: dict[str, torch.Tensor] = {}

    def evaluate() -> None:
        with ema.swapped():
            held.update({name: tensor.clone() for name, tensor in system.state_dict().items()})
            raise KeyError

    with pytest.raises(KeyError):  # the weights come back when evaluation fails, too
        evaluate()
    assert all(torch.equal(held[name], tensor) for name, tensor in averaged.items())
    assert all(torch.equal(tensor, live[name]) for name, tensor in system.state_dict().items())
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in ema.state_dict(system).items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


def test_tied_weights_keep_one_average() -> None:
    system = Tied()
    ema = Ema(system, decay=0.9)
    with torch.no_grad():
        system.a.weight.add_(1)
    ema.update()
    live = system.a.weight.detach().clone()
    state = ema.state_dict(system)
    assert state.keys() == {"a.weight", "b.weight"}
    assert torch.equal(state["a.weight"], state["b.weight"])
    with ema.swapped():
        assert torch.equal(system.b.weight, state["a.weight"])
    assert torch.equal(system.b.weight, live)


def test_load_restores() -> None:
    system = make(ToyRegression)
    ema = Ema(system, decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            system.net[0].weight.add_(1)
        ema.update()
    again = Ema(system, decay=0.9)
    again.load({name: tensor.clone() for name, tensor in ema.state_dict(system).items()}, ema.num_updates)
    for average in (ema, again):
        average.update()
    for name, tensor in ema.state_dict(system).items():
        assert torch.equal(tensor, again.state_dict(system)[name])
