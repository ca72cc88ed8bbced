"""Training from a configuration: open the data, learn the vocabulary, build the system, hand all to the loop."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm.config import apply_overrides, merge, read_layers, read_yaml, to_dict, validate, write_yaml
from mm.data.accounting import merge_states
from mm.data.captions import Captioner, corpus
from mm.data.emoji import MIN_SIZE
from mm.data.episodes import NAMES, Pool
from mm.data.features import encoding_of
from mm.data.loader import Loader
from mm.data.questions import check_questions, questions_of
from mm.data.sources import open_source, open_training_source
from mm.data.stream import INEXACT, StreamLoader
from mm.errors import BadSample, ConfigError, UserError
from mm.evaluation.vqa import frequent_answers, normalise
from mm.hub import CONFIG_FILE, Model, embed_parts, load, load_parts, with_parts
from mm.nn.parallel import divide
from mm.nn.tuning import tune
from mm.processor import Processor
from mm.run.card import write_card
from mm.run.config import RunConfig
from mm.run.encoding import check_encoding
from mm.run.episodes import EpisodePreparation
from mm.run.preparation import TrainPreparation
from mm.run.validation import Validator
from mm.systems import build, read_system
from mm.systems.interleaved import InterleavedSettings
from mm.systems.language_model import LanguageConfig
from mm.tokenizers.text import TextTokenizer
from mm.training.checkpoint import SaveError, find_checkpoint
from mm.training.devices import choose_device, seed_everything
from mm.training.loop import TrainResult
from mm.training.loop import train as train_loop
from mm.training.parallel import environment
from mm.types import Source, System, capabilities

DEFAULT_RUNS = Path("runs")
MAX_CORPUS_SAMPLES = 200_000
"""Samples whose captions teach the vocabulary, evenly spread over larger sources."""


def train(
    config: str | Path | RunConfig, overrides: Sequence[str] = (), *, out: str | Path | None = None, **loop_options: Any
) -> TrainResult:
    """Train a system from a configuration. The run folder's newest checkpoint is resumed; a finished run returns at once.

    Args:
        config: A YAML file or a validated configuration.
        overrides: ``key.path=value`` changes to it.
        out: Run folder; default ``runs/<name of the file>``.
        loop_options: Passed on to `mm.training.loop.train`.

    Raises:
        UserError: Configuration, data or run folder cannot be used.
    """
    if isinstance(config, RunConfig):
        name = config.system.name
        resolved = validate(RunConfig, apply_overrides(to_dict(config), overrides), "configuration")
    else:
        name = Path(config).stem
        resolved = load_run_config(Path(config), overrides)
    folder = Path(out) if out is not None else DEFAULT_RUNS / name
    run = assemble(resolved, resume=find_checkpoint(folder, lambda _: None) if folder.is_dir() else None)
    result = train_loop(
        run.system,
        run.stream,
        run.config.train,
        folder,
        validate=run.validator,
        extra_files=run.write_files,
        merge_states=merge_states,
        parallel=run.config.parallel,
        divide=divide,
        **loop_options,
    )
    if result.checkpoint is not None and environment()[0] == 0:
        try:
            write_card(folder, result.checkpoint)
        except OSError as error:
            raise SaveError(f"{folder}: the card cannot be written: {error.strerror}; the model is complete") from None
    return result


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the configuration of a run. A ``system`` section without a ``name`` lists changes to the network of ``init_from``.

    Raises:
        UserError: The file, a key or a value cannot be used, or there is no such model.
    """
    values = apply_overrides(read_layers(path), overrides)
    changes = values.get("system") or {}
    if values.get("init_from") and isinstance(changes, dict) and "name" not in changes:
        own = to_dict(load(str(values["init_from"]), device="cpu", precision="fp32").config)
        values["system"] = merge(own, changes)
    return validate(RunConfig, values, str(path))


@dataclass(frozen=True)
class Assembled:
    """The parts of a run, ready to be trained.

    Args:
        config: The configuration with what depends on the data filled in (vocabulary size, answers).
        system: The network.
        processor: Its preparation.
        stream: Its batches.
        validator: Scores the network during training, or None.
    """

    config: RunConfig
    system: System
    processor: Processor
    stream: Loader | StreamLoader
    validator: Validator | None

    def write_files(self, folder: Path) -> None:
        """What makes a checkpoint a model: the configuration and the preparation beside the weights."""
        write_yaml(self.config, folder / CONFIG_FILE)
        self.processor.save(folder)


