"""The ``mm`` command: parses, calls, prints. Everything it does can be done from Python through ``mm`` itself."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mm.errors import UserError

app = typer.Typer(
    name="mm",
    help="A multimodal foundation-model suite: train, evaluate and use models of pictures, sound and text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
eval_app = typer.Typer(no_args_is_help=True, help="Measure a model; every figure comes with its interval and its protocol.")
data_app = typer.Typer(no_args_is_help=True, help="Build, pack, check and index data.")
app.add_typer(eval_app, name="eval")
app.add_typer(data_app, name="data")

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A shipped name (see `mm list`), a run or model folder, ARCHITECTURE/TAG, OWNER/NAME."
    ),
]
DataOption = Annotated[
    str, typer.Option("--data", metavar="SRC", help="emoji:test, a folder, a CSV/JSONL file or a shard pattern.")
]
SourceArgument = Annotated[str, typer.Argument(metavar="SRC", help="A folder, a CSV/JSONL file, a shard pattern, emoji:test.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
ImageFieldOption = Annotated[str | None, typer.Option("--image-field", metavar="COLUMN", help="Column with the picture files.")]
AudioFieldOption = Annotated[str | None, typer.Option("--audio-field", metavar="COLUMN", help="Column with the recordings.")]
TextFieldOption = Annotated[
    str | None, typer.Option("--text-field", metavar="COLUMN", help="Column or field with the captions.")
]
PrecisionOption = Annotated[
    str, typer.Option("--precision", help="auto, fp32 or bf16; auto is bf16 where the hardware has matrix units for it.")
]
GuidanceOption = Annotated[
    float, typer.Option("--guidance", min=0, help="How closely the prompt is followed; 1 is no guidance.")
]
GuidanceIntervalOption = Annotated[
    tuple[float, float],
    typer.Option("--guidance-interval", metavar="LOW HIGH", help="Part of the progress, in 0..1, in which guidance acts."),
]
GuidanceRampOption = Annotated[
    bool,
    typer.Option("--guidance-ramp", help="Let guidance grow with the steps, for generators that choose many tokens at once."),
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0, help="Below 1 safer, above 1 bolder; 0 the likeliest.")
]
CaptionTemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", min=0, help="0 writes the likeliest words; above 0 draws them. 1 where several are wanted."),
]
LanguageOption = Annotated[
    str | None, typer.Option("--language", metavar="NAME", help="One that the model can begin with; default: its first.")
]
PromptOption = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Text to go on from instead.")]
BeamsOption = Annotated[
    int | None,
    typer.Option("--beams", min=1, help="Continuations kept at each step; default: 1, or all candidates.", show_default=False),
]
SpeechBeamsOption = Annotated[
    int, typer.Option("--beams", min=1, help="Texts kept from frame to frame; 1 takes the likeliest path.")
]
FreeOption = Annotated[bool, typer.Option("--free", help="Write answers, which need not be among the known ones.")]
LengthPenaltyOption = Annotated[
    float, typer.Option("--length-penalty", help="Beams are compared by log-likelihood over length to this power.")
]
NoRepeatOption = Annotated[
    int, typer.Option("--no-repeat", min=0, help="No run of so many tokens is written twice; 0: no rule.")
]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest caption.")]
CaptionBestOfOption = Annotated[
    int, typer.Option("--best-of", min=1, help="Candidates of each caption; the best by likelihood and ranker is taken.")
]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many likeliest tokens; 0 for all.")]
TopPOption = Annotated[float, typer.Option("--top-p", min=0, max=1, help="Draw from the likeliest tokens of this probability.")]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Steps of generators that do not write token by token.")]
SolverOption = Annotated[
    str,
    typer.Option(
        "--solver",
        metavar="NAME",
        help="From noise to data: euler, heun, dpm++, lcm or a scheduler of diffusers such as DDIM; default: the model's.",
        show_default=False,
    ),
]
ShiftOption = Annotated[float, typer.Option("--shift", help="Above 1 spends more of the steps on noise.")]
RescaleOption = Annotated[float, typer.Option("--rescale", help="Bring back the spread that guidance adds: 0 for none to 1.")]
ThresholdOption = Annotated[
    float, typer.Option("--threshold", help="Dynamic thresholds for models of pixels, e.g. 0.995; 0 for none.")
]
CacheOption = Annotated[bool, typer.Option("--cache/--no-cache", help="Remember the vectors of this model and source.")]


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Options that precede every command."""
    if version:
        from mm import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")] = Path("runs/quickstart"),
) -> None:
    """The whole tour on the embedded data, with a report (HTML and PNG)."""
    from mm.quickstart import tour

    tour(out)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="E.g. data.train=photos train.steps=500")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="RUN", help="Run folder; default runs/NAME.")] = None,
) -> None:
    """Train a system. Called again with the same run folder, it resumes; works unchanged under torchrun."""
    from mm import show
    from mm.run.training import train as run_training
    from mm.training.parallel import environment

    outcome = run_training(config, overrides or [], out=out)
    rank, _ = environment()
    if rank == 0:
        show.trained(outcome)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="E.g. train.batch_size=4096")] = None,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", help="Accelerators to share the training.")] = 1,
    device: Annotated[
        str, typer.Option("--device", help="b200, h200, h100, a100-80, l40s, l4, rtx-4090, mi300x ..., or cpu: this machine.")
    ] = "h100",
    mfu: Annotated[
        float | None,
        typer.Option("--mfu", help="Share of the peak to reckon with; default: estimated by kernel.", show_default=False),
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", min=0, help="Dollars an hour of one device; default: its usual one.")
    ] = None,
    read_data: Annotated[
        bool, typer.Option("--data/--no-data", help="Open the data, or plan by the shapes of the largest batch.")
    ] = True,
    json_file: JsonOption = None,
) -> None:
    """Parameters, FLOPs, memory, layout, speed and cost of a training, before paying for it."""
    from mm import show
    from mm.run.plan import plan as run_plan

    show.check_outputs(None, json_file)
    with show.progress_bar("planning"):
        found = run_plan(config, overrides or [], processes=gpus, device=device, mfu=mfu, price=price, read_data=read_data)
    show.planned(found, json_file)


