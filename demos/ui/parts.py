"""What the tabs share: errors in kind words, inputs within bounds, and examples."""

import functools
import inspect
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio import processing_utils
from gradio.data_classes import FileData, ImageData
from PIL import Image
from torch import Tensor

from mm.errors import BadSample, UserError
from mm.media.audio import AudioLimits, decode_audio, without_silence
from mm.media.image import ImageLimits, decode_image
from ui.offer import EXAMPLES, Offer, Wish
from ui.safety import MAX_UPLOAD_BYTES

LIMITS = ImageLimits(max_bytes=MAX_UPLOAD_BYTES, max_pixels=40_000_000)
SOUND_LIMITS = AudioLimits(max_bytes=MAX_UPLOAD_BYTES, max_seconds=60)
RATE = 16_000
"""Samples a second of what is handed on; models bring it to their own."""

Sound = tuple[int, np.ndarray]
"""A rate and a wave, as `mm.media.audio.open_audio` takes it from microphones."""

MAX_LETTERS = 300
"""Of one text; models read some dozen tokens."""

PICTURE_HEIGHT = 260

SHOWN_SECONDS = 30
"""How long what went wrong is shown, unless it is closed before."""

LANE: Mapping[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
"""One request computes at a time, whatever it asks for: memory stays bounded, and two cores are not shared by ten."""

_PATH = re.compile(r"(?:/[^/\s:'\"]+)+/([^/\s:'\"]+)")


def kindly(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors become words on the page.

    What a visitor can mend is said, with file names in place of paths. Everything else goes to the server's log and to nobody
    else.
    """
    if inspect.isgeneratorfunction(getattr(handler, "func", handler)):

        @functools.wraps(handler)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                raise _shown(error) from None

        return stream

    @functools.wraps(handler)
    def once(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise _shown(error) from None

    return once


def _shown(error: Exception) -> gr.Error:
    if isinstance(error, UserError):
        return gr.Error(
            _PATH.sub(r"\1", str(error)), title="Please change something", duration=SHOWN_SECONDS, print_exception=False
        )
    traceback.print_exception(error, file=sys.stderr)
    return gr.Error("This did not work, and it is our fault; the server's log says why.", print_exception=False)


def text_of(given: object, what: str, limit: int = MAX_LETTERS) -> str:
    """A text as it was typed, without the space around it. Raises `UserError` where it is empty or too long."""
    words = given.strip() if isinstance(given, str) else ""
    if not words:
        raise UserError(f"{what}: please write something")
    if len(words) > limit:
        raise UserError(f"{what}: {len(words):,} letters are too many; at most {limit} are read")
    return words


def texts_of(given: object, what: str, most: int) -> list[str]:
    """Texts separated by commas, each once. Raises `UserError` where there are none or too many."""
    whole = text_of(given, what, most * MAX_LETTERS)
    found = list(dict.fromkeys(text.strip() for text in re.split(r"[,，、\n]", whole) if text.strip()))
    if not 0 < len(found) <= most:
        raise UserError(f"{what}: {len(found)} were given; give 1 to {most}, separated by commas")
    return [text_of(text, what) for text in found]


def number_of(given: object, what: str, low: float, high: float) -> float:
    """A number within bounds. Raises `UserError` for anything else."""
    if isinstance(given, bool) or not isinstance(given, int | float) or not low <= given <= high:
        raise UserError(f"{what}: give a number from {low:g} to {high:g}")
    return given


def picture_of(given: Tensor | None) -> Tensor:
    """The picture, uint8 ``(3|4, H, W)``. Raises `UserError` where there is none."""
    if given is None:
        raise UserError("please give a picture: drop one on the field, or take an example")
    return given


def sound_of(given: Sound | None) -> Sound:
    """The recording. Raises `UserError` where there is none, or nothing is heard in it."""
    if given is None:
        raise UserError("please record a word, drop a recording on the field, or take an example")
    if not len(given[1]):
        raise UserError("nothing is to be heard in this recording; is the right microphone switched on?")
    return given


def picture_input(offer: Offer, example: str, label: str = "Picture") -> gr.Image:
    """A field for a picture, prefilled. Handlers receive uint8 ``(3|4, H, W)``, or None where it is empty."""
    return gr.Image(
        value=str(offer.example(example)),
        type="filepath",
        sources=["upload", "clipboard"],
        label=label,
        height=PICTURE_HEIGHT,
        buttons=[],
        elem_classes="picture",
    )


def sound_input(example: Path, label: str) -> gr.Audio:
    """A field for a recording by microphone or file, prefilled. Handlers receive a `Sound`, or None where it is empty."""
    return gr.Audio(
        value=str(example),
        type="filepath",
        sources=["microphone", "upload"],
        label=label,
        buttons=[],
        editable=False,
        elem_classes="sound",
    )


def _decoded(_: gr.Image, payload: ImageData | None) -> Tensor | None:
    if payload is None or payload.path is None:
        return None
    try:
        return decode_image(Path(payload.path).read_bytes(), LIMITS)
    except BadSample as error:
        raise _unusable("picture", error, "JPEG, PNG, WebP, GIF or BMP file of at most 40 megapixels") from None


def _heard(_: gr.Audio, payload: FileData | None) -> Sound | None:
    """A decoded recording without the silence around it."""
    if payload is None or not payload.path:
        return None
    try:
        wave = decode_audio(Path(payload.path).read_bytes(), RATE, limits=SOUND_LIMITS)
    except BadSample as error:
        kinds = f"WAV, FLAC, Ogg or MP3 file of at most {SOUND_LIMITS.max_seconds:g} seconds"
        raise _unusable("recording", error, kinds) from None
    return RATE, without_silence(wave, RATE).numpy()


def _unusable(what: str, error: BadSample, wanted: str) -> gr.Error:
    words = f"This {what} cannot be used: {error.cause}. Give a {wanted}."
    return gr.Error(words, title="Please change something", duration=SHOWN_SECONDS, print_exception=False)


# Gradio's own would decode whatever Pillow and ffmpeg can, without bounds, and say "Error" of what they cannot. For the class,
# not for a component, which Gradio makes anew when an example fills it; and not in a subclass, beside whose source it would
# write a file.
gr.Image.preprocess = _decoded  # pyright: ignore[reportAttributeAccessIssue]
gr.Audio.preprocess = _heard  # pyright: ignore[reportAttributeAccessIssue]

_save = processing_utils.save_pil_to_cache


@functools.wraps(_save)
def _saved(img: Image.Image, cache_dir: str, *args: Any, **kwargs: Any) -> str:
    """Gradio's own writes equal pictures into one file, again and again, while that file is on its way to another visitor."""
    with tempfile.TemporaryDirectory(dir=cache_dir) as alone:
        made = Path(_save(img, alone, *args, **kwargs))
        path = Path(cache_dir).resolve() / made.relative_to(Path(alone).resolve())
        path.parent.mkdir(exist_ok=True)
        made.replace(path)
    return str(path)


processing_utils.save_pil_to_cache = _saved


def examples(offer: Offer, picture: gr.Image, names: tuple[str, ...] = EXAMPLES) -> None:
    """Pictures to click on."""
    gr.Examples([[str(offer.example(name))] for name in names], [picture], label="Or one of these", api_visibility="private")


def model_choice(offer: Offer, wish: Wish, label: str = "Model", first: str | None = None) -> gr.Dropdown:
    """The ids of the models that can do something."""
    names = offer.models(wish)
    value = first if first in names else next(iter(names), None)
    return gr.Dropdown(names, value=value, label=label, visible=len(names) > 1, filterable=False)
