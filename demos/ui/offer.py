"""What the app offers: models and folders, all of them named when it was started and asked for by their ids alone."""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mm
from mm.data.emoji import concepts, draw_concepts
from mm.errors import UserError
from mm.hub import Model
from mm.evaluation.sheet import to_pillow
from mm.media.image import open_image
from mm.paths import cache_folder
from mm.types import Embeds
from PIL import Image

EMOJI = "emoji"
EMOJI_ARTIST, EMOJI_SIDE = "emojione", 160
"""Drawings by the artist whom no shipped model has seen in training, and the side that they are drawn at, in pixels."""

EMOJI_COUNT = 360
EXAMPLES = ("dog face", "pizza", "automobile", "red heart", "sunflower", "rocket")
FILE_NAME = re.compile(r"[\w ]+")
THUMBNAIL = 256

Wish = Callable[[Model], bool]


class Offer:
    """Loaded models and folders by id.

    Args:
        models: By id; they are used by one request at a time.
        folders: Of pictures, by id.
    """

    def __init__(self, models: Mapping[str, Model], folders: Mapping[str, Path]) -> None:
        self._models, self._folders = dict(models), dict(folders)

    @property
    def folders(self) -> list[str]:
        """Ids of all folders."""
        return list(self._folders)

    def models(self, wish: Wish) -> list[str]:
        """Ids of the models that can do something."""
        return [name for name, model in self._models.items() if wish(model)]

    def model(self, name: object) -> Model:
        """A model by its id. Raises `UserError` for anything else: nothing is loaded for a visitor."""
        if not isinstance(name, str) or name not in self._models:
            raise UserError(f"there is no such model here; choose one of {', '.join(self._models)}")
        return self._models[name]

    def folder(self, name: object) -> Path:
        """A folder by its id. Raises `UserError` for anything else."""
        if not isinstance(name, str) or name not in self._folders:
            raise UserError(f"there is no such folder here; choose one of {', '.join(self._folders)}")
        return self._folders[name]

    def example(self, name: str) -> Path:
        """The file of an embedded picture by its concept's name."""
        return self._folders[EMOJI] / f"{name}.png"


def can(*capabilities: str) -> Wish:
    """Whether a model has capabilities, see `mm.types.CAPABILITIES`."""
    return lambda model: set(capabilities) <= model.capabilities


def shares(*modalities: str) -> Wish:
    """Whether a model brings modalities into one space."""
    return lambda model: isinstance(model.system, Embeds) and set(modalities) <= model.system.encoders().keys()


def make_offer(models: Iterable[str] = (), folders: Iterable[str | Path] = ()) -> Offer:
    """Load the shipped models and those that are named beside them.

    Args:
        models: MODEL references, see `mm.load`. The id of a run or a model folder is its name.
        folders: Of pictures, beside the embedded emoji; the id is the name.

    Raises:
        UserError: One cannot be had, or two of them have one name.
    """
    loaded = {name: mm.load(name) for name in mm.shipped()}
    for reference in models:
        if reference not in loaded:
            _put(loaded, _identity(reference), mm.load(reference), "models")
    offered = {EMOJI: emoji_folder()}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"--folders {folder}: no such folder")
        _put(offered, folder.resolve().name, folder.resolve(), "folders")
    return Offer(loaded, offered)


def emoji_folder() -> Path:
    """Some hundred embedded drawings as files, called by their concepts' names; drawn once, in a second."""
    folder = cache_folder() / f"demo-{EMOJI_ARTIST}-{EMOJI_SIDE}-{EMOJI_COUNT}"
    if not folder.is_dir():
        part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
        part.mkdir(parents=True)
        keys = {
            concept["name"]: key
            for key, concept in concepts().items()
            if concept["core"] and FILE_NAME.fullmatch(concept["name"])
        }
        chosen = [*EXAMPLES, *list(keys)[:: -(-len(keys) // EMOJI_COUNT)]]
        drawn = draw_concepts(EMOJI_ARTIST, [keys[name] for name in chosen], EMOJI_SIDE)
        for key, png in drawn.items():
            (part / f"{concepts()[key]['name']}.png").write_bytes(png)
        try:
            part.replace(folder)
        except OSError:  # another one was quicker
            shutil.rmtree(part)
    return folder


def thumbnail(path: Path) -> Image.Image:
    """A small copy of a picture of a folder, so that no file of it is served itself."""
    picture = to_pillow(open_image(path))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


def _identity(reference: str) -> str:
    path = Path(reference)
    return path.resolve().name if path.is_dir() else reference


def _put(into: dict[str, Any], name: str, value: Any, option: str) -> None:
    if name in into:
        raise UserError(f"--{option}: two are called '{name}'; rename one of them")
    into[name] = value
