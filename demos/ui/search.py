"""Tab: pictures of a folder that fit words, a picture, or whatever else the model brings into the same space."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

import mm
from ui.offer import Offer, shares, thumbnail
from ui.parts import LANE, examples, kindly, model_choice, number_of, picture_input, picture_of, sound_input, sound_of, text_of

MOST = 48
FIELD_WIDTH = 260
"""Pixels; two of them stand below each other on a phone."""

WORDS = ("smiling face", "red heart", "rotes Herz", "corazón rojo", "赤いハート", "smiling cat", "moon")
SPOKEN = Path(__file__).parents[1] / "spoken"
SAID = ("grinning cat", "wine glass", "fire engine", "ferris wheel")
"""Examples of the spoken word, in a voice that no shipped model has heard in training."""


@dataclass(frozen=True)
class Query:
    """A way to ask.

    Args:
        kind: The modality, by which `mm.search` takes it.
        label: Of its tab.
        field: Makes its prefilled input, with examples.
        read: Checks what was given.
    """

    kind: str
    label: str
    field: Callable[[Offer], Component]
    read: Callable[[Any], Any]


def _words(_: Offer) -> gr.Textbox:
    words = gr.Textbox("smiling face", label="What to look for, in any of ten languages", max_length=300)
    gr.Examples([[text] for text in WORDS], [words], label="Or one of these", api_visibility="private")
    return words


def _picture(offer: Offer) -> gr.Image:
    picture = picture_input(offer, "helicopter", "Pictures like this one")
    examples(offer, picture)
    return picture


def _sound(_: Offer) -> gr.Audio:
    files = [SPOKEN / f"{words}.mp3" for words in SAID]
    sound = sound_input(files[0], "What to look for, said in English")
    gr.Examples(
        [[str(file)] for file in files],
        [sound],
        label="Or one of these",
        example_labels=list(SAID),
        api_visibility="private",
    )
    return sound


QUERIES = (
    Query("text", "By words", _words, lambda given: text_of(given, "Words")),
    Query("image", "By picture", _picture, picture_of),
    Query("audio", "By voice", _sound, sound_of),
)


def search(
    offer: Offer, query: Query, model: str, folder: str, count: float, given: Any, progress: gr.Progress | None = None
) -> tuple[list[tuple[Image.Image, str]], str]:
    """The pictures of a folder that fit best, each with its name and cosine, and how many were looked through."""
    wanted, most = query.read(given), int(number_of(count, "How many", 1, MOST))
    place = offer.folder(folder)

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress((done, total), desc="reading the folder")

    found = mm.search(offer.model(model), place, k=most, progress=told, **{query.kind: wanted})
    unread = f", {len(found.skipped)} could not be read" if found.skipped else ""
    shown = [(thumbnail(hit.path), f"{hit.path.stem}  {hit.score:.2f}") for hit in found.hits]
    return shown, f"The best {len(shown)} of {found.searched} pictures{unread}; the number is the cosine."


def tab(offer: Offer) -> None:
    """Lay out the tab."""
    with gr.Row():
        folder = gr.Dropdown(offer.folders, value=offer.folders[0], label="Folder", filterable=False, min_width=FIELD_WIDTH)
        count = gr.Slider(1, MOST, 12, step=1, label="How many", min_width=FIELD_WIDTH)
    asked = []
    with gr.Tabs():
        for query in QUERIES:
            able = shares("image", query.kind)
            with gr.Tab(query.label, visible=bool(offer.models(able))):
                field = query.field(offer)
                model = model_choice(offer, able, first="emoji-clip")
                asked.append((query, model, field, gr.Button(f"Search {query.label.lower()}", variant="primary")))
    stop = gr.Button("Stop", size="sm", visible=len(offer.folders) > 1)
    gallery = gr.Gallery(label="Found", show_label=False, columns=6, object_fit="contain", buttons=[], elem_classes="found")
    said = gr.Markdown(elem_classes="lead")
    for query, model, field, button in asked:
        event = gr.on(
            [button.click] + ([field.submit] if isinstance(field, gr.Textbox) else []),
            _handler(offer, query),
            [model, folder, count, field],
            [gallery, said],
            api_name=f"search_by_{query.kind}",
            api_description=search.__doc__,
            **LANE,
        )
        stop.click(None, cancels=[event], api_visibility="private")


def _handler(offer: Offer, query: Query) -> Callable[..., Any]:
    def handler(model: str, folder: str, count: float, given: Any, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        return search(offer, query, model, folder, count, given, progress)

    return kindly(handler)