def assemble(config: RunConfig, *, resume: Path | None = None) -> Assembled:
    """Open the data and build everything that a configuration names.

    Args:
        config: The run.
        resume: A checkpoint whose preparation is kept, its vocabulary above all: the weights know its ids.

    Raises:
        UserError: When data, model or their combination cannot be used.
    """
    parts = load_parts(config.system.parts() | config.system.training_parts())
    image_size = with_parts(config.system, parts).picture_side
    source = open_training_source(config.data, image_size=image_size or MIN_SIZE)
    start = load(config.init_from, device="cpu", precision="fp32") if config.init_from else None
    if resume is not None:
        processor = _kept_processor(config, resume, image_size)
    else:
        processor = _first_processor(config, source, image_size, parts, start)
        if image_size is not None and not processor.has_image:  # begins as a language model
            processor = processor.with_image(config.processor.image_spec(image_size))
        elif image_size is not None and processor.image_spec.size != image_size:  # begins with a stage for smaller pictures
            processor = processor.with_image(processor.image_spec.model_copy(update={"size": image_size, "resize_to": None}))
        processor = _with_words_of(parts.get("language"), processor)
        if not config.system.begins_texts:
            processor = processor.without_start()
    config = _with_answers(_with_vocabulary(config, processor, start), source, resume)
    config = config.model_copy(update={"system": embed_parts(config.system, parts)})
    known = {"answer_text": processor.text(config.system.known_answers)} if config.system.learns_answers else {}
    system = _system(config, start, {name: part.system for name, part in parts.items()} | known)
    rank, world_size = environment()
    rank, world_size = rank // config.parallel.model_size, config.parallel.data_size(world_size)
    if config.train.batch_size % world_size:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} is not a multiple of the {world_size} processes, which share it evenly"
        )
    encoding = encoding_of(source)
    if encoding is not None:
        check_encoding(encoding, config, with_parts(config.system, parts), system, processor, source.name)
    captioner = Captioner(config.data.captions)
    preparation = TrainPreparation(
        processor,
        captioner,
        config.data.augment,
        config.data.positives,
        config.train.seed,
        answers=config.system.learns_answers,
        words=config.system.learns_whole_words,
        encoding=encoding,
        augment_audio=config.data.augment_audio,
        sees=config.system.learns_pictures,
    )
    prepare = _episodes(preparation, config, source, capabilities(system))
    sampling = config.data.sampling
    options: dict[str, Any] = {
        "batch_size": config.train.batch_size,
        "seed": config.train.seed,
        "workers": config.data.workers,
        "rank": rank,
        "world_size": world_size,
        "max_bad_fraction": config.data.max_bad_fraction,
        "timeout_seconds": config.data.timeout_seconds,
    }
    if config.data.stream is not None and config.data.train is not None:
        if rank == 0:
            print(INEXACT, file=sys.stderr)
        stream = StreamLoader(config.data.train, config.data.stream, prepare, prepare.collate, **options)
    else:
        stream = Loader(
            source,
            prepare,
            prepare.collate,
            policy=sampling.policy,
            field=sampling.field,
            per_concept=sampling.per_concept,
            pin_memory=choose_device(config.train.device).type == "cuda",
            **options,
        )
    return Assembled(config, system, processor, stream, _validator(config, processor, image_size, capabilities(system)))


def _episodes(
    preparation: TrainPreparation, config: RunConfig, source: Source, able: frozenset[str]
) -> TrainPreparation | EpisodePreparation:
    """The preparation that makes episodes of samples, where the configuration asks for them."""
    episodes = config.data.episodes
    if episodes is None:
        return preparation
    if "writes" not in able or not preparation.processor.has_image:
        raise ConfigError(
            f"data.episodes: '{config.system.name}' reads no texts with pictures in them; take frozen or flamingo"
        )
    if isinstance(config.system, InterleavedSettings) and isinstance(config.system.language, LanguageConfig):
        names = preparation.processor.text([episodes.template.format(name) for name in NAMES])
        longest = config.system.picture_positions + int(names.lengths.max())
        needed, room = (episodes.ways[1] * episodes.shots[1] + 1) * longest, config.system.language.network.context_length
        if needed > room:
            raise ConfigError(
                f"data.episodes: up to {needed} positions do not fit system.language.network.context_length {room}; "
                "take a longer context, or fewer ways or shots"
            )
    return EpisodePreparation(preparation, Pool(source, episodes.concept, apart=episodes.apart), episodes)


