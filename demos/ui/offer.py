"""What the app offers: models and folders, all of them named when it was started and asked for by their ids alone."""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

import mm
from mm.data.emoji import concepts, draw_concepts
from mm.errors import UserError
from mm.evaluation.sheet import to_pillow
from mm.hub import Model
from mm.media.image import open_image
from mm.paths import cache_folder
from mm.types import Embeds

EMOJI = "emoji"
EMOJI_ARTIST, EMOJI_SIDE = "emojione", 160
"""Drawings by the artist whom no shipped model has seen in training, and the side that they are drawn at, in pixels."""

EMOJI_COUNT = 360
EXAMPLES = ("tiger face", "hot dog", "balloon", "helicopter", "pear", "crescent moon")
SOUGHT = ("red heart", "grinning cat", "wine glass", "fire engine", "ferris wheel")
"""Drawings that examples of the search look for."""

FILE_NAME = re.compile(r"[\w ]+")
THUMBNAIL = 256


class Abilities(NamedTuple):
    """What a model can do (`mm.types.CAPABILITIES`), and the modalities that it brings into one space."""

    capabilities: frozenset[str]
    modalities: frozenset[str] = frozenset()


def abilities(model: Model) -> Abilities:
    """Those of a loaded model."""
    shared = model.system.encoders().keys() if isinstance(model.system, Embeds) else ()
    return Abilities(model.capabilities, frozenset(shared))


PAIRS = frozenset({"image", "text"})
SHIPPED = {
    "emoji-albef": Abilities(frozenset({"embeds", "matches", "grounds"}), PAIRS),
    "emoji-audio": Abilities(frozenset({"embeds", "hears"}), PAIRS | {"audio"}),
    "emoji-captioner": Abilities(frozenset({"captions"})),
    "emoji-clip": Abilities(frozenset({"embeds"}), PAIRS),
    "emoji-dalle": Abilities(frozenset({"paints", "expects"})),
    "emoji-flow": Abilities(frozenset({"paints", "varies"})),
    "emoji-judge": Abilities(frozenset({"embeds"}), PAIRS),
    "emoji-muse": Abilities(frozenset({"paints"})),
    "emoji-vq": Abilities(frozenset({"tokenizes", "compresses"})),
    "emoji-vqa": Abilities(frozenset({"answers", "answers_freely"})),
}
"""Told before they are loaded, so that the page need not wait for all of them; a test compares."""

Wish = Callable[[Abilities], bool]


class Offer:
    """Models and folders by id.

    Args:
        models: MODEL references by id.
        folders: Of pictures, by id.

    Raises:
        UserError: A model that is not shipped cannot be loaded.
    """

    def __init__(self, models: Mapping[str, str], folders: Mapping[str, Path]) -> None:
        self._models, self._folders = dict(models), dict(folders)
        self._loaded: dict[str, Model] = {}
        self._loading = threading.Lock()
        self._abilities = {name: SHIPPED.get(name) or abilities(self.model(name)) for name in models}

    @property
    def folders(self) -> list[str]:
        """Ids of all folders."""
        return list(self._folders)

    def models(self, wish: Wish) -> list[str]:
        """Ids of the models that can do something."""
        return [name for name, able in self._abilities.items() if wish(able)]

    def model(self, name: object) -> Model:
        """A model by its id, loaded when it is first asked for. Raises `UserError` where none was offered under this id."""
        if not isinstance(name, str) or name not in self._models:
            raise UserError(f"there is no such model here; choose one of {', '.join(self._models)}")
        with self._loading:
            if name not in self._loaded:
                self._loaded[name] = mm.load(self._models[name])
            return self._loaded[name]

    def load_all(self) -> None:
        """Load what is not loaded yet; done in the background while the first visitors look at the page."""
        for name in self._models:
            self.model(name)

    def folder(self, name: object) -> Path:
        """A folder by its id. Raises `UserError` where none was offered under this id."""
        if not isinstance(name, str) or name not in self._folders:
            raise UserError(f"there is no such folder here; choose one of {', '.join(self._folders)}")
        return self._folders[name]

    def example(self, name: str) -> Path:
        """The file of an embedded picture by its concept's name."""
        return self._folders[EMOJI] / f"{name}.png"


def can(*capabilities: str) -> Wish:
    """Whether a model has capabilities."""
    return lambda able: able.capabilities.issuperset(capabilities)


def shares(*modalities: str) -> Wish:
    """Whether a model brings modalities into one space."""
    return lambda able: able.modalities.issuperset(modalities)


def make_offer(models: Iterable[str] = (), folders: Iterable[str | Path] = ()) -> Offer:
    """The shipped models and the embedded emoji, and what is named beside them.

    Args:
        models: MODEL references, see `mm.load`. The id of a run or a model folder is its name.
        folders: Of pictures; the id is the name.

    Raises:
        UserError: One cannot be had, or two of them have one name.
    """
    offered = {name: name for name in mm.shipped()}
    for reference in models:
        if reference not in offered:
            folder = Path(reference).expanduser()
            name, whole = (folder.resolve().name, str(folder.resolve())) if folder.is_dir() else (reference, reference)
            _put(offered, name, whole, "models")
    places = {EMOJI: emoji_folder()}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"--folders {folder}: no such folder")
        _put(places, folder.resolve().name, folder.resolve(), "folders")
    return Offer(offered, places)


def emoji_folder() -> Path:
    """Some hundred embedded drawings as files, called by their concepts' names; drawn once, in a second."""
    keys = {
        concept["name"]: key for key, concept in concepts().items() if concept["core"] and FILE_NAME.fullmatch(concept["name"])
    }
    chosen = sorted({*EXAMPLES, *SOUGHT, *list(keys)[:: -(-len(keys) // EMOJI_COUNT)]})
    digest = hashlib.sha256(f"{EMOJI_ARTIST} {EMOJI_SIDE} {chosen}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"demo-{digest}"
    if not folder.is_dir():
        part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
        part.mkdir(parents=True)
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


def _put(into: dict[str, Any], name: str, value: Any, option: str) -> None:
    if name in into:
        raise UserError(f"--{option}: two are called '{name}'; rename one of them")
    into[name] = value
