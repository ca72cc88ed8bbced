"""Turn finished runs of one configuration, a seed each, into a shipped model with its system card.

The run that is best on the validation artist ships. The test artist is read here, once, by the commands that the card quotes.

    python tools/ship.py emoji-clip runs/queue-0 runs/queue-1 --first-stages runs/clip-0 runs/clip-1
    python tools/ship.py emoji-vq runs/vq
"""

import argparse
import json
import platform
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import mm
from mm.data.emoji import open_emoji
from mm.evaluation.captioning import normalised
from mm.evaluation.charts import read_metrics
from mm.evaluation.heat import heat_over
from mm.evaluation.metrics import Interval, Result
from mm.evaluation.sheet import contact_sheet
from mm.hub import ASSETS, Model
from mm.run.captioning import caption
from mm.run.card import efficiency_rows
from mm.run.generation import generate
from mm.run.memory import remembering
from mm.show import save_picture
from mm.types import Tokenizes

LICENCES = """The weights learned from art under Apache-2.0 (Noto), CC-BY-4.0 (Twemoji), MIT (Fluent Emoji, flat) and
CC-BY-SA-4.0 (OpenMoji), and from names under Unicode-3.0 (CLDR); credits in ATTRIBUTION.md. The weights are given under
CC-BY-SA-4.0, the strictest of these."""


SHOWN = "emoji:test/core"
SHEET_COLUMNS = 10
PROMPTS = (
    *("grinning face", "dog face", "pizza", "red heart", "rocket", "sunflower", "crown", "soccer ball", "penguin", "red apple"),
    *("crying face", "cat face", "hamburger", "blue heart", "automobile", "cherry blossom", "gem stone", "guitar", "snake"),
    *("tangerine", "nerd face", "ghost", "police car", "green heart", "cactus", "hourglass done", "bomb", "owl", "ice cream"),
    "blue apple",
)
JUDGED = {"judge": "emoji-judge", "limit": 100, "best_of": 8, "train": "emoji:train/core"}
UNCHOSEN = {"judge": "emoji-judge", "limit": 1000, "best_of": 1}
"""As many pictures as a distance between sets needs, the first one of each prompt."""


@dataclass(frozen=True)
class Measurement:
    """One evaluation: its name for `mm.evaluate`, the data, options, and what is appended to the names of its figures."""

    task: str
    data: str
    options: dict[str, Any] = field(default_factory=dict)
    suffix: str = ""

    def __call__(self, model: Model) -> Result:
        measured = mm.evaluate(self.task, model, self.data, **self.options)
        return Result({name + self.suffix: figure for name, figure in measured.metrics.items()}, measured.protocol)

    def command(self, model: str) -> str:
        told = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in self.options.items()}
        options = "".join(f" --{name.replace('_', '-')} {value}" for name, value in told.items())
        return f"mm eval {self.task} {model} --data {self.data}{options}"


@dataclass(frozen=True)
class Shipment:
    """What is known of a model before it is measured.

    Args:
        summary: One line.
        configs: Configurations in the order of their stages.
        train: The source that it learned from.
        data: The same in words.
        headline: Figure that chooses among seeds, on the first validation measurement.
        validation: Measured for every seed.
        test: Measured on the artist that nothing was chosen on; for every seed.
        seeds: Figures listed for every seed, of the test measurements.
        limits: What it cannot do.
        sheet: Draws pictures that show what it does, where there is something to show.
        base: The shipped model that it was trained from; weights that are still its own are not stored again.
        evaluation: How it is measured where nothing else is asked for, by task.
        remembers: Source of the texts that it knows by heart, see `mm.run.memory`.
    """

    summary: str
    configs: tuple[str, ...]
    train: str
    data: str
    headline: str
    validation: tuple[Measurement, ...]
    test: tuple[Measurement, ...]
    seeds: tuple[str, ...]
    limits: str
    sheet: Callable[[Model], Image.Image] | None = None
    base: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    remembers: str | None = None