@eval_app.command("zero-shot")
def eval_zero_shot(
    model: ModelArgument,
    data: DataOption,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names, one a line; default: the source's.")
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="FIELD", help="Field with the class: cls, txt or a JSON key.")] = None,
    template: Annotated[list[str] | None, typer.Option(help="Prompt with {} for the name; repeat for an ensemble.")] = None,
    image_field: ImageFieldOption = None,
    audio_field: AudioFieldOption = None,
    baseline: Annotated[str | None, typer.Option(metavar="SRC", help="Source of the pixel baseline, or 'none'.")] = None,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    cache: CacheOption = True,
) -> None:
    """Zero-shot classification: top-1, top-5, mean per class, beside nearest neighbour on pixels."""
    from mm import show
    from mm.data.labels import read_classes
    from mm.run.evaluation import evaluate_zero_shot

    with show.progress_bar("encoding") as progress:
        result = evaluate_zero_shot(
            model,
            data,
            classes=read_classes(classes) if classes else None,
            label=label,
            image_field=image_field,
            audio_field=audio_field,
            templates=template,
            baseline=baseline,
            device=device,
            precision=precision,
            cache=cache,
            progress=progress,
        )
    show.result(result, f"zero-shot: {model} on {data}", json_file)


@eval_app.command("retrieval")
def eval_retrieval(
    model: ModelArgument,
    data: DataOption,
    image_field: ImageFieldOption = None,
    audio_field: AudioFieldOption = None,
    text_field: TextFieldOption = None,
    between: Annotated[
        str, typer.Option(metavar="A,B", help="The two sides: image,text or audio,text or audio,image.")
    ] = "image,text",
    score: Annotated[
        str | None,
        typer.Option(
            help="order of the candidates of models that embed and match: itm, itc or sum; by the model's card, else itm",
            show_default=False,
        ),
    ] = None,
    itm_weight: Annotated[
        float | None,
        typer.Option(
            "--itm-weight", min=0, help="Of the logit of matching in the sum; by the card, else 1.", show_default=False
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Candidates of each query that such models read; by the card, else 128.", show_default=False),
    ] = None,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    cache: CacheOption = True,
) -> None:
    """Retrieval both ways between pictures, texts or recordings: R@1, R@5, R@10, median rank, with all captions of a picture.

    A model that both embeds and matches is measured in two stages: contrastive top-k, then re-ranked by reading each pair.
    """
    from mm import show
    from mm.run.tasks import evaluate_any_retrieval

    with show.progress_bar("encoding") as progress:
        result = evaluate_any_retrieval(
            model,
            data,
            between=tuple(side.strip() for side in between.split(",")),  # pyright: ignore[reportArgumentType] - it looks itself
            image_field=image_field,
            audio_field=audio_field,
            text_field=text_field,
            score=score,
            itm_weight=itm_weight,
            top_k=top_k,
            device=device,
            precision=precision,
            cache=cache,
            progress=progress,
        )
    show.result(result, f"retrieval: {model} on {data}", json_file)


@eval_app.command("compositional")
def eval_compositional(
    model: ModelArgument,
    data: Annotated[str, typer.Option("--data", metavar="SRC", help="winoground:FOLDER or sugarcrepe:FOLDER.")],
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    cache: CacheOption = True,
) -> None:
    """Captions that differ in the order or in one of their words: Winoground's scores, SugarCrepe's accuracies."""
    from mm import show
    from mm.run.evaluation import evaluate_compositional

    with show.progress_bar("encoding") as progress:
        result = evaluate_compositional(model, data, device=device, precision=precision, cache=cache, progress=progress)
    show.result(result, f"compositional: {model} on {data}", json_file)


@eval_app.command("probe")
def eval_probe(
    model: ModelArgument,
    train: Annotated[str, typer.Option("--train", metavar="SRC", help="Labelled examples.")],
    data: DataOption,
    method: Annotated[
        str, typer.Option(help="linear, knn, tip (names and examples) or prompt (learned words before the name).")
    ] = "linear",
    label: Annotated[str | None, typer.Option(metavar="FIELD", help="Field with the class.")] = None,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    cache: CacheOption = True,
) -> None:
    """A classifier on the model's vectors, taught by examples: how good are the vectors for this task?"""
    from mm import show
    from mm.run.adaptation import evaluate_probe

    with show.progress_bar("encoding") as progress:
        result = evaluate_probe(
            model,
            train,
            data,
            method=method,
            label=label,
            device=device,
            precision=precision,
            cache=cache,
            progress=progress,
        )
    show.result(result, f"{method} probe: {model} on {data}", json_file)


@eval_app.command("reconstruction")
def eval_reconstruction(
    model: ModelArgument,
    data: DataOption,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Pictures to tokens and back: PSNR, SSIM, how many codes are used."""
    from mm import show
    from mm.run.picture_evaluation import evaluate_reconstruction

    with show.progress_bar("reconstructing") as progress:
        result = evaluate_reconstruction(model, data, device=device, precision=precision, progress=progress)
    show.result(result, f"reconstruction: {model} on {data}", json_file)


@eval_app.command("vqa")
def eval_vqa(
    model: ModelArgument,
    data: Annotated[
        str, typer.Option("--data", metavar="SRC", help="emoji-vqa:test, vqav2:FOLDER, or a table with question and answer.")
    ],
    train: Annotated[
        str | None, typer.Option("--train", metavar="SRC", help="Questions that blind guesses learn from, or 'none'.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")] = None,
    free: FreeOption = False,
    image_field: ImageFieldOption = None,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Questions about pictures: VQA v2's accuracy by kind, beside the usual answers without looking."""
    from mm import show
    from mm.run.answering import evaluate_vqa

    with show.progress_bar("answering") as progress:
        result = evaluate_vqa(
            model,
            data,
            train=train,
            limit=limit,
            free=free,
            image_field=image_field,
            device=device,
            precision=precision,
            progress=progress,
        )
    show.result(result, f"vqa: {model} on {data}", json_file)


@eval_app.command("captioning")
def eval_captioning(
    model: ModelArgument,
    data: DataOption,
    language: LanguageOption = None,
    prompt: PromptOption = None,
    label: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field with the right captions, such as names.zh, or txt.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Had no part in writing; for emoji emoji-judge, or 'none'.")
    ] = None,
    neighbour: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Finds the nearest training picture; for emoji emoji-clip, or 'none'.")
    ] = None,
    train: Annotated[
        str | None, typer.Option("--train", metavar="SRC", help="Captions that baselines know, or 'none' for no baselines.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many samples.")] = None,
    beams: BeamsOption = None,
    temperature: CaptionTemperatureOption = None,
    top_p: TopPOption = 1.0,
    max_tokens: MaxTokensOption = 32,
    length_penalty: LengthPenaltyOption = 1.0,
    no_repeat: NoRepeatOption = 0,
    best_of: CaptionBestOfOption = 1,
    ranker: Annotated[str, typer.Option(metavar="MODEL", help="Has a say in the choice among candidates.")] = "emoji-clip",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    image_field: ImageFieldOption = None,
    text_field: TextFieldOption = None,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    cache: CacheOption = True,
) -> None:
    """Captions against what people said: exact match, BLEU, ROUGE-L, CIDEr, beside captions of the nearest known pictures."""
    from mm import show
    from mm.run.captioning import evaluate_captioning

    show.check_outputs(json_file=json_file)
    with show.progress_bar("writing") as progress:
        result = evaluate_captioning(
            model,
            data,
            language=language,
            prompt=prompt,
            label=label,
            judge=judge,
            neighbour=neighbour,
            train=train,
            limit=limit,
            decoding=_decoding(1, best_of, beams, temperature, top_p, max_tokens, length_penalty, no_repeat),
            best_of=best_of,
            ranker=ranker if best_of > 1 else None,
            seed=seed,
            image_field=image_field,
            text_field=text_field,
            device=device,
            precision=precision,
            cache=cache,
            progress=progress,
        )
    show.result(result, f"captioning: {model} on {data}", json_file)


