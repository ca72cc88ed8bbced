"""A page that says what a picture shows, to copy from; opens on http://127.0.0.1:7860."""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils

import mm

UPLOADS = Path(tempfile.mkdtemp()).resolve()  # Gradio's folder for them, this page's own


def uploaded(picture: dict[str, Any] | None) -> bytes:
    """The uploaded file, to be decoded within mm's limits. A request may name any path: only uploads are read."""
    path = Path(str(picture["path"])).resolve() if picture else UPLOADS
    if not path.is_relative_to(UPLOADS) or not path.is_file():
        raise mm.UserError("give a picture first")
    return path.read_bytes()


def caption(model: mm.Model, picture: dict[str, Any] | None, language: str | None) -> str:
    """The likeliest caption, in a language that the model can begin with."""
    try:
        (written,) = mm.caption(model, [uploaded(picture)], language=language)
    except mm.UserError as error:
        raise gr.Error(str(error), print_exception=False) from None
    return written.text


async def refuse(*_: Any, **__: Any) -> str:
    """In the place of Gradio's download of what is given as an address."""
    raise gr.Error("upload a file; addresses are not fetched", print_exception=False)


def page(model: str) -> gr.Blocks:
    os.environ["GRADIO_TEMP_DIR"], processing_utils.async_ssrf_protected_download = str(UPLOADS), refuse
    writer = mm.load(model)
    languages = list(getattr(writer.system, "beginnings", ()))
    with gr.Blocks(title="mm caption", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        picture = gr.Image(sources=["upload", "clipboard"], type="filepath")
        language = gr.Dropdown(languages, label="Language", visible=bool(languages))
        button, words = gr.Button("Describe", variant="primary"), gr.Textbox(label="Caption")
        button.click(partial(caption, writer), [picture, language], words, preprocess=False, api_name="caption")
    return blocks.queue(max_size=8, default_concurrency_limit=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="emoji-captioner")
    try:
        theme = gr.themes.Default(font=["system-ui"], font_mono=["monospace"])  # no fonts from the network
        page(parser.parse_args().model).launch(server_name="127.0.0.1", share=False, max_file_size="10mb", theme=theme)
    except mm.UserError as error:
        sys.exit(f"error: {error}")
