"""Scores during training, by what the system can do, on pictures decoded once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm.data.labels import label_of, label_task
from mm.data.questions import Question, check_questions, question_of
from mm.errors import UserError
from mm.evaluation.recognition import recognition
from mm.evaluation.reconstruction import psnr, reconstructed, ssim
from mm.evaluation.retrieval import ranks
from mm.evaluation.vqa import accepted, accuracy
from mm.evaluation.zero_shot import class_vectors, label_ranks
from mm.hub import Model
from mm.nn.quantize import CodeUsage
from mm.processor import Processor
from mm.run.preparation import QuestionPreparation
from mm.run.reading import MAX_BAD_SHARE, evaluation_loader
from mm.systems import SystemConfig
from mm.types import AudioBatch, Batch, Captions, Compresses, Decoding, Embeds, Hears, Source, System, Tokenizes, Transcribes

MAX_SAMPLES = 2000
BATCH_SIZE = 128


@dataclass(frozen=True)
class _Held:
    """Validation pictures and recordings as the network takes them, a batch each, with their captions and fields, and questions
    where they are asked. There are none of what the network does not take."""

    sizes: tuple[int, ...]
    pixels: tuple[Tensor, ...]
    captions: tuple[tuple[str, ...], ...]
    fields: tuple[Any, ...]
    questions: tuple[Question, ...] = ()
    sounds: tuple[AudioBatch, ...] = ()


class Validator:
    """Called by the training loop with the network in evaluation mode.

    Figures of systems that embed, as fractions: ``r1`` is the mean of ``image_to_text_r1`` and ``text_to_image_r1``; ``top1``
    where there are labels. Of those that hear, ``audio_to_text_r1`` and, where there are pictures, ``audio_to_image_r1`` and
    ``audio_to_image_r10``. Of picture autoencoders: ``psnr`` in decibels, ``ssim``, and of those with tokens ``codebook_usage``
    and ``perplexity``. Of all others: the mean of each part of their loss, of systems that answer questions ``accuracy``, by
    the rules of VQA v2, and of systems that caption ``exact``, the share of pictures whose likeliest caption, with the usual
    beginning, is the first one; of systems that recognise speech ``wer`` and ``cer``, by the likeliest path.

    Args:
        source: Pictures, captioned or labelled ones for systems with text, of which the first 2,000 usable ones are taken.
        processor: The network's preparation.
        config: The network's configuration.
        able: Its capabilities, see `mm.types.capabilities`.
    """

    def __init__(self, source: Source, processor: Processor, config: SystemConfig, able: frozenset[str]) -> None:
        self._source, self._processor, self._config, self._able = source, processor, config, able
        self._held: _Held | None = None

    def prepare(self) -> None:
        """Read and decode the pictures now, so that what cannot be used is told before any training.

        Raises:
            UserError: There is nothing to measure: no picture that can be used, or neither captions nor labels.
        """
        if "answers" in self._able:
            check_questions(self._source)
        self._held = self._held or self._read()
        labelled = "embeds" in self._able and self._labels(self._held) is not None
        texts = any(self._held.captions) or bool(self._held.questions)
        if self._processor.has_text and not texts and not labelled:
            raise UserError(f"{self._source.name}: has neither captions nor labels to validate with; leave data.validation out")

    def __call__(self, system: System) -> dict[str, float]:
        held = self._held = self._held or self._read()
        device = next(system.parameters()).device
        if isinstance(system, Tokenizes | Compresses):
            return self._reconstruction(system, held, device)
        model = Model(system=system, processor=self._processor, config=self._config, name="validation", device=device)
        found: dict[str, float] = {}
        if isinstance(system, Hears) and held.sounds:
            found = self._hearing(model, system, held)
        elif isinstance(system, Embeds):
            vectors = torch.cat([model.embed_pixels(pixels) for pixels in held.pixels])
            found = self._retrieval(model, vectors, held) | self._zero_shot(model, vectors, held)
        else:
            found = self._losses(system, held, device)
        if "answers" in self._able:
            found |= self._accuracy(model, held)
        if "captions" in self._able and isinstance(system, Captions):
            found |= self._exact(system, held, device)
        if isinstance(system, Transcribes):
            found |= self._recognition(system, held, device)
        return found

    def _read(self) -> _Held:
        seen = ("image",) if self._processor.has_image and self._config.learns_pictures else ()
        media = (*seen, "audio") if self._config.hears else ("image",)
        prepare = QuestionPreparation if "answers" in self._able else None
        loader = evaluation_loader(
            self._source,
            self._processor,
            media,
            prepare=prepare,
            batch_size=BATCH_SIZE,
            workers=0,
            max_bad_fraction=MAX_BAD_SHARE,
        )
        batches = []
        for batch in loader.one_epoch():
            batches.append(batch)
            if sum(map(len, batches)) >= MAX_SAMPLES:
                break
        if not batches:
            raise UserError(f"{self._source.name}: no sample can be used: {loader.accounting.describe()}")
        return _Held(
            tuple(map(len, batches)),
            tuple(batch.image for batch in batches if batch.image is not None),
            tuple(captions for batch in batches for captions in batch.captions),
            tuple(fields for batch in batches for fields in batch.fields),
            tuple(
                question_of(fields, where)
                for batch in batches
                for fields, where in zip(batch.fields, batch.ids, strict=True)
                if "answers" in self._able
            ),
            tuple(batch.audio for batch in batches if batch.audio is not None),
        )

    def _hearing(self, model: Model, system: Hears, held: _Held) -> dict[str, float]:
        """Recalls of what was said and of what it names; of equal texts the first one counts as said."""
        with torch.no_grad():
            sounds = torch.cat([system.embed_audio(audio.to(model.device)).float().cpu() for audio in held.sounds])
        rows = [row for row, captions in enumerate(held.captions) if captions]
        said = [held.captions[row][0] for row in rows]
        texts = list(dict.fromkeys(said))
        right = torch.tensor([texts.index(text) for text in said])
        found = {"audio_to_text_r1": _recall(sounds[rows], model.embed_texts(texts), right, 1)}
        if held.pixels:
            vectors = torch.cat([model.embed_pixels(pixels) for pixels in held.pixels])
            found |= {f"audio_to_image_r{k}": _recall(sounds, vectors, torch.arange(len(sounds)), k) for k in (1, 10)}
        return found

    def _reconstruction(self, system: Tokenizes | Compresses, held: _Held, device: torch.device) -> dict[str, float]:
        usage = CodeUsage(system.vocab_size) if isinstance(system, Tokenizes) else None
        rates, likeness = [], []
        for pixels in held.pixels:
            made, ids = reconstructed(system, pixels.to(device))
            if usage is not None and ids is not None:
                usage.update(ids)
            rates.append(psnr(made.cpu(), pixels))
            likeness.append(ssim(made.cpu(), pixels))
        found = {"psnr": torch.cat(rates).mean().item(), "ssim": torch.cat(likeness).mean().item()}
        return found if usage is None else found | {"codebook_usage": usage.usage, "perplexity": usage.perplexity}

    def _losses(self, system: System, held: _Held, device: torch.device) -> dict[str, float]:
        """Means over samples; every batch meets the same random choices at every validation."""
        sums: dict[str, float] = {}
        captions, count = iter(held.captions), 0
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for number, size in enumerate(held.sizes):
                torch.manual_seed(number)
                rows = slice(count, count + size)
                pixels = held.pixels[number] if held.pixels else None
                asked = held.questions[rows]
                texts = [question.text for question in asked] or [(next(captions) or ("",))[0] for _ in range(size)]
                if "captions" in self._able and isinstance(system, Captions):
                    texts = [f"{_usual(system)} {text}".strip() for text in texts]
                text = self._processor.text(texts) if self._processor.has_text else None
                answers = tuple(accepted(question.answers) for question in asked)
                sound = held.sounds[number] if held.sounds else None
                batch = Batch(tuple(map(str, range(rows.start, rows.stop))), pixels, text, answers=answers, audio=sound)
                losses = system.loss(batch.to(device), 0)
                for name, value in {"loss": losses.total, **losses.parts}.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * size
                count += size
        return {name: value / count for name, value in sums.items()}

    def _accuracy(self, model: Model, held: _Held) -> dict[str, float]:
        """Of the best answers, by the rules of VQA v2."""
        scores: list[float] = []
        for pixels in held.pixels:
            asked = held.questions[len(scores) : len(scores) + len(pixels)]
            ranked = model.answer_pixels(pixels, [question.text for question in asked])
            scores += [accuracy(best.answers[0], question.answers) for best, question in zip(ranked, asked, strict=True)]
        return {"accuracy": sum(scores) / len(scores)}

    def _exact(self, system: Captions, held: _Held, device: torch.device) -> dict[str, float]:
        """Of the likeliest words behind the usual beginning."""
        tokenizer, right, count = self._processor.tokenizer, 0, 0
        longest = max((len(tokenizer.encode(captions[0])) for captions in held.captions if captions), default=0)
        decoding = Decoding(max_tokens=longest + 1, end=tokenizer.end)
        captions = iter(held.captions)
        for pixels in held.pixels:
            beginning = self._processor.beginnings([_usual(system)] * len(pixels)).to(device)
            for written in system.caption(pixels.to(device), beginning, decoding, range(len(pixels))):
                expected = next(captions)
                if expected:
                    count += 1
                    right += tokenizer.decode(written.ids) == tokenizer.decode(tokenizer.encode(expected[0]))
        return {"exact": right / max(1, count)}

    def _recognition(self, system: Transcribes, held: _Held, device: torch.device) -> dict[str, float]:
        """Rates of errors against the first caption, without intervals."""
        tokenizer = self._processor.tokenizer
        written = [tokenizer.decode(ids) for sound in held.sounds for ids in system.transcribe(sound.to(device))]
        said = [captions[0] if captions else "" for captions in held.captions]
        found = recognition(written, said, resamples=1).metrics
        return {name: found[name].value for name in ("wer", "cer")}

    def _retrieval(self, model: Model, vectors: Tensor, held: _Held) -> dict[str, float]:
        rows = [row for row, captions in enumerate(held.captions) if captions]
        if not rows:
            return {}
        texts = model.embed_texts([held.captions[row][0] for row in rows])
        found = ranks(vectors[rows], texts, torch.arange(len(rows)))
        image_to_text = (found.image_to_text < 1).float().mean().item()
        text_to_image = (found.text_to_image < 1).float().mean().item()
        return {
            "r1": (image_to_text + text_to_image) / 2,
            "image_to_text_r1": image_to_text,
            "text_to_image_r1": text_to_image,
        }

    def _zero_shot(self, model: Model, vectors: Tensor, held: _Held) -> dict[str, float]:
        labelled = self._labels(held)
        if labelled is None:
            return {}
        classes, rows, labels = labelled
        prompts = getattr(self._source, "templates", ()) or self._processor.templates
        candidates = class_vectors(model.embed_texts, classes, prompts)
        found = label_ranks(vectors[rows], candidates, torch.tensor(labels))
        return {"top1": (found < 1).float().mean().item()}

    def _labels(self, held: _Held) -> tuple[tuple[str, ...], list[int], list[int]] | None:
        """Candidate classes, the labelled rows and their labels; None where captions alone are to be validated with."""
        try:
            task = label_task(self._source)
        except UserError:
            return None
        index = task.index()
        found = [(row, index.get(label_of(fields, task.label) or "")) for row, fields in enumerate(held.fields)]
        pairs = [(row, label) for row, label in found if label is not None]
        if len(index) < 2 or not pairs:
            return None
        return task.classes, [row for row, _ in pairs], [label for _, label in pairs]


def _recall(queries: Tensor, items: Tensor, right: Tensor, k: int) -> float:
    """Share of queries whose right item is among the first ``k``; of equal scores the lowest index wins."""
    scores = queries @ items.T
    own = scores.gather(1, right[:, None])
    earlier = torch.arange(len(items)) < right[:, None]
    return (((scores > own) | ((scores == own) & earlier)).sum(1) < k).float().mean().item()


def _usual(system: Captions) -> str:
    """The text that captions begin with where nothing else is asked for."""
    return next(iter(system.beginnings.values()))
