"""Tab: pictures of words by three kinds of generators side by side, shown in the making."""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import gradio as gr
from PIL import Image
from torch import Tensor

import mm
from mm.errors import UserError
from mm.evaluation.sheet import to_pillow
from mm.run.generation import cut_prompts
from mm.types import OnPicture, Sampling
from ui.offer import Offer, can
from ui.parts import LANE, MAX_LETTERS, PICTURE_HEIGHT, kindly, number_of, text_of

HOW = {
    "emoji-dalle": "autoregressive: token after token",
    "emoji-muse": "masked: all tokens in a few steps",
    "emoji-flow": "diffusion: from noise to the picture",
}
RANKER = "emoji-clip"
PROMPTS = ("red heart", "green heart", "penguin", "a slice of pizza", "smiling cat with sunglasses")
MAX_BEST_OF = 16
MAX_SEED = 2**31 - 1
SECONDS_BETWEEN = 0.15
"""Pictures in the making come faster than a page should be sent."""


class Stopped(Exception):  # noqa: N818 - ends a thread whose result nobody waits for
    """The visitor left or pressed the button."""


def create(
    offer: Offer, painters: list[str], prompt: str, seed: float, guidance: float, best_of: float
) -> Iterator[tuple[Image.Image | None, ...]]:
    """Pictures of a prompt, one by each chosen painter in the order of `offer`, as far as they are made.

    While a painter works, all its candidates are shown; then the best of them.
    """
    names = offer.models(can("paints"))
    chosen = [name for name in names if name in painters]
    if not chosen or set(painters) - set(names):
        raise UserError(f"Painters: choose at least one of {', '.join(names)}")
    words = text_of(prompt, "Prompt")
    number = int(number_of(seed, "Seed", 0, MAX_SEED))
    sampling = Sampling(guidance=number_of(guidance, "Guidance", 1, 10))
    candidates = int(number_of(best_of, "Best of", 1, MAX_BEST_OF))
    for name in chosen:
        for _, read in cut_prompts(offer.model(name), [words]):
            gr.Info(f"{name} reads only: {read}")
    shown: dict[str, Image.Image | None] = dict.fromkeys(names)
    yield tuple(shown.values())
    for name in chosen:

        def paint(on_picture: OnPicture, name: str = name) -> Tensor:
            made = mm.generate(
                offer.model(name),
                [words],
                seed=number,
                sampling=sampling,
                best_of=candidates,
                ranker=offer.model(RANKER) if candidates > 1 else None,
                on_picture=on_picture,
            )
            return made[0].pixels

        for picture in in_the_making(paint):
            shown[name] = picture
            yield tuple(shown.values())


def in_the_making(paint: Callable[[OnPicture], Tensor]) -> Iterator[Image.Image]:
    """The states of a picture that is painted in a thread, some of them left out, and the picture itself.

    The thread ends at its next state when nobody takes them any more.
    """
    states: queue.Queue[Tensor | Exception | None] = queue.Queue()
    stopped, finished = threading.Event(), threading.Event()
    last = 0.0

    def show(pictures: Tensor, _: float) -> None:
        nonlocal last
        if stopped.is_set():
            raise Stopped
        if time.monotonic() - last > SECONDS_BETWEEN:
            last = time.monotonic()
            states.put(_side_by_side(pictures.cpu()))

    def work() -> None:
        try:
            states.put(paint(show))
        except Exception as error:
            states.put(error)
        finally:
            states.put(None)
            finished.set()

    threading.Thread(target=work, daemon=True).start()
    try:
        while (state := states.get()) is not None:
            if isinstance(state, Exception):
                raise state
            yield to_pillow(state)
    finally:
        stopped.set()
        finished.wait()


def _side_by_side(pictures: Tensor) -> Tensor:
    """Candidates in a square."""
    from torchvision.utils import make_grid  # 2 seconds, for which the page need not wait

    return make_grid(pictures, nrow=math.ceil(len(pictures) ** 0.5), padding=0) if len(pictures) > 1 else pictures[0]


def tab(offer: Offer) -> None:
    """Lay out the tab."""
    names = offer.models(can("paints"))
    with gr.Row(elem_classes="asked"):
        prompt = gr.Textbox("red heart", label="Prompt", scale=4, min_width=280, max_length=MAX_LETTERS)
        button = gr.Button("Create", variant="primary", scale=1, min_width=120)
        stop = gr.Button("Stop", scale=1, min_width=80)
    gr.Examples([[text] for text in PROMPTS], [prompt], label="Or one of these", api_visibility="private")
    pictures = []
    with gr.Row():
        for name in names:
            with gr.Column(min_width=220):
                pictures.append(
                    gr.Image(
                        label=name,
                        format="png",
                        height=PICTURE_HEIGHT,
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        elem_classes="painting",
                    )
                )
                gr.Markdown(HOW.get(name, ""), elem_classes="lead")
    with gr.Accordion("Settings", open=False):
        painters = gr.CheckboxGroup(names, value=[n for n in names if n in HOW] or names, label="Painters")
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, info="Equal seeds give equal pictures")
            guidance = gr.Slider(1, 10, 3, step=0.5, label="Guidance", info="More follows the words more")
            best_of = gr.Slider(1, MAX_BEST_OF, 4, step=1, label="Best of", info=f"Candidates, of which {RANKER} chooses")
    event = gr.on(
        [button.click, prompt.submit],
        kindly(partial(create, offer)),
        [painters, prompt, seed, guidance, best_of],
        pictures,
        api_name="create",
        **LANE,
    )
    stop.click(None, cancels=[event], api_visibility="private")
