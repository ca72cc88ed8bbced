"""FLOPs, memory and phases of steps, with data and without; the same as torch's own counter and allocator see."""

import importlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_systems import SYSTEMS
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from toy_training import ToyClip, ToyStream, make, toy_config

from mm.errors import UserError
from mm.nn.parallel import divide, recompute_blocks
from mm.systems import build, read_system
from mm.training.devices import autocast
from mm.training.energy import Estimate, Rapl, Sum, energy_meter
from mm.training.estimate import Estimate as Planned
from mm.training.estimate import Setting, Sharing, Structure, estimate, reasons, recommended, sharings, structure
from mm.training.gradients import backward
from mm.training.hardware import DEVICES, Device, named
from mm.training.meter import Meter
from mm.training.simulate import Simulated, simulate, without_data
from mm.types import Batch, Losses, System

WIDTH, LENGTH, ROWS = 64, 32, 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.inputs, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.inputs(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.output(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.feed_forward(self.norm(x + self.attention(x)))


class Deep(System):
    """Blocks, of whose output only some positions count: which, the data and the network decide."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def loss(self, batch: Batch, step: int) -> Losses:
        assert batch.image is not None
        x = self.first(batch.image.flatten(1)[:, :LENGTH, None].float() / 255)
        for block in self.blocks:
            x = block(x)
        chosen = torch.rand(x.shape[:2]) < 0.5
        found = self.last(x[chosen])
        positive = found[found > 0] if int(chosen.sum()) > 1 else found
        loss = found.square().mean() + 0 * positive.sum()
        return Losses(loss, {"square": loss.detach()})


@pytest.fixture(scope="module")
def batch() -> Batch:
    pixels = torch.randint(0, 256, (ROWS, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Batch(ids=tuple(map(str, range(ROWS))), image=pixels)


@pytest.fixture(scope="module")
def simulated(batch: Batch) -> Simulated:
    torch.manual_seed(0)
    return simulate(Deep(), batch, toy_config(), torch.float32)


def steps(system: System, batch: Batch) -> torch.optim.Optimizer:
    system.train()
    optimizer = torch.optim.AdamW(system.parameters(), fused=True)
    backward(system, batch, 0, 1, partial(autocast, torch.device("cpu"), torch.float32))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def test_flops_are_those_of_torch(batch: Batch) -> None:
    """Attention included, which torch counts where it is not fused."""
    system = Deep()
    steps(system, batch)
    with Meter(system) as meter:
        system.loss(batch, 0).total.backward()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        system.loss(batch, 0).total.backward()
    assert meter.cost.flops("update") == 0
    assert meter.cost.flops("forward") * 3 == pytest.approx(counter.get_total_flops(), rel=0.06)
    assert meter.cost.flops() == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_a_step_without_data_costs_what_a_real_one_does(batch: Batch, simulated: Simulated) -> None:
    """FLOPs and bytes by the meter on real tensors, and by torch's allocator."""
    torch.manual_seed(0)
    system = Deep()
    optimizer = steps(system, batch)
    kept = [value for state in optimizer.state.values() for value in state.values()]
    with Meter(system, kept) as meter:
        system.loss(batch, 0).total.backward()
    optimizer.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        system.loss(batch, 0).total.backward()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert simulated.cost.flops("forward", "backward") == pytest.approx(meter.cost.flops(), rel=0.01)
    planned = simulated.cost.peak("forward", "backward")
    assert planned == pytest.approx(meter.cost.peak(), rel=0.02)
    assert planned == pytest.approx(most, rel=0.05)
    assert simulated.gradients == sum(p.nbytes for p in system.parameters())
    assert simulated.optimizer == pytest.approx(2 * simulated.gradients, rel=0.01)


def test_simulation_leaves_everything_as_it_was(batch: Batch) -> None:
    system = make(ToyClip)
    before = {name: tensor.clone() for name, tensor in system.state_dict().items()}
    random = torch.get_rng_state()
    pictures = next(iter(ToyStream()))
    simulate(system, pictures, toy_config(accumulate=2), torch.float32)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in system.state_dict().items())
    assert all(parameter.grad is None for parameter in system.parameters())


def test_shared_weights_stay_shared_without_data() -> None:
    system = Deep()
    system.blocks[1] = system.blocks[0]
    copy = without_data(system)
    assert copy.blocks[1] is copy.blocks[0]
    assert len(list(copy.parameters())) == len(list(system.parameters()))


def test_recomputation_costs_less_than_a_forward_pass_and_saves_activations(batch: Batch, simulated: Simulated) -> None:
    """Of each block, the last product need not be computed again."""
    selective, full = (
        simulate(Deep(), batch, toy_config(), torch.float32, recompute=way, divide=divide) for way in ("selective", "full")
    )
    assert full.cost.activations < 0.5 * simulated.cost.activations
    assert full.cost.activations < selective.cost.activations < simulated.cost.activations
    assert 0.6 < full.cost.flops("recompute") / simulated.cost.flops("forward") < 1
    assert selective.cost.flops("recompute") == simulated.cost.flops("recompute") == 0
    for phase in ("forward", "backward", "update"):
        for other in (selective, full):
            assert other.cost.flops(phase) == pytest.approx(simulated.cost.flops(phase), rel=0.01)


def test_what_is_recomputed_has_the_precisions_of_cuda_too(batch: Batch) -> None:
    """Else the normalised activations would be in bf16 the second time, and torch would refuse."""
    plain, full = (
        simulate(Deep(), batch, toy_config(), torch.bfloat16, like_cuda=True, recompute=way, divide=divide)
        for way in ("none", "full")
    )
    assert full.cost.flops("recompute") > 0 == plain.cost.flops("recompute")
    singles = [
        operation for operation in full.cost.operations if operation.phase == "recompute" and not operation.low_precision
    ]
    assert singles


def test_the_meter_tells_real_recomputation_apart(batch: Batch) -> None:
    """So the MFU of a training that recomputes is that of its network, not of its devices' work."""
    costs = []
    for way in ("none", "full"):
        system = Deep()
        if way == "full":
            recompute_blocks(system, selective=False)
        with Meter(system) as meter:
            system.loss(batch, 0).total.backward()
        costs.append(meter.cost)
    plain, full = costs
    assert full.flops("forward", "backward") == pytest.approx(plain.flops("forward", "backward"), rel=0.01)
    assert full.flops("recompute") > 0.6 * plain.flops("forward")


class Ctc(System):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.codes = nn.Linear(64, 8 * 5), nn.Parameter(torch.randn(4, 8))

    def loss(self, batch: Batch, step: int) -> Losses:
        assert batch.image is not None
        logits = self.first(batch.image[:, 0].flatten(1).float()).view(-1, 8, 5)
        ids = (logits[..., 0] * 1000).round().long().flatten()
        used = torch.bincount(ids.abs(), minlength=4) + torch.zeros(4)
        lengths = torch.full((len(logits),), 8)
        loss = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), torch.ones(len(logits), 3, dtype=torch.long), lengths, lengths // 4
        )
        return Losses(loss + 0 * self.codes.sum(), {"used": used.mean()})


