"""A page that says what a picture shows, to copy from; opens on http://127.0.0.1:7860."""

import argparse
import sys
from functools import partial

import gradio as gr
from starlette.middleware import Middleware
from torch import Tensor
from ui.parts import kindly, picture_of
from ui.safety import MAX_UPLOAD_BYTES, Guard, private_folder

import mm


def caption(model: mm.Model, picture: Tensor | None, language: str | None) -> str:
    """The likeliest caption, in a language that the model can begin with."""
    (written,) = mm.caption(model, [picture_of(picture)], language=language)
    return written.text


def page(model: mm.Model) -> gr.Blocks:
    languages = list(getattr(model.system, "beginnings", ()))
    with gr.Blocks(title="mm caption", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        picture = gr.Image(sources=["upload", "clipboard"], type="filepath")  # decoded within bounds by ui.parts
        language = gr.Dropdown(languages, label="Language", visible=bool(languages))
        button, words = gr.Button("Describe", variant="primary"), gr.Textbox(label="Caption")
        button.click(kindly(partial(caption, model)), [picture, language], words, api_name="caption")
    return blocks.queue(max_size=8, default_concurrency_limit=1, api_open=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="emoji-captioner")
    try:
        model = mm.load(parser.parse_args().model)
        theme = gr.themes.Default(font=["system-ui"], font_mono=["monospace"])  # no fonts from the network
        with private_folder() as folder:  # for what is uploaded; nothing outside it is served
            page(model).launch(
                server_name="127.0.0.1",
                share=False,
                max_file_size=MAX_UPLOAD_BYTES,
                theme=theme,
                app_kwargs={"middleware": [Middleware(Guard, folder=folder)]},
            )
    except mm.UserError as error:
        sys.exit(f"error: {error}")
