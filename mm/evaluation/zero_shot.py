"""Zero-shot classification: pictures against the text vectors of class names.

Protocol: https://arxiv.org/abs/2103.00020, section 3.1. Shapes: N pictures, C classes, P prompts, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from mm.errors import UserError
from mm.evaluation.metrics import RESAMPLES, Interval, Result, bootstrap, mean_per_class, selections, share, subset_sizes
from mm.evaluation.scores import checked, checked_index, count_ahead, exact_fp32, pad_rows

CHUNK = 1920
"""Pictures scored at once: bounds the memory at CHUNK x C fp32 scores."""

TOP5_CLASSES = 5


def class_vectors(
    embed_text: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str], batch_size: int = 256
) -> Float[Tensor, "c d"]:
    """One unit vector a class: the normalised mean of the normalised vectors of its prompts.

    Args:
        embed_text: Turns texts into vectors ``(number of texts, D)``; called with at most ``batch_size`` texts, shortest first.
        names: Class names.
        templates: Prompts with ``{}`` in the place of the name, e.g. ``"an emoji of {}"``.
        batch_size: Texts embedded at once.

    Raises:
        UserError: no name, a template without ``{}``, vectors that are not finite or cancel out.
    """
    if not names or not templates:
        raise UserError("zero-shot needs at least one class name and one template")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template '{template}': write {{}} where the class name goes, for example 'a photo of a {{}}'")
    prompts = [template.replace("{}", name) for name in names for template in templates]
    distinct = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
    with torch.no_grad():
        batches = [embed_text(distinct[start : start + batch_size]) for start in range(0, len(distinct), batch_size)]
    vectors = F.normalize(checked(torch.cat(batches), "text vectors of the classes"), dim=1)
    place = {prompt: row for row, prompt in enumerate(distinct)}
    rows = torch.tensor([place[prompt] for prompt in prompts], device=vectors.device)
    means = vectors[rows].unflatten(0, (len(names), len(templates))).mean(dim=1)
    for name, length in zip(names, means.norm(dim=1).tolist(), strict=True):
        if length < 1e-6:
            raise UserError(f"class '{name}': its prompts have vectors that cancel out; use other templates")
    return F.normalize(means, dim=1)


def ranked(
    image_vectors: Float[Tensor, "n d"], class_vectors: Float[Tensor, "c d"], k: int
) -> tuple[Int64[Tensor, "n k"], Float[Tensor, "n k"]]:
    """The k best classes of each picture and their scores (dot products), best first, of equals the lowest index first."""
    images, classes = checked(image_vectors, "image vectors"), checked(class_vectors, "class vectors", image_vectors.shape[-1])
    found, values = [], []
    with exact_fp32(images.device):
        columns = pad_rows(classes.to(images.device)).T
        for chunk in images.split(CHUNK):
            scores = (pad_rows(chunk) @ columns)[: len(chunk), : len(classes)]
            best = scores.sort(dim=1, descending=True, stable=True)
            found.append(best.indices[:, :k])
            values.append(best.values[:, :k])
    return torch.cat(found), torch.cat(values)


def label_ranks(
    image_vectors: Float[Tensor, "n d"], class_vectors: Float[Tensor, "c d"], labels: Int64[Tensor, " n"]
) -> Int64[Tensor, " n"]:
    """Number of classes that stand before the right one, on the CPU: 0 where the picture is classified rightly."""
    images, classes = checked(image_vectors, "image vectors"), checked(class_vectors, "class vectors", image_vectors.shape[-1])
    labels = checked_index(labels, len(images), len(classes), "labels").to(images.device)
    counts = []
    with exact_fp32(images.device):
        columns, index = pad_rows(classes.to(images.device)).T, torch.arange(len(classes), device=images.device)
        room = images.new_empty(min(CHUNK, len(images)) * len(classes))
        for chunk, label in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
            scores = (pad_rows(chunk) @ columns)[: len(chunk), : len(classes)]
            right = scores.gather(1, label[:, None]).squeeze(1)
            counts.append(count_ahead(scores, right, index, label, dim=1, room=room))
    return torch.cat(counts).cpu()


def zero_shot(
    image_vectors: Float[Tensor, "n d"],
    class_vectors: Float[Tensor, "c d"],
    labels: Int64[Tensor, " n"],
    *,
    subsets: Mapping[str, Tensor | np.ndarray | Sequence[bool]] | None = None,
    what: str = "pictures",
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Result:
    """Top-1, top-5 and mean per-class recall with 95 % intervals over resampled pictures.

    Args:
        image_vectors: Vectors of the pictures; scores are their dot products with the class vectors.
        class_vectors: See the function of that name.
        labels: Right class of each picture.
        subsets: Masks over pictures by name. Each gives the same figures with its name as a suffix (``top1_novel``): only its
            pictures are counted, and all classes stay candidates.
        what: What is classified, for the stamp.
        protocol: Facts for the stamp that only the caller knows (split, templates, resize).
        seed: Seed of the intervals.
        resamples: Number of bootstrap resamples.

    Returns:
        ``top1``, ``top5`` (only with at least 5 classes), ``mean_per_class`` and the same for each subset.

    Raises:
        UserError: shapes that do not fit, labels out of range, NaN or infinity in a vector, an empty subset.
    """
    ranks = label_ranks(image_vectors, class_vectors, labels).numpy()
    right, num_classes = labels.detach().cpu().numpy(), len(class_vectors)
    metrics: dict[str, Interval] = {}
    for suffix, chosen in selections(subsets or {}, len(ranks)).items():
        hits, truth = ranks[chosen], right[chosen]
        statistics = {f"top1{suffix}": share(hits < 1)}
        if num_classes >= TOP5_CLASSES:
            statistics[f"top5{suffix}"] = share(hits < TOP5_CLASSES)
        statistics[f"mean_per_class{suffix}"] = mean_per_class(hits < 1, truth)
        metrics |= bootstrap(statistics, len(hits), seed=seed, resamples=resamples)
    stamp = {
        "task": f"zero-shot, 1 of {num_classes} classes",
        what: len(ranks),
        **subset_sizes(subsets or {}),
        **(protocol or {}),
        "scores": "dot product in fp32, of equal scores the lowest index wins",
        "interval": f"95 % bootstrap over {what}, {resamples} resamples, seed {seed}",
    }
    return Result(metrics, stamp)
