"""Results for people: tables on the terminal, pictures and JSON in files."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mm.data.check import Report
from mm.data.write import Packed
from mm.errors import UserError
from mm.evaluation.heat import heat_over
from mm.evaluation.metrics import Result
from mm.evaluation.sheet import Picture, contact_sheet, to_pillow
from mm.fusion.grounding import Grounding, centre, focus
from mm.media.image import open_image
from mm.run.filtering import Filtered
from mm.run.generation import Painting
from mm.run.inference import Prediction, SearchResult
from mm.run.recognition import Transcript
from mm.run.writing import Caption
from mm.training.loop import TrainResult
from mm.training.parallel import environment
from mm.types import RankedAnswers

if TYPE_CHECKING:
    from mm.run.plan import Plan

SHOWN_LABELS = 5
GROUNDING_SIDE, GROUNDING_COLUMNS = 256, 6
"""Pixels of a side of each picture with heat, and how many of them are beside each other at most."""

STATE_MS, LAST_STATE_MS = 150, 1500
"""How long an animation shows a picture in the making, and the finished one."""


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """Give ``progress(done, total)`` and draw it on standard error, where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def trained(outcome: TrainResult) -> None:
    """How a training ended, and what to do next."""
    console = Console()
    figures = ", ".join(f"{name} {_figure(name, value)}" for name, value in outcome.metrics.items())
    console.print(f"step {outcome.step}, {outcome.seconds:.0f} s" + (f", validation: {figures}" if figures else ""))
    skipped = outcome.accounting.get("skipped", 0)
    if skipped:
        causes = ", ".join(f"{cause} {count}" for cause, count in sorted(outcome.accounting.get("causes", {}).items()))
        console.print(f"{skipped} samples of this epoch could not be used: {causes}")
    if outcome.checkpoint is not None:
        console.print(f"checkpoint: {outcome.checkpoint}", soft_wrap=True)


def _figure(name: str, value: float) -> str:
    """Rates in percent, everything else as a number."""
    return f"{value:.1%}" if name.endswith(("r1", "top1", "usage", "accuracy")) else f"{value:.4g}"


def result(measured: Result, title: str, json_file: Path | None) -> None:
    """A table of figures with intervals and protocol; several processes have the same, and the first one shows it."""
    if environment()[0] > 0:
        return
    Console().print(measured.table(title))
    if json_file:
        measured.write(json_file)
        print(f"written: {json_file}")


def predictions(found: Sequence[Prediction], json_file: Path | None) -> None:
    """The likeliest labels of each picture."""
    table = Table()
    table.add_column("picture")
    table.add_column("label")
    table.add_column("probability", justify="right")
    table.add_column("then")
    for entry in found:
        ranked = list(zip(entry.labels, entry.probabilities, strict=True))
        others = ", ".join(f"{label} {probability:.1%}" for label, probability in ranked[1:SHOWN_LABELS])
        table.add_row(Text(entry.image), Text(ranked[0][0], style="bold"), f"{ranked[0][1]:.1%}", Text(others, style="dim"))
    Console().print(table)
    values = [{"image": e.image, "labels": list(e.labels), "probabilities": list(e.probabilities)} for e in found]
    _write_json(json_file, {"predictions": values})


def answers(found: RankedAnswers, image: str, question: str, json_file: Path | None) -> None:
    """The likeliest answers to a question."""
    table = Table(title=Text(f"{image}: {question}"), title_justify="left")
    table.add_column("answer")
    table.add_column("probability", justify="right")
    ranked = list(zip(found.answers, found.scores, strict=True))
    for answer, score in ranked:
        table.add_row(Text(answer), f"{score:.1%}")
    Console().print(table)
    values = [{"answer": answer, "probability": score} for answer, score in ranked]
    _write_json(json_file, {"image": image, "question": question, "answers": values})


