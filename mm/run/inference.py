"""Using a model on one's own files: classify pictures or recordings, search a folder."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mm.data.files import AUDIO_SUFFIXES
from mm.errors import BadSample, UserError
from mm.evaluation.zero_shot import class_vectors, ranked
from mm.hub import Model
from mm.paths import cache_folder
from mm.run.evaluation import loaded

Progress = Callable[[int, int], None]

INDEXED_AT_ONCE = 32
PICTURE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})


@dataclass(frozen=True)
class Prediction:
    """The labels of one picture or recording, most likely first, with their probabilities."""

    image: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Hit:
    """One found picture and its cosine with the query."""

    path: Path
    score: float


@dataclass(frozen=True)
class SearchResult:
    """Found pictures, best first.

    Args:
        query: The words, the picture or the recording that was asked for.
        hits: Best first.
        searched: Number of pictures in the index.
        skipped: Files that could not be read, with the reason.
    """

    query: str
    hits: tuple[Hit, ...]
    searched: int
    skipped: tuple[str, ...]


def classify(
    model: str | Path | Model,
    images: Sequence[Any],
    labels: Sequence[str],
    *,
    templates: Sequence[str] | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> list[Prediction]:
    """Classify pictures, or recordings, among labels.

    Args:
        model: A loaded model or a MODEL reference.
        images: Paths (a folder stands for all pictures in it, or all recordings where it has no picture), bytes, PIL images,
            arrays or tensors; recordings are paths by their ending, or what microphones give, a rate with an array.
        labels: Class names, at least two.
        templates: Prompt ensemble; default: the processor's.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.

    Raises:
        UserError: No picture, fewer than two labels, a file that is no picture.
    """
    if len(set(labels)) < 2:
        raise UserError(f"labels: give at least two different ones, separated by commas, got {list(labels)}")
    raws = [item for image in images for item in expand_folder(image, also=AUDIO_SUFFIXES)]
    if not raws:
        raise UserError("nothing to classify")
    model = loaded(model, device, precision)
    heard = [number for number, raw in enumerate(raws) if _is_recording(raw)]
    if heard and len(heard) < len(raws):
        raise UserError(f"{raws[heard[0]]}: a recording among pictures; classify them one kind after the other")
    candidates = class_vectors(model.embed_texts, labels, tuple(templates or model.processor.templates))
    vectors = model.embed_audios(raws) if heard else model.embed_images(raws)
    order, _ = ranked(vectors, candidates, len(labels))
    probabilities = model.scores(vectors, candidates).softmax(1).gather(1, order)
    names = list(labels)
    return [
        Prediction(
            image=str(raw) if isinstance(raw, str | Path) else f"picture {number}",
            labels=tuple(names[int(column)] for column in order[number]),
            probabilities=tuple(probabilities[number].tolist()),
        )
        for number, raw in enumerate(raws)
    ]


def search(
    model: str | Path | Model,
    folder: str | Path,
    *,
    text: str | None = None,
    image: Any = None,
    audio: Any = None,
    k: int = 12,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress | None = None,
) -> SearchResult:
    """Find the pictures of a folder that fit words or a recording, or look like a picture.

    The folder's vectors are kept in the cache; a file that was added or changed since is encoded anew.

    Raises:
        UserError: Not exactly one query, no such folder, no picture in it.
    """
    if sum(query is not None for query in (text, image, audio)) != 1:
        raise UserError("give exactly one query: --text WORDS, --image FILE or --audio FILE")
    model = loaded(model, device, precision)
    folder = Path(folder)
    if text is not None:
        query, asked = model.embed_texts([text]), text
    elif image is not None:
        query, asked = model.embed_images([image]), str(image)
    else:
        query, asked = model.embed_audios([audio]), str(audio) if isinstance(audio, str | Path) else "a recording"
    paths, vectors, skipped = index_folder(model, folder, progress=progress)
    scores, rows = _nearest(vectors, query, min(k, len(paths)))
    hits = tuple(Hit(folder / paths[row], score) for row, score in zip(rows, scores, strict=True))
    return SearchResult(query=asked, hits=hits, searched=len(paths), skipped=tuple(skipped))


def index_folder(model: Model, folder: Path, *, progress: Progress | None = None) -> tuple[list[str], Tensor, list[str]]:
    """Relative paths of a folder's pictures, their unit vectors ``(N, D)``, and what was left out with the reason.

    Raises:
        UserError: No such folder, or no readable picture in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --index takes a folder of pictures")
    files = {str(path.relative_to(folder)): path for path in _pictures(folder)}
    key = hashlib.sha256(f"{model.fingerprint} {folder.resolve()}".encode()).hexdigest()[:32]
    cache = cache_folder() / "search" / f"{key}.safetensors"
    known = _recall(cache)
    stamps = {name: f"{path.stat().st_mtime_ns} {path.stat().st_size}" for name, path in files.items()}
    vectors = {name: vector for name, (stamp, vector) in known.items() if stamps.get(name) == stamp}
    missing = [name for name in files if name not in vectors]
    skipped: list[str] = []
    for start in range(0, len(missing), INDEXED_AT_ONCE):
        pixels: dict[str, Tensor] = {}
        for name in missing[start : start + INDEXED_AT_ONCE]:
            try:
                pixels[name] = model.processor.image(files[name])
            except (UserError, BadSample) as error:
                skipped.append(str(error))
        if pixels:
            vectors |= dict(zip(pixels, model.embed_pixels(torch.stack(list(pixels.values()))), strict=True))
        if progress:
            progress(min(start + INDEXED_AT_ONCE, len(missing)), len(missing))
    if not vectors:
        reason = f" ({skipped[0]})" if skipped else ""
        raise UserError(f"{folder}: no readable picture in it{reason}; pictures are {', '.join(sorted(PICTURE_EXTENSIONS))}")
    names = sorted(vectors)
    if missing or len(vectors) < len(known):
        _remember(cache, {name: (stamps[name], vectors[name]) for name in names})
    return names, torch.stack([vectors[name] for name in names]), skipped