def test_counts_and_ctc_losses_have_shapes_without_data(batch: Batch) -> None:
    found = simulate(Ctc(), batch, toy_config(), torch.float32)
    assert found.cost.flops("backward") > 0
    assert found.gradients == sum(parameter.nbytes for parameter in Ctc().parameters())


PARTS = Structure(num_blocks=6, blocks=1_200_000, largest=200_000, tensor=4, tensor_share=0.3, pipeline=2, pipeline_share=0.52)


def setting(simulated: Simulated, processes: int, **changes: object) -> Setting:
    device = Device("x", "x", 1e15, 1e14, 80e9, 3e12, 4e11, 700, 1.0, "", True)
    steps = dict.fromkeys(("none", "selective", "full"), simulated)
    values = {"steps": steps, "structure": PARTS, "device": device}
    values |= {"processes": processes, "batch_size": ROWS * processes, "dtype": torch.float32}
    return Setting(**(values | changes))  # pyright: ignore[reportArgumentType]


def test_layouts_share_what_they_say(simulated: Simulated) -> None:
    common = setting(simulated, 4)
    ddp = estimate(Sharing(), common).memory
    fsdp = estimate(Sharing(data="fsdp"), common).memory
    hsdp = estimate(Sharing(data="fsdp", replicas=2), common).memory
    tensor = estimate(Sharing(tensor=4), common).memory
    pipeline = estimate(Sharing(pipeline=2, microbatches=8), common).memory
    assert ddp.weights == simulated.weights
    assert fsdp.optimizer == ddp.optimizer / 4
    assert hsdp.optimizer == ddp.optimizer / 2
    assert fsdp.weights < ddp.weights
    assert (tensor.weights, pipeline.optimizer) == (0.3 * ddp.weights, 0.52 * ddp.optimizer)
    assert ddp.activations >= simulated.cost.activations - simulated.gradients