def reconstructions(model: Model) -> Image.Image:
    """Pictures by the test artist, each above what its tokens keep of it."""
    tokenizer, source = model.system, open_emoji(SHOWN, model.processor.image_spec.size)
    if not isinstance(tokenizer, Tokenizes):
        raise TypeError(f"{model.name} has no tokens")
    step = len(source) // SHEET_COLUMNS
    real = model.processor.images([source.read(row * step).media["image"] for row in range(SHEET_COLUMNS)])
    made = tokenizer.decode(tokenizer.encode(real))
    return contact_sheet([*real, *made], columns=SHEET_COLUMNS, cell=96)


def paintings(model: Model) -> Image.Image:
    """The best of 8 of a few prompts, new combinations of words among them."""
    made = generate(model, PROMPTS, best_of=8, ranker="emoji-clip")
    return contact_sheet([one.pixels for one in made], PROMPTS, columns=SHEET_COLUMNS, cell=96)


CHINESE = {
    "红心": "red heart",
    "披萨": "pizza",
    "火箭": "rocket",
    "企鹅": "penguin",
    "向日葵": "sunflower",
    "汽车": "automobile",
    "苹果": "apple",
    "绿心": "green heart",
    "吉他": "guitar",
    "皇冠": "crown",
    "月亮": "moon",
    "雪人": "snowman",
}
OF_FLOW = (
    *PROMPTS[:-1],
    *("yellow heart", "purple heart", "star", "full moon", "snowman", "tulip", "watermelon", "strawberry", "carrot"),
    *("mushroom", "fire", "umbrella", "pineapple"),
    *("blue apple", "green cat face", "purple rocket", "red penguin", "orange car", "pink tree", "black heart with crown"),
    *("yellow whale", "blue pizza", "green hamburger"),
    *CHINESE,
)
"""64: seen concepts, new combinations of words, Chinese names."""


def many_paintings(model: Model) -> Image.Image:
    """The best of 8 of 64 prompts; Chinese ones are captioned in English, for which every machine has letters."""
    made = generate(model, OF_FLOW, best_of=8, ranker="emoji-clip")
    told = [f"{CHINESE[prompt]} (asked in Chinese)" if prompt in CHINESE else prompt for prompt in OF_FLOW]
    return contact_sheet([one.pixels for one in made], told, columns=SHEET_COLUMNS, cell=96)


GROUNDED = ("heart with arrow", "house with garden", "police car", "wine glass", "broken heart")
GROUNDED += ("crescent moon", "sun with face", "tropical fish", "cooked rice", "fork and knife")


def heats(model: Model) -> Image.Image:
    """Pictures by the test artist, each with the heat of two words of its name."""
    source, panels, captions = open_emoji(SHOWN, 128), [], []
    rows = {source.fields(row)["name"]: row for row in range(len(source))}
    for name in GROUNDED:
        picture = source.read(rows[name]).media["image"]
        found, view = model.ground(picture, name), model.processor.view(picture, 96)
        words = {word: heat for word, heat in zip(found.words, found.heat, strict=True) if word not in ("with", "and")}
        shown = list(words.items())[:2]
        panels += [view, *(heat_over(view, heat) for _, heat in shown)]
        captions += [f"{name} {found.match:.0%}", *(word for word, _ in shown)]
    return contact_sheet(panels, captions, columns=6, cell=96)


