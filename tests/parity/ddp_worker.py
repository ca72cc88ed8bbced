"""One process of the data-parallel parity test: trains toys into the given folder. Started by torchrun, or alone."""

import json
import sys
from pathlib import Path

import torch
from toy_training import ToyClip, ToyRegression, ToyStream, make, toy_config

from mm.errors import UserError
from mm.training.loop import train
from mm.training.parallel import environment, open_world
from mm.types import System


class NoDropoutClip(ToyClip):
    def __init__(self) -> None:
        super().__init__(dropout=0)


class PlainRegression(ToyRegression):
    """Without the layers that see only this process's samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = torch.nn.Identity()
        self.net[2] = torch.nn.Identity()


def merge(states: list[dict]) -> dict:
    return states[0] | {"ranks": len(states)}


def run(folder: Path, name: str, kind: type[System], poison: frozenset[int] = frozenset(), **changes: object) -> None:
    rank, size = environment()
    stream = ToyStream(8, rank=rank, world_size=size, poison=poison)
    system = make(kind, seed=rank)  # different on purpose: the first process's weights count
    config = toy_config(**{"checkpoint_every_steps": 0} | changes)
    train(system, stream, config, folder / name, progress=False, merge_states=merge)
    values = {key: value.flatten().tolist() for key, value in system.state_dict().items()}
    (folder / f"{name}-{rank}.json").write_text(json.dumps(values))


def main(folder: Path) -> None:
    run(folder, "clip", NoDropoutClip)
    run(folder, "clip-accumulated", NoDropoutClip, accumulate=2)
    run(folder, "regression", PlainRegression)
    run(folder, "normalised", ToyRegression, steps=8)
    run(folder, "straight", ToyClip, steps=20, schedule="constant")
    run(folder, "resumed", ToyClip, steps=10, schedule="constant")
    run(folder, "resumed", ToyClip, steps=20, schedule="constant")
    run(folder, "poisoned", NoDropoutClip, poison=frozenset({6}))  # the last sample, which is the last process's
    try:
        run(folder, "hopeless", NoDropoutClip, poison=frozenset(range(3, 9)), max_nonfinite=3, checkpoint_every_steps=2)
    except UserError as error:
        rank, _ = environment()
        (folder / f"hopeless-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with open_world("cpu"):
        main(Path(sys.argv[1]))
