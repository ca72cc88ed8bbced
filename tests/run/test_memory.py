"""Texts known by heart: each caption once, kept with the model, and refused where nothing could use them."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mm
from mm.cli import app
from mm.errors import ConfigError, UserError
from mm.run.memory import remembering


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    folder = tmp_path / "captioned"
    folder.mkdir()
    for number, words in enumerate(("red heart", "pizza", "red heart")):
        Image.new("RGB", (64, 64)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(words)
    return folder


def test_the_command_keeps_each_caption_once_and_the_weights_as_they_are(captioned: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["remember", "emoji-audio", "--data", str(captioned), "--out", str(tmp_path / "heard")])
    assert done.exit_code == 0, done.output
    before, after = (mm.load(name, device="cpu", precision="fp32") for name in ("emoji-audio", str(tmp_path / "heard")))
    assert after.config.memory_size == 2
    assert after.card["remembers"].startswith("2 captions of ")
    torch.testing.assert_close(after.system.memory, before.embed_texts(["red heart", "pizza"]), atol=1e-6, rtol=0)
    changed = {
        name for name, value in after.system.state_dict().items() if not torch.equal(value, before.system.state_dict()[name])
    }
    assert changed == {"memory"}


def test_a_training_does_not_begin_with_an_empty_memory() -> None:
    """Its directions would be towards zeros; one that begins with a memory keeps it."""
    own = mm.load("emoji-audio", device="cpu").config
    with pytest.raises(ConfigError, match=r"system\.memory_size 1287: would be .*mm remember"):
        own.check_start(None)
    with pytest.raises(ConfigError, match="memory_size"):
        own.check_start(own.model_copy(update={"memory_size": 2}))
    own.check_start(own)
    own.model_copy(update={"memory_size": 0}).check_start(None)


def test_models_that_do_not_hear_and_sources_without_captions_are_refused(captioned: Path) -> None:
    with pytest.raises(UserError, match="only an imagebind with a fixed hub"):
        remembering(mm.load("emoji-clip", device="cpu"), str(captioned))
    for file in captioned.glob("*.txt"):
        file.unlink()
    with pytest.raises(UserError, match="no captions to remember"):
        remembering(mm.load("emoji-audio", device="cpu"), str(captioned))
