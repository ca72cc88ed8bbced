"""Using a model on data of one's own kind: probes on its vectors, averages of weights, learned prompts.

Sources: WiSE-FT https://arxiv.org/abs/2109.01903, CoOp https://arxiv.org/abs/2109.01134.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.data.labels import LabelTask, label_task
from mm.encoders.text import TextEncoder
from mm.errors import UserError
from mm.evaluation.metrics import Result
from mm.evaluation.probe import linear_probe, nearest_neighbours, tip_adapter
from mm.evaluation.zero_shot import class_vectors, zero_shot
from mm.fusion.dual_tower import unit
from mm.hub import Model
from mm.run.evaluation import Progress, embed_texts_together, encode, labelled, loaded, opened, stamp
from mm.run.tasks import evaluate
from mm.seeding import derive_seed
from mm.systems.clip import Clip
from mm.training.parallel import open_world
from mm.training.statistics import running_statistics
from mm.types import Source

CLASSIFIERS = {"linear": linear_probe, "knn": nearest_neighbours}
PROBES = (*CLASSIFIERS, "tip", "prompt")
PROMPT_EXAMPLES, PROMPT_NAMES = 64, 128
"""Examples and names that a step of `learn_prompt` compares at most."""

ALPHAS = tuple(step / 10 for step in range(11))
"""Shares of the tuned weights that `sweep` measures."""


def evaluate_probe(
    model: str | Path | Model,
    train: str | Source,
    data: str | Source,
    *,
    method: str = "linear",
    label: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    cache: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Teach a classifier on a model's vectors of one labelled source and measure it on another.

    Args:
        model: A loaded model or a MODEL reference.
        train: The examples. Settings are chosen on a fifth of them, never on ``data``.
        data: What is measured. ``linear`` and ``knn`` never answer a class that has no example.
        method: ``linear`` (logistic regression), ``knn``, ``tip`` (Tip-Adapter: names and examples together) or ``prompt``
            (zero-shot classification with learned words before the name, see `learn_prompt`).
        label: Field that holds the class name; default: the source's own.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        cache: Remember the vectors in the cache folder.
        progress: Called with (done, total) while encoding.

    Raises:
        UserError: An unknown method, or labels that the two sources do not share.
    """
    if method not in PROBES:
        raise UserError(f"'{method}': no such probe; there are {', '.join(PROBES)}")
    model = loaded(model, device, precision)
    sources = [opened(source, model) for source in (train, data)]
    tasks = _common_tasks(sources, label)
    task, fingerprint = tasks[-1], model.fingerprint
    prompts = tuple(getattr(sources[1], "templates", ()) or model.processor.templates)
    with open_world(model.device.type) as world:
        encoded = [
            encode(model, source, cache=cache, progress=progress, world=world, fingerprint=fingerprint) for source in sources
        ]
        names = class_vectors(embed_texts_together(model, world), task.classes, prompts) if method == "tip" else None
    sides: list[tuple[Tensor, Tensor]] = []
    for source, own, found in zip(sources, tasks, encoded, strict=True):
        rows, labels = labelled([sample["fields"] for sample in found.samples], own, source)
        sides.append((found.images[rows].to(model.device), labels))
    (examples, example_labels), (images, labels) = sides
    protocol = stamp(model, sources[1], encoded[1].accounting, fingerprint) | {
        "label": task.label,
        "examples_from": sources[0].name,
        "examples_samples": encoded[0].accounting,
        "examples_fingerprint": sources[0].fingerprint[:16],
    }
    if names is not None:
        protocol |= {"templates": list(prompts)}
        scale = _logit_scale(model)
        return tip_adapter(examples, example_labels, images, labels, names, scale=scale, protocol=protocol)
    if method == "prompt":
        words = max((prompt.partition("{}")[0].strip() for prompt in prompts), key=len)
        _, vectors = learn_prompt(model, examples, example_labels, task.classes, words=words)
        learned = {"classifier": f"learned prompt, from '{words}'", "examples": len(examples)}
        return zero_shot(images, vectors(task.classes), labels, protocol=protocol | learned)
    fit = CLASSIFIERS[method]
    return fit(examples, example_labels, images, labels, num_classes=len(task.classes), protocol=protocol)


