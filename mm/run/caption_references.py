"""What captions of a source are held against: the right ones, the names of its classes, and captions of like pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mm.data.captions import look_up
from mm.data.emoji import EmojiSource
from mm.data.fields import nearest as did_you_mean
from mm.data.labels import LabelTask
from mm.data.sources import Subset
from mm.errors import BadSample, UserError
from mm.evaluation.baseline import SIDE, nearest, nearest_vectors
from mm.evaluation.captioning import normalised
from mm.hub import Model
from mm.run.evaluation import CAPTION_LABEL, COMMANDS, encode, opened, subset_masks, thumbnails_of
from mm.run.picture_controls import recorded_training
from mm.types import Source

PROBED_SAMPLES = 50
ENGLISH = "en"
"""Language of the usual names of classes."""

CAPTIONED_SETS = (None, "retrieval", "zero-shot")
"""What figures of a source are published for, where its texts or names describe pictures."""


@dataclass(frozen=True)
class References:
    """Where the right captions of a sample are, and what is known of them.

    Args:
        label: Dotted field that holds them; None for the sample's captions.
        task: The source's classes, if it brings any.
        names: Names of the classes in the language of the references, each with the subgroups that it belongs to.
        of_value: Name of a class by what the field says of it, where that is another.
    """

    label: str | None
    task: LabelTask | None = None
    names: Mapping[str, frozenset[str]] = field(default_factory=dict)
    of_value: Mapping[str, str] = field(default_factory=dict)

    def of(self, fields: Mapping[str, Any], captions: Sequence[str]) -> tuple[str, ...]:
        """The right captions of a sample; none where it has none."""
        if self.label is None:
            return tuple(captions)
        value = look_up(fields, self.label)
        several = value if isinstance(value, list | tuple) else [value]
        said = [str(one).strip() for one in several if one is not None]
        return tuple(self.of_value.get(one, one) for one in said if one)

    @property
    def has_subgroups(self) -> bool:
        """Whether classes belong to subgroups."""
        return any(self.names.values())

    def masks(self, fields: Sequence[Mapping[str, Any]]) -> dict[str, list[bool]]:
        """Masks over samples for each of the source's subsets, where there is more than one."""
        found = {} if self.task is None else subset_masks(fields, self.task)
        return found if len(found) > 1 else {}

    def subgroup_hits(self, captions: Sequence[str], fields: Sequence[Mapping[str, Any]]) -> list[float]:
        """Whether each caption is the name of a class of its sample's subgroup."""
        known: dict[str, frozenset[str]] = {}
        for name, subgroups in self.names.items():
            known[normalised(name)] = known.get(normalised(name), frozenset()) | subgroups
        return [
            float(entry.get("subgroup") in known.get(normalised(caption), ()))
            for caption, entry in zip(captions, fields, strict=True)
        ]

    def stamp(self) -> dict[str, Any]:
        """What the protocol says of them."""
        facts: dict[str, Any] = {"reference": f"field {self.label}" if self.label else "captions of the sample"}
        if self.has_subgroups:
            facts["subgroup"] = (
                f"the caption is one of {len(self.names)} names, of a class of the right subgroup; "
                "any other caption counts as wrong"
            )
        return facts


def caption_references(source: Source, label: str | None, language: str | None, *, strict: bool) -> References:
    """What a source says that its pictures should be called.

    Args:
        source: As the user gave it.
        label: Field with the right captions, ``txt`` for the captions; default: of a source with named classes the name, else
            the captions.
        language: What captions are written in: if the source has names in that language (``names.zh`` beside ``name``), these
            are meant, else the usual ones.
        strict: Names in that language have to be there.

    Raises:
        UserError: Texts of the source are no descriptions, no sample has the field, or there are no names in the language.
    """
    kind = getattr(source, "evaluation", None)
    if kind not in CAPTIONED_SETS:
        hint = f"measure it with `mm eval {COMMANDS.get(kind, kind)}`"
        raise UserError(f"{source.name}: a {kind} set, whose texts do not describe pictures; {hint}")
    task: LabelTask | None = getattr(source, "task", None)
    if label == CAPTION_LABEL or (label is None and task is None):
        return References(None, task)
    chosen = label or _in_language(source, task.label if task else "", language, strict=strict)
    _check_field(source, chosen)
    if isinstance(source, EmojiSource):
        return References(chosen, task, source.named(chosen))
    if task is not None and chosen == task.label:
        of_value = dict(zip(task.values, task.classes, strict=True)) if task.values else {}
        return References(chosen, task, dict.fromkeys(task.classes, frozenset()), of_value)
    return References(chosen, task)


