"""The whole tour on the embedded data: build it, use and measure the shipped model, train a small one, write a report."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

import mm
from mm.data.emoji import open_emoji
from mm.data.labels import label_task
from mm.data.speech import speak
from mm.errors import UserError
from mm.evaluation.captioning import normalised
from mm.evaluation.charts import Bar, bar_chart, curve_chart, read_metrics
from mm.evaluation.metrics import Result
from mm.evaluation.report import Charts, Gallery, Section, Shot, Text, Tile, Tiles, Wide, result_table, write_report
from mm.evaluation.sheet import contact_sheet
from mm.evaluation.zero_shot import class_vectors, ranked
from mm.hub import Model, load
from mm.media.image import decode_image
from mm.run.adaptation import evaluate_probe
from mm.run.captioning import caption, evaluate_captioning
from mm.run.config import CONFIGS
from mm.run.evaluation import evaluate_retrieval, evaluate_zero_shot
from mm.run.generation import generate
from mm.run.inference import classify, search
from mm.run.picture_evaluation import evaluate_reconstruction
from mm.run.tasks import evaluate_any_retrieval
from mm.run.training import train
from mm.show import progress_bar, result, save_picture
from mm.types import Source, Tokenizes

MODEL = "emoji-clip"
TOKENIZER = "emoji-vq"
PAINTERS = {
    "emoji-dalle": "token after token",
    "emoji-muse": "in a few parallel steps",
    "emoji-flow": "from noise to the picture in a few steps",
}
PAINTED = ("grinning face", "red heart", "pizza", "penguin", "rocket", "sunflower", "red apple", "green heart")
CANDIDATES = 8
MAKING = 4
"""States of pictures in the making that are shown, beside the first."""
READER = "emoji-albef"
ANSWERER = "emoji-vqa"
ASKED = ("1f436", "1f355", "1f697", "1f33b", "1f3b8", "1f451", "1f40d", "2764")
QUESTIONS = ("what is in the picture?", "is it an animal?", "which group does it belong to?")
CAPTIONER = "emoji-captioner"
TEST = "emoji:test/core"
VALIDATION = "emoji:validation/core"
EXAMPLES = "emoji:train/all-concepts/core/noto/twemoji"
DRAWING_SIDE = 128
"""Pixels of the pictures that are shown; the model sees its own size."""

CLASSIFIED = ("1f436", "1f355", "1f697", "1f33b", "1f3b8", "26bd", "1f480", "2708", "1f451", "1f40d", "1f4a3", "1f382")
"""Concepts whose pictures are classified, by code point."""
LABELS = (
    *("dog face", "cat face", "pizza", "automobile", "sunflower", "guitar", "soccer ball"),
    *("skull", "airplane", "crown", "snake", "bomb", "birthday cake"),
)
QUERIES = ("smiling face", "red heart", "police car", "flower", "clock face", "rotes Herz", "火车")
SAID = ("dog face", "pizza", "red heart", "police car", "sunflower")
LISTENER = "emoji-audio"
SEARCHED = 400
HITS = 8
DESCRIBED = 16


def tour(out: Path) -> Path:
    """Run every stop and write ``report.html`` and its pictures into ``out``; returns the report.

    Finished stops are quick the second time: the data is cached, and the small model's run is resumed where it stopped.
    """
    console = Console()
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    pictures = _data(console)
    console.rule("the shipped model")
    model = load(MODEL)
    sections = [
        _measure(model, console),
        _classify(model, pictures, out, console),
        _search(model, pictures, out, console),
        _hear(pictures, out, console),
        _answers(model, pictures, out),
        _read(console),
        _ask(pictures, console),
        _caption(pictures, console),
        _examples(model, console),
        _tokens(out, console),
        _paint(out, console),
        _train(out, console),
    ]
    seconds = time.monotonic() - started
    report = out / "report.html"
    write_report(
        report,
        "mm quickstart",
        sections,
        lead="Pictures by an artist whose drawings no model here has seen in training, named, found and measured.",
        foot=f"mm {mm.__version__}, {seconds:.0f} s. Art and names: see ATTRIBUTION.md. Written by `mm quickstart`.",
    )
    console.rule("done")
    console.print(f"report: {report.resolve()}  ({seconds:.0f} s)", soft_wrap=True)
    return report


def _data(console: Console) -> Source:
    console.rule("the embedded data")
    with progress_bar("drawing") as progress:
        open_emoji(TEST, 64, progress=progress)
    with progress_bar("drawing larger") as progress:
        source = open_emoji(TEST, DRAWING_SIDE, progress=progress)
    console.print(f"{len(source)} pictures by the test artist, {len(label_task(source).classes)} names")
    return source


def _measure(model: Model, console: Console) -> Section:
    with progress_bar("encoding") as progress:
        zero_shot = evaluate_zero_shot(model, "emoji:test", progress=progress)
        retrieval = evaluate_retrieval(model, TEST, progress=progress)
    result(zero_shot, f"zero-shot: {MODEL} names pictures of an unseen artist", None)
    result(retrieval, f"retrieval: {MODEL}", None)
    return Section(
        "How well the shipped model does on an unseen artist",
        [
            _tiles(zero_shot, retrieval),
            Charts([_bars(zero_shot), _recall_bars(retrieval)]),
            result_table(zero_shot),
            result_table(retrieval),
        ],
    )


def _examples(model: Model, console: Console) -> Section:
    """Names beside examples: the same vectors, asked in two ways, on the validation artist."""
    console.rule("examples instead of names")
    zero_shot = evaluate_zero_shot(model, VALIDATION, baseline="none")
    found = {"names alone (zero-shot)": zero_shot.metrics["top1"]}
    with progress_bar("encoding") as progress:
        neighbours = evaluate_probe(model, EXAMPLES, VALIDATION, method="knn", progress=progress)
    result(neighbours, f"nearest neighbours: {MODEL}, examples by two artists, measured on a third", None)
    found["examples alone (nearest neighbours)"] = neighbours.metrics["top1"]
    bars = [Bar(label, figure.value, figure.low, figure.high) for label, figure in found.items()]
    return Section(
        "Names or examples",
        [
            Text(
                "The model's vectors need no further training: examples by two artists of its training name a third artist's."
            ),
            Charts([bar_chart(bars, title="Top-1 on the validation artist")]),
        ],
    )


def _read(console: Console) -> Section:
    """Candidates by vectors, put in a new order by reading each pair."""
    console.rule("pictures read with texts")
    with progress_bar("reading pairs") as progress:
        measured = evaluate_any_retrieval(READER, TEST, progress=progress)
    result(measured, f"retrieval in two stages: {READER}", None)
    bars = [
        Bar(f"{direction.replace('_', ' ')}, {label}", figure.value, figure.low, figure.high, strong=not stage)
        for direction in ("image_to_text", "text_to_image")
        for stage, label in (("contrastive_", "by vectors"), ("", "each candidate read"))
        if (figure := measured.metrics[f"{stage}{direction}_r1"])
    ]
    words = "Vectors find candidates; a fusion in which words attend to the picture then reads each of them with it."
    return Section(
        "Pictures read with texts",
        [Text(words), Charts([bar_chart(bars, title="R@1 among the unseen artist's pictures")]), result_table(measured)],
    )


def _ask(pictures: Source, console: Console) -> Section:
    """Questions about pictures."""
    console.rule("questions about pictures")
    model, shots = load(ANSWERER), []
    rows = {pictures.fields(row)["key"]: row for row in range(len(pictures))}
    for row in [rows[key] for key in ASKED if key in rows]:
        image = _picture(pictures, row)
        answers = [model.answer(image, question, k=1).answers[0] for question in QUESTIONS]
        console.print(f"  {pictures.fields(row)['name']:22} {', '.join(answers)}")
        shots.append(Shot(image, answers[0], [f"{q} {a}" for q, a in zip(QUESTIONS[1:], answers[1:], strict=True)]))
    return Section("Questions about pictures", [Text(f"First: {QUESTIONS[0]}"), Gallery(shots)])


def _caption(pictures: Source, console: Console) -> Section:
    """Pictures in words of two languages, chosen by the writer alone."""
    console.rule("pictures in words")
    with progress_bar("writing") as progress:
        measured = evaluate_captioning(CAPTIONER, TEST, progress=progress)
    result(measured, f"captioning: {CAPTIONER}", None)
    model = load(CAPTIONER)
    rows = list(range(0, len(pictures), max(1, len(pictures) // DESCRIBED)))[:DESCRIBED]
    images = [_picture(pictures, row) for row in rows]
    english, chinese = (caption(model, images, language=language) for language in ("en", "zh"))
    shots = []
    for row, image, en, zh in zip(rows, images, english, chinese, strict=True):
        truth = pictures.fields(row)["name"]
        console.print(f"  {truth:28} {en.text}, {zh.text}")
        shots.append(Shot(image, en.text, [zh.text, f"it is: {truth}"], right=normalised(en.text) == normalised(truth)))
    labels = {"exact": "the captioner", "neighbour_exact": "nearest training picture by vectors", "baseline_exact": "by pixels"}
    bars = [
        Bar(label, figure.value, figure.low, figure.high, strong=name == "exact")
        for name, label in labels.items()
        if (figure := measured.metrics.get(name))
    ]
    return Section(
        "Pictures in words",
        [
            Charts([bar_chart(bars, title="Caption is the exact name, an unseen artist")]),
            Gallery(shots),
            result_table(measured),
        ],
    )


def _tokens(out: Path, console: Console) -> Section:
    """Pictures through 64 tokens each and back, above them the originals."""
    console.rule("pictures as tokens")
    model = load(TOKENIZER)
    measured = evaluate_reconstruction(model, TEST)
    result(measured, f"reconstruction: {TOKENIZER} on an unseen artist", None)
    tokenizer, source = model.system, open_emoji(TEST, 64)
    assert isinstance(tokenizer, Tokenizes)
    rows = {source.fields(row)["key"]: row for row in range(len(source))}
    originals = model.processor.images([source.read(rows[key]).media["image"] for key in CLASSIFIED if key in rows])
    made = tokenizer.decode(tokenizer.encode(originals))
    sheet = contact_sheet([*originals, *made], columns=len(originals), cell=96, title="mm eval reconstruction")
    save_picture(sheet, out / "tokens.png")
    grid, psnr = " x ".join(map(str, tokenizer.grid)), measured.metrics["psnr"].show()[0]
    words = f"Above the drawings, below what {grid} tokens of {tokenizer.vocab_size} codes keep of them: {psnr} dB."
    return Section("Pictures as tokens, the words of picture generators", [Text(words), Wide(sheet, words)])


def _paint(out: Path, console: Console) -> Section:
    """Pictures of words by all painters, each the best of a few candidates, and pictures in the making."""
    console.rule("pictures of words")
    rows: list[Any] = []
    for name in PAINTERS:
        with progress_bar(name) as progress:
            rows += generate(name, PAINTED, best_of=CANDIDATES, ranker=MODEL, progress=progress)
    sheet = contact_sheet(
        [one.pixels for one in rows], [one.prompt for one in rows], columns=len(PAINTED), cell=96, title="mm generate"
    )
    save_picture(sheet, out / "painted.png")
    words = "; ".join(f"by {name}, {how}" for name, how in PAINTERS.items())
    words = f"From above: {words}. Best of {CANDIDATES} by {MODEL}."
    console.print(words)
    states: list[list[Any]] = []
    *_, name = PAINTERS
    made = generate(name, PAINTED, on_picture=lambda pictures, _: states.append(list(pictures)))
    shown = [states[round(at * (len(states) - 1) / MAKING)] for at in range(MAKING + 1)]
    making = contact_sheet([one for state in shown for one in state], columns=len(made), cell=96, title="mm generate --partial")
    save_picture(making, out / "making.png")
    told = f"What {name} expects of the picture, from noise (above) to the end (below)."
    return Section("Pictures of words", [Text(words), Wide(sheet, words), Text(told), Wide(making, told)])


def _tiles(zero_shot: Result, retrieval: Result) -> Tiles:
    top1, top5, pixels = (zero_shot.metrics[name].show() for name in ("top1", "top5", "baseline_top1"))
    found = retrieval.metrics["text_to_image_r10"].show()
    return Tiles(
        [
            Tile(top1[0], "top-1 of all core names", f"95 %: {top1[1]}; pixels alone: {pixels[0]}"),
            Tile(top5[0], "top-5 of all core names", f"95 %: {top5[1]}"),
            Tile(found[0], "right picture among ten", f"text to image, 95 %: {found[1]}"),
        ]
    )


def _bars(measured: Result) -> Any:
    names = {
        "top1": "all core concepts",
        "top1_seen": "concepts seen in training, by other artists",
        "top1_compositional": "new combinations of known words",
        "top1_novel": "new concepts",
        "baseline_top1": "nearest neighbour on pixels (its index holds all concepts)",
    }
    present = {name: label for name, label in names.items() if name in measured.metrics}
    bars = [
        Bar(label, measured.metrics[name].value, measured.metrics[name].low, measured.metrics[name].high, strong=name == "top1")
        for name, label in present.items()
    ]
    return bar_chart(bars, title="Zero-shot top-1, one of all core names")


def _recall_bars(measured: Result) -> Any:
    bars = [
        Bar(f"{direction.replace('_', ' ')}, R@{k}", interval.value, interval.low, interval.high, strong=k == 1)
        for direction in ("image_to_text", "text_to_image")
        for k in (1, 5, 10)
        if (interval := measured.metrics.get(f"{direction}_r{k}"))
    ]
    return bar_chart(bars, title="Retrieval among the unseen artist's pictures")


def _classify(model: Model, pictures: Source, out: Path, console: Console) -> Section:
    console.rule("classify with your own labels")
    rows = {pictures.fields(row)["key"]: row for row in range(len(pictures))}
    chosen = [rows[key] for key in CLASSIFIED if key in rows]
    images = [_picture(pictures, row) for row in chosen]
    predictions = classify(model, images, LABELS)
    for row, prediction in zip(chosen, predictions, strict=True):
        console.print(f"  {pictures.fields(row)['name']:22} {prediction.labels[0]} {prediction.probabilities[0]:.0%}")
    shots = [
        Shot(
            image,
            prediction.labels[0],
            [f"{label} {p:.0%}" for label, p in list(zip(prediction.labels, prediction.probabilities, strict=True))[:3]],
        )
        for image, prediction in zip(images, predictions, strict=True)
    ]
    save_picture(contact_sheet(images, [shot.caption for shot in shots], title="mm classify"), out / "classify.png")
    return Section("Classify with your own labels", [Text(f"Labels: {', '.join(LABELS)}."), Gallery(shots)])


def _search(model: Model, pictures: Source, out: Path, console: Console) -> Section:
    console.rule("search a folder")
    folder = _folder_of_pictures(pictures, out / "pictures")
    blocks = []
    for number, query in enumerate(QUERIES):
        with progress_bar("indexing") as progress:
            found = search(model, folder, text=query, k=HITS, progress=progress)
        console.print(f"  {query:24} {', '.join(hit.path.stem for hit in found.hits[:4])}")
        images = [decode_image(hit.path.read_bytes()) for hit in found.hits]
        sheet = contact_sheet(images, [hit.path.stem for hit in found.hits], columns=HITS, title=query)
        save_picture(sheet, out / f"search-{number}.png")
        blocks.append(Wide(sheet, f"“{query}”, {found.searched} pictures searched"))
    return Section("Search a folder by words", blocks)


def _hear(pictures: Source, out: Path, console: Console) -> Section:
    """Spoken names find pictures, where there is a voice to speak them."""
    console.rule("search by a spoken word")
    folder, blocks = _folder_of_pictures(pictures, out / "pictures"), []
    listener = load(LISTENER)
    for number, words in enumerate(SAID):
        try:
            said = speak(words)
        except UserError as error:
            console.print(f"  left out: {error}")
            return Section("Search a folder by a spoken word", [Text(f"Left out: {error}.")])
        (out / f"said-{number}.flac").write_bytes(said)
        found = search(listener, folder, audio=said, k=HITS)
        console.print(f"  {words:24} {', '.join(hit.path.stem for hit in found.hits[:4])}")
        images = [decode_image(hit.path.read_bytes()) for hit in found.hits]
        sheet = contact_sheet(images, [hit.path.stem for hit in found.hits], columns=HITS, title=f"said: {words}")
        blocks.append(Wide(sheet, f"“{words}”, said by a synthetic voice that {LISTENER} never heard in training"))
    return Section("Search a folder by a spoken word", blocks)


def _folder_of_pictures(pictures: Source, folder: Path) -> Path:
    """Some of the test artist's pictures as ordinary files, named after what they show."""
    folder.mkdir(exist_ok=True)
    step = max(1, len(pictures) // SEARCHED)
    for row in range(0, len(pictures), step):
        name = "".join(c if c.isalnum() else "-" for c in pictures.fields(row)["name"])
        path = folder / f"{name}.png"
        if not path.exists():
            path.write_bytes(pictures.read(row).media["image"])
    return folder


def _answers(model: Model, pictures: Source, out: Path) -> Section:
    """A row of typical answers, right and wrong ones."""
    rows = list(range(0, len(pictures), max(1, len(pictures) // 24)))[:24]
    images = [_picture(pictures, row) for row in rows]
    names = label_task(pictures).classes
    order, _ = ranked(model.embed_images(images), class_vectors(model.embed_texts, names, model.processor.templates), 3)
    shots = []
    for row, image, best in zip(rows, images, order.tolist(), strict=True):
        truth = pictures.fields(row)["name"]
        answers = [names[column] for column in best]
        shots.append(Shot(image, answers[0], [f"it is: {truth}", f"then: {', '.join(answers[1:])}"], right=answers[0] == truth))
    sheet = contact_sheet(
        images, [shot.caption for shot in shots], right=[shot.right for shot in shots], title="mm eval zero-shot"
    )
    save_picture(sheet, out / "answers.png")
    return Section("What it answers, one of all core names", [Gallery(shots)])


def _train(out: Path, console: Console) -> Section:
    console.rule("train a small CLIP from scratch")
    run = out / "small-clip"
    outcome = train(CONFIGS / "quickstart.yaml", out=run)
    rows = read_metrics(run / "metrics.jsonl")
    figures = ", ".join(f"{name} {value:.1%}" for name, value in outcome.metrics.items())
    console.print(f"step {outcome.step}: {figures}")
    scored = {name: _curve(rows, name) for name in ("r1", "top1")}
    charts = [
        curve_chart({"training loss": _curve(rows, "loss")}, title="Contrastive loss"),
        curve_chart(scored, title="Validation artist, fractions"),
    ]
    return Section(
        "A small CLIP from scratch, just now",
        [Text(f"{outcome.step} steps in {outcome.seconds:.0f} s. Validation artist: {figures}."), Charts(charts)],
    )


def _curve(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Points of a figure in metrics.jsonl, whether it stands at the top or among the validation figures."""
    points = []
    for row in rows:
        value = row.get(name, row.get("validation", {}).get(name))
        if value is not None:
            points.append((row["step"], value))
    return points


def _picture(source: Source, row: int) -> Tensor:
    return decode_image(source.read(row).media["image"])
