"""Load and save models: a shipped name, a run, a folder or a published checkpoint goes in, weights and preparation come out.

A model folder holds ``config.yaml`` (of which ``system:`` builds the network), ``model.safetensors``, ``processor.json``,
``tokenizer.json`` and, where it was measured, ``card.json``.
"""

import difflib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm.config import StrictConfig, read_json, read_yaml, validate
from mm.errors import CheckpointError, UserError
from mm.fusion.grounding import Grounding, ground_words
from mm.nn.freeze import folded_weights
from mm.nn.initialise import Unfilled
from mm.nn.tuning import Tune, TuneConfig, merge, tune
from mm.processor import Processor
from mm.published.imported import Imported
from mm.published.resolve import import_model
from mm.systems import SystemConfig, build, read_system
from mm.training.checkpoint import STATE_FILE, find_checkpoint
from mm.training.devices import choose_device, inference_dtype
from mm.types import (
    Answers,
    AnswersFreely,
    AudioBatch,
    Candidates,
    CompilesDecoding,
    CompilesSampling,
    Decoding,
    Embeds,
    Grounds,
    Hears,
    RankedAnswers,
    System,
    TextBatch,
    capabilities,
)

ASSETS = Path(__file__).parent / "assets"
CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
CARD_FILE = "card.json"

MAX_STATE_BYTES = 64 << 20

LENGTH_STEP = 8
"""Compiled text encoders see lengths that are multiples of it."""

FREE_BEAMS = 5
"""Beams that answers are written freely with, at least."""

Progress = Callable[[int, int], None]


class _Tuned(StrictConfig):
    """The ``tune`` section of a model's configuration."""

    tune: Tune | None = None