def training_index(
    model: Model, source: Source, train: str | Source | None, *, image_field: str | None, text_field: str | None
) -> Source | None:
    """Pictures whose captions a baseline may know: those that were named, else those that the model learned from as its card or
    run says, else the source's own reference.

    Raises:
        UserError: A source cannot be read.
    """
    if train == "none":
        return None
    if train is not None:
        return opened(train, model, image_field=image_field, text_field=text_field)
    recorded = recorded_training(model)
    if recorded is not None:
        return recorded
    task: LabelTask | None = getattr(source, "task", None)
    return None if task is None or task.reference is None else opened(task.reference, model)


def neighbour_captions(
    asked: Source,
    index: Source,
    references: References,
    finder: Model | None,
    vectors: Tensor | None,
    *,
    cache: bool = True,
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The first caption of the training picture that is most like each picture, in pixels and by a model's vectors.

    Args:
        asked: The n pictures, all of which can be read.
        index: Training pictures.
        references: Where captions are, in both.
        finder: A model with a shared space, if one is to look, too.
        vectors: Its unit vectors of the n pictures, ``(n, D)``.
        cache: Remember the vectors of the training pictures in the cache folder.

    Returns:
        Captions by baseline (``baseline``, ``neighbour``), and what the protocol says of them.

    Raises:
        UserError: No training picture has a caption.
    """
    small, samples = thumbnails_of(index, None)
    known = [(row, found[0]) for row, one in enumerate(samples) if (found := references.of(one.fields, one.texts))]
    if not known:
        raise UserError(f"{index.name}: no picture has a caption for the baselines; give another source with --train, or none")
    queries, _ = thumbnails_of(asked, None)
    rows = nearest(small[[row for row, _ in known]], queries).tolist()
    captions = {"baseline": [known[row][1] for row in rows]}
    facts = {"baseline": f"caption of the nearest of {len(known)} pictures of {index.name} in pixels, {SIDE} x {SIDE} on black"}
    if finder is not None and vectors is not None:
        encoded = encode(finder, index, cache=cache)
        said = [references.of(one["fields"], one["captions"]) for one in encoded.samples]
        rows = [row for row, found in enumerate(said) if found]
        captions["neighbour"] = [said[rows[place]][0] for place in nearest_vectors(encoded.images[rows], vectors).tolist()]
        facts["neighbour"] = f"caption of the picture of {index.name} that is nearest by the vectors of {finder.name}"
    return captions, facts


def only(source: Source, ids: Sequence[str]) -> Subset:
    """The samples with these ids, in their order."""
    place = {source.key(row): row for row in range(len(source))}
    return Subset(source, [place[name] for name in ids])


def _in_language(source: Source, label: str, language: str | None, *, strict: bool) -> str:
    """The field with names in a language: ``names.zh`` for ``name`` and ``zh``."""
    if language in (None, ENGLISH):
        return label
    fields = _first_fields(source)
    translated = f"{label}s.{language}"
    if any(look_up(entry, translated) is not None for entry in fields):
        return translated
    if not strict:
        return label
    languages = sorted({name for entry in fields if isinstance(entry.get(f"{label}s"), Mapping) for name in entry[f"{label}s"]})
    raise UserError(
        f"{source.name}: no names in the language '{language}'; {did_you_mean(str(language), [ENGLISH, *languages])}; "
        "or name the field with --label"
    )


def _check_field(source: Source, name: str) -> None:
    fields = _first_fields(source)
    if all(look_up(entry, name) is None for entry in fields):
        known = list(dict.fromkeys(key for entry in fields for key in entry))
        raise UserError(f"{source.name}: no sample has a field '{name}'; {did_you_mean(name, known)}")


def _first_fields(source: Source) -> list[Mapping[str, Any]]:
    found = []
    for index in range(min(len(source), PROBED_SAMPLES)):
        try:
            found.append(source.fields(index))
        except BadSample:
            continue
    return found