def _nearest(vectors: Tensor, query: Tensor, k: int) -> tuple[list[float], list[int]]:
    """Exact inner-product search; of equal scores the first file's name wins."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors.numpy())
    wanted = k
    while True:
        scores, rows = index.search(query.numpy(), wanted)
        if wanted == len(vectors) or scores[0][-1] < scores[0][k - 1]:
            break
        wanted = min(2 * wanted, len(vectors))  # equal scores at the cut: all of them must be seen to choose the first
    best = sorted(zip((-scores[0]).tolist(), rows[0].tolist(), strict=True))[:k]
    return [-score for score, _ in best], [row for _, row in best]


def _pictures(folder: Path, endings: frozenset[str] = PICTURE_EXTENSIONS) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())


def _is_recording(raw: Any) -> bool:
    return isinstance(raw, tuple) or (isinstance(raw, str | Path) and Path(raw).suffix.lower() in AUDIO_SUFFIXES)


def expand_folder(image: Any, *, also: frozenset[str] = frozenset()) -> list[Any]:
    """A folder becomes its pictures, or where it has none its files with ``also`` for an ending; all else stays what it is."""
    if isinstance(image, str | Path) and Path(image).is_dir():
        found: list[Any] = list(_pictures(Path(image))) or list(_pictures(Path(image), also))
        if not found:
            raise UserError(f"{image}: no picture in this folder")
        return found
    return [image]


def _recall(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Stamp and vector of each file that was indexed before; a damaged cache is made again."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            stamps = json.loads(file.metadata()["stamps"])
            vectors = file.get_tensor("vectors")
        return {name: (stamp, vectors[row]) for row, (name, stamp) in enumerate(stamps)}
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError):
        path.unlink(missing_ok=True)
        return {}


def _remember(path: Path, entries: dict[str, tuple[str, Tensor]]) -> None:
    """Keep the index. A cache that cannot be written costs only the time of encoding again."""
    metadata = {"stamps": json.dumps([(name, stamp) for name, (stamp, _) in entries.items()])}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save({"vectors": torch.stack([vector for _, vector in entries.values()])}, metadata=metadata))
        temporary.replace(path)
