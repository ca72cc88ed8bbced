"""Tab: a picture among one's own labels."""

from functools import partial

import gradio as gr
from torch import Tensor

import mm
from mm.errors import UserError
from ui.offer import Offer, shares
from ui.parts import LANE, examples, kindly, model_choice, picture_input, picture_of, texts_of

LABELS = "tiger face, cat face, lion, hot dog, balloon, helicopter, pear, crescent moon"
MAX_LABELS = 50
SHOWN = 8


def classify(offer: Offer, model: str, picture: Tensor | None, labels: str) -> dict[str, float]:
    """How likely each of the labels (separated by commas) is for a picture."""
    names = texts_of(labels, "Labels", MAX_LABELS)
    if len(names) < 2:
        raise UserError("Labels: give at least two different ones, separated by commas")
    found = mm.classify(offer.model(model), [picture_of(picture)], names)[0]
    return dict(zip(found.labels, found.probabilities, strict=True))


def tab(offer: Offer) -> None:
    """Lay out the tab."""
    with gr.Row():
        with gr.Column():
            picture = picture_input(offer, "tiger face")
            examples(offer, picture)
        with gr.Column():
            labels = gr.Textbox(LABELS, label="Your labels, separated by commas", lines=2, max_length=5000)
            model = model_choice(offer, shares("image", "text"), first="emoji-clip")
            button = gr.Button("Classify", variant="primary")
            answer = gr.Label(label="How likely each label is", num_top_classes=SHOWN, elem_classes="bars")
    gr.on(
        [button.click, labels.submit],
        kindly(partial(classify, offer)),
        [model, picture, labels],
        answer,
        api_name="classify",
        **LANE,
    )
