"""A page that tells which of your own labels fits a picture, to copy from; opens on http://127.0.0.1:7860."""

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

LABELS, MAX_LETTERS = "dog face, cat face, pizza, automobile, red heart", 4000
UPLOADS = Path(tempfile.mkdtemp()).resolve()  # Gradio's folder for them, this page's own


def uploaded(picture: dict[str, Any] | None) -> bytes:
    """The uploaded file, to be decoded within mm's limits. A request may name any path: only uploads are read."""
    path = Path(str(picture["path"])).resolve() if picture else UPLOADS
    if not path.is_relative_to(UPLOADS) or not path.is_file():
        raise mm.UserError("give a picture first")
    return path.read_bytes()


def classify(model: mm.Model, picture: dict[str, Any] | None, labels: str) -> dict[str, float]:
    """Probability of each label."""
    try:
        if len(str(labels)) > MAX_LETTERS:
            raise mm.UserError(f"labels: more than {MAX_LETTERS} letters; give fewer")
        (found,) = mm.classify(model, [uploaded(picture)], sorted({name.strip() for name in str(labels).split(",")} - {""}))
    except mm.UserError as error:
        raise gr.Error(str(error), print_exception=False) from None
    return dict(zip(found.labels, found.probabilities, strict=True))


async def refuse(*_: Any, **__: Any) -> str:
    """In the place of Gradio's download of what is given as an address."""
    raise gr.Error("upload a file; addresses are not fetched", print_exception=False)


def page(model: str) -> gr.Blocks:
    os.environ["GRADIO_TEMP_DIR"], processing_utils.async_ssrf_protected_download = str(UPLOADS), refuse
    with gr.Blocks(title="mm classify", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        inputs = [gr.Image(sources=["upload", "clipboard"], type="filepath"), gr.Textbox(LABELS, label="Labels")]
        button, best = gr.Button("Classify", variant="primary"), gr.Label(num_top_classes=5)
        button.click(partial(classify, mm.load(model)), inputs, best, preprocess=False, api_name="classify")
    return blocks.queue(max_size=8, default_concurrency_limit=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="emoji-clip")
    try:
        theme = gr.themes.Default(font=["system-ui"], font_mono=["monospace"])  # no fonts from the network
        page(parser.parse_args().model).launch(server_name="127.0.0.1", share=False, max_file_size="10mb", theme=theme)
    except mm.UserError as error:
        sys.exit(f"error: {error}")