def test_stages_of_a_pipeline_hold_what_their_schedule_says(simulated: Simulated, batch: Batch) -> None:
    again = simulate(Deep(), batch, toy_config(), torch.float32, recompute="full", divide=divide)
    parts = replace(PARTS, num_stacks=1, num_parts=12, pipeline=4, pipeline_share=0.27)
    common = setting(simulated, 4, steps={"none": simulated, "full": again}, structure=parts)

    def held(**changes: Any) -> Planned:
        return estimate(Sharing(pipeline=4, **changes), common)

    gpipe, more = held(microbatches=4), held(microbatches=8)
    alternating, finer = (held(microbatches=count, schedule="1f1b") for count in (4, 8))
    assert gpipe.memory.activations == more.memory.activations > 2 * alternating.memory.activations
    assert alternating.memory.activations > finer.memory.activations
    assert gpipe.seconds < alternating.seconds < 1.5 * gpipe.seconds


def test_offloaded_state_costs_time_not_memory(simulated: Simulated) -> None:
    here, there = (estimate(Sharing(), setting(simulated, 4, offload=offload)) for offload in (False, True))
    assert there.memory.optimizer == 0 < here.memory.optimizer
    assert there.memory.total < here.memory.total
    assert there.seconds == pytest.approx(here.seconds + 2 * simulated.optimizer / 12e9)


def test_layouts_that_exist() -> None:
    assert [one.name for one in sharings(1, ROWS, PARTS)] == ["ddp", "ddp sel.", "ddp full"]
    plain = sharings(4, 64, PARTS)[:6]
    assert [one.name for one in plain] == ["ddp", "fsdp", "hsdp 2", "tensor 4", "pipeline 2", "pipeline 2 1f1b"]
    assert [one.settings() for one in plain] == [
        {},
        {"data": "fsdp"},
        {"data": "fsdp", "replicas": 2},
        {"tensor": 4},
        {"pipeline": 2, "microbatches": 8},
        {"pipeline": 2, "microbatches": 8, "schedule": "1f1b"},
    ]
    assert [one.name for one in sharings(4, 64, Structure(0, 0, 0))] == ["ddp", "fsdp", "hsdp 2"]


def test_networks_are_cut_as_a_training_cuts_them() -> None:
    """As far as their heads and layers go; experts stand in no pipeline."""
    system = build(read_system(SYSTEMS["dalle"], "test"))
    parts = structure(system, 8, divide)
    assert (parts.tensor, parts.pipeline) == (2, 2)
    assert 0.5 < parts.tensor_share < 1
    assert 0.5 < parts.pipeline_share < 1
    experts = build(read_system({**SYSTEMS["dalle"], "experts": {"count": 2, "top_k": 1}}, "test"))
    assert structure(experts, 8, divide).pipeline == 1
    assert (
        structure(system, 3, divide)
        == structure(system, 1, divide)
        == replace(parts, tensor=1, tensor_share=1.0, pipeline=1, pipeline_share=1.0)
    )


def test_the_fastest_that_fits_is_recommended(simulated: Simulated) -> None:
    roomy = setting(simulated, 4)
    found = [estimate(sharing, roomy) for sharing in sharings(4, 64, roomy.structure)]
    assert all(sum(one.shares.values()) == pytest.approx(1) for one in found)
    assert all(("waiting" in one.shares) == (one.sharing.pipeline > 1) for one in found)
    best = recommended(found)
    assert best is not None
    assert best.samples_per_second >= 0.98 * max(one.samples_per_second for one in found)
    tiny = setting(simulated, 4, device=Device("x", "x", 1e15, 1e14, 2e9, 3e12, 4e11, 700, 1.0, "", True))
    assert all(one.fits for one in found)
    too_big = Simulated(simulated.cost, ROWS, 3 * 10**9, 0, 0, 0)
    none = setting(too_big, 4, device=tiny.device, steps={"none": too_big})
    alone, shared = estimate(Sharing(), none), estimate(Sharing(data="fsdp"), none)
    assert recommended([alone]) is None
    assert reasons([alone], none.device)[0].startswith("the smallest, ddp, needs 3.0 of 0.8 GB")
    assert recommended([alone, replace(shared, fits=True)]) is not None
    assert reasons([alone, replace(shared, fits=True)], none.device) == ["ddp needs 3.0 of 0.8 GB"]