def captions(written: Sequence[Caption], json_file: Path | None) -> None:
    """What was written about each picture."""
    ranked = any(one.score is not None for one in written)
    words = "log-likelihood: of the words and their end, in nats"
    words += "\nscore: that and the ranker's logit of picture and caption together" if ranked else ""
    table = Table(caption=words, caption_justify="left")
    table.add_column("picture")
    table.add_column("caption")
    table.add_column("log-likelihood", justify="right")
    if ranked:
        table.add_column("score", justify="right")
    for one in written:
        score = [_or_dash(one.score, ".3f")] if ranked else []
        table.add_row(Text(one.image), Text(one.text, style="bold"), f"{one.log_likelihood:.2f}", *score)
    Console().print(table)
    _write_json(json_file, {"captions": [asdict(one) for one in written]})


def transcripts(written: Sequence[Transcript], unusable: Sequence[str], json_file: Path | None) -> None:
    """What is said in each recording, and which ones cannot be read, each with the reason."""
    table = Table()
    table.add_column("recording")
    table.add_column("text")
    for one in written:
        table.add_row(Text(one.audio), Text(one.text, style="bold"))
    Console().print(table)
    for reason in unusable:
        print(f"mm: left out: {reason}", file=sys.stderr)
    _write_json(json_file, {"transcripts": [asdict(one) for one in written], "left_out": list(unusable)})