def _first_processor(
    config: RunConfig, source: Source, image_size: int | None, parts: Mapping[str, Model], start: Model | None
) -> Processor:
    """The preparation of what the run starts from, or of a new model."""
    if start is None:
        return _processor(config, source, image_size, parts)
    if start.processor.has_text or config.system.text_limits is None or not config.system.hears:
        return start.processor
    heard, wanted = start.processor.audio_spec, config.processor.audio  # begins as an encoder that knows no words
    if (heard.rate, heard.normalise) != (wanted.rate, wanted.normalise):
        raise ConfigError(
            f"init_from: '{config.init_from}' hears waves at {heard.rate} Hz, normalise: {str(heard.normalise).lower()}; "
            "set both in processor.audio"
        )
    return _processor(config, source, image_size, parts)


def _kept_processor(config: RunConfig, checkpoint: Path, image_size: int | None) -> Processor:
    """The preparation that a run began with. Raises `ConfigError` where the configuration asks for another by now."""
    kept = Processor.load(checkpoint)
    same = kept.templates == config.processor.templates or "hub" in config.system.parts()
    if config.system.hears:
        same = same and kept.audio_spec == config.processor.audio
    if image_size is not None and "hub" not in config.system.parts():
        same = same and kept.image_spec == config.processor.image_spec(image_size)
    if config.init_from is None and not same:
        raise ConfigError(
            f"{checkpoint}: this run began with another 'processor' section; put it back, or train into a new run folder"
        )
    return kept


def _with_words_of(language: Model | None, processor: Processor) -> Processor:
    """The preparation with the tokens that a language model which is part of the network knows."""
    if language is None:
        return processor
    return Processor(
        image=processor.image_spec,
        tokenizer=language.processor.tokenizer,
        context_length=processor.context_length,
        templates=processor.templates,
        audio=processor.audio_spec if processor.has_audio else None,
    )


def _processor(config: RunConfig, source: Source, image_size: int | None, parts: Mapping[str, Model]) -> Processor:
    """The preparation of a new model."""
    settings = config.processor
    if "hub" in parts:  # pictures and texts are prepared as it knows them
        hub = parts["hub"].processor
        return Processor(
            image=hub.image_spec,
            tokenizer=hub.tokenizer,
            context_length=hub.context_length,
            templates=hub.templates,
            audio=settings.audio,
        )
    image = None if image_size is None else settings.image_spec(image_size)
    audio = settings.audio if config.system.hears else None
    limits = with_parts(config.system, parts).text_limits
    if limits is None:
        return Processor(image=image, templates=settings.templates, audio=audio)
    vocab_size, context_length = limits
    reader = parts.get("language") or parts.get("text")
    if reader is not None:
        tokenizer = reader.processor.tokenizer
    elif settings.tokenizer == "clip":
        tokenizer = TextTokenizer.clip_bpe()
    elif settings.tokenizer == "characters":
        tokenizer = TextTokenizer.train_characters(_corpus(config, source))
    else:
        tokenizer = TextTokenizer.train_bpe(_corpus(config, source), vocab_size)
    return Processor(image=image, tokenizer=tokenizer, context_length=context_length, templates=settings.templates, audio=audio)


