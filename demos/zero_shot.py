"""A page that tells which of your own labels fits a picture, to copy from; opens on http://127.0.0.1:7860."""

import argparse
import sys
from functools import partial

import gradio as gr
from starlette.middleware import Middleware
from torch import Tensor
from ui.parts import kindly, picture_of, texts_of
from ui.safety import MAX_UPLOAD_BYTES, Guard, private_folder

import mm

LABELS, MOST = "dog face, cat face, pizza, automobile, red heart", 50


def classify(model: mm.Model, picture: Tensor | None, labels: str) -> dict[str, float]:
    """Probability of each label."""
    (found,) = mm.classify(model, [picture_of(picture)], texts_of(labels, "Labels", MOST))
    return dict(zip(found.labels, found.probabilities, strict=True))


def page(model: mm.Model) -> gr.Blocks:
    with gr.Blocks(title="mm classify", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        picture = gr.Image(sources=["upload", "clipboard"], type="filepath")  # decoded within bounds by ui.parts
        labels = gr.Textbox(LABELS, label="Labels")
        button, best = gr.Button("Classify", variant="primary"), gr.Label(num_top_classes=5)
        button.click(kindly(partial(classify, model)), [picture, labels], best, api_name="classify")
    return blocks.queue(max_size=8, default_concurrency_limit=1, api_open=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="emoji-clip")
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
