"""Tab: one picture and a few texts, as three ways of joining pictures with words see them."""

from functools import partial
from typing import Any, get_args

import gradio as gr
from torch import Tensor

import mm
from mm.run.weighing import Strategy, Weighed, strategy
from ui.offer import Offer
from ui.parts import LANE, examples, kindly, model_choice, picture_input, picture_of, text_of, texts_of

HOW: dict[Strategy, str] = {
    "dual tower": "Picture and text become a vector each, and the vectors are compared.",
    "single tower": "Words and picture tokens are one sequence. A painter (DALL-E) tells how much the words let it expect the "
    "picture: it is the weakest judge of the three.",
    "cross-attention": "Words attend to the picture, and the pair is read as a whole.",
}
MEASURES = {"cosine": "cosine {:.2f}", "match": "belong together: {:.0%}", "log-likelihood": "{:.2f} nats a picture token"}
TEXT, OTHERS = "hot dog", "pear, balloon, tiger face, helicopter"
MAX_OTHERS = 15


def compare(offer: Offer, picture: Tensor | None, text: str, others: str, *models: str) -> tuple[Any, ...]:
    """For each model how likely a text is for a picture among others, and in words the score of the text alone."""
    given, wanted = picture_of(picture), text_of(text, "Text")
    beside = texts_of(others, "Other texts", MAX_OTHERS) if others.strip() else []
    texts = list(dict.fromkeys([wanted, *beside]))
    found = [mm.weigh(offer.model(name), given, texts) for name in models]
    return tuple(shown for one in found for shown in ({fit.text: fit.probability for fit in one.fits}, _said(one)))


def _said(one: Weighed) -> str:
    score = MEASURES[one.measure].format(one.fits[0].score)
    return f"**{one.fits[0].text}**: {score}"


def tab(offer: Offer) -> None:
    """Lay out the tab."""
    with gr.Row():
        with gr.Column():
            picture = picture_input(offer, "hot dog")
            examples(offer, picture)
        with gr.Column():
            text = gr.Textbox(TEXT, label="Text", max_length=300)
            others = gr.Textbox(OTHERS, label="Other texts to choose from, separated by commas", lines=2, max_length=3000)
            button = gr.Button("Compare", variant="primary")
    models, outputs = [], []
    with gr.Row():
        for way in get_args(Strategy):
            with gr.Column(min_width=240):
                gr.Markdown(f"### {way.capitalize()}\n{HOW[way]}", elem_classes=["lead", "way"])
                bars = gr.Label(label="Which text fits", num_top_classes=5, show_heading=False, elem_classes="bars")
                outputs += [bars, gr.Markdown()]
                models.append(model_choice(offer, lambda able, way=way: strategy(*able) == way, first="emoji-clip"))
    gr.on(
        [button.click, text.submit, others.submit],
        kindly(partial(compare, offer)),
        [picture, text, others, *models],
        outputs,
        api_name="compare",
        **LANE,
    )