def _corpus(config: RunConfig, source: Source) -> Iterator[str]:
    """Every text that the caption templates can make of the training samples, and the prompts of evaluation."""
    yield from config.processor.templates
    step = max(1, len(source) // MAX_CORPUS_SAMPLES)
    for index in range(0, len(source), step):
        try:
            yield from corpus(source.read(index), config.data.captions)
        except BadSample:
            continue


def _with_vocabulary(config: RunConfig, processor: Processor, start: Model | None) -> RunConfig:
    """The configuration with the vocabulary's true size, which may be smaller than asked for.

    Published networks may have room for more words than their tokenizer has; what starts with one keeps that room.
    """
    if not processor.has_text or {"text", "hub"} & config.system.parts().keys():  # what reads the texts keeps its vocabulary
        return config
    size = processor.tokenizer.vocab_size
    if start is not None and start.config.name == config.system.name:
        known = with_parts(start.config, load_parts(start.config.parts())).text_limits  # which a part may have to tell
        size = size if known is None else known[0]
    return config.model_copy(update={"system": config.system.with_vocabulary(size)})


def _with_answers(config: RunConfig, source: Source, resume: Path | None) -> RunConfig:
    """The configuration with the answers that the network will know: those that a run began with, the configured ones, or the
    most frequent ones of the training questions. Raises `UserError` where the source asks no questions."""
    system = config.system
    if not system.learns_answers:
        return config
    check_questions(source)
    if resume is not None:
        kept = read_yaml(resume / CONFIG_FILE)["system"]
        known = read_system(kept, f"{resume / CONFIG_FILE} (system)").known_answers
    elif system.answer_limit:
        known = frequent_answers((question.answers for question in questions_of(source)), system.answer_limit)
    else:
        known = tuple(dict.fromkeys(map(normalise, system.known_answers)))
    if not known:
        raise UserError(f"{source.name}: no question has an answer that could be learned")
    return config.model_copy(update={"system": system.with_answers(known)})


def _system(config: RunConfig, start: Model | None, parts: Mapping[str, Any]) -> System:
    seed_everything(config.train.seed, torch.device("cpu"))
    config.system.check_start(None if start is None else start.config)
    system = build(config.system, parts)
    carried = None if start is None else start.tune
    if carried is not None:
        if carried != config.tune:
            raise ConfigError(
                f"init_from: '{config.init_from}' has trained parts beside its weights, so it can only be tuned as before; "
                f"go on with tune='{json.dumps(to_dict(carried))}'"
            )
        tune(system, carried)
    if start is not None:
        same_answers = config.system.known_answers == start.config.known_answers
        fresh = () if same_answers else {*config.system.fresh_parts, *start.config.fresh_parts}
        _adopt(system, start.system, config.init_from or start.name, tuple(fresh))
    if config.tune is not None and carried is None:
        tune(system, config.tune)
    return system


def _adopt(system: System, start: System, name: str, fresh: tuple[str, ...] = ()) -> None:
    """Take over all parameters, and the buffers that fit: a queue that only one of the two has is left as it is.

    Parts named in ``fresh`` are not taken over, and may be in one of the two only; parameters that `System.may_be_added` allows
    may be missing in ``start``; those that are `System.only_for_training` start fresh.
    """
    given = {key: value for key, value in system.state_from(start).items() if not key.startswith(start.only_for_training)}
    state, own = _without(given, fresh), system.state_dict()
    parameters = set(_without({key: None for network in (start, system) for key, _ in network.named_parameters()}, fresh))
    if type(start) is not type(system):  # gives what it has
        parameters = set(state)
    parameters -= {key for key in parameters - state.keys() if key.startswith(system.may_be_added)}
    parameters -= {key for key in parameters if key.startswith(system.only_for_training + start.only_for_training)}
    unfit = [key for key in parameters if key not in state or key not in own or state[key].shape != own[key].shape]
    if unfit:
        raise ConfigError(
            f"init_from: '{name}' is another network than 'system' describes (first difference: {min(unfit)}); "
            "`mm info --yaml` prints its section"
        )
    fit = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    system.load_state_dict(own | fit)


def _without(values: Mapping[str, Any], parts: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key.partition(".")[0] not in parts}


def _validator(config: RunConfig, processor: Processor, image_size: int | None, able: frozenset[str]) -> Validator | None:
    if config.data.validation is None:
        return None
    data = config.data
    source = open_source(
        config.data.validation,
        text_field=data.text_field,
        label_field=data.label_field,
        image_field=data.image_field,
        audio_field=data.audio_field,
        image_size=image_size or MIN_SIZE,
    )
    validator = Validator(source, processor, config.system, able)
    if environment()[0] == 0:
        validator.prepare()
    return validator
