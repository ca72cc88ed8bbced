"""Students of few steps: teachers stay, students learn, one step comes near to the teacher's many, resuming is exact."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_flow import CLIP, DIT, PIXELS, TEXT, VARIANTS, batch, small, spread, texts

import mm
from mm.config import validate
from mm.errors import ConfigError
from mm.run.config import RunConfig
from mm.run.training import assemble
from mm.systems.flow import Flow, FlowConfig
from mm.training.checkpoint import find_checkpoint
from mm.training.tracking import Event
from mm.types import Sampling

METHODS: dict[str, dict[str, Any]] = {
    "reflow": {"method": "reflow", "teacher": "some-flow", "steps": 3, "moments": 2},
    "consistency": {"method": "consistency", "teacher": "some-flow", "steps": 4, "decay": 0.5},
    "consistency with itself": {"method": "consistency", "teacher": "some-flow", "steps": 4, "decay": 0.0, "distance": "l2"},
}


def teacher_and_student(variant: str, method: str, **options: Any) -> tuple[Flow, Flow]:
    """The student begins as its teacher."""
    teacher = spread(small(variant))
    student = small(variant, {"teacher": teacher}, distil=METHODS[method], **options)
    student.load_state_dict(student.state_dict() | teacher.state_dict())
    return teacher, student.train()


def step(student: Flow, optimizer: torch.optim.Optimizer, number: int) -> float:
    optimizer.zero_grad()
    losses = student.loss(batch(), number)
    losses.total.backward()
    optimizer.step()
    student.after_step(number)
    return losses.total.item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["latents", "pixels", "ddpm"])
def test_all_of_a_student_learns_and_nothing_of_its_teacher(variant: str, method: str) -> None:
    """A diffusion, too, makes its student by reflow a flow."""
    path = {"path": {"kind": "flow"}} if (variant, method) == ("ddpm", "reflow") else {}
    teacher, student = teacher_and_student(variant, method, **path)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    reached: set[str] = set()
    for number in range(15):
        step(student, optimizer, number)
        reached |= {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {n for n, p in student.named_parameters() if p.requires_grad}
    assert not any(n.startswith("slow.") for n in reached)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert not any("teacher" in name for name in student.state_dict())
    lasting = {name for name in student.state_dict() if not name.startswith(student.only_for_training)}
    assert lasting == before.keys()
    if student.slow is not None:
        assert int(student.slow.num_updates) == 15


@pytest.mark.slow
def test_one_step_comes_near_to_what_the_teacher_makes_in_many() -> None:
    """Guided pictures of four texts: of the distance that the teacher's own single step leaves, the student leaves less than a
    fifth, without guidance."""
    torch.manual_seed(0)
    teacher = small("latents", caption_dropout=0.1, text=TEXT).train()
    optimizer = torch.optim.Adam([p for p in teacher.parameters() if p.requires_grad], lr=3e-3)
    for number in range(100):
        step(teacher, optimizer, number)
    distil = METHODS["reflow"] | {"guidance": 2.0, "steps": 6, "moments": 8}
    student = small("latents", {"teacher": teacher.eval()}, text=TEXT, distil=distil, path={"std": 0.0})
    student.load_state_dict(teacher.state_dict())
    optimizer = torch.optim.Adam([p for p in student.train().parameters() if p.requires_grad], lr=3e-3)
    for number in range(60):
        step(student, optimizer, number)
    latents: list[torch.Tensor] = []
    for system, guidance, steps in ((teacher, 2.0, 6), (teacher, 2.0, 1), (student.eval(), 1.0, 1)):
        with pytest.MonkeyPatch.context() as patch:
            decode = system.latents.from_latents
            patch.setattr(system.latents, "from_latents", lambda x, decode=decode: (latents.append(x), decode(x))[1])
            system.paint(texts(6, 3, 5, 4), range(4), Sampling(guidance, steps=steps))
    wanted, before, after = latents
    assert (after - wanted).square().mean() < 0.2 * (before - wanted).square().mean()


def test_captions_are_dropped_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without captions a student's loss does not depend on them."""
    _, student = teacher_and_student("latents", "consistency")
    monkeypatch.setattr(student, "config", student.config.model_copy(update={"caption_dropout": 1.0}))
    losses = []
    for lengths in ((6, 3, 5, 4), (1, 1, 1, 1)):
        torch.manual_seed(5)
        data = batch()
        losses.append(student.loss(type(data)(data.ids, data.image, texts(*lengths)), 0).total)
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_bf16_is_near_to_one_of_fp32(method: str) -> None:
    """A teacher computes in what its student is trained in; its ways stay in fp32."""
    _, student = teacher_and_student("latents", method)
    found = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(student.loss(batch(), 0).total)
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], rtol=0.1, atol=0.01)


