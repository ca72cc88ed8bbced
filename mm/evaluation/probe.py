"""Classifiers on frozen vectors: logistic regression, nearest neighbours, and a cache of examples beside the class names.

Sources: https://arxiv.org/abs/2103.00020, section 3.2 (linear probe); https://arxiv.org/abs/1805.01978 (weighted neighbours);
https://arxiv.org/abs/2111.03930 (Tip-Adapter). Shapes: N examples, Q queries, C classes, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from mm.errors import UserError
from mm.evaluation.metrics import RESAMPLES, Interval, Result, bootstrap, mean_per_class, share
from mm.evaluation.scores import checked, checked_index, exact_fp32, pad_rows
from mm.seeding import generator

PENALTIES = tuple(10.0**power for power in range(-6, 3))
"""Weights of the squared norm among which the held part chooses."""

PENALTY = 1e-4
TIP = (10.0, 4.0)
"""Settings (the latter alpha and beta) where too few examples can be held out to choose by."""

MIN_HELD = 5
HELD_SHARE = 0.2
ITERATIONS = 500
NEIGHBOURS = 20
TEMPERATURE = 0.07
MAX_SCORES = 1 << 25
"""Scores of queries with examples in memory at once: 128 MiB, whatever their numbers."""

SHARPNESS = tuple(float(value) for value in (0.5, 1, 2, 4, 8))
MIXTURE = tuple(float(value) for value in (0, 2.5, 5, 10, 20, 40))
"""Tip-Adapter's beta and alpha among which the held part chooses; alpha 0 is zero-shot classification."""