@dataclass
class Model:
    """A system with its preparation: raw pictures and texts in, vectors and answers out.

    Args:
        system: The network, in evaluation mode.
        processor: How raw input becomes tensors for this network.
        config: The configuration that built the network.
        name: What the user called it.
        card: Data, command, figures and limits, as far as they were recorded.
        device: Where the network lives.
        dtype: What the weights are computed with; parts that would suffer from it stay in fp32.
        compiled_rows: Rows of every batch where the encoders are compiled (`compile`), 0 where they are not.
        tune: How the network was tuned, where that added parts that are not folded into its weights.
        left_out: Weights that belong to the model, for which nothing was built (`load_painter`).
    """

    system: System
    processor: Processor
    config: SystemConfig
    name: str
    card: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    compiled_rows: int = 0
    tune: TuneConfig | None = None
    left_out: dict[str, Tensor] = field(default_factory=dict)

    @property
    def capabilities(self) -> frozenset[str]:
        """Names of what this model can do, see `mm.types.CAPABILITIES`."""
        return capabilities(self.system)

    @property
    def fingerprint(self) -> str:
        """Digest of network, weights and preparation: equal fingerprints give equal vectors."""
        vocabulary = self.processor.tokenizer.to_json() if self.processor.has_text else ""
        added = () if self.tune is None else (self.tune.model_dump_json(),)
        parts = (self.config.model_dump_json(), json.dumps(self.processor.to_dict()), vocabulary, *added)
        return _digest(_lasting(self.system), "\n".join(parts))

    @property
    def embed_dim(self) -> int:
        """Width of the shared embedding space."""
        self._shared_space()
        return int(getattr(self.config, "embed_dim", 0))  # an encoder alone ends where its backbone does

    def compile(self, rows: int = 64) -> "Model":
        """This model itself, its encoders compiled for long jobs: a minute of compilation, then fewer and larger kernels.

        Batches are filled up to ``rows``, texts to multiples of 8 tokens, so that few shapes are compiled. A CPU needs a C++
        compiler for it; weights are folded into the compiled code, so they must not change afterwards. Of a model that decodes
        or samples step by step the step is compiled, for each number of rows when it is first met.

        Raises:
            UserError: The model neither embeds nor has such a step.
        """
        if isinstance(self.system, CompilesSampling):
            self.system.compile_sampling()
            return self
        if isinstance(self.system, CompilesDecoding):
            self.system.compile_decoding()
            return self
        if not isinstance(self.system, Embeds | Hears):
            raise self._unable("has nothing that can be compiled", "use it as it is, or take a dual tower, a flow or a writer")
        for modality, encoder in self.system.encoders().items():
            if modality != "audio":  # whose lengths differ
                encoder.compile(dynamic=False)
        self.compiled_rows = rows
        return self

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Prepared pictures, uint8 ``(B, 3, S, S)``, to unit vectors ``(B, D)`` in fp32 on the CPU."""
        system, rows = self._embedding_system(), self.compiled_rows or len(pixels)
        with torch.no_grad(), self._as_compiled():
            parts = [system.embed_image(_filled(part, rows).to(self.device))[: len(part)] for part in pixels.split(rows)]
        return torch.cat(parts).float().cpu()

    def embed_images(self, images: Sequence[Any], *, batch_size: int = 64, progress: Progress | None = None) -> Tensor:
        """Raw pictures (paths, bytes, PIL images, arrays) to unit vectors ``(N, D)``, fp32."""
        parts = []
        for start in range(0, len(images), batch_size):
            parts.append(self.embed_pixels(self.processor.images(images[start : start + batch_size])))
            if progress:
                progress(min(start + batch_size, len(images)), len(images))
        return torch.cat(parts) if parts else torch.empty(0, self.embed_dim)

    def embed_waves(self, audio: AudioBatch) -> Tensor:
        """Prepared recordings to unit vectors ``(B, D)`` in fp32 on the CPU."""
        if not isinstance(self.system, Hears):
            raise self._unable("takes no recordings", "take a model that hears, such as emoji-audio")
        with torch.no_grad():
            return self.system.embed_audio(audio.to(self.device)).float().cpu()

    def embed_audios(self, recordings: Sequence[Any], *, batch_size: int = 32, progress: Progress | None = None) -> Tensor:
        """Raw recordings (what `mm.processor.Processor.audio` takes) to unit vectors ``(N, D)``, fp32."""
        parts = []
        for start in range(0, len(recordings), batch_size):
            parts.append(self.embed_waves(self.processor.audios(recordings[start : start + batch_size])))
            if progress:
                progress(min(start + batch_size, len(recordings)), len(recordings))
        return torch.cat(parts) if parts else torch.empty(0, self.embed_dim)

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """Texts to unit vectors ``(N, D)``, fp32. Texts of like length share a batch, so that little padding is computed."""
        system, batch_size = self._shared_space(), self.compiled_rows or batch_size
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors: list[Tensor] = []
        with torch.no_grad(), self._as_compiled():
            for start in range(0, len(order), batch_size):
                batch = self.processor.text([texts[i] for i in order[start : start + batch_size]])
                rows = len(batch)
                if self.compiled_rows:
                    batch = self._in_few_shapes(batch)
                vectors.append(system.embed_text(batch.to(self.device))[:rows].float().cpu())
                if progress:
                    progress(min(start + batch_size, len(texts)), len(texts))
        if not vectors:
            return torch.empty(0, self.embed_dim)
        joined = torch.cat(vectors)
        result = torch.empty_like(joined)
        result[torch.tensor(order)] = joined
        return result

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Logits ``(Q, M)`` with the model's own scale, fp32."""
        with torch.no_grad():
            return self._shared_space().scores(queries.to(self.device), items.to(self.device)).float().cpu()

    def answer(
        self, image: Any, question: str, *, k: int = 5, candidates: Sequence[str] | None = None, free: bool = False
    ) -> RankedAnswers:
        """The ``k`` best answers to a question about one raw picture (path, bytes, PIL image, array).

        Args:
            image: What `mm.processor.Processor.image` takes.
            question: In words.
            k: Answers wanted.
            candidates: Answers to choose among; default: those that the model knows.
            free: Write answers that need not be in any list, by a search with `FREE_BEAMS` beams, or ``k``.

        Raises:
            UserError: This model does not answer questions, not freely, or cannot give one of the candidates; no picture there.
        """
        self.answering_system()
        pixels = self.processor.image(image)[None]
        return self.answer_pixels(pixels, [question], k=k, candidates=candidates, free=free)[0]

    def answer_pixels(
        self,
        pixels: Tensor,
        questions: Sequence[str],
        *,
        k: int = 1,
        candidates: Sequence[str] | None = None,
        free: bool = False,
    ) -> list[RankedAnswers]:
        """As `answer`, of prepared pictures uint8 ``(B, 3, S, S)`` with a question each."""
        if free:
            if candidates is not None:
                raise UserError("free and candidates: what is written freely is not chosen among candidates; give one of them")
            return self._written_answers(pixels, questions, k)
        system, among = self.answering_system(), None
        if candidates is not None:
            if not candidates:
                raise UserError("candidates: give at least one answer to choose among, or none at all for the model's own")
            among = Candidates(tuple(candidates), self.processor.text(candidates).to(self.device))
        text = self.processor.text(questions).to(self.device)
        with torch.no_grad():
            return system.answer(pixels.to(self.device), text, among, k=k)

    def _written_answers(self, pixels: Tensor, questions: Sequence[str], k: int) -> list[RankedAnswers]:
        """The ``k`` likeliest answers that a search finds, each text once, with the likelihood of writing it."""
        system = self.free_answering_system()
        text = self.processor.text(questions).to(self.device)
        decoding = Decoding(beams=max(k, FREE_BEAMS), length_penalty=0.0, end=self.processor.tokenizer.end)
        with torch.no_grad():
            found = system.write_answer(pixels.to(self.device), text, decoding, [0] * len(text))
        ranked = []
        for best in found:
            scores: dict[str, float] = {}
            for one in (best, *best.others):
                scores.setdefault(self.processor.tokenizer.decode(one.ids), math.exp(one.log_likelihood))
            ranked.append(RankedAnswers(tuple(scores)[:k], tuple(scores.values())[:k]))
        return ranked

    def ground(self, image: Any, text: str, *, layers: Sequence[int] | None = None) -> Grounding:
        """Where in one raw picture (path, bytes, PIL image, array) the words of a text are.

        Places are those of the picture as the model sees it, `mm.processor.Processor.view`.

        Args:
            image: What `mm.processor.Processor.image` takes.
            text: What the picture may show; what is longer than the model reads is left out.
            layers: See `mm.types.Grounds.ground`.

        Raises:
            UserError: This model cannot ground words, or not by these layers; the text has no word; no picture there.
        """
        system, tokenizer = self._grounding_system(), self.processor.tokenizer
        words = tokenizer.words(text, self.processor.context_length)
        if not words:
            raise UserError(f"text {text!r}: has no word to look for; say what the picture shows")
        pixels, ids = self.processor.image(image)[None], self.processor.text([text])
        with torch.no_grad():
            encoded = system.encode_image(pixels.to(self.device)), system.encode_text(ids.to(self.device))
            pieces = system.ground(*encoded, layers=layers)[0].cpu()
            match = float(system.match(*encoded).sigmoid())
        return ground_words(tokenizer.decode(ids.ids[0].tolist()), words, pieces, match)

    def parameters(self) -> dict[str, int]:
        """Parameter counts of the top-level parts, and ``total``, without what training alone needs."""
        counts: dict[str, int] = {}
        for name, parameter in self.system.named_parameters():
            if not name.startswith(self.system.only_for_training):
                part = name.partition(".")[0]
                counts[part] = counts.get(part, 0) + parameter.numel()
        return counts | {"total": sum(counts.values())}

    def _as_compiled(self) -> AbstractContextManager[object]:
        return folded_weights(self.device) if self.compiled_rows else nullcontext()

    def _in_few_shapes(self, batch: TextBatch) -> TextBatch:
        """Filled up with padding behind the texts, which no text's vector depends on, and with rows."""
        length = min(-(-batch.ids.shape[1] // LENGTH_STEP) * LENGTH_STEP, self.processor.context_length)
        ids = F.pad(batch.ids, (0, length - batch.ids.shape[1]), value=self.processor.tokenizer.pad)
        lengths = F.pad(batch.lengths, (0, self.compiled_rows - len(batch)), value=1)
        return TextBatch(_filled(ids, self.compiled_rows), lengths)

    def _shared_space(self) -> Embeds | Hears:
        """The system, where texts have vectors in one space with pictures or recordings."""
        return self.system if isinstance(self.system, Hears) else self._embedding_system()

    def _embedding_system(self) -> Embeds:
        if not isinstance(self.system, Embeds):
            raise self._unable("has no shared embedding space", "take a dual-tower model")
        return self.system

    def answering_system(self) -> Answers:
        """The system, where it answers questions. Raises `UserError` where it does not."""
        if "answers" not in self.capabilities or not isinstance(self.system, Answers):
            raise self._unable("cannot answer questions", "take a model that learned to, such as emoji-vqa")
        return self.system

    def free_answering_system(self) -> AnswersFreely:
        """The system, where it writes answers that are in no list. Raises `UserError` where it does not."""
        if "answers_freely" not in self.capabilities or not isinstance(self.system, AnswersFreely):
            remedy = "take one with a decoder, such as emoji-vqa, or its known answers"
            raise self._unable("cannot write answers freely", remedy)
        return self.system

    def _grounding_system(self) -> Grounds:
        if "grounds" not in self.capabilities or not isinstance(self.system, Grounds):
            remedy = "take a model whose words attend to the picture, such as emoji-albef"
            raise self._unable("cannot tell where words are", remedy)
        return self.system

    def _unable(self, lack: str, remedy: str) -> UserError:
        able = ", ".join(sorted(self.capabilities)) or "nothing yet"
        return UserError(f"{self.name} {lack} (it can: {able}); {remedy}")


def _filled(rows: Tensor, count: int) -> Tensor:
    """Zero rows appended up to ``count``."""
    missing = count - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing > 0 else rows


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    folder = ASSETS / "models"
    return sorted(path.name for path in folder.iterdir() if (path / WEIGHTS_FILE).is_file()) if folder.is_dir() else []


def load(model: str | Path, *, device: str = "auto", precision: str = "auto") -> Model:
    """Load a model with its preparation, to use it: what training alone needs, such as momentum copies, is left out (a training
    begins with a model by ``init_from``).

    Args:
        model: A shipped name (`shipped`), a run folder (its newest complete checkpoint, EMA weights), a model folder, or a
            published checkpoint (`mm.published.resolve.import_model`): an open_clip tag (``ViT-B-32/openai``), a folder of
            open_clip or transformers, a Hugging Face repository.
        device: ``auto`` (CUDA, then MPS, then CPU) or any torch device.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 on GPUs and CPUs with matrix units for it, else fp32. The environment
            variable ``MM_PRECISION`` decides for ``auto``. Unit vectors and scores are in fp32 in any case, and so are
            projections, except those inside library towers.

    Raises:
        CheckpointError: When there is no such model, or a file of it is missing, damaged or of another shape.
    """
    return _load(model, device, precision)


def load_painter(model: str | Path, *, device: str = "auto", precision: str = "auto") -> Model:
    """As `load`, to make pictures of words and for nothing else: what reads the words is built without its picture tower, which
    with the library behind it would take most of the time."""
    return _load(model, device, precision, painting=True)


def _load(model: str | Path, device: str, precision: str, *, painting: bool = False, reading: bool = False) -> Model:
    """See `load`; only for ``painting``, or as a part that is only for ``reading`` texts."""
    without = {"image": None} if reading else {}
    imported = None if str(model) in shipped() else import_model(str(model))
    if imported is not None:
        return from_imported(imported, name=str(model), device=device, precision=precision, without=without)
    folder, weights = _locate(str(model))
    config_path = folder / CONFIG_FILE
    values = read_yaml(config_path)
    if "system" not in values:
        raise CheckpointError(f"{config_path}: has no 'system' section; is this a model folder written by mm?")
    config = read_system(values["system"], f"{config_path} (system)")
    parts = load_parts(config.parts(), config.readers if painting else frozenset())
    with Unfilled():
        system = build(config.for_inference(), {name: part.system for name, part in parts.items()} | without)
    _check_parts(system, parts, values.get("parts", {}), config_path)
    of_parts = _part_weights(system, parts)
    way = validate(_Tuned, {"tune": values.get("tune")}, str(config_path)).tune
    if way is not None:
        tune(system, way)
    own, left_out = _set_aside(system, _read_weights(weights))
    _check_stored_parts(own, of_parts, parts, weights)
    _load_weights(system, of_parts | _shared_weights(system, values.get("base"), config_path) | own, str(weights))
    added = None if way is None else merge(system, way)
    place = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    dtype = inference_dtype(precision, place)
    return Model(
        system=_placed(system, place, dtype),
        processor=Processor.load(folder),
        config=config,
        name=str(model),
        card=_card(folder, values),
        device=place,
        dtype=dtype,
        tune=added,
        left_out=left_out,
    )


def _card(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """What is recorded of a model: its card, or of a run its data, trained parameters and cost."""
    if (folder / CARD_FILE).is_file():
        return read_json(folder / CARD_FILE)
    state = read_json(folder / STATE_FILE, MAX_STATE_BYTES) if (folder / STATE_FILE).is_file() else {}
    recorded = {
        "training_data": values.get("data"),
        "parameters": state.get("parameters"),
        "training": state.get("efficiency"),
    }
    return {key: value for key, value in recorded.items() if value}


def load_parts(references: Mapping[str, str], readers: Collection[str] = ()) -> dict[str, Model]:
    """The models that a system's configuration names as its parts, in fp32 on the CPU; ``readers`` to read texts alone.

    Raises:
        UserError: A model was tuned by parts beside its weights: a configuration of the whole has no place for them.
    """
    parts = {name: _load(reference, "cpu", "fp32", reading=name in readers) for name, reference in references.items()}
    for name, part in parts.items():
        if part.tune is not None:
            raise UserError(
                f"system.{name}: '{part.name}' was tuned by '{part.tune.method}', which cannot be folded into the weights of a "
                "part; take the model that it was made of, or tune that with 'lora'"
            )
    return parts


def with_parts(config: SystemConfig, parts: Mapping[str, Model]) -> SystemConfig:
    """The configuration with references to parts of its network replaced by their configurations."""
    return config.model_copy(update={name: parts[name].config for name in config.parts()})


def embed_parts(config: SystemConfig, parts: Mapping[str, Model]) -> SystemConfig:
    """As `with_parts`, except for references to shipped models.

    So a model folder is whole wherever it is moved, while shipped models are not stored again in each other.
    """
    whole = with_parts(config, parts)
    return whole.model_copy(update={name: reference for name, reference in config.parts().items() if reference in shipped()})


def _part_weights(system: System, parts: Iterable[str]) -> dict[str, Tensor]:
    """Weights of parts under the names that they have in the whole network."""
    return {f"{name}.{key}": tensor for name in parts for key, tensor in system.part_state(name).items()}


def _check_parts(system: System, parts: Mapping[str, Model], digests: Mapping[str, str], where: Path) -> None:
    """Raises `CheckpointError` where a part is no longer the one that the whole was trained with."""
    for name, digest in digests.items():
        if name in parts:
            whole = system.part_state(name) | parts[name].left_out
            _check_unchanged(parts[name].name, _digest(whole), digest, f"{where}: its {name}")


def _check_unchanged(name: str, digest: str, expected: object, what: str) -> None:
    if digest != expected:
        raise CheckpointError(
            f"{what} '{name}' has other weights than when this model was saved; "
            "take the version of mm that it was made with, or train it again"
        )


def _shared_weights(system: System, base: object, where: Path) -> dict[str, Tensor]:
    """What the shipped model that a folder is saved beside gives its network, see `save`."""
    if base is None:
        return {}
    if not isinstance(base, dict) or base.get("model") not in shipped():
        raise CheckpointError(f"{where}: 'base' names no shipped model; there are {', '.join(shipped())}")
    shared = load(base["model"], device="cpu", precision="fp32")
    _check_unchanged(shared.name, _digest(_lasting(shared.system)), base.get("digest"), f"{where}: its base")
    return _given(system, shared.system)


def _given(system: System, base: System) -> dict[str, Tensor]:
    """What a shipped model gives a network, as far as it fits and a saved model holds it."""
    own = system.state_dict()
    return {
        name: tensor
        for name, tensor in system.state_from(base).items()
        if name in own and tensor.shape == own[name].shape and not name.startswith(system.only_for_training)
    }


def _check_stored_parts(
    own: Mapping[str, Tensor], of_parts: Mapping[str, Tensor], parts: Mapping[str, Model], where: Path
) -> None:
    """Raises `CheckpointError` where a run has kept other weights of a part than the model that it names has by now."""
    for name, part in parts.items():
        named = {key: tensor for key, tensor in of_parts.items() if key.startswith(f"{name}.")}
        kept = {key: tensor for key, tensor in own.items() if key in named}
        same = kept.keys() == named.keys() and all(torch.equal(tensor, named[key]) for key, tensor in kept.items())
        if kept and not same:
            raise CheckpointError(
                f"{where}: its {name} '{part.name}' has other weights than when this run began; "
                "take the version of mm that it was made with, or train it again"
            )


def _lasting(system: System) -> dict[str, Tensor]:
    """The weights without those that training alone needs, which change nothing that a model gives."""
    return {name: tensor for name, tensor in system.state_dict().items() if not name.startswith(system.only_for_training)}


def network_fingerprint(config: SystemConfig, state: Mapping[str, Tensor]) -> str:
    """Digest of a network alone, whatever is prepared for it; of a part of another network, too (`System.part_state`)."""
    return _digest(state, json.dumps(config.model_dump(mode="json"), sort_keys=True))


def _digest(state: Mapping[str, Tensor], text: str = "") -> str:
    """Of names and weights, behind a text."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _placed(system: System, device: torch.device, dtype: torch.dtype) -> System:
    """The system in evaluation mode, on its device, its weights cast once to the computing type."""
    system.eval().to(device)
    if dtype != torch.float32:
        system.cast_(dtype)
    return system


def from_imported(
    imported: Imported,
    *,
    name: str,
    device: str = "auto",
    precision: str = "auto",
    without: Mapping[str, None] = MappingProxyType({}),
) -> Model:
    """A model from what an importer returned, ``without`` some of its towers.

    Raises:
        CheckpointError: Weights and configuration do not fit.
    """
    with Unfilled():
        system = build(imported.config.for_inference(), without)
    state, left_out = _set_aside(system, imported.state)
    _load_weights(system, state, name)
    place = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    dtype = inference_dtype(precision, place)
    return Model(
        system=_placed(system, place, dtype),
        processor=imported.processor,
        config=imported.config,
        name=name,
        card=imported.card,
        device=place,
        dtype=dtype,
        left_out=left_out,
    )


def save(
    model: Model,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    card: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> Path:
    """Write a model folder that `load` reads.

    Args:
        model: What to write.
        folder: A new or empty one.
        dtype: Of the weights in the file.
        card: What to record of the model; default: its own.
        base: A shipped model that this one was trained from: weights that are still its own (`System.state_from`) are not
            stored again.

    Raises:
        UserError: As `make_folder`, the weights were cast to a type that holds less than ``dtype``, or ``base`` is not shipped.
    """
    if base is not None and base not in shipped():
        raise UserError(f"base '{base}': is not shipped with mm; there are {', '.join(shipped())}")
    if dtype.itemsize > min(p.dtype.itemsize for p in model.system.parameters()):
        raise UserError(
            f"{model.name}: its weights were cast to bf16 for speed; load it with precision='fp32' to save it whole"
        )
    folder = check_folder(folder)
    of_parts = _part_weights(model.system, model.config.parts())
    state = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous().clone()
        for name, tensor in _lasting(model.system).items()
        if name not in of_parts
    }
    references: dict[str, Any] = {"parts": {name: _digest(model.system.part_state(name)) for name in model.config.parts()}}
    if base is not None:
        shared = load(base, device="cpu", precision="fp32")
        given = _given(model.system, shared.system)
        state = {name: t for name, t in state.items() if name not in given or not torch.equal(t, given[name].to(t.dtype))}
        references["base"] = {"model": base, "digest": _digest(_lasting(shared.system))}
    if model.tune is not None:
        references["tune"] = model.tune.model_dump(mode="json")
    contents = dict(model.card if card is None else card)
    there = _nearest(folder)
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=f".{folder.name}.") as name:
            written = Path(name)
            write_config(model.config, written, references)
            model.processor.save(written)
            if contents:
                (written / CARD_FILE).write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            save_file(state, written / WEIGHTS_FILE)
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(written.iterdir(), key=lambda file: file.name == WEIGHTS_FILE):  # the weights make it a model
                file.replace(folder / file.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); make room or choose another folder") from error
    return folder


def check_folder(folder: str | Path) -> Path:
    """A folder that may take a new model; it need not exist yet: what a command checks before it loads or computes for long.

    Raises:
        UserError: It already holds a model, or nothing can be written there.
    """
    folder = Path(folder)
    try:
        if (folder / WEIGHTS_FILE).exists():
            raise UserError(f"{folder}: already holds a model; choose another folder")
        tempfile.TemporaryFile(dir=_nearest(folder)).close()
    except OSError as error:
        raise UserError(f"{folder}: no model can be written there ({error}); choose another folder") from None
    return folder


def _nearest(folder: Path) -> Path:
    """The folder itself where there is one, else the nearest of those above it."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def write_config(config: SystemConfig, folder: Path, references: Mapping[str, Any] | None = None) -> None:
    """Write the resolved configuration of a network that is not part of a run, and what else `load` has to know of it."""
    named = {name: value for name, value in (references or {}).items() if value}
    values: dict[str, Any] = {"system": config.model_dump(mode="json")} | named
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _locate(model: str) -> tuple[Path, Path]:
    """The folder with configuration and preparation, and the weight file."""
    if model in shipped():
        folder = ASSETS / "models" / model
        return folder, folder / WEIGHTS_FILE
    folder = Path(model)
    if not folder.is_dir():
        near = difflib.get_close_matches(model, shipped(), n=1)
        hint = (
            f"did you mean '{near[0]}'?"
            if near
            else f"shipped models: {', '.join(shipped()) or 'none'}; or give a run folder, ARCHITECTURE/TAG or OWNER/NAME"
        )
        raise CheckpointError(f"no model '{model}'; {hint}")
    if (folder / WEIGHTS_FILE).is_file() and not (folder / "manifest.json").is_file():
        return folder, folder / WEIGHTS_FILE
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise CheckpointError(f"{folder}: holds neither a model nor a complete checkpoint of a run")
    ema = checkpoint / EMA_FILE
    return checkpoint, ema if ema.is_file() else checkpoint / WEIGHTS_FILE


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from None


def _set_aside(system: System, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a network, and in fp32 those of what it was built without."""
    own = {name: tensor for name, tensor in state.items() if not name.startswith(system.left_out)}
    left_out = {name: tensor for name, tensor in state.items() if name not in own}
    return own, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in left_out.items()}


def _load_weights(system: System, state: Mapping[str, Tensor], where: str) -> None:
    """Load strictly, except for what training alone needs; bf16 and fp16 files are computed with in fp32."""
    expected, state = (
        {name: tensor for name, tensor in tensors.items() if not name.startswith(system.only_for_training)}
        for tensors in (system.state_dict(), state)
    )
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(f"{where}: does not fit its configuration; missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{where}: '{name}' is {tuple(tensor.shape)}, its configuration says {tuple(expected[name].shape)}"
            )
    system.load_state_dict(system.state_dict() | state)