def captions(model: Model) -> Image.Image:
    """Twenty pictures by the test artist with what is written of them."""
    source = open_emoji("emoji:test/core", 96)
    rows = range(0, len(source), len(source) // 20)[:20]
    pictures = [source.read(row).media["image"] for row in rows]
    told = [one.text for one in caption(model, pictures)]
    right = [normalised(text) == normalised(source.fields(row)["name"]) for text, row in zip(told, rows, strict=True)]
    return contact_sheet([model.processor.view(picture, 96) for picture in pictures], told, right=right, columns=5, cell=120)


PAINTERS: dict[str, Any] = {
    "train": "emoji:train/core",
    "data": "emoji:train/core: artists noto, twemoji, fluent-flat, openmoji; seen concepts only",
    "headline": "clip_rank5",
    "validation": (Measurement("generation", "emoji:validation/core/seen", JUDGED),),
    "test": (
        Measurement("generation", "emoji:test/core/seen", JUDGED),
        Measurement("generation", "emoji:test/core/compositional", JUDGED, "_compositional"),
        Measurement("generation", "emoji:test/core", UNCHOSEN, "_unchosen"),
    ),
    "seeds": ("clip_rank5", "clip_rank5_real", "copies"),
    "limits": """- It knows the names of about 1,290 concepts; new combinations of words work now and then, new words do not.
- Fine detail is what 64 tokens hold: see `emoji-vq`.
- `copies` says how often a picture is as near to a training picture as few real ones are.""",
    "sheet": paintings,
}

BLURRED = """
- The judge sees more than people do: hearts, faces, cars and fruit come out well, many finer things (guitar, owl, dog face) are
  blurred or odd, Chinese names less surely than English ones. Choosing by `emoji-clip` favours what such networks see."""

SHIPMENTS = {
    "emoji-clip": Shipment(
        summary="CLIP that knows emoji-like pictures by name, in English and nine other languages",
        configs=("configs/clip.yaml", "configs/clip_queue.yaml"),
        train="emoji:train/core",
        data="emoji:train/core: artists noto, twemoji, fluent-flat, openmoji; seen concepts only",
        headline="top1",
        validation=(Measurement("zero-shot", "emoji:validation", {"baseline": "none"}),),
        test=(Measurement("zero-shot", "emoji:test"), Measurement("retrieval", "emoji:test/core")),
        seeds=("top1", "top5", "image_to_text_r1", "text_to_image_r1"),
        limits="""- It knows drawings of the kind of emoji, cut to their content on a plain background, not photographs.
- 1,287 concepts were seen in training. Names of other concepts are understood only as far as their words occurred in seen
  names (`top1_compositional`); concepts whose words are new (`top1_novel`) are mostly missed.
- Other languages were a tenth of the captions: words of seen names are understood, how well was not measured.
- Text of more than 24 tokens is cut.""",
    ),
    "emoji-vq": Shipment(
        summary="Picture tokenizer for emoji-like pictures: 64 px as 8 x 8 tokens of 1,000 codes",
        configs=("configs/vq.yaml", "configs/vq_decoder.yaml"),
        train="emoji:train",
        data="emoji:train: artists noto, twemoji, fluent-flat, openmoji; seen concepts only",
        headline="psnr",
        validation=(Measurement("reconstruction", "emoji:validation/core"),),
        test=(Measurement("reconstruction", "emoji:test/core"),),
        seeds=("psnr", "ssim", "codebook_usage"),
        limits="""- It knows flat drawings on a plain, mostly white background; photographs and text come back blurred.
- Trained for the squared error alone, it gives the mean of what it is unsure of: thin lines and small faces are soft.""",
        sheet=reconstructions,
    ),
    "emoji-judge": Shipment(
        summary="A second CLIP that judges generated pictures; it shares nothing with what conditions or ranks",
        configs=("configs/judge.yaml",),
        train="emoji:train/core",
        data="emoji:train/core: artists noto, twemoji, fluent-flat, openmoji; seen concepts only",
        headline="top5",
        validation=(Measurement("zero-shot", "emoji:validation", {"baseline": "none"}),),
        test=(Measurement("zero-shot", "emoji:test", {"baseline": "none"}),),
        seeds=("top1", "top5"),
        limits="""- For judging only: `emoji-clip` is the better model.
- It knows drawings of the kind of emoji, cut to their content on a plain background.""",
    ),
    "emoji-dalle": Shipment(
        summary="Paints emoji of their names, one picture token after the other",
        configs=("configs/dalle.yaml",),
        **PAINTERS,
    ),
    "emoji-muse": Shipment(
        summary="Paints emoji of their names, all picture tokens at once in a few steps",
        configs=("configs/muse.yaml",),
        **PAINTERS,
    ),
    "emoji-flow": Shipment(
        summary="Paints emoji of their names by flow matching, in English and Chinese",
        configs=("configs/flow.yaml",),
        **PAINTERS | {"sheet": many_paintings, "limits": PAINTERS["limits"] + BLURRED},
    ),
}

RERANKED: dict[str, Any] = {"score": "sum", "itm_weight": 0.35, "top_k": 32}
"""The weight was chosen on the validation artist."""
MATCHED: dict[str, Any] = {"score": "itm", "top_k": 32}

SHIPMENTS |= {
    "emoji-albef": Shipment(
        summary="ALBEF on the towers of emoji-clip: reads a picture with a text and tells whether they match",
        configs=("configs/albef.yaml",),
        train="emoji:train/core",
        data="emoji:train/core: artists noto, twemoji, fluent-flat, openmoji; seen concepts only",
        headline="image_to_text_r1",
        validation=(Measurement("retrieval", "emoji:validation/core", RERANKED),),
        test=(
            Measurement("retrieval", "emoji:test/core", RERANKED),
            Measurement("retrieval", "emoji:test/core", MATCHED, "_itm"),
        ),
        seeds=("image_to_text_r1", "text_to_image_r1", "contrastive_image_to_text_r1", "contrastive_text_to_image_r1"),
        evaluation={"retrieval": RERANKED},
        limits="""- Its towers are those of `emoji-clip`, whose limits it shares.
- Matching alone ranks worse than the vectors of the towers (`image_to_text_r1_itm`): weigh it in the sum.
- Each of its 36 picture tokens has seen most of the picture, so the heat of a word is not a place to rely on.""",
        sheet=heats,
        base="emoji-clip",
    ),
    "emoji-vqa": Shipment(
        summary="Answers questions about emoji-like pictures: what it is, of which group, yes or no",
        configs=("configs/albef_vqa.yaml",),
        train="emoji-vqa:train",
        data="emoji-vqa:train: questions about artists noto, twemoji, fluent-flat, openmoji; seen concepts only",
        headline="accuracy",
        validation=(Measurement("vqa", "emoji-vqa:validation"),),
        test=(Measurement("vqa", "emoji-vqa:test"),),
        seeds=("accuracy", "blind_accuracy"),
        limits="""- It knows the wordings of its training questions and the 1,500 most frequent answers.
- Names are the hardest kind: see `accuracy_name`.""",
        base="emoji-albef",
    ),
}

CAPTIONED: dict[str, Any] = {"best_of": 8, "ranker": "emoji-clip"}

SHIPMENTS |= {
    "emoji-captioner": Shipment(
        summary="Names emoji-like pictures in English and Chinese",
        configs=("configs/captioner.yaml",),
        train="emoji:train/core",
        data="emoji:train/core: artists noto, twemoji, fluent-flat, openmoji; seen concepts only",
        headline="exact",
        validation=(Measurement("captioning", "emoji:validation/core", CAPTIONED),),
        test=(
            Measurement("captioning", "emoji:test/core", CAPTIONED),
            Measurement("captioning", "emoji:test/core", {}, "_greedy"),
            Measurement("captioning", "emoji:test/core", {"language": "zh"}, "_chinese"),
        ),
        seeds=("exact", "exact_greedy", "token_f1", "subgroup"),
        limits="""- Its picture encoder is that of `emoji-albef`, whose limits it shares: drawings on a plain background.
- It says the names of about 1,290 concepts; new combinations of words come now and then, new words do not.
- Chinese names are CLDR's, learned for the same concepts.""",
        sheet=captions,
        base="emoji-albef",
    ),
}

HEARD: dict[str, Any] = {"between": ("audio", "image")}
HEARD_AS_TEXT: dict[str, Any] = {"between": ("audio", "text")}
READ: dict[str, Any] = {"between": ("image", "text")}

SHIPMENTS |= {
    "emoji-audio": Shipment(
        summary="Finds emoji-like pictures, and words, by English speech: a third tower beside those of emoji-clip",
        configs=("configs/imagebind.yaml",),
        train="emoji-speech:train",
        data="emoji-speech:train: names and keywords of seen concepts, spoken by six voices of espeak-ng",
        headline="audio_to_image_r1",
        validation=(Measurement("retrieval", "emoji-speech:validation/core", HEARD),),
        test=(
            Measurement("retrieval", "emoji-speech:test/core", HEARD),
            Measurement("retrieval", "emoji-speech:test/core", READ),
            Measurement("retrieval", "emoji-speech:test/core", HEARD_AS_TEXT),
        ),
        seeds=("audio_to_image_r1", "audio_to_image_r10", "audio_to_text_r1"),
        remembers="emoji:train/core",
        limits="""- The speech is synthetic (espeak-ng), that of the test too, though in an accent it was not trained on; how
  well it hears people was not measured.
- English alone; what is longer than 2.4 s is cut.
- What it hears is drawn towards the names of seen core concepts, which it knows by heart: other words are heard less surely.
- Of concepts whose words are new (`_novel`) it finds what `emoji-clip` finds by the written name, less what is misheard.""",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(SHIPMENTS), help="the model whose facts are written above")
    parser.add_argument("runs", nargs="+", type=Path, help="finished last stages, by seed")
    parser.add_argument("--first-stages", nargs="*", type=Path, default=[], help="the runs that they start from")
    arguments = parser.parse_args()
    shipment = SHIPMENTS[arguments.name]
    loaded = [mm.load(run, precision="fp32") for run in arguments.runs]
    if shipment.remembers:
        loaded = [remembering(model, shipment.remembers) for model in loaded]
    models = [rounded(replace(model, name=arguments.name)) for model in loaded]
    validation = [[measure(model) for measure in shipment.validation] for model in models]
    chosen = max(range(len(models)), key=lambda seed: validation[seed][0].metrics[shipment.headline].value)
    test = [[measure(model) for measure in shipment.test] for model in models]
    run, stages = arguments.runs[chosen], [*arguments.first_stages[chosen : chosen + 1], arguments.runs[chosen]]
    seed = models_seed(run)
    card = {
        "summary": shipment.summary,
        "command": " && ".join(f"mm train {config} train.seed={seed}" for config in shipment.configs),
        "train": shipment.train,
        "data": shipment.data,
        "data_fingerprint": _state(run)["stream"]["fingerprint"],
        "training_seconds": round(sum(_seconds(stage) for stage in stages)),
        "training": [found for stage in stages if (found := _state(stage).get("efficiency"))],
        "hardware": f"{platform.processor() or platform.machine()}, CPU only",
        "versions": {"mm": mm.__version__, "torch": torch.__version__},
        "validation": _joined(validation[chosen]),
        "test": _joined(test[chosen]),
        "seeds": _seeds(shipment, validation, test),
        "licence": "CC-BY-SA-4.0",
    }
    if shipment.remembers:
        last = f"runs/{Path(shipment.configs[-1]).stem}"
        card["command"] += f" && mm remember {last} --data {shipment.remembers} -o {arguments.name}"
        card["remembers"] = models[chosen].card["remembers"]
    if shipment.evaluation:
        card["evaluation"] = shipment.evaluation
    folder = ASSETS / "models" / arguments.name
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    mm.save(models[chosen], fresh, dtype=torch.bfloat16, card=card, base=shipment.base)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    shipped = mm.load(arguments.name, precision="fp32")
    card["validation_as_shipped"] = card["validation"][shipment.headline]
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    page = _page(arguments.name, shipment, card, shipped, validation[chosen], test[chosen])
    if shipment.sheet:
        save_picture(shipment.sheet(shipped), Path(f"docs/images/{arguments.name}.png"))
    Path(f"docs/cards/{arguments.name}.md").write_text(page, encoding="utf-8")
    print(page)


def rounded(model: Model) -> Model:
    """The model with its weights as they will be in the file: every figure is of what ships."""
    with torch.no_grad():
        for tensor in model.system.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
    return model


def models_seed(run: Path) -> int:
    """The seed that a run was trained with."""
    return int(_state(run)["train"]["seed"])


def _state(run: Path) -> dict[str, Any]:
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return json.loads((checkpoint / "state.json").read_text())


def _seconds(run: Path) -> float:
    return max(row.get("seconds", 0.0) for row in read_metrics(run / "metrics.jsonl"))


def _joined(results: list[Result]) -> dict[str, Any]:
    return {name: value for result in results for name, value in result.to_json()["metrics"].items()}


def _seeds(shipment: Shipment, validation: list[list[Result]], test: list[list[Result]]) -> dict[str, dict[str, Any]]:
    """Every seed's headline figures, and their medians."""
    table: dict[str, dict[str, Any]] = {}
    for part, names, measured in (("validation", (shipment.headline,), validation), ("test", shipment.seeds, test)):
        for name in names:
            found = [next(r.metrics[name] for r in results if name in r.metrics) for results in measured]
            values = [interval.value for interval in found]
            table[f"{part}_{name}"] = {"values": values, "median": statistics.median(values), "unit": found[0].unit}
    return table


def _efficiency(card: dict[str, Any]) -> str:
    """Throughput, use of the device, memory, energy of each stage; runs from before these were recorded have none."""
    told = ["; ".join(f"{what}: {value}" for what, value in efficiency_rows(stage)) for stage in card["training"]]
    return "\n".join(f"- {line}" for line in told or ["Throughput and energy were not recorded"])


def _shown(value: float, unit: Any) -> str:
    return Interval(value, value, value, unit).show()[0]


def _table(measured: Result) -> str:
    """Figures with their intervals as a Markdown table, the protocol beneath."""
    rows = [f"| `{name}` | {' | '.join(interval.show())} |" for name, interval in measured.metrics.items()]
    return "\n".join(["| figure | value | 95 % interval |", "|---|---|---|", *rows, "", measured.stamp()])


def _page(
    name: str, shipment: Shipment, card: dict[str, Any], model: Model, validation: list[Result], test: list[Result]
) -> str:
    seeds = "\n".join(
        f"| `{figure}` | {', '.join(_shown(v, e['unit']) for v in e['values'])} | {_shown(e['median'], e['unit'])} |"
        for figure, e in card["seeds"].items()
    )
    parts = {
        artist: "\n\n".join(f"`{m.command(name)}`\n\n{_table(r)}" for m, r in zip(measurements, results, strict=True))
        for artist, measurements, results in (("test", shipment.test, test), ("validation", shipment.validation, validation))
    }
    sheet = f"\n![what it makes](../images/{name}.png)\n" if shipment.sheet else ""
    return f"""# {name}
{sheet}
{card["summary"]}. {model.parameters()["total"]:,} parameters, {model.processor.image_spec.size} px, bf16 weights.

- Trained by `{card["command"]}` on {card["data"]}
  (fingerprint `{card["data_fingerprint"][:16]}`), {card["training_seconds"] / 60:.0f} minutes, {card["hardware"]},
  torch {card["versions"]["torch"]}.
{_efficiency(card)}
- Configuration chosen on the validation artist fxemoji. Shipped: the seed with the best validation `{shipment.headline}`.

## Seeds

| figure | by seed | median |
|---|---|---|
{seeds}

## Test artist emojione, read once for each seed

{parts["test"]}

## Validation artist fxemoji

{parts["validation"]}

All figures are of the weights as they ship, rounded to bf16.

## Limits

{shipment.limits}

## Licences

{LICENCES}
"""


if __name__ == "__main__":
    main()