@eval_app.command("few-shot")
def eval_few_shot(
    model: ModelArgument,
    data: DataOption,
    pool: Annotated[str | None, typer.Option("--pool", metavar="SRC", help="Where the examples come from.")] = None,
    ways: Annotated[int, typer.Option("--ways", help="Concepts of an episode.")] = 2,
    shots: Annotated[str, typer.Option("--shots", help="Numbers of examples of each concept.")] = "0,1,2,4",
    repeats: Annotated[int, typer.Option("--repeats", help="How often all examples are shown.")] = 1,
    draws: Annotated[int, typer.Option("--draws", help="Episodes of each query picture.")] = 1,
    real_names: Annotated[
        bool, typer.Option("--real-names", help="Call concepts by their names, not by made-up ones.")
    ] = False,
    rices: Annotated[
        str | None, typer.Option("--rices", metavar="MODEL", help="Show the pictures most similar to the query, by this model.")
    ] = None,
    template: Annotated[str, typer.Option("--template", help="Text behind a picture, {} being the name.")] = "{}",
    label: Annotated[str | None, typer.Option("--label", metavar="FIELD", help="Field with the name.")] = None,
    apart: Annotated[
        str | None, typer.Option("--apart", metavar="FIELD", help="Field in which examples differ from the query.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many queries, drawn at random.")] = None,
    image_field: ImageFieldOption = None,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Naming a picture after examples in the prompt, by number of shots, beside the same prompts without their pictures."""
    from mm import show
    from mm.run.few_shot import evaluate_few_shot

    try:
        numbers = [int(number) for number in shots.split(",")]
    except ValueError:
        raise UserError(f"--shots {shots}: give numbers with commas between, such as 0,1,2,4") from None
    show.check_outputs(json_file=json_file)
    with show.progress_bar("asking") as progress:
        result = evaluate_few_shot(
            model,
            data,
            pool=pool,
            ways=ways,
            shots=numbers,
            repeats=repeats,
            draws=draws,
            real_names=real_names,
            rices=rices,
            template=template,
            label=label,
            apart=apart,
            limit=limit,
            image_field=image_field,
            device=device,
            precision=precision,
            progress=progress,
        )
    show.result(result, f"few-shot: {model} on {data}", json_file)


@eval_app.command("recognition")
def eval_recognition(
    model: ModelArgument,
    data: Annotated[
        str, typer.Option("--data", metavar="SRC", help="emoji-speech:test/seen, or recordings with what is said in them.")
    ],
    beams: SpeechBeamsOption = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many recordings.")] = None,
    audio_field: AudioFieldOption = None,
    text_field: TextFieldOption = None,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Speech written down: errors over words (wer) and characters (cer)."""
    from mm import show
    from mm.run.recognition import evaluate_recognition

    show.check_outputs(json_file=json_file)
    with show.progress_bar("listening") as progress:
        result = evaluate_recognition(
            model,
            data,
            beams=beams,
            limit=limit,
            audio_field=audio_field,
            text_field=text_field,
            device=device,
            precision=precision,
            progress=progress,
        )
    show.result(result, f"recognition: {model} on {data}", json_file)


@eval_app.command("generation")
def eval_generation(
    model: ModelArgument,
    data: DataOption,
    judge: Annotated[
        str, typer.Option(metavar="MODEL", help="Looks at the pictures; independent of model and ranker.")
    ] = "emoji-judge",
    limit: Annotated[int, typer.Option(min=1, help="Number of prompts, drawn among the class names or captions of SRC.")] = 100,
    ranker: Annotated[str, typer.Option(metavar="MODEL", help="Chooses the best candidate of each prompt.")] = "emoji-clip",
    best_of: Annotated[int, typer.Option(min=1, help="Candidates of each prompt.")] = 8,
    train: Annotated[
        str | None, typer.Option("--train", metavar="SRC", help="What the model learned from, to see whether it copies.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights of the Inception of 2015 (.pth), for the published kind of FID and KID."),
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="FIELD", help="Field with the class: cls, txt or a JSON key.")] = None,
    image_field: ImageFieldOption = None,
    text_field: TextFieldOption = None,
    guidance: GuidanceOption = 3.0,
    guidance_interval: GuidanceIntervalOption = (0.0, 1.0),
    guidance_ramp: GuidanceRampOption = False,
    temperature: TemperatureOption = 1.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    steps: StepsOption = 12,
    solver: SolverOption = "",
    shift: ShiftOption = 1.0,
    rescale: RescaleOption = 0.0,
    threshold: ThresholdOption = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    sheet: Annotated[Path | None, typer.Option("--sheet", metavar="PNG", help="Contact sheet of the chosen pictures.")] = None,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Pictures of SRC's class names or captions, seen by an independent judge; whether they are copies; FID, KID, CLIPScore."""
    from mm import show
    from mm.run.generation import Painting
    from mm.run.picture_evaluation import evaluate_generation
    from mm.types import Sampling

    show.check_outputs(sheet, json_file)
    sampling = Sampling(
        guidance, guidance_interval, guidance_ramp, temperature, top_k, top_p, steps, solver, rescale, threshold, shift=shift
    )
    made: list[Painting] = []
    with show.progress_bar("painting") as progress:
        result = evaluate_generation(
            model,
            data,
            judge=judge,
            limit=limit,
            ranker=ranker,
            best_of=best_of,
            train=train,
            features=features,
            label=label,
            image_field=image_field,
            text_field=text_field,
            seed=seed,
            sampling=sampling,
            device=device,
            precision=precision,
            progress=progress,
            on_made=made.extend,
        )
    show.result(result, f"generation: {model} on {data}", json_file)
    if sheet:
        show.paintings(made, sheet, 10, None)


@app.command()
def interpolate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that was fine-tuned.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="What became of it.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="New model folder.")],
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Share of the tuned weights.")] = 0.5,
) -> None:
    """Average a model and its fine-tuning: it learns the new and forgets less of the old (WiSE-FT)."""
    from mm.hub import check_folder, load, save
    from mm.run.adaptation import interpolate as between

    check_folder(out)
    models = [load(model, device="cpu", precision="fp32") for model in (base, tuned)]
    typer.echo(save(between(models[0], models[1], alpha), out))


