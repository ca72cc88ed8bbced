"""`mm plan` beside real steps on this CPU: memory and FLOPs, a process for each configuration.

    python bench/plan_check.py [CONFIG ...] [--json FILE]

Memory, beside what outlives a step: the most that torch's allocator held during a real step (its profiler), and how far the
process's resident memory grew (VmHWM; malloc gives freed blocks back at once). FLOPs: torch's own `FlopCounterMode` during a
real step with unfused attention, which it counts as matrix products; it cannot see the fused one of the CPU.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

NAMES = ("clip", "albef", "dalle", "flow", "captioner")
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass
class Compared:
    """Bytes and FLOPs of a step."""

    name: str
    batch_size: int
    planned_bytes: float
    allocated_bytes: float
    resident_bytes: float
    kept_bytes: float
    planned_flops: float
    counted_flops: float


def compare(name: str) -> Compared:
    """Plan a configuration, then take steps of it, with all its samples in this process."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    from mm.run.plan import prepared, remembers, run_config
    from mm.training.devices import choose_dtype
    from mm.training.parallel import World
    from mm.training.simulate import simulate
    from mm.training.step import Stepper

    config, notes = run_config(Path("configs") / f"{name}.yaml", ["data.workers=0"])
    ready = prepared(config, True, notes)
    dtype = choose_dtype(config.train.precision, torch.device("cpu"))
    planned = simulate(ready.system, ready.batch, config.train, dtype, remembers=remembers(config))
    stepper = Stepper(ready.system, config.train, World(0, 1, torch.device("cpu")))
    ready.system.train()
    for step in range(2):
        stepper.step(ready.batch, step)
    stepper.optimizer.zero_grad(set_to_none=True)
    before = resident()
    stepper.step(ready.batch, 2)
    grown = peak_resident() - before
    stepper.optimizer.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        stepper.step(ready.batch, 3)
    now = most = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stepper.step(ready.batch, 4)
    return Compared(
        name=name,
        batch_size=len(ready.batch),
        planned_bytes=planned.cost.peak(),
        allocated_bytes=most,
        resident_bytes=grown,
        kept_bytes=planned.weights + planned.averages + planned.optimizer,
        planned_flops=planned.cost.flops(),
        counted_flops=counter.get_total_flops(),
    )


def resident() -> int:
    """Bytes that are resident now; the record of most starts anew."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_resident() -> int:
    """Most bytes that were resident since `resident`."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def table(rows: list[Compared]) -> str:
    """Markdown."""
    head = "| configuration | batch | plan, MB | allocator, MB | resident, MB | plan, GFLOPs | counted, GFLOPs |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in rows:
        allocated, grown = (
            f"{value / 1e6:.1f} ({value / row.planned_bytes - 1:+.1%})" for value in (row.allocated_bytes, row.resident_bytes)
        )
        counted = f"{row.counted_flops / 1e9:.1f} ({row.counted_flops / row.planned_flops - 1:+.1%})"
        lines.append(
            f"| {row.name} | {row.batch_size} | {row.planned_bytes / 1e6:.1f} | {allocated} | {grown} | "
            f"{row.planned_flops / 1e9:.1f} | {counted} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=NAMES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help="one configuration in this process; prints JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(asdict(compare(arguments.configs[0]))))
        return
    rows = []
    for name in arguments.configs:
        command = [sys.executable, "-W", "ignore", __file__, "--one", name]
        done = subprocess.run(command, env=os.environ | MALLOC, check=True, capture_output=True, text=True)
        rows.append(Compared(**json.loads(done.stdout.splitlines()[-1])))
        print(f"{name}: done", file=sys.stderr)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
