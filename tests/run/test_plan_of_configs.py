"""Every shipped configuration can be planned: what a step costs, and a layout for eight devices."""

from pathlib import Path

import pytest

from mm.run.plan import plan

CONFIGS = sorted(Path("configs").glob("*.yaml"))
STARTS = {
    "flow_few": ("init_from=emoji-flow", "system.distil.teacher=emoji-flow"),
    "latent_diffusion": None,
}
"""What stands in for a run that is not here; None where the configuration begins with weights of others."""

NEED_DATA = {"albef_vqa", "flamingo", "frozen", "vilt_vqa"}
"""What these learn, answers and examples, only their data can tell."""


@pytest.mark.parametrize(
    "config", [path for path in CONFIGS if STARTS.get(path.stem, ()) is not None], ids=lambda path: path.stem
)
def test_every_configuration_can_be_planned(config: Path) -> None:
    changes = [*(STARTS.get(config.stem) or ()), "train.batch_size=16", "train.accumulate=1"]
    found = plan(config, changes, processes=8, read_data=config.stem in NEED_DATA)
    assert 0 < found.parameters["trained"] <= found.parameters["total"]
    assert found.forward_flops > 0
    assert found.backward_flops > 0
    assert found.recommended is not None
    assert {one.sharing.data for one in found.estimates} == {"ddp", "fsdp"}
    for one in found.estimates:
        assert 0 < one.memory.total < 2e9, one.sharing.name
        assert min(vars(one.memory).values()) >= 0
        assert 0 < one.mfu < 0.7
        assert 0 < one.seconds < 1
        assert sum(one.shares.values()) == pytest.approx(1)
    ddp, fsdp = found.estimates[:2]
    assert fsdp.memory.optimizer == pytest.approx(ddp.memory.optimizer / 8)