def interpolate(base: Model, tuned: Model, alpha: float) -> Model:
    """The model between two: weights ``(1 - alpha) * base + alpha * tuned`` (WiSE-FT). It often keeps what ``base`` knew.

    Args:
        base: The model that was fine-tuned.
        tuned: What became of it.
        alpha: 0 gives ``base``, 1 gives ``tuned``, both to the bit.

    Raises:
        UserError: Alpha outside 0..1, or models of different networks, vocabularies or weight types.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha {alpha} is not between 0 (the first model) and 1 (the second)")
    if base.processor.tokenizer.to_json() != tuned.processor.tokenizer.to_json():
        raise UserError(
            f"{base.name} and {tuned.name} have different vocabularies; only a model and its own fine-tuning can be averaged"
        )
    first, second = _averaged(base), _averaged(tuned)
    unfit = [name for name in first.keys() | second.keys() if _kind(first.get(name)) != _kind(second.get(name))]
    if unfit:
        raise UserError(f"{base.name} and {tuned.name} are different networks (first difference: {min(unfit)})")
    system = copy.deepcopy(tuned.system)
    mixed = {name: _between(first[name], tensor, alpha) for name, tensor in second.items()}
    system.load_state_dict(tuned.system.state_dict() | mixed)
    return replace(tuned, system=system, name=f"{base.name} and {tuned.name} at {alpha:g}", card={})


def sweep(
    base: Model,
    tuned: Model,
    data: str | Source,
    *,
    alphas: Sequence[float] = ALPHAS,
    task: str = "zero-shot",
    options: Mapping[str, Any] | None = None,
) -> dict[float, Result]:
    """Measure averages of two models, to choose one: on data that neither was trained on and that is not reported.

    Args:
        base: See `interpolate`.
        tuned: See `interpolate`.
        data: A source to choose by.
        alphas: Shares of the tuned weights.
        task: What to measure, see `mm.run.evaluation.evaluate`.
        options: Of that evaluation.

    Returns:
        Figures by alpha.
    """
    fixed = {"cache": False} | ({"baseline": "none"} if task == "zero-shot" else {}) | dict(options or {})
    return {alpha: evaluate(task, interpolate(base, tuned, alpha), data, **fixed) for alpha in alphas}


def best_alpha(rates: Mapping[float, float]) -> float:
    """The alpha with the best figure of a `sweep`; of equals the smallest, which forgets least."""
    return max(sorted(rates), key=lambda alpha: rates[alpha])


def learn_prompt(
    model: Model,
    images: Tensor,
    labels: Tensor,
    names: Sequence[str],
    *,
    words: str = "",
    length: int = 4,
    steps: int = 100,
    lr: float = 0.01,
    seed: int = 0,
) -> tuple[Tensor, Callable[[Sequence[str]], Tensor]]:
    """Learn the words around a class name, as vectors; the model itself stays as it is (CoOp, one context for all classes).

    Args:
        model: A dual tower with the suite's own text encoder.
        images: Unit vectors of the examples, ``(N, D)``.
        labels: Class of each example, ``(N,)``.
        names: Class names. Where there are many, a step compares 64 examples with their names and 64 others.
        words: What the learned vectors begin as, e.g. "a photo of a". They stand before the name.
        length: How many to begin with at random, without ``words``.
        steps: Optimizer steps.
        lr: Peak learning rate of Adam; it falls along a cosine.
        seed: Of the first vectors and of what is compared.

    Returns:
        The context ``(length, width)`` and a function from class names to their unit vectors ``(C, D)``.

    Raises:
        UserError: Another kind of model, or a name that is too long.
    """
    system = model.system
    encoder = system.encoders().get("text") if isinstance(system, Clip) else None
    if not isinstance(system, Clip) or not isinstance(encoder, TextEncoder) or encoder.pad_id is not None:
        raise UserError(f"{model.name}: prompts are learned for dual towers with mm's own text encoder")
    random = torch.Generator().manual_seed(derive_seed(seed, "prompt"))
    if words:
        start = encoder.embedding.tokens(model.processor.text([words]).ids[0, 1:-1].to(model.device)).float().detach()
        length = len(start)
    else:
        start = (0.02 * torch.randn(length, encoder.width, generator=random)).to(model.device)
    context = nn.Parameter(start.clone())

    def vectors(texts: Sequence[str]) -> Tensor:
        batch = model.processor.text(texts).to(model.device)
        if batch.ids.shape[1] + length > encoder.context_length:
            raise UserError(f"a class name of {batch.ids.shape[1]} tokens leaves no room for {length} learned ones")
        tokens = encoder.embedding.tokens(batch.ids)
        learned = context.to(tokens.dtype).expand(len(tokens), -1, -1)
        pooled = encoder.encode_vectors(torch.cat([tokens[:, :1], learned, tokens[:, 1:]], 1), batch.lengths + length).pooled
        return unit(system.towers.projections["text"](pooled.float()))

    optimizer = torch.optim.Adam([context], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images, labels, scale = images.cpu(), labels.cpu(), system.towers.scale().detach()
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randperm(len(labels), generator=random)[:PROMPT_EXAMPLES]
            others = torch.randperm(len(names), generator=random)[: PROMPT_NAMES - len(rows)]
            chosen, places = torch.cat([labels[rows], others]).unique(return_inverse=True)
            candidates = vectors([names[int(place)] for place in chosen])
            loss = F.cross_entropy(scale * images[rows].to(model.device) @ candidates.T, places[: len(rows)].to(model.device))
            [context.grad] = torch.autograd.grad(loss, [context])
            optimizer.step()
            schedule.step()
    return context.detach(), torch.no_grad()(vectors)


def _common_tasks(sources: Sequence[Source], label: str | None) -> list[LabelTask]:
    """The task of each source with the classes of both, those of the measured one first, each under its own label field."""
    train, test = tasks = [label_task(source, label=label) for source in sources]
    if not train.index().keys() & test.index().keys():
        raise UserError(f"{sources[0].name} and {sources[1].name} have no class in common; check --label")
    names = {value: task.classes[place] for task in (train, test) for value, place in task.index().items()}
    values = tuple(dict.fromkeys([*test.index(), *train.index()]))
    return [replace(task, classes=tuple(names[value] for value in values), values=values) for task in tasks]


def _logit_scale(model: Model) -> float:
    """What the model multiplies cosines with, whatever its bias: its scores of a vector with itself and with its opposite."""
    vector = F.normalize(torch.ones(1, model.embed_dim), dim=1)
    same, opposite = model.scores(vector, torch.cat([vector, -vector]))[0].tolist()
    return (same - opposite) / 2


def _averaged(model: Model) -> dict[str, Tensor]:
    """The weights and the statistics of normalisation that belong to them; queues and the like are no part of an average."""
    return {name: weight.detach() for name, weight in model.system.named_parameters()} | running_statistics(model.system)


def _kind(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _between(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    if alpha in (0, 1) or not second.is_floating_point():
        return second if alpha else first
    return torch.lerp(first.to(second.device), second, alpha)
