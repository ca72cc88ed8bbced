"""Faster ways to the same figures: two processes that share an evaluation, compiled encoders."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmark_copies as copies
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

import mm
from mm.data.accounting import Accounting
from mm.run.evaluation import shared_out
from mm.training.parallel import open_world
from mm.types import Source

COMMANDS = {
    "zero-shot": ["zero-shot", "emoji-clip", "--data", "emoji:validation/novel", "--baseline", "none"],
    "retrieval": ["retrieval", "emoji-clip", "--data", "emoji:validation/novel"],
    "probe": ["probe", "emoji-clip", "--train", "emoji:all/noto/novel", "--data", "emoji:validation/novel", "--method", "tip"],
    "vqa": ["vqa", "emoji-vqa", "--data", "emoji-vqa:validation/compositional", "--limit", "43"],
    "captioning": ["captioning", "emoji-captioner", "--data", "emoji:validation/novel", "--judge", "none", "--train", "none"],
}


def run(command: list[str], output: Path, processes: int) -> subprocess.CompletedProcess[str]:
    """The command line, run by one or by several processes, none of which may use the other's cache of vectors."""
    cache = [] if command[0] == "vqa" else ["--no-cache"]  # answers are not remembered
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "mm.cli", "eval", *command, *cache, "--json", str(output)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def figures(command: list[str], folder: Path, processes: int, samples: str = "43 delivered") -> dict[str, dict[str, float]]:
    """Metrics of the command line."""
    output = folder / f"{processes}.json"
    done = run(command, output, processes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("95% interval") == 1, "only the first process shows the table"
    content = json.loads(output.read_text())
    assert content["protocol"]["samples"].startswith(samples), content["protocol"]["samples"]
    return content["metrics"]


@pytest.mark.parametrize("task", COMMANDS)
def test_figures_do_not_depend_on_the_number_of_processes(task: str, tmp_path: Path) -> None:
    one, two = (figures(COMMANDS[task], tmp_path, processes) for processes in (1, 2))
    assert one == two


def test_pictures_that_cannot_be_used_are_judged_for_all_processes_together(tmp_path: Path) -> None:
    """The first process meets all of them, 3 of its 10 pictures; 3 of 20 are few enough, 5 are not, whoever meets them."""
    folder = tmp_path / "photos"
    for number in range(20):
        copies.picture(folder / f"{number:02d}.png", number)
        copies.text(folder / f"{number:02d}.txt", f"picture {number}")
    for number in range(3):
        (folder / f"{number:02d}.png").write_bytes(b"broken")
    command = ["retrieval", "emoji-clip", "--data", str(folder)]
    one, two = (figures(command, tmp_path, processes, "17 delivered, 3 skipped") for processes in (1, 2))
    assert one == two
    for number in (3, 4):
        (folder / f"{number:02d}.png").write_bytes(b"broken")
    done = run(command, tmp_path / "none.json", 2)
    assert done.stderr.count("mm: error") == done.stderr.count("15 delivered, 5 skipped") == 2, done.stderr
    assert done.stderr.count("\nmm: error: process 1: ") + done.stderr.startswith("mm: error: process 1: ") == 1, done.stderr


def test_more_processes_than_samples(tmp_path: Path) -> None:
    copies.picture(tmp_path / "photos" / "one.png", 0)
    copies.text(tmp_path / "photos" / "one.txt", "the only picture")
    assert figures(["retrieval", "emoji-clip", "--data", str(tmp_path / "photos")], tmp_path, 2, "1 delivered")


@dataclass(frozen=True)
class Seen:
    """A sample, and which process had it."""

    id: str
    fields: Mapping[str, Any]
    process: int


def share(rank: int, folder: Path) -> None:
    """One of two processes; five samples of which each may do its part alone."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)

    def work(source: Source) -> tuple[list[Seen], Accounting]:
        samples = [source.read(index) for index in range(len(source))]
        counts = Accounting(indexed=len(samples), delivered=len(samples))
        return [Seen(sample.id, {"txt": sample.texts[0]}, rank) for sample in samples], counts

    source = mm.open_source(str(folder / "photos"))
    with open_world("cpu") as world:
        found, counts = shared_out(source, world, work, lambda values: Seen(**values))
    assert [one.process for one in found] == [0, 0, 1, 1, 1]
    assert [one.fields["txt"] for one in found] == [f"picture {number}" for number in range(5)]
    assert (counts.indexed, counts.delivered) == (5, 5)
    dist.destroy_process_group()


def test_each_process_has_its_stretch_and_all_return_the_whole(tmp_path: Path) -> None:
    for number in range(5):
        copies.picture(tmp_path / "photos" / f"{number}.png", number)
        copies.text(tmp_path / "photos" / f"{number}.txt", f"picture {number}")
    spawn(share, (tmp_path,), nprocs=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own imports
def test_compiled_encoders_give_the_same_vectors() -> None:
    model = mm.load("emoji-clip", device="cpu", precision="fp32")
    pixels = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = ["zebra", "an emoji of a red apple", "", "umbrella with rain drops and a very long handle"]
    expected = model.embed_pixels(pixels), model.embed_texts(texts)
    compiled = model.compile(rows=4)
    assert compiled is model  # whose encoders are compiled: it may not meet other shapes under another name
    for found, eager in zip((compiled.embed_pixels(pixels), compiled.embed_texts(texts)), expected, strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)