def grounding(found: Grounding, image: str, view: Tensor, out: Path | None, json_file: Path | None) -> None:
    """Where the words of a text are in a picture.

    Args:
        found: The words with their heat.
        image: What the user called the picture.
        view: The picture as the model sees it, uint8 ``(3, S, S)``, of any resolution.
        out: Draw picture, text and words there: a contact sheet where it has a suffix, which is .png; else a file each.
        json_file: Gets the grids of the heat, too.
    """
    fits = f"the text fits the picture: {found.match:.0%}"
    table = Table(title=Text(f"{image}: {found.text}"), title_justify="left", caption=fits, caption_justify="left")
    table.add_column("word")
    for name in ("share of the heat", "x", "y", "in the hottest quarter"):
        table.add_column(name, justify="right")
    words = [{"word": word, "share": share} for word, share in zip(found.words, found.shares, strict=True)]
    words = [word | _summary(heat) for word, heat in zip(words, found.heat, strict=True)]
    whole = {"word": "whole text", "share": None} | _summary(found.whole)
    for row in (*words, whole):
        figures = [_or_dash(row[key], form) for key, form in (("share", ".0%"), ("x", ".2f"), ("y", ".2f"), ("focus", ".0%"))]
        table.add_row(Text(row["word"], style="dim" if row is whole else ""), *figures)
    Console().print(table)
    if out:
        panels = [to_pillow(view), *(heat_over(view, heat) for heat in (found.whole, *found.heat))]
        captions = ["what the model sees", "whole text", *(f"{row['word']}\n{row['share']:.0%} of the heat" for row in words)]
        title = f"{found.text}  ({found.match:.0%} match)"
        columns = -(-len(panels) // -(-len(panels) // GROUNDING_COLUMNS))  # rows of like length
        _save_pictures(panels, captions, out, columns=columns, cell=view.shape[-1], title=title)
        print(f"picture: {out}")
    whole_values = {key: whole[key] for key in ("x", "y", "focus", "heat")}
    values = {"image": image, "text": found.text, "match": found.match, "words": words, "whole": whole_values}
    _write_json(json_file, values)


def _summary(heat: Tensor) -> dict[str, Any]:
    """Centre, share in the hottest quarter and all of a map, JSON ready."""
    x, y = centre(heat) or (None, None)
    return {"x": x, "y": y, "focus": focus(heat), "heat": heat.tolist()}


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def hits(found: SearchResult, sheet: Path | None, json_file: Path | None) -> None:
    """The found files with their scores; a contact sheet where a file for it is given."""
    table = Table(caption=f"{found.searched} pictures searched", caption_justify="left")
    table.add_column("rank", justify="right")
    table.add_column("cosine", justify="right")
    table.add_column("file")
    for rank, hit in enumerate(found.hits, start=1):
        table.add_row(str(rank), f"{hit.score:.3f}", Text(str(hit.path)))
    Console().print(table)
    if found.skipped:
        print(f"{len(found.skipped)} files left out, for example {found.skipped[0]}", file=sys.stderr)
    if sheet:
        pictures = [open_image(hit.path) for hit in found.hits]
        captions = [f"{hit.path.name}  {hit.score:.2f}" for hit in found.hits]
        save_picture(contact_sheet(pictures, captions, title=f"{found.query}"), sheet)
        print(f"contact sheet: {sheet}")
    values = [{"file": str(hit.path), "score": hit.score} for hit in found.hits]
    _write_json(json_file, {"query": found.query, "hits": values, "searched": found.searched})


def check_outputs(pictures: Path | None = None, json_file: Path | None = None) -> None:
    """Find out before the work whether its results can be written; folders that are missing are made.

    Args:
        pictures: As in `paintings`.
        json_file: Any file in a folder that is there.

    Raises:
        UserError: A file or folder cannot be written, or pictures are to be written in another format than PNG.
    """
    if json_file is not None:
        _check_file(json_file, "the result", "give a path in an existing folder")
    if pictures is None:
        return
    folder = pictures if _is_folder(pictures) else pictures.parent
    if folder is not pictures and pictures.suffix.lower() != ".png":
        raise UserError(f"{pictures}: pictures are written as .png; give a name that ends so, or a folder")
    make_folder(folder)
    if folder is not pictures:
        _check_file(pictures, "the picture", "give a name that ends in .png in a folder of yours")


def make_folder(folder: Path) -> None:
    """A folder for pictures that can be written into. Raises `UserError` where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: no pictures can be written there ({error.strerror}); give another folder") from None


def paintings(made: Sequence[Painting], out: Path, columns: int, json_file: Path | None) -> None:
    """A contact sheet of generated pictures where ``out`` has a suffix, which is .png; else a file for each in a folder."""
    captions = [one.prompt + (f"  {one.score:.2f}" if one.score is not None else "") for one in made]
    files = _save_pictures([one.pixels for one in made], captions, out, columns=columns)
    print(f"{len(made)} pictures: {out}")
    values = [
        {"prompt": one.prompt, "seed": one.seed, "number": one.number, "score": one.score, "file": str(file)}
        for one, file in zip(made, files, strict=True)
    ]
    _write_json(json_file, {"pictures": values})


def prompt_cut(prompt: str, read: str) -> None:
    """A text was too long for a model: one line on standard error."""
    print(f"mm: the text '{prompt}' is too long for the model, which reads only '{read}'", file=sys.stderr)


class Making:
    """Writes pictures while they are made: a sheet of each state of a batch, ``BATCH-STATE.png``, then all as ``BATCH.gif``.

    Args:
        folder: Where to. Raises `UserError` where nothing can be written.
        columns: Pictures in a row of a sheet.
    """

    def __init__(self, folder: Path, columns: int) -> None:
        make_folder(folder)
        self.folder, self.columns = folder, columns
        self._batch, self._states = 0, list[Image.Image]()

    def __call__(self, pictures: Tensor, progress: float) -> None:
        """Take the pictures of a batch, uint8 ``(B, 3, H, W)``, as far as they are; at progress 1 the batch is done."""
        sheet = contact_sheet(list(pictures), columns=self.columns)
        save_picture(sheet, self.folder / f"{self._batch:03d}-{len(self._states):03d}.png")
        self._states.append(sheet)
        if progress >= 1:
            durations = [STATE_MS] * (len(self._states) - 1) + [LAST_STATE_MS]
            options = {"save_all": True, "append_images": self._states[1:], "duration": durations, "loop": 0}
            save_picture(self._states[0], self.folder / f"{self._batch:03d}.gif", **options)
            self._batch, self._states = self._batch + 1, []


def _save_pictures(pictures: Sequence[Picture], captions: Sequence[str], out: Path, **options: Any) -> list[Path]:
    """The file of each: a contact sheet, with its own options, where ``out`` has a suffix; else a file for each in a folder."""
    if not _is_folder(out):
        save_picture(contact_sheet(pictures, captions, **options), out)
        return [out] * len(pictures)
    make_folder(out)
    files = [out / f"{number:04d}.png" for number in range(len(pictures))]
    for picture, file in zip(pictures, files, strict=True):
        save_picture(to_pillow(picture), file)
    return files


def _is_folder(out: Path) -> bool:
    return out.is_dir() or not out.suffix


def _check_file(path: Path, what: str, remedy: str) -> None:
    """Open a file for writing without changing it."""
    there = path.exists()
    try:
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise UserError(f"{path}: {what} cannot be written: {error.strerror}; {remedy}") from None


def packed(outcome: Packed, folder: Path) -> None:
    """What went into the shards and what did not."""
    print(f"{outcome.samples} samples in {len(outcome.shards)} shards in {folder}")
    for cause, count in outcome.bad.most_common():
        print(f"left out: {count} ({cause})")


def filtered(outcome: Filtered, folder: Path, json_file: Path | None) -> None:
    """How many captions fit their pictures, given and written ones."""
    counts = {name: getattr(outcome, name) for name in ("given", "given_kept", "written", "written_kept", "samples", "dropped")}
    print(f"{outcome.samples} samples in {len(outcome.shards)} shards in {folder}, {outcome.dropped} left without a caption")
    print(
        f"captions that fit: {outcome.given_kept} of {outcome.given} given, {outcome.written_kept} of {outcome.written} written"
    )
    for cause, count in outcome.bad.most_common():
        print(f"left out: {count} ({cause})")
    _write_json(json_file, counts | {"bad": dict(outcome.bad)})


def checked(report: Report, json_file: Path | None) -> None:
    """Counts of a source, good and bad."""
    table = Table(title=Text(report.name), title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_column("example", style="dim")
    table.add_row("samples", str(report.samples), "")
    table.add_row("good", str(report.good), "", style="green")
    for cause, count in report.bad.most_common():
        table.add_row(Text(cause), str(count), Text(report.examples[cause][0]), style="red")
    for what, count in (
        ("without text", report.without_text),
        ("without picture or sound", report.without_media),
        ("repeated ids", report.repeated_ids),
        ("repeated pictures", report.repeated_pictures),
        ("repeated recordings", report.repeated_recordings),
    ):
        if count:
            table.add_row(what, str(count), "", style="yellow")
    for bucket, count in report.shorter_side.items():
        table.add_row(f"shorter side {bucket} px", str(count), "")
    for kind, count in report.rates.items():
        table.add_row(f"recordings of {kind}", str(count), "")
    if report.rates:
        table.add_row("hours of sound; seconds of the longest", f"{report.seconds / 3600:.2f}; {report.longest:.1f}", "")
    table.add_row("media, MB", f"{report.media_bytes / 1e6:.1f}", "")
    for note, value in report.shards.items():
        table.add_row(Text(f"shards: {note}"), "", Text(str(value)))
    Console().print(table)
    _write_json(json_file, report.to_json())


def catalogue(entries: Mapping[str, Mapping[str, str]]) -> None:
    """Names and their lines, kind by kind."""
    for kind, names in entries.items():
        table = Table(title=Text(kind, style="bold"), title_justify="left", show_header=False, box=None)
        table.add_column("name", style="cyan", no_wrap=True)
        table.add_column("what")
        for name, line in names.items():
            table.add_row(Text(name), Text(line))
        Console().print(table)


def description(values: Mapping[str, Any], json_file: Path | None) -> None:
    """A model's description as an indented outline."""
    console = Console()
    _outline(console, values, 0)
    _write_json(json_file, values)


def save_picture(picture: Any, path: Path, **options: Any) -> None:
    """Save a PIL image; options are those of its format. Raises `UserError` where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the picture cannot be written: {error}; give a name that ends in .png") from None


def _outline(console: Console, values: Mapping[str, Any], depth: int) -> None:
    for key, value in values.items():
        head = Text("  " * depth + key.replace("_", " ") + ": ", style="cyan")
        if isinstance(value, Mapping):
            console.print(head)
            _outline(console, value, depth + 1)
        else:
            body = (
                f"{value:,}"
                if isinstance(value, int)
                else ", ".join(map(str, value))
                if isinstance(value, list)
                else str(value)
            )
            console.print(head + Text(body), soft_wrap=True)


def _write_json(path: Path | None, values: Mapping[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="ascii")
    except OSError as error:
        raise UserError(f"{path}: the result cannot be written: {error.strerror}; give a path in an existing folder") from None
    print(f"written: {path}")


def planned(found: "Plan", json_file: Path | None) -> None:
    """What a training needs, layout by layout."""
    parameters, device = found.parameters, found.device
    console = Console()
    console.print(
        f"[bold]{found.name}[/bold] ({found.system}): {parameters['total']:,} parameters, {parameters['trained']:,} trained; "
        f"a batch of {found.train.batch_size} on {found.processes} x {device.name}, {str(found.dtype).removeprefix('torch.')}",
        highlight=False,
        soft_wrap=True,
    )
    forward, backward = (f"{value / 1e9:.3g}" for value in (found.forward_flops, found.backward_flops))
    console.print(f"GFLOPs of a sample: forward {forward}, backward {backward}", highlight=False)
    unit, name = (1e9, "GB") if max(one.memory.total for one in found.estimates) >= 1e10 else (1e6, "MB")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0, title=f"{name} of each GPU", title_justify="left")
    table.add_column("layout", no_wrap=True)
    for heading in ("weights", "states", "grads", "activ.", "total", "samples/s", "MFU", "run $"):
        table.add_column(heading, justify="right")
    for one in found.estimates:
        memory, price = one.memory, found.dollars(one)
        sizes = (memory.weights, memory.optimizer + memory.averages, memory.gradients, memory.activations)
        table.add_row(
            one.sharing.name,
            *(f"{size / unit:,.1f}" for size in sizes),
            Text(f"{memory.total / unit:,.1f}", style="green" if one.fits else "red"),
            f"{one.samples_per_second:,.0f}" if one.fits else "too big",
            f"{one.mfu:.1%}" if one.fits else "",
            f"{price:,.2f}" if one.fits and price is not None else "",
            style="bold" if one is found.recommended else "",
        )
    console.print(table)
    for line in (*_plan_words(found), *_plan_advice(found), *found.notes):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    _write_json(json_file, found.to_json())


def _plan_words(found: "Plan") -> Iterator[str]:
    device = found.device
    price = "no price" if found.price is None else f"about ${found.price:.2f} an hour"
    yield "states: optimizer, averaged weights; sel., full: what the backward pass recomputes (parallel.recompute);"
    yield "1f1b: stages that hold one microbatch (parallel.schedule)"
    yield (
        f"{device.name}: {device.memory / 1e9:.0f} GB, {device.peak(found.dtype) / 1e12:.3g} TFLOP/s, "
        f"{device.bandwidth / 1e12:.3g} TB/s, {device.form}; {price}"
    )


_BOUNDS = {
    "arithmetic": "products",
    "memory": "memory traffic",
    "launches": "launching kernels, which train.compile and larger batches make less of",
    "sending": "sending",
    "waiting": "stages that wait",
}


def _duration(seconds: float) -> str:
    """For people."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _plan_advice(found: "Plan") -> Iterator[str]:
    best = found.recommended
    if best is None:
        yield "no layout fits: take more GPUs, a smaller train.batch_size, or a larger train.accumulate"
    else:
        told = ", ".join(f"{key}: {str(value).lower()}" for key, value in best.sharing.settings().items())
        section = f" (parallel: {{{told}}})" if told else ""
        run = f"{_duration(3600 * found.hours(best))} and at most {found.kilowatt_hours(best):.3g} kWh"
        yield f"recommended: {best.sharing.name}{section}: {run} for {found.train.steps:,} steps"
        shares = sorted(best.shares.items(), key=lambda item: -item[1])
        yield "its time: " + ", ".join(f"{share:.0%} {_BOUNDS[bound]}" for bound, share in shares if share >= 0.005)
    yield f"why: {'; '.join(found.reasons)}"
    speed, pipeline = found.best.samples_per_second, found.input
    if pipeline.core_samples_per_second is None or pipeline.bytes_per_sample is None or found.cores is None:
        yield f"input: {speed:,.0f} samples/s are needed; decoding was not measured"
    else:
        yield (
            f"input: {speed:,.0f} samples/s are needed, {speed * pipeline.bytes_per_sample / 1e6:,.1f} MB/s; one core here "
            f"makes {pipeline.core_samples_per_second:,.0f} samples/s, so {found.cores:,.1f} such cores"
        )
