"""A page that paints what you write, to copy from; opens on http://127.0.0.1:7860."""

import argparse
import os
import sys
import tempfile
from functools import partial

import gradio as gr
import numpy as np

import mm

MAX_LETTERS, MAX_PICTURES = 500, 8


def paint(model: mm.Model, ranker: mm.Model, prompt: str, count: int, seed: int | None) -> list[np.ndarray]:
    """The best of four candidates for each picture, uint8 ``(H, W, 3)``; the same seed paints the same pictures."""
    try:
        if not prompt.strip() or len(prompt) > MAX_LETTERS:
            raise mm.UserError(f"write what to paint, in at most {MAX_LETTERS} letters")
        made = mm.generate(model, [prompt], count=int(count), seed=int(seed or 0), best_of=4, ranker=ranker)
    except mm.UserError as error:
        raise gr.Error(str(error), print_exception=False) from None
    return [one.pixels.permute(1, 2, 0).numpy() for one in made]


def page(model: str, ranker: str = "emoji-clip") -> gr.Blocks:
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp()  # the pictures are kept there for an hour, and nothing else is
    run = partial(paint, mm.load(model), mm.load(ranker))
    with gr.Blocks(title="mm generate", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        prompt = gr.Textbox("a green heart", label="Prompt", max_length=MAX_LETTERS)
        count = gr.Slider(1, MAX_PICTURES, value=4, step=1, label="Pictures")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        button, pictures = gr.Button("Paint", variant="primary"), gr.Gallery(columns=4, format="png")
        gr.on([button.click, prompt.submit], run, [prompt, count, seed], pictures, api_name="paint")
    return blocks.queue(max_size=8, default_concurrency_limit=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="emoji-flow")
    try:
        theme = gr.themes.Default(font=["system-ui"], font_mono=["monospace"])  # no fonts from the network
        page(parser.parse_args().model).launch(server_name="127.0.0.1", share=False, max_file_size="10mb", theme=theme)
    except mm.UserError as error:
        sys.exit(f"error: {error}")
