"""Speech written down: one's own recordings, and how many errors a model makes on a source."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.data.accounting import Accounting
from mm.data.emoji import MIN_SIZE
from mm.data.files import is_recording
from mm.data.labels import label_task
from mm.data.sources import Subset, open_source
from mm.errors import UserError
from mm.evaluation.metrics import Result
from mm.evaluation.recognition import recognition
from mm.hub import Model
from mm.processor import padded
from mm.run.evaluation import loaded, refuse_incomplete, shared_out, stamp, subset_masks
from mm.run.reading import BATCH_SIZE, evaluation_loader
from mm.training.parallel import open_world
from mm.types import AudioBatch, Source, Transcribes

Progress = Callable[[int, int], None]

BEAMS = 8
"""Texts kept from frame to frame where nothing else is said."""


@dataclass(frozen=True)
class Transcript:
    """What is said in a recording."""

    audio: str
    text: str


def transcribe(
    model: str | Path | Model,
    audios: Sequence[Any],
    *,
    beams: int = BEAMS,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress | None = None,
    on_unusable: Callable[[str], None] | None = None,
) -> list[Transcript]:
    """Write down recordings of up to half an hour, in windows of what the model takes (``processor.audio.max_seconds``).

    Args:
        model: A loaded model or a MODEL reference; it must recognise speech.
        audios: Paths (a folder stands for all recordings in it), bytes, or waves at the model's rate.
        beams: Texts kept from frame to frame; 1 takes the likeliest path.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        progress: Called with (recordings done, in all).
        on_unusable: Called with what is wrong with a recording that cannot be read, which is left out; None raises instead.

    Raises:
        UserError: The model does not recognise speech, there is no recording or none that can be read, or ``beams`` is
            below 1.
    """
    _checked_beams(beams)
    model = loaded(model, device, precision)
    _recogniser(model)
    raws = [raw for audio in audios for raw in _expanded(audio)]
    if not raws:
        raise UserError("no recordings to write down")
    found: list[Transcript] = []
    window = model.processor.audio_spec.max_samples
    waiting: list[tuple[str, Tensor]] = []

    def hear() -> None:
        if waiting:
            texts = _written(model, padded([wave for _, wave in waiting]), beams, window)
            found.extend(Transcript(name, text) for (name, _), text in zip(waiting, texts, strict=True))
        waiting.clear()

    for number, raw in enumerate(raws):
        name = str(raw) if isinstance(raw, str | Path) else f"recording {number}"
        try:
            wave = model.processor.audio(raw, whole=True)
        except UserError as error:
            if on_unusable is None:
                raise
            on_unusable(str(error))
            continue
        finally:
            if progress:
                progress(number + 1, len(raws))
        if len(wave) > window or len(waiting) == BATCH_SIZE:  # a long one alone: the others would be filled up to its length
            hear()
        waiting.append((name, wave))
        if len(wave) > window:
            hear()
    hear()
    if not found:
        raise UserError("none of the recordings can be read")
    return found


def evaluate_recognition(
    model: str | Path | Model,
    data: str | Source,
    *,
    beams: int = BEAMS,
    limit: int | None = None,
    audio_field: str | None = None,
    text_field: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress | None = None,
    on_written: Callable[[Sequence[Transcript], Sequence[str]], None] | None = None,
) -> Result:
    """Error rates of a model on a source of recordings with what is said in them, see `mm.evaluation.recognition`.

    Args:
        model: A loaded model or a MODEL reference; it must recognise speech.
        data: A source. The first caption of a sample is what is said; samples without one are left out.
        beams: See `transcribe`.
        limit: Take only so many samples, the first ones.
        audio_field: Column of a table that holds the recordings, where its name is not a usual one.
        text_field: Column or field that holds what is said, likewise.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        progress: Called with (recordings done, in all).
        on_written: Receives what was written, and what is said.

    Raises:
        UserError: The model does not recognise speech, the source says of no recording what is said in it, too many of its
            samples cannot be used, or ``beams`` is below 1.
    """
    _checked_beams(beams)
    model = loaded(model, device, precision)
    _recogniser(model)
    source = (
        open_source(data, audio_field=audio_field, text_field=text_field, image_size=MIN_SIZE)
        if isinstance(data, str)
        else data
    )
    split = getattr(source, "task", None) is not None
    if limit is not None:
        source = Subset(source, range(min(limit, len(source))))
    with open_world(model.device.type) as world:
        hear = partial(_hear_all, model, beams, progress)
        found, accounting = shared_out(source, world, hear, lambda values: _Heard(**values))
    refuse_incomplete(source, accounting)
    if not found:
        raise UserError(f"{source.name}: no sample has a text; name the field with what is said by --text-field")
    said = [one.said for one in found]
    if on_written:
        on_written([Transcript(one.id, one.text) for one in found], said)
    masks = subset_masks([one.fields for one in found], label_task(source)) if split else {}
    return recognition(
        [one.text for one in found],
        said,
        subsets=masks if len(masks) > 1 else {},
        protocol=stamp(model, source, accounting.describe())
        | {"decoding": "likeliest path" if beams == 1 else f"prefix search, {beams} beams, no language model"},
    )


@dataclass(frozen=True)
class _Heard:
    """A sample, what was written down and what is said."""

    id: str
    fields: Mapping[str, Any]
    text: str
    said: str


def _hear_all(model: Model, beams: int, progress: Progress | None, source: Source) -> tuple[list[_Heard], Accounting]:
    """Every usable recording of a source that has a text, and the counts of those that cannot be used."""
    loader = evaluation_loader(source, model.processor)
    found: list[_Heard] = []
    done = 0
    for batch in loader.one_epoch():
        assert batch.audio is not None
        rows = [row for row, captions in enumerate(batch.captions) if captions]
        if rows:
            texts = _written(model, batch.audio[torch.tensor(rows)], beams)
            entries = zip(rows, texts, strict=True)
            found += [_Heard(batch.ids[row], batch.fields[row], text, batch.captions[row][0]) for row, text in entries]
        done += len(batch)
        if progress:
            progress(done, len(source))
    return found, loader.accounting


def _written(model: Model, audio: AudioBatch, beams: int, window: int | None = None) -> list[str]:
    system = _recogniser(model)
    with torch.no_grad():
        found = system.transcribe(audio.to(model.device), beams=beams, window=window)
    return [model.processor.tokenizer.decode(ids) for ids in found]


def _recogniser(model: Model) -> Transcribes:
    if not isinstance(model.system, Transcribes):
        able = ", ".join(sorted(model.capabilities)) or "nothing yet"
        raise UserError(
            f"{model.name} does not recognise speech (it can: {able}); take a run of configs/wav2vec2_ctc.yaml, or wav2vec 2.0 "
            "with a CTC head"
        )
    return model.system


def _checked_beams(beams: int) -> None:
    if beams < 1:
        raise UserError(f"beams {beams}: give 1 for the likeliest path, or a larger number")


def _expanded(audio: Any) -> list[Any]:
    """A folder becomes its recordings; everything else stays what it is."""
    if not isinstance(audio, str | Path) or not Path(audio).is_dir():
        return [audio]
    found = sorted(path for path in Path(audio).rglob("*") if is_recording(path.name) and path.is_file())
    if not found:
        raise UserError(f"{audio}: no recording in this folder")
    return list(found)