def test_speed_follows_mfu_and_peak(simulated: Simulated) -> None:
    flops = simulated.cost.flops("forward", "backward") / ROWS
    slow = Device("x", "x", 1e9, 1e9, 80e9, 3e12, 4e11, 700, 1.0, "", True)
    found = estimate(Sharing(), setting(simulated, 1, device=slow, mfu=0.5))
    assert found.samples_per_second == pytest.approx(0.5e9 / flops, rel=0.05)
    assert found.mfu == pytest.approx(0.5, rel=0.05)
    assert estimate(Sharing(), setting(simulated, 1, device=slow)).mfu <= 0.7


def test_devices_are_plausible() -> None:
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.fp32 < device.bf16 < 1e16
        assert 1e10 < device.memory < 1e12
        assert device.price is not None
        assert device.form


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_devices_are_known_by_what_torch_calls_them(told: str, name: str | None) -> None:
    """Variants of other rates are not mistaken for those of the table."""
    found = named(told)
    assert (None if found is None else found.name) == name


def test_energy_is_counted_over_the_edge_of_a_counter(tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    for name, value in {"name": "package-0", "max_energy_range_uj": "999999", "energy_uj": "900000"}.items():
        (package / name).write_text(value)
    rapl = Rapl.find(tmp_path)
    assert rapl is not None
    (package / "energy_uj").write_text("400000")
    assert rapl.joules(1.0) == pytest.approx(0.5)
    (package / "energy_uj").write_text("500000")
    assert rapl.joules(2.0) == pytest.approx(0.6)
    both = Sum([rapl, Estimate(10)])
    assert both.joules(3.0) == pytest.approx(0.6 + 30)
    assert "estimated" in both.method
    assert Rapl.find(tmp_path / "nowhere") is None


def test_unknown_devices_have_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rapl, "find", lambda: None)
    assert energy_meter("auto", None, accelerated=True) is None
    meter = energy_meter("auto", 100.0, accelerated=True)
    assert meter is not None
    assert meter.joules(36.0) == 3600


FAKE_CODECARBON = """
from types import SimpleNamespace


class OfflineEmissionsTracker:
    works = True
    stopped = 0

    def __init__(self, *, country_iso_code, save_to_file, log_level, allow_multiple_runs, output_handlers):
        assert len(country_iso_code) == 3 and not save_to_file
        self._handlers, self._kilowatt_hours, self._started = output_handlers, 0.0, False

    def start(self):
        self._started = True

    def flush(self):
        if self._started and self.works:
            self._kilowatt_hours += 0.5
            total = SimpleNamespace(energy_consumed=self._kilowatt_hours, emissions=1.0)
            for handler in self._handlers:
                handler.out(total, total)
                handler.live_out(total, total)
        return 1.0

    def stop(self):
        OfflineEmissionsTracker.stopped += 1
        for handler in self._handlers:
            handler.exit()
"""
"""What is used of the interface of codecarbon 2.8 to 3.3: figures come through its outputs, and failures are only logged."""


@pytest.fixture
def codecarbon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "codecarbon.py").write_text(FAKE_CODECARBON)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "codecarbon", raising=False)
    yield importlib.import_module("codecarbon")
    sys.modules.pop("codecarbon", None)


def test_codecarbon_is_asked(codecarbon: Any) -> None:
    meter = energy_meter("codecarbon", None, accelerated=True)
    assert meter is not None
    assert meter.method == "codecarbon"
    assert meter.joules(1.0) == 3.6e6  # two flushes of half a kilowatt hour
    assert meter.joules(2.0) == 1.5 * 3.6e6
    meter.close()
    assert codecarbon.OfflineEmissionsTracker.stopped == 1


def test_a_codecarbon_that_measures_nothing_is_refused(codecarbon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecarbon.OfflineEmissionsTracker, "works", False)
    with pytest.raises(UserError, match="measures nothing on this machine"):
        energy_meter("codecarbon", None, accelerated=True)
    assert codecarbon.OfflineEmissionsTracker.stopped == 1


def test_codecarbon_that_is_not_there_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(UserError, match="is not installed"):
        energy_meter("codecarbon", None, accelerated=True)
