"""Few-shot evaluation: episodes, or examples found by similarity, as prompts of a model that reads pictures among words."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.data.captions import look_up
from mm.data.episodes import Episode, Pool, check_template
from mm.data.labels import label_of, label_task
from mm.errors import BadSample, UserError
from mm.evaluation.few_shot import chosen_right, few_shot
from mm.evaluation.metrics import Result
from mm.evaluation.reranking import nearest
from mm.hub import Model
from mm.run.episodes import captioned, endings
from mm.run.evaluation import encode, loaded, opened, stamp
from mm.run.preparation import picture
from mm.seeding import generator
from mm.types import Decoding, Interleaved, Source, Writes

Progress = Callable[[int, int], None]

GREY = 128
"""Of 255: what the blind baseline sees in place of every picture."""

SPARE_TOKENS = 4
"""Tokens that an answer may have beyond the longest name, so that a longer answer is not right by being cut."""


@dataclass(frozen=True)
class Question:
    """A query with the examples that may be shown before it.

    Args:
        query: Index of the picture in the data.
        examples: For a number of shots: indices in the pool with their names, in the order in which they are shown.
        names: To choose among; empty where the answer is open.
        answer: The right name.
    """

    query: int
    examples: Callable[[int], Sequence[tuple[int, str]]]
    names: tuple[str, ...]
    answer: str


@dataclass
class _Pictures:
    """Pictures of a source as the model takes them, each decoded once."""

    model: Model
    source: Source
    known: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, index: int) -> Tensor:
        if index not in self.known:
            self.known[index] = picture(self.source.read(index), self.model.processor, keep_alpha=False)
        return self.known[index]


def evaluate_few_shot(
    model: str | Path | Model,
    data: str | Source,
    *,
    pool: str | Source | None = None,
    ways: int = 2,
    shots: Sequence[int] = (0, 1, 2, 4),
    repeats: int = 1,
    draws: int = 1,
    real_names: bool = False,
    rices: str | Path | Model | None = None,
    template: str = "{}",
    label: str | None = None,
    apart: str | None = None,
    limit: int | None = None,
    image_field: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress | None = None,
) -> Result:
    """How often a picture is named right after examples in the prompt, and how often without seeing any of the pictures.

    Args:
        model: A loaded model or a MODEL reference.
        data: Labelled pictures to be named.
        pool: Labelled pictures that examples are drawn from; default: the source's own reference, else ``data``, of which a
            picture is never an example of itself.
        ways: Number of concepts of an episode; those beside the query's are drawn within its subset of the source.
        shots: Numbers of examples of each concept. Of one episode fewer shots are the first of more.
        repeats: How often all examples are shown.
        draws: Episodes of each query.
        real_names: Call concepts by their names; default: by made-up ones, new in each episode.
        rices: A MODEL with a space of pictures; then the shots are the pictures of the pool nearest to the query there, the
            nearest last, with their real names, and the answer is open (https://arxiv.org/abs/2109.05014, Flamingo appendix).
        template: Text behind a picture, ``{}`` being the name.
        label: Field with the name; default: the source's own.
        apart: Field in which examples differ from the query.
        limit: Number of queries, drawn at random.
        image_field: Column of a table that holds the picture files, where its name is not a usual one.
        seed: Of the episodes.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        progress: Called with (questions done, in all).

    Returns:
        For k shots ``exact_Kshot`` (the open answer, letter by letter) and ``accuracy_Kshot`` (the likeliest of the names of
        the episode), the same with ``blind_`` in front, and with subset suffixes. With ``rices`` instead of the accuracy
        ``nearest_exact``: the name of the nearest picture.

    Raises:
        UserError: The model reads no pictures among words, the sources give no episodes, or an option means nothing.
    """
    model = loaded(model, device, precision)
    if not isinstance(model.system, Writes) or "writes" not in model.capabilities or not model.processor.has_image:
        raise UserError(f"{model.name}: reads no texts in which pictures stand; take a run of configs/frozen.yaml")
    _check(ways, shots, repeats, draws, template)
    source = opened(data, model, image_field=image_field)
    task = label_task(source, label=label)
    reference = pool if pool is not None else task.reference or source
    examples = opened(reference, model, image_field=image_field)
    rows = [row for row in range(len(source)) if label_of(source.fields(row), task.label)]
    facts: dict[str, Any] = {"pool": examples.name, "shots": list(shots), "repeats": repeats, "template": template}
    if rices is None:
        pictures = Pool(examples, task.label, apart=apart, within=task.subsets, min_pictures=max(1, *shots))
        rows = [row for row in rows if pictures.ways(source.fields(row)) >= ways and pictures.has(source.fields(row))]
        rows = _some(rows, limit, seed)
        facts |= {"ways": ways, "draws": draws, "names": "real" if real_names else "made up", "chance": f"{1 / ways:.1%}"}
        questions = _episodes(source, pictures, rows, ways, max(shots), draws, task.label if real_names else None, seed)
    else:
        rows = _some(rows, limit, seed)
        retriever = loaded(rices, device, precision)
        questions = _similar(source, examples, rows, retriever, max(1, *shots), task.label, apart)
        questions = [question for question in questions if len(question.examples(max(shots))) == max(shots)]
        facts |= {"names": "real", "shots_by": f"similarity of {retriever.name}, the most similar last"}
    if not rows:
        raise UserError(f"{source.name}: no picture has a concept with {max(shots)} examples in {examples.name}; see --pool")
    asking = _Asking(model, source, examples, template, repeats)
    asked = [question for question in questions if asking.usable(question, max(shots))]
    if not asked:
        raise UserError(f"{source.name}: no question is left with its examples; see --pool and --apart")
    facts["examples"] = "never the query; a picture comes again where its concept has too few"
    right: dict[str, Sequence[bool] | Tensor] = {}
    total = 2 * len(shots) * len(asked)
    for prefix, blind in (("", False), ("blind_", True)):
        for number in shots:
            done = sum(map(len, right.values())) // (1 if rices else 2)
            report = None if progress is None else lambda count, done=done: progress(done + count, total)
            found = asking(asked, number, blind, report)
            right |= {f"{prefix}{name}_{number}shot": values for name, values in found.items()}
    if rices is not None:
        right["nearest_exact"] = [question.examples(1)[-1][1] == question.answer for question in asked]
    values = [str(look_up(source.fields(question.query), task.subsets)) for question in asked] if task.subsets else []
    names = sorted(set(values))
    return few_shot(
        right,
        [source.key(question.query) for question in asked],
        subsets={name: [value == name for value in values] for name in names} if len(names) > 1 else {},
        protocol=stamp(model, source, f"{len(rows)} queries") | facts | {"decoding": "greedy", "seed": seed},
    )


@dataclass
class _Asking:
    """Puts questions to a model."""

    model: Model
    data: Source
    pool: Source
    template: str
    repeats: int

    def __post_init__(self) -> None:
        self._queries, self._examples = _Pictures(self.model, self.data), _Pictures(self.model, self.pool)

    def usable(self, question: Question, shots: int) -> bool:
        """Whether all of its pictures can be decoded."""
        try:
            self._pictures(question, shots)
        except BadSample:
            return False
        return True

    def __call__(
        self, questions: Sequence[Question], shots: int, blind: bool, report: Callable[[int], None] | None
    ) -> dict[str, list[bool]]:
        """Whether each is answered right: ``exact``, and ``accuracy`` where there are names to choose among."""
        system, processor = self.model.system, self.model.processor
        assert isinstance(system, Writes)
        tokenizer, beginning = processor.tokenizer, self.template.partition("{}")[0]
        found: dict[str, list[bool]] = {"exact": [], "accuracy": []}
        for question in questions:
            texts = [self.template.format(name) for _, name in self._shown(question, shots)]
            image = torch.stack(self._pictures(question, shots))
            image = (torch.full_like(image, GREY) if blind else image).to(self.model.device)
            prompt = Interleaved(captioned(processor, [texts], beginning).to(self.model.device), image)
            endings_of = endings(processor, self.template, question.names or [question.answer]).to(self.model.device)
            decoding = Decoding(max_tokens=int(endings_of.lengths.max()) + SPARE_TOKENS, end=tokenizer.end)
            [written] = system.write(prompt, decoding, [0])
            expected = endings(processor, self.template, [question.answer])
            right = tokenizer.decode(expected.ids[0, : expected.lengths[0]].tolist())
            found["exact"].append(written.finished and tokenizer.decode(written.ids) == right)
            if question.names:
                likelihoods = system.continuation_likelihoods(prompt, endings_of).cpu()
                answer = torch.tensor([question.names.index(question.answer)])
                found["accuracy"].append(bool(chosen_right(likelihoods, answer)))
            if report is not None:
                report(len(found["exact"]))
        return {name: values for name, values in found.items() if values}

    def _shown(self, question: Question, shots: int) -> list[tuple[int, str]]:
        return [*question.examples(shots)] * self.repeats

    def _pictures(self, question: Question, shots: int) -> list[Tensor]:
        """Of the examples, then of the query."""
        return [*(self._examples(index) for index, _ in self._shown(question, shots)), self._queries(question.query)]


def _check(ways: int, shots: Sequence[int], repeats: int, draws: int, template: str) -> None:
    """Raises `UserError` for options that mean nothing."""
    if ways < 2:
        raise UserError(f"ways is {ways}; take at least 2 concepts to tell apart")
    if not shots or min(shots) < 0 or len(set(shots)) < len(shots):
        raise UserError(f"shots are {', '.join(map(str, shots)) or 'none'}; give different numbers from 0 on, such as 0,1,2,4")
    if repeats < 1 or draws < 1:
        raise UserError("repeats and draws are numbers from 1 on")
    try:
        check_template(template)
    except ValueError as error:
        raise UserError(str(error)) from None


def _some(rows: Sequence[int], limit: int | None, seed: int) -> list[int]:
    """So many of the queries, drawn at random, in their order."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return sorted(rows[place] for place in generator(seed, "queries").permutation(len(rows))[:limit])


def _episodes(
    source: Source, pool: Pool, rows: Sequence[int], ways: int, shots: int, draws: int, label: str | None, seed: int
) -> Iterator[Question]:
    """Episodes of each query; with one of more shots those of fewer are known, too."""
    for row in rows:
        for number in range(draws):
            random = generator(seed, number, source.key(row), "episode")
            fields, query = source.fields(row), source.key(row)
            try:
                episode = pool.draw(random, fields, ways=ways, shots=shots, query_id=query, label=label)
            except BadSample:  # a concept is left without an example: no question
                continue
            yield Question(row, _ShownFirst(episode), episode.names, episode.names[episode.answer])


@dataclass(frozen=True)
class _ShownFirst:
    """The first examples of each way of an episode, with their names."""

    episode: Episode

    def __call__(self, shots: int) -> list[tuple[int, str]]:
        return [(index, self.episode.names[way]) for index, way in self.episode.first(shots).support]


@dataclass(frozen=True)
class _MostSimilar:
    """The most similar pictures with their names, the most similar last."""

    ranked: tuple[tuple[int, str], ...]

    def __call__(self, shots: int) -> list[tuple[int, str]]:
        return list(reversed(self.ranked[:shots]))


def _similar(
    source: Source, pool: Source, rows: Sequence[int], model: Model, shots: int, label: str, apart: str | None
) -> Iterator[Question]:
    """Questions whose examples are the nearest pictures of the pool, never the query itself (RICES)."""
    if "embeds" not in model.capabilities:
        raise UserError(f"{model.name}: has no space in which pictures are alike; choose shots by a model such as emoji-clip")
    own, others = encode(model, source), encode(model, pool)
    place = {sample["id"]: number for number, sample in enumerate(own.samples)}
    index = {pool.key(number): number for number in range(len(pool))}
    for row in rows:
        if source.key(row) not in place:
            continue
        number, fields = place[source.key(row)], source.fields(row)
        ranked: list[tuple[int, str]] = []
        order = nearest(own.images[number : number + 1], others.images, len(others.images))[0].tolist()
        for sample in (others.samples[other] for other in order):
            name = label_of(sample["fields"], label)
            same = apart is not None and look_up(sample["fields"], apart) == look_up(fields, apart)
            if name and not same and sample["id"] != source.key(row):
                ranked.append((index[sample["id"]], name))
            if len(ranked) == shots:
                break
        yield Question(row, _MostSimilar(tuple(ranked)), (), str(label_of(fields, label)))
