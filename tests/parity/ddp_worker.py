"""One process of the data-parallel parity test: trains toys into the given folder. Started by torchrun, or alone."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from toy_training import ToyClip, ToyRegression, ToyStream, make, toy_config

from mm.errors import UserError
from mm.systems import build, read_system
from mm.training.loop import train
from mm.training.parallel import environment, open_world
from mm.types import Batch, System, TextBatch


class NoDropoutClip(ToyClip):
    def __init__(self) -> None:
        super().__init__(dropout=0)


class PlainRegression(ToyRegression):
    """Without the layers that see only this process's samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1] = torch.nn.Identity()
        self.net[2] = torch.nn.Identity()


class Captioned(ToyStream):
    """The toy stream with bigger pictures and captions; every fourth row repeats the caption of the one before."""

    def batch(self, k: int) -> Batch:
        plain = super().batch(k)
        rows = [int(name.split("-")[1]) for name in plain.ids]
        generator = torch.Generator().manual_seed(k)
        image = torch.randint(0, 256, (self.batch_size, 3, 32, 32), generator=generator, dtype=torch.uint8)
        ids = torch.randint(3, 40, (self.batch_size, 6), generator=generator)
        same = torch.tensor([row - (row % 4 == 3) for row in range(self.batch_size)])
        text = TextBatch(ids[same][rows], torch.full((len(rows),), 6))
        return Batch(plain.ids, image[rows], text, same[rows])


def tiny_clip() -> System:
    values = {
        "name": "clip",
        "image": {"backbone": "convnext_atto", "image_size": 32, "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}},
        "text": {"width": 16, "layers": 1, "heads": 2, "context_length": 8, "vocab_size": 40},
        "embed_dim": 8,
    }
    return build(read_system(values, "test"))


def merge(states: list[dict]) -> dict:
    return states[0] | {"ranks": len(states)}


def run(
    folder: Path,
    name: str,
    kind: Callable[[], System],
    poison: frozenset[int] = frozenset(),
    stream_kind: type[ToyStream] = ToyStream,
    **changes: object,
) -> None:
    rank, size = environment()
    stream = stream_kind(8, rank=rank, world_size=size, poison=poison)
    system = make(kind, seed=rank)  # different on purpose: the first process's weights count
    config = toy_config(**{"checkpoint_every_steps": 0} | changes)
    train(system, stream, config, folder / name, progress=False, merge_states=merge)
    values = {key: value.flatten().tolist() for key, value in system.state_dict().items()}
    (folder / f"{name}-{rank}.json").write_text(json.dumps(values))


def main(folder: Path) -> None:
    run(folder, "clip", NoDropoutClip)
    run(folder, "clip-accumulated", NoDropoutClip, accumulate=2)
    run(folder, "regression", PlainRegression)
    run(folder, "tiny-clip", tiny_clip, stream_kind=Captioned, steps=8)
    run(folder, "tiny-clip-accumulated", tiny_clip, stream_kind=Captioned, steps=8, accumulate=2)
    run(folder, "normalised", ToyRegression, steps=8)
    run(folder, "straight", ToyClip, steps=20, schedule="constant", log_every=5)
    run(folder, "resumed", ToyClip, steps=10, schedule="constant", log_every=5)
    run(folder, "resumed", ToyClip, steps=20, schedule="constant", log_every=5)
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