class Killed(BaseException):
    pass


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (16, 16), (40 * number, 0, 90)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


@pytest.mark.parametrize("method", ["reflow", "consistency"])
def test_a_killed_student_ends_in_the_same_bits(method: str, pictures: Path, tmp_path: Path) -> None:
    system = {"name": "flow", "latents": PIXELS, "text": TEXT | {"vocab_size": 262}, "denoiser": DIT | {"patch": 4}}
    train = {"steps": 4, "batch_size": 4, "checkpoint_every_steps": 2, "log_every": 1, "precision": "fp32", "device": "cpu"}
    config = {"data": {"train": str(pictures), "workers": 0}, "train": train | {"tensorboard": False, "ema_decay": 0.9}}
    config["system"] = system
    write = yaml.safe_dump
    (tmp_path / "teacher.yaml").write_text(write(config | {"train": config["train"] | {"steps": 2}}))
    mm.train(tmp_path / "teacher.yaml", out=tmp_path / "teacher", progress=False)
    distil = METHODS[method] | {"teacher": str(tmp_path / "teacher")}
    student = config | {"system": system | {"distil": distil}, "init_from": str(tmp_path / "teacher")}
    (tmp_path / "student.yaml").write_text(write(student))

    def kill(event: Event) -> None:
        if event.kind == "log" and event.step == 3:
            raise Killed

    mm.train(tmp_path / "student.yaml", out=tmp_path / "straight", progress=False)
    with pytest.raises(Killed):
        mm.train(tmp_path / "student.yaml", out=tmp_path / "killed", progress=False, on_event=kill)
    mm.train(tmp_path / "student.yaml", out=tmp_path / "killed", progress=False)
    whole, resumed = (find_checkpoint(tmp_path / name, lambda _: None) for name in ("straight", "killed"))
    assert whole is not None
    assert resumed is not None
    for file in ("model", "ema", "optimizer"):
        first, second = (torch_file(folder / f"{file}.safetensors") for folder in (whole, resumed))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), file
    loaded = mm.load(tmp_path / "killed", device="cpu")
    assert not [name for name in loaded.system.state_dict() if name.startswith("slow.")]
    assert mm.load(tmp_path / "teacher", device="cpu").system.state_dict().keys() == loaded.system.state_dict().keys()
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    mm.load(tmp_path / "killed", device="cpu")  # needs no teacher


def test_a_start_may_read_texts_with_a_shipped_model(pictures: Path, tmp_path: Path) -> None:
    system = {"name": "flow", "latents": PIXELS, "text": "emoji-clip", "denoiser": DIT | {"patch": 4}}
    train = {"steps": 1, "batch_size": 4, "precision": "fp32", "device": "cpu", "tensorboard": False}
    config = {"system": system, "data": {"train": str(pictures), "workers": 0}, "train": train}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(config))
    mm.train(tmp_path / "first.yaml", out=tmp_path / "first", progress=False)
    run = assemble(validate(RunConfig, config | {"init_from": str(tmp_path / "first")}, "test"))
    expected = mm.load(tmp_path / "first", device="cpu", precision="fp32").system.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.system.state_dict().items())


def torch_file(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_teachers_that_cannot_teach() -> None:
    def student(variant: str, teacher: Any, method: str, **options: Any) -> Flow:
        return small(variant, {"teacher": teacher} if teacher is not None else {}, distil=METHODS[method], **options)

    latents, ddpm = small("latents"), small("ddpm")
    with pytest.raises(ConfigError, match="is no generator by flow matching"):
        student("latents", latents.text, "reflow")
    with pytest.raises(ConfigError, match="is no generator by flow matching"):
        student("latents", None, "reflow")
    with pytest.raises(ConfigError, match="has other latents"):
        student("pixels", latents, "consistency")
    with pytest.raises(ConfigError, match="reads texts in another way"):
        student("latents", latents, "reflow", text=CLIP)
    with pytest.raises(ConfigError, match="goes another way"):
        student("ddpm", small("ddpm", path={"kind": "diffusion", "betas": "linear"}), "consistency")
    student("ddpm", ddpm, "reflow", path={"kind": "flow"}, weighting="uniform")
    with pytest.raises(ConfigError, match="learns straight lines"):
        student("ddpm", ddpm, "reflow")
    with pytest.raises(ConfigError, match="set align: null"):
        student("latents", latents, "reflow", align={"model": "some-clip", "layer": 1})
    with pytest.raises(ConfigError, match="distil"):
        validate(FlowConfig, VARIANTS["latents"] | {"distil": {"teacher": "some-flow", "method": "magic"}}, "test")
