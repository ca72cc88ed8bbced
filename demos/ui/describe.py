"""Tab: a picture in words, questions about it, and where in it words are."""

from functools import partial

import gradio as gr
from PIL import Image
from torch import Tensor

import mm
from mm.errors import UserError
from mm.evaluation.heat import heat_over
from mm.types import Captions
from ui.offer import Offer, can
from ui.parts import LANE, MAX_LETTERS, examples, kindly, model_choice, picture_input, picture_of, text_of

ANSWERS = 5
QUESTIONS = ("what is in the picture?", "is it an animal?", "which group does it belong to?")
LANGUAGES = {"en": "English", "zh": "Chinese"}
HEAT_SIDE = 256
MAX_WORDS = 8


def describe(offer: Offer, model: str, language: str, picture: Tensor | None) -> str:
    """A caption of a picture, in a language (``en``, ``zh``) where the model knows it, else in its usual one."""
    writer = offer.model(model)
    known = isinstance(writer.system, Captions) and language in writer.system.beginnings
    return mm.caption(writer, [picture_of(picture)], language=language if known else None)[0].text


def ask(offer: Offer, model: str, picture: Tensor | None, question: str) -> dict[str, float]:
    """The likeliest answers to a question about a picture."""
    found = offer.model(model).answer(picture_of(picture), text_of(question, "Question"), k=ANSWERS)
    return dict(zip(found.answers, found.scores, strict=True))


def locate(offer: Offer, model: str, picture: Tensor | None, words: str) -> tuple[list[tuple[Image.Image, str]], str]:
    """Where in a picture each word of a text is, drawn as heat, and how likely the text fits at all."""
    reader, given = offer.model(model), picture_of(picture)
    found = reader.ground(given, text_of(words, "Words"))
    if len(found.words) > MAX_WORDS:
        raise UserError(f"Words: {len(found.words)} are too many to draw; give up to {MAX_WORDS}")
    view = reader.processor.view(given, HEAT_SIDE)
    drawn = [
        (heat_over(view, heat), f"{word}  {share:.0%}")
        for word, heat, share in zip(found.words, found.heat, found.shares, strict=True)
    ]
    fits = f"The text fits the picture with {found.match:.0%}."
    return drawn, fits if found.match >= 0.5 else f"{fits} Where it does not fit, the heat tells little."


def tab(offer: Offer) -> None:
    """Lay out the tab."""
    with gr.Row():
        with gr.Column():
            picture = picture_input(offer, "tiger face")
            examples(offer, picture)
        with gr.Column():
            writer = model_choice(offer, can("captions"), "Captioner")
            language = gr.Radio([(name, key) for key, name in LANGUAGES.items()], value="en", label="Language")
            tell = gr.Button("Describe", variant="primary")
            caption = gr.Textbox(label="Caption", lines=1, interactive=False, buttons=["copy"])
        with gr.Column():
            answerer = model_choice(offer, can("answers"), "Answerer")
            question = gr.Dropdown(QUESTIONS, value=QUESTIONS[0], label="Question", allow_custom_value=True)
            put = gr.Button("Ask", variant="primary")
            answer = gr.Label(label="Answers", num_top_classes=ANSWERS, elem_classes="bars")
    with gr.Row(elem_classes="asked"):
        reader = model_choice(offer, can("grounds"), "Reader")
        words = gr.Textbox("tiger face", label="Words to find in the picture", max_length=MAX_LETTERS, scale=4)
        find = gr.Button("Show where", variant="primary", scale=1, min_width=140)
    gr.Markdown("Where each word is, and its share of the heat:", elem_classes="lead")
    heat = gr.Gallery(
        label="Where each word is",
        show_label=False,
        columns=4,
        object_fit="contain",
        buttons=[],
        elem_classes=["found", "heat"],
    )
    fits = gr.Markdown(elem_classes="lead")
    tell.click(kindly(partial(describe, offer)), [writer, language, picture], caption, api_name="describe", **LANE)
    put.click(kindly(partial(ask, offer)), [answerer, picture, question], answer, api_name="ask", **LANE)
    gr.on(
        [find.click, words.submit],
        kindly(partial(locate, offer)),
        [reader, picture, words],
        [heat, fits],
        api_name="locate",
        **LANE,
    )