def fit_logistic(
    vectors: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    num_classes: int,
    penalty: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"]]:
    """Weights and biases that minimise ``mean cross-entropy + penalty / 2 * |weights|^2``, by L-BFGS in fp64.

    Equal to scikit-learn's ``LogisticRegression(C=1 / (penalty * N))`` at its optimum, wherever the search starts: from zeros,
    or from the ``start`` that another penalty gave, which takes fewer steps.
    """
    inputs = vectors.double()
    if start is None:
        start = inputs.new_zeros(num_classes, inputs.shape[1]), inputs.new_zeros(num_classes)
    weight, bias = (tensor.clone().requires_grad_() for tensor in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # pyright: ignore[reportArgumentType] - L-BFGS takes a closure that returns a tensor
    return weight.detach(), bias.detach()


def linear_probe(
    train: Float[Tensor, "n d"],
    train_labels: Int64[Tensor, " n"],
    test: Float[Tensor, "q d"],
    test_labels: Int64[Tensor, " q"],
    *,
    num_classes: int,
    penalties: Sequence[float] = PENALTIES,
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Result:
    """Top-1 and mean per class of a logistic regression; its penalty is chosen on held training examples.

    Classes without an example are never answered.

    Raises:
        UserError: Shapes that do not fit, labels out of range, NaN in a vector, fewer than two classes or five examples.
    """
    train, train_labels, test, test_labels = _checked(train, train_labels, test, test_labels, num_classes)
    fit, held = _split(train_labels, seed)
    classes, targets = train_labels.unique(return_inverse=True)
    best = PENALTY
    if len(held) >= MIN_HELD:
        losses, solution = {}, None
        for penalty in sorted(penalties, reverse=True):
            weight, bias = solution = fit_logistic(train[fit], targets[fit], len(classes), penalty, solution)
            losses[penalty] = F.cross_entropy(train[held].double() @ weight.T + bias, targets[held]).item()
        best = min(penalties, key=lambda penalty: losses[penalty])
    weight, bias = fit_logistic(train, targets, len(classes), best)
    found = classes[(test.double() @ weight.T + bias).argmax(1)]
    stamp = {"classifier": "logistic regression, L-BFGS in fp64", "penalty": best, "chosen_on": len(held)}
    return _result(found, test_labels, stamp | {"examples": len(train)} | dict(protocol or {}))


def nearest_neighbours(
    train: Float[Tensor, "n d"],
    train_labels: Int64[Tensor, " n"],
    test: Float[Tensor, "q d"],
    test_labels: Int64[Tensor, " q"],
    *,
    num_classes: int,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    protocol: Mapping[str, Any] | None = None,
) -> Result:
    """Top-1 and mean per class of a vote among the k nearest, each weighing ``exp(cosine / temperature)``.

    Of equally near examples the first count, of classes with equal votes the lowest index wins. Raises as `linear_probe`.
    """
    train, train_labels, test, test_labels = _checked(train, train_labels, test, test_labels, num_classes)
    k = min(k, len(train))
    columns, found = pad_rows(F.normalize(train, dim=1)).T, []
    with exact_fp32(train.device):
        for chunk in F.normalize(test, dim=1).split(max(1, MAX_SCORES // columns.shape[1])):
            cosines = (pad_rows(chunk) @ columns)[: len(chunk), : len(train)]
            least = cosines.topk(k, dim=1).values[:, -1:]
            room = k - (cosines > least).sum(1, keepdim=True)  # for those that are exactly as near as the k-th
            level = cosines == least
            chosen = (cosines > least) | (level & (level.cumsum(1) <= room))
            rows, places = chosen.nonzero(as_tuple=True)
            weights = ((cosines[rows, places] - 1) / temperature).exp()
            votes = weights.new_zeros(len(chunk), num_classes)
            found.append(votes.index_put_((rows, train_labels[places]), weights, accumulate=True).argmax(1))
    stamp = {"classifier": f"{k} nearest neighbours, weights exp(cosine / {temperature})", "examples": len(train)}
    return _result(torch.cat(found), test_labels, stamp | dict(protocol or {}))


def tip_adapter(
    train: Float[Tensor, "n d"],
    train_labels: Int64[Tensor, " n"],
    test: Float[Tensor, "q d"],
    test_labels: Int64[Tensor, " q"],
    class_vectors: Float[Tensor, "c d"],
    *,
    scale: float = 100.0,
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Result:
    """Class names and examples together, without training: ``scale * cosine with the name + alpha * votes of the examples``.

    An example votes for its class with ``exp(-beta * (1 - cosine))``. Alpha and beta are chosen on a fifth of the examples,
    with the others as the cache; the test set sees one setting. ``scale`` is the model's own. Raises as `linear_probe`.
    """
    train, train_labels, test, test_labels = _checked(train, train_labels, test, test_labels, len(class_vectors))
    names = F.normalize(checked(class_vectors, "class vectors", train.shape[1]), dim=1).to(train.device)
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    fit, held = _split(train_labels, seed)

    def answers(queries: Tensor, cache: Tensor, labels: Tensor, settings: Sequence[tuple[float, float]]) -> Tensor:
        """Class of each query by each setting, ``(settings, Q)``."""
        found = []
        for chunk in queries.split(max(1, MAX_SCORES // max(len(cache), len(names)))):
            nearness, by_name, votes = cache @ chunk.T - 1, scale * names @ chunk.T, {}
            for beta in {beta for _, beta in settings}:
                empty = nearness.new_zeros(len(names), len(chunk))
                votes[beta] = empty.index_put_((labels,), (beta * nearness).exp_(), accumulate=True)
            found.append(torch.stack([(by_name + alpha * votes[beta]).argmax(0) for alpha, beta in settings]))
        return torch.cat(found, 1)

    with exact_fp32(train.device):
        best = TIP
        if len(held) >= MIN_HELD:
            settings = [(alpha, beta) for alpha in MIXTURE for beta in SHARPNESS]
            hits = (answers(train[held], train[fit], train_labels[fit], settings) == train_labels[held]).sum(1).tolist()
            best = settings[hits.index(max(hits))]  # of equals the smallest alpha
        [found] = answers(test, train, train_labels, [best])
    stamp = {"classifier": "Tip-Adapter without training", "scale": scale, "alpha": best[0], "beta": best[1]}
    return _result(found, test_labels, stamp | {"examples": len(train)} | dict(protocol or {}))


def _checked(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, num_classes: int) -> tuple[Tensor, ...]:
    train, test = checked(train, "training vectors"), checked(test, "test vectors", train.shape[-1])
    device = torch.device("cpu") if train.device.type == "mps" else train.device  # which has no fp64
    if num_classes < 2:
        raise UserError(f"a classifier needs at least two classes, got {num_classes}")
    if len(train) < 5:
        raise UserError(f"{len(train)} training examples: at least 5 are needed, of which one is held out to choose settings")
    train_labels = checked_index(train_labels, len(train), num_classes, "training labels")
    test_labels = checked_index(test_labels, len(test), num_classes, "test labels")
    return train.to(device), train_labels.to(device), test.to(device), test_labels.to(device)


def _split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the examples to fit on and of those to choose on. Only classes with several examples give one away."""
    order = torch.from_numpy(generator(seed, "probe").permutation(len(labels))).to(labels.device)
    place = torch.empty_like(labels)  # of each example among those of its class, in a random order
    for label in labels.unique():
        members = order[labels[order] == label]
        place[members] = torch.arange(len(members), device=labels.device)
    held = place % round(1 / HELD_SHARE) == 1
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _result(found: Tensor, labels: Tensor, stamp: dict[str, Any]) -> Result:
    hits, truth = (found == labels).cpu().numpy(), labels.cpu().numpy()
    metrics: dict[str, Interval] = bootstrap({"top1": share(hits), "mean_per_class": mean_per_class(hits, truth)}, len(hits))
    return Result(metrics, stamp | {"pictures": len(hits), "interval": f"95 % bootstrap over pictures, {RESAMPLES} resamples"})
