"""A mixture over thousands of shards: the time to index them, to open them, to the first batch, and the memory that takes.

Pictures are 8 x 8 and shards small, so that what is measured is the number of shards and samples, not decoding. Each figure is
of a process of its own, with the indexes and the page cache warm but for the first.

    python bench/many_shards.py [--shards 2400] [--samples 50] [--jobs 2] [--json FILE]
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

SOURCES = (0.5, 0.3, 0.2)
"""Shares of the sources of the mixture, and of the shards."""


def make_shards(folder: Path, shards: int, samples: int) -> list[str]:
    """Shards as others write them, without indexes; returns a pattern for each source."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 90)).save(buffer, "PNG")
    picture = buffer.getvalue()
    patterns = []
    for source, share in enumerate(SOURCES):
        place = folder / f"source{source}"
        place.mkdir()
        for shard in range(round(shards * share)):
            with tarfile.open(place / f"{shard:05d}.tar", "w") as tar:
                for sample in range(samples):
                    for name, data in (("png", picture), ("txt", f"{source} {shard} {sample}".encode())):
                        member = tarfile.TarInfo(f"{shard:05d}{sample:04d}.{name}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        patterns.append(f"{place}/*.tar")
    return patterns


def resident() -> float:
    """MiB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def opened(patterns: list[str]) -> dict[str, float]:
    """Open the mixture and take batches, in this process."""
    from mm.data.config import DataConfig
    from mm.data.loader import Loader
    from mm.data.sources import open_training_source
    from mm.types import Batch

    parts = [{"source": pattern, "weight": weight} for pattern, weight in zip(patterns, SOURCES, strict=True)]
    config = DataConfig.model_validate({"mixture": parts})
    before, begun = resident(), time.perf_counter()
    source = open_training_source(config)
    open_seconds, open_memory = time.perf_counter() - begun, resident() - before
    begun = time.perf_counter()
    loader = Loader(
        source, lambda sample, visit: sample.id, lambda items, epoch: Batch(tuple(items)), batch_size=256, seed=0, workers=0
    )
    batches = iter(loader)
    next(batches)
    first_seconds = time.perf_counter() - begun
    begun, count = time.perf_counter(), 40
    for _ in range(count):
        next(batches)
    speed = 256 * count / (time.perf_counter() - begun)
    return {
        "samples": len(source),
        "open_seconds": open_seconds,
        "open_mib": open_memory,
        "first_batch_seconds": first_seconds,
        "samples_per_second": speed,
        "all_mib": resident() - before,
    }


def index_seconds(patterns: list[str], jobs: int) -> float:
    """`mm data index` over all sources, as a user runs it; indexes that were there are made anew."""
    begun = time.perf_counter()
    for pattern in patterns:
        for old in Path(pattern).parent.glob("*.idx.json"):
            old.unlink()
        command = [sys.executable, "-m", "mm.cli", "data", "index", pattern, "--jobs", str(jobs)]
        subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description="A mixture over thousands of shards.")
    parser.add_argument("--shards", type=int, default=2400)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--open", nargs="*", help="patterns to open in this process; prints JSON")
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(opened(arguments.open)))
        return
    with tempfile.TemporaryDirectory() as place:
        patterns = make_shards(Path(place), arguments.shards, arguments.samples)
        found = {f"index_seconds_{jobs}_jobs": index_seconds(patterns, jobs) for jobs in sorted({1, arguments.jobs})}
        command = [sys.executable, "-W", "ignore", __file__, "--open", *patterns]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    found |= {"shards": arguments.shards, "sources": len(SOURCES), "load": os.getloadavg()[0]}
    for name, value in found.items():
        print(f"{name:24} {value:,.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