@app.command()
def classify(
    model: ModelArgument,
    images: Annotated[list[str], typer.Argument(metavar="FILES...", help="Pictures, recordings, or folders of either.")],
    labels: Annotated[str, typer.Option("--labels", help="Class names, separated by commas.")],
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Classify pictures, or recordings by a model that hears, among your own labels."""
    from mm import show
    from mm.run.inference import classify as run_classify

    names = [name.strip() for name in labels.split(",") if name.strip()]
    show.predictions(run_classify(model, images, names, device=device, precision=precision), json_file)


@app.command()
def answer(
    model: ModelArgument,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture file.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="About the picture.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many answers to show.")] = 5,
    free: FreeOption = False,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Answer a question about a picture: the likeliest answers with their probabilities."""
    from mm import show
    from mm.hub import load

    loaded = load(model, device=device, precision=precision)
    show.answers(loaded.answer(image, question, k=k, free=free), image, question, json_file)


@app.command()
def caption(
    model: ModelArgument,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Picture files or folders.")],
    language: LanguageOption = None,
    prompt: PromptOption = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Captions of each picture.")] = 1,
    beams: BeamsOption = None,
    temperature: CaptionTemperatureOption = None,
    top_p: TopPOption = 1.0,
    max_tokens: MaxTokensOption = 32,
    length_penalty: LengthPenaltyOption = 1.0,
    no_repeat: NoRepeatOption = 0,
    best_of: CaptionBestOfOption = 1,
    ranker: Annotated[str, typer.Option(metavar="MODEL", help="Has a say in the choice among candidates.")] = "emoji-clip",
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds draw equal captions.")] = 0,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Describe pictures in words."""
    from mm import show
    from mm.run.captioning import caption as run_caption

    show.check_outputs(json_file=json_file)
    with show.progress_bar("writing") as progress:
        written = run_caption(
            model,
            images,
            language=language,
            prompt=prompt,
            count=count,
            best_of=best_of,
            ranker=ranker if best_of > 1 else None,
            decoding=_decoding(count, best_of, beams, temperature, top_p, max_tokens, length_penalty, no_repeat),
            seed=seed,
            device=device,
            precision=precision,
            progress=progress,
        )
    show.captions(written, json_file)


@app.command()
def transcribe(
    model: ModelArgument,
    audios: Annotated[list[str], typer.Argument(metavar="AUDIO...", help="Sound files or folders.")],
    beams: SpeechBeamsOption = 8,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Write down what is said in recordings of up to half an hour. Exit code 1 when one of several cannot be read."""
    from mm import show
    from mm.run.recognition import transcribe as run_transcribe

    show.check_outputs(json_file=json_file)
    unusable: list[str] = []
    with show.progress_bar("listening") as progress:
        written = run_transcribe(
            model,
            audios,
            beams=beams,
            device=device,
            precision=precision,
            progress=progress,
            on_unusable=unusable.append if len(audios) > 1 or Path(audios[0]).is_dir() else None,
        )
    show.transcripts(written, unusable, json_file)
    if unusable:
        raise typer.Exit(1)


def _decoding(
    count: int,
    best_of: int,
    beams: int | None,
    temperature: float | None,
    top_p: float,
    max_tokens: int,
    length_penalty: float,
    no_repeat: int,
) -> Any:
    """How to write (a `Decoding`): as is said, else as is usual for so many captions and candidates."""
    from mm.run.writing import DRAWN, usual_decoding
    from mm.types import Decoding

    if beams is not None:
        usual = Decoding(beams=beams)
    else:
        usual = DRAWN if temperature is not None or top_p < 1 else usual_decoding(count, best_of)
    chosen = usual.temperature if temperature is None else temperature
    usual = replace(usual, length_penalty=length_penalty, no_repeat=no_repeat)
    return replace(usual, max_tokens=max_tokens, temperature=chosen, top_p=top_p)


@app.command()
def ground(
    model: ModelArgument,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture file.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What it shows.")],
    word: Annotated[list[str] | None, typer.Option(help="Show this word only; repeat for several.")] = None,
    layer: Annotated[list[int] | None, typer.Option(min=0, help="Layer of the fusion, from 0; repeat to average.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PNG", help="Draw the heat of each word; a folder for single files.")
    ] = None,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Find the words of a text in a picture: which parts of it speak for each word, with their centres (Grad-CAM).

    Places are those of the square that the model sees, 0 to 1 from the left and from the top.
    """
    from mm import show
    from mm.hub import load
    from mm.run.generation import cut_prompts

    show.check_outputs(out, json_file)
    loaded = load(model, device=device, precision=precision)
    found = loaded.ground(image, text, layers=layer)
    for prompt, read in cut_prompts(loaded, [text]):
        show.prompt_cut(prompt, read)
    view = loaded.processor.view(image, show.GROUNDING_SIDE)
    show.grounding(found.only(word) if word else found, image, view, out, json_file)


@app.command()
def search(
    model: ModelArgument,
    index: Annotated[Path, typer.Option("--index", metavar="DIR", help="Folder of pictures; its vectors are cached.")],
    text: Annotated[str | None, typer.Option("--text", help="Search by words.")] = None,
    image: Annotated[str | None, typer.Option("--image", metavar="FILE", help="Search by a picture.")] = None,
    audio: Annotated[str | None, typer.Option("--audio", metavar="FILE", help="Search by a recording.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many pictures to find.")] = 12,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="PNG", help="Draw the hits on a contact sheet.")] = None,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Find pictures in a folder by words, a picture or a recording: file names, scores and a contact sheet."""
    from mm import show
    from mm.run.inference import search as run_search

    with show.progress_bar("indexing") as progress:
        found = run_search(
            model, index, text=text, image=image, audio=audio, k=k, device=device, precision=precision, progress=progress
        )
    show.hits(found, out, json_file)


@app.command()
def generate(
    model: ModelArgument,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to paint.")],
    count: Annotated[int, typer.Option("-n", min=1, help="Pictures of each prompt.")] = 4,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PNG", help="Contact sheet; a folder for single files.")] = Path(
        "generated.png"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal pictures.")] = 0,
    guidance: GuidanceOption = 3.0,
    guidance_interval: GuidanceIntervalOption = (0.0, 1.0),
    guidance_ramp: GuidanceRampOption = False,
    temperature: TemperatureOption = 1.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    steps: StepsOption = 12,
    solver: SolverOption = "",
    shift: ShiftOption = 1.0,
    rescale: RescaleOption = 0.0,
    threshold: ThresholdOption = 0.0,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="What the pictures should not show.")] = None,
    best_of: Annotated[int, typer.Option(min=1, help="Candidates of each picture; the ranker takes the best.")] = 1,
    ranker: Annotated[str, typer.Option(metavar="MODEL", help="Has a say in the choice among candidates.")] = "emoji-clip",
    image: Annotated[str | None, typer.Option("--image", metavar="FILE", help="A picture to be finished or changed.")] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="PART|FILE",
            help="What stays of it: top (default), bottom, left, right, border, or a mask picture, white where it stays.",
        ),
    ] = None,
    paste: Annotated[
        bool, typer.Option(help="Lay what stays over the result as it was, not as the model's tokens have it.")
    ] = True,
    strength: Annotated[
        float | None,
        typer.Option(help="Change all of --image, keeping no part: the share of it that is forgotten, above 0 to 1."),
    ] = None,
    partial: Annotated[
        Path | None, typer.Option("--partial", metavar="DIR", help="Also write the pictures in the making, as PNG and GIF.")
    ] = None,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Make pictures of words."""
    from mm import show
    from mm.run.generation import generate as run_generate
    from mm.types import Sampling

    if keep is not None and image is None:
        raise UserError(f"--keep {keep}: says what stays of a picture; give the picture with --image")
    if strength is not None and image is None:
        raise UserError(f"--strength {strength}: says how much of a picture is forgotten; give the picture with --image")
    if strength is not None and keep is not None:
        raise UserError("--strength changes all of --image, --keep says what of it stays: give one of both")
    show.check_outputs(out, json_file)
    share = 1.0 if strength is None else strength
    sampling = Sampling(
        *(guidance, guidance_interval, guidance_ramp, temperature, top_k, top_p),
        *(steps, solver, rescale, threshold, share, shift),
    )
    with show.progress_bar("painting") as progress:
        made = run_generate(
            model,
            prompts,
            count=count,
            seed=seed,
            sampling=sampling,
            best_of=best_of,
            ranker=ranker if best_of > 1 else None,
            image=image,
            keep=keep or ("top" if image and strength is None else None),
            paste=paste,
            negative=negative,
            device=device,
            precision=precision,
            on_picture=show.Making(partial, count) if partial else None,
            on_cut=show.prompt_cut,
            progress=progress,
        )
    show.paintings(made, out, count, json_file)


@app.command()
def vary(
    model: ModelArgument,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Pictures to make others of.")],
    count: Annotated[int, typer.Option("-n", min=1, help="Pictures of each.")] = 4,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PNG", help="Contact sheet; a folder for single files.")] = Path(
        "varied.png"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal pictures.")] = 0,
    guidance: GuidanceOption = 3.0,
    guidance_interval: GuidanceIntervalOption = (0.0, 1.0),
    steps: StepsOption = 12,
    solver: SolverOption = "",
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Make other pictures of what a picture shows."""
    from mm import show
    from mm.run.generation import vary as run_vary
    from mm.types import Sampling

    show.check_outputs(out, json_file)
    sampling = Sampling(guidance, guidance_interval, steps=steps, solver=solver)
    with show.progress_bar("painting") as progress:
        made = run_vary(
            model, images, count=count, seed=seed, sampling=sampling, device=device, precision=precision, progress=progress
        )
    show.paintings(made, out, count, json_file)


@data_app.command("build")
def data_build(
    name: Annotated[str, typer.Argument(help="Which embedded data; there is: emoji.")],
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels, 32 to 224.")] = 64,
    speech: Annotated[
        bool, typer.Option("--speech", help="Speak their names instead, for emoji-speech; by espeak-ng.")
    ] = False,
    splits: Annotated[str, typer.Option(metavar="LIST", help="Of what is spoken.")] = "train,validation,test",
) -> None:
    """Draw the embedded data once, or speak it, into indexed shards in the cache folder."""
    from mm import show
    from mm.data import emoji
    from mm.data import speech as spoken

    if name != "emoji":
        raise UserError(f"'{name}': no such embedded data; there is: emoji")
    if not speech:
        with show.progress_bar("drawing") as progress:
            typer.echo(emoji.build(size, progress=progress))
        return
    for split in spoken.read_splits(splits):
        with show.progress_bar(f"speaking {split}") as progress:
            typer.echo(spoken.record(split, progress=progress))


@data_app.command("pack")
def data_pack(
    source: SourceArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="New or empty folder for the shards.")],
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 10_000,
    image_field: ImageFieldOption = None,
    audio_field: AudioFieldOption = None,
    text_field: TextFieldOption = None,
) -> None:
    """Pack any source into indexed webdataset shards."""
    from mm import show
    from mm.data.sources import open_source
    from mm.data.write import pack

    with show.progress_bar("packing") as progress:
        opened = open_source(source, image_field=image_field, audio_field=audio_field, text_field=text_field)
        packed = pack(opened, out, samples_per_shard=samples_per_shard, progress=progress)
    show.packed(packed, out)


@data_app.command("encode")
def data_encode(
    source: SourceArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="New or empty folder for the shards.")],
    latents: Annotated[
        str, typer.Option("--latents", metavar="MODEL", help="Compresses pictures: system.latents of training.")
    ],
    text: Annotated[
        str | None, typer.Option("--text", metavar="MODEL", help="Reads captions: system.text.", show_default=False)
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Also mirror images, for data.augment.flip.")] = False,
    dtype: Annotated[str, typer.Option(help="What numbers are stored as: fp16 or bf16.")] = "fp16",
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 10_000,
    image_field: ImageFieldOption = None,
    text_field: TextFieldOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Compute once what the frozen parts of a generator make of samples: shards to train on without them."""
    from mm import show
    from mm.data.features import DTYPES
    from mm.run.encoding import encode_samples

    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: take {' or '.join(DTYPES)}")
    with show.progress_bar("encoding") as progress:
        packed = encode_samples(
            source,
            out,
            latents,
            text=text,
            flip=flip,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            samples_per_shard=samples_per_shard,
            image_field=image_field,
            text_field=text_field,
            device=device,
            progress=progress,
        )
    show.packed(packed, out)


@data_app.command("filter")
def data_filter(
    source: SourceArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="New or empty folder for the shards.")],
    judge: Annotated[str, typer.Option("--judge", metavar="MODEL", help="Tells whether a caption fits its picture.")],
    captioner: Annotated[
        str | None, typer.Option("--captioner", metavar="MODEL", help="Writes further captions.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Captions to write for each picture.")] = 1,
    threshold: Annotated[
        float | None,
        typer.Option(help="Least probability of a match (0.5 if not given), or least cosine.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What written captions begin with; default: the captioner's usual.", show_default=False)
    ] = None,
    top_p: TopPOption = 0.9,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    image_field: ImageFieldOption = None,
    text_field: TextFieldOption = None,
    json_file: JsonOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Keep the captions that fit their pictures, and write new ones: shards to train on (CapFilt of BLIP)."""
    from mm import show
    from mm.data.sources import open_source
    from mm.run.filtering import NUCLEUS, filter_captions

    show.check_outputs(None, json_file)
    with show.progress_bar("filtering") as progress:
        result = filter_captions(
            open_source(source, image_field=image_field, text_field=text_field),
            out,
            judge,
            captioner=captioner,
            count=count,
            threshold=threshold,
            beginning=prompt,
            decoding=replace(NUCLEUS, top_p=top_p),
            seed=seed,
            device=device,
            progress=progress,
        )
    show.filtered(result, out, json_file)


@data_app.command("check")
def data_check(
    source: SourceArgument,
    image_field: ImageFieldOption = None,
    audio_field: AudioFieldOption = None,
    text_field: TextFieldOption = None,
    json_file: JsonOption = None,
) -> None:
    """Read and decode every sample of a source; report what is unusable, by cause. Exit code 1 when anything is."""
    from mm import show
    from mm.data.check import check
    from mm.data.sources import open_source

    with show.progress_bar("reading") as progress:
        opened = open_source(source, image_field=image_field, audio_field=audio_field, text_field=text_field)
        report = check(opened, progress=progress)
    show.checked(report, json_file)
    if not report.ok:
        raise typer.Exit(1)


@data_app.command("index")
def data_index(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of tar shards, or a shard pattern; s3://... too.")],
    jobs: Annotated[int, typer.Option(help="Processes that read shards.", min=1, max=256)] = 1,
) -> None:
    """Write the sidecar index of webdataset shards, made by anyone, beside them."""
    from mm import show
    from mm.data.index import index_shards, publish_sidecar
    from mm.data.remote import Remote
    from mm.data.shards import expand

    with show.progress_bar("indexing") as progress:
        shards = index_shards(expand(folder), rebuild=True, jobs=jobs, progress=progress)
    for shard in shards:
        if isinstance(shard.path, Remote):
            publish_sidecar(shard.path)
    typer.echo(f"{len(shards)} shards, {sum(map(len, shards))} samples indexed")


@app.command("list")
def list_everything() -> None:
    """What there is: shipped models, systems, configurations, data."""
    from mm import show
    from mm.run.catalogue import catalogue

    show.catalogue(catalogue())


@app.command()
def convert(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Weights of open_clip, OpenAI's CLIP or ALBEF, or a folder of open_clip or transformers (BERT, too).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="New model folder.")],
    arch: Annotated[
        str | None,
        typer.Option(
            help="open_clip's, with /TAG where its tags differ: ViT-B-32/openai; OpenAI's files and folders need none."
        ),
    ] = None,
    trusted: Annotated[
        bool, typer.Option("--i-trust-this-file", help="Read a pickled file, which can run whatever its writer put in.")
    ] = False,
    vocab: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For ALBEF, which does not hold it: vocab.txt of bert-base-uncased.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="MODEL", help="For BERT, which becomes a start of ALBEF: sees the pictures.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="PIXELS", min=8, help="For ALBEF and BERT: side of the pictures, if another.")
    ] = None,
    rescale: Annotated[
        str | None, typer.Option(metavar="SRC", help="For KL autoencoders of diffusers: give latents of SRC unit spread.")
    ] = None,
    shifted: Annotated[bool, typer.Option("--shifted", help="With --rescale: bring their mean to zero, too.")] = False,
) -> None:
    """Turn a foreign weight file into a model folder: safetensors and JSON, read without running code from then on."""
    from mm.run.conversion import convert as run_conversion

    done = run_conversion(
        file,
        out,
        architecture=arch,
        trusted=trusted,
        vocab=vocab,
        image=image,
        image_size=image_size,
        rescale=rescale,
        shifted=shifted,
    )
    typer.echo(done)


@app.command()
def remember(
    model: ModelArgument,
    data: Annotated[str, typer.Option("--data", metavar="SRC", help="Its captions are remembered.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="New model folder.")],
) -> None:
    """Give a model that hears (imagebind) texts known by heart, towards which it then draws what it hears."""
    from mm.hub import check_folder, load, save
    from mm.run.memory import remembering

    out = check_folder(out)
    typer.echo(save(remembering(load(model, device="cpu", precision="fp32"), data), out))


@app.command("export")
def export_model(
    model: ModelArgument,
    to: Annotated[str, typer.Option("--to", help="onnx, torch (torch.export), open_clip, hf (transformers) or diffusers.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="New or empty folder.")],
) -> None:
    """Write a model for other runtimes and libraries; what is written is loaded again and compared before it appears."""
    from mm.export import export

    wanted: Any = "huggingface" if to == "hf" else to  # any other word is refused by name
    typer.echo(export(model, out, to=wanted))


@app.command()
def info(
    model: ModelArgument,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the 'system' section of its configuration instead.")] = False,
    json_file: JsonOption = None,
) -> None:
    """A model's size, preparation, capabilities and system card."""
    from mm import show
    from mm.config import dump_yaml
    from mm.hub import load
    from mm.run.catalogue import describe

    loaded = load(model, device="cpu")
    if as_yaml:
        typer.echo(dump_yaml(loaded.config))
    else:
        show.description(describe(loaded), json_file)


def main() -> None:
    """Entry point: a `UserError` is one line on stderr and its exit code, 2 unless it has its own.

    Under torchrun each process writes its line at once, so that lines are not torn, and all but the first say who they are.
    """
    debug = "--debug" in sys.argv[1:2]
    try:
        app()
    except UserError as error:
        if debug:
            raise
        rank = int(os.environ.get("RANK", "0"))
        sys.stderr.write(f"mm: error: process {rank}: {error}\n" if rank else f"mm: error: {error}\n")
        sys.exit(getattr(error, "exit_code", 2))
    except BrokenPipeError:
        sys.exit(141)


if __name__ == "__main__":
    main()
