"""Picture input: decode and transform against open_clip's, reading samples against webdataset's reader, and both together.

Pictures are 500 x 375 JPEG files made here (smooth noise of many scales, as photographs have), brought to 224 pixels by the
evaluation transform. Both sides start from the bytes of the file. Ours ends in uint8, normalised later on the model's device;
a case of its own adds the normalisation to ours. Calls alternate, so that a busy machine slows both.

    python bench/input_pipeline.py --json FILE
"""

import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import torch
from harness import Case, arguments_parser, interleaved, report
from PIL import Image
from torch import Tensor

from mm.data.loader import Loader
from mm.data.shards import ShardSource
from mm.data.write import write_shards
from mm.media.image import ImageSpec, decode_image, fit_image
from mm.types import Batch, Sample

PICTURES = 24
SAMPLES = 2000
LOADED, BATCH = 128, 32
WIDTH, HEIGHT, SIZE = 500, 375, 224


def make_jpegs(count: int) -> list[bytes]:
    """Colour noise of eight scales, the finer the weaker; files about as large as photographs of this size and quality."""
    random = np.random.default_rng(0)
    files = []
    for _ in range(count):
        picture = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for level in range(2, 10):
            coarse = Image.fromarray(random.integers(0, 256, (3 * 2**level // 4, 2**level, 3), dtype=np.uint8))
            layer = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
            picture += (layer - 127) / 1.5 ** (level - 2)
        buffer = io.BytesIO()
        Image.fromarray((picture + 127).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def ours(data: bytes, spec: ImageSpec) -> Tensor:
    return fit_image(decode_image(data), spec)


def open_clip_transform() -> tuple[Callable[[bytes], Tensor], Tensor, Tensor]:
    """open_clip's evaluation transform from bytes to normalised floats, and its mean and standard deviation (3, 1, 1)."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, image_transform

    transform = image_transform(SIZE, is_train=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return lambda data: transform(Image.open(io.BytesIO(data))), mean, std


def transform_cases(repeats: int) -> Iterator[Case]:
    files = make_jpegs(PICTURES)
    spec = ImageSpec(size=SIZE)
    theirs, mean, std = open_clip_transform()
    differences = [((theirs(data) * std + mean) * 255 - ours(data, spec)).abs().mean().item() for data in files]
    kib = np.mean([len(data) for data in files]) / 1024
    print(f"files of {kib:.0f} KiB on average; absolute difference to open_clip's pixels, of 255:")
    print(f"mean {np.mean(differences):.4f}, picture with the largest mean {max(differences):.4f}")

    def normalised(data: bytes) -> Tensor:
        return (ours(data, spec).float() / 255 - mean) / std

    def peer_all() -> list[Tensor]:
        return [theirs(data) for data in files]

    outputs = {
        "uint8 out": lambda: [ours(data, spec) for data in files],
        "normalised floats out": lambda: [normalised(data) for data in files],
    }
    for name, ours_all in outputs.items():
        mine, peer = interleaved(ours_all, peer_all, repeats)
        label = f"decode and transform {WIDTH}x{HEIGHT} to {SIZE}, {name}"
        yield Case(label, "open_clip", PICTURES / mine, PICTURES / peer, "pictures/s", higher_is_better=True)


def reading_case(repeats: int) -> Case:
    import webdataset

    random = np.random.default_rng(0)
    made = [Sample(f"{i:06d}", {"image": b"\xff\xd8\xff" + random.bytes(2000)}, (f"caption {i}",)) for i in range(SAMPLES)]
    with tempfile.TemporaryDirectory() as folder:
        shard = str(write_shards(made, Path(folder))[0])
        source = ShardSource(shard)
        peer = webdataset.WebDataset(shard, shardshuffle=False)
        assert [sample["jpg"] for sample in peer] == [source.read(i).media["image"] for i in range(SAMPLES)]
        order = random.permutation(SAMPLES).tolist()
        mine, theirs = interleaved(lambda: [source.read(i) for i in order], lambda: list(peer), repeats)
    label = "read a sample of 2 kB and its caption (ours in any order, crc checked; theirs in file order)"
    return Case(label, "webdataset", 1e6 * mine / SAMPLES, 1e6 * theirs / SAMPLES, "us")


def loading_cases(repeats: int) -> Iterator[Case]:
    """Whole batches from shards of pictures: read, decode, transform, collate; ours at random, webdataset's in file order."""
    import webdataset

    spec, files = ImageSpec(size=SIZE), make_jpegs(PICTURES)
    theirs, _, _ = open_clip_transform()
    made = [Sample(f"{i:06d}", {"image": files[i % PICTURES]}, (f"caption {i}",)) for i in range(LOADED)]

    def prepare(sample: Sample, visit: int) -> Tensor:
        return ours(sample.media["image"], spec)

    def collate(items: list[Tensor], epoch: int) -> Batch:
        return Batch(tuple(map(str, range(len(items)))), torch.stack(items))

    with tempfile.TemporaryDirectory() as folder:
        shard = str(write_shards(made, Path(folder))[0])
        fsspec.filesystem("memory").pipe_file("/bench/0.tar", Path(shard).read_bytes())
        sources = {"here": ShardSource(shard), "in object storage, cached": ShardSource("memory://bench")}
        loaders = {place: Loader(source, prepare, collate, batch_size=BATCH, seed=0) for place, source in sources.items()}
        peer = webdataset.WebDataset(shard, shardshuffle=False).to_tuple("jpg").map_tuple(theirs).batched(BATCH)
        for place, loader in loaders.items():
            mine, other = interleaved(
                lambda of=loader: sum(len(batch) for batch in of.one_epoch()), lambda: sum(len(x) for (x,) in peer), repeats
            )
            label = f"whole batches of {BATCH} from shards {place}, no workers"
            yield Case(label, "webdataset, open_clip", LOADED / mine, LOADED / other, "pictures/s", higher_is_better=True)


def main() -> None:
    parser = arguments_parser(__doc__ or "")
    parser.set_defaults(repeats=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="webdataset")
    cases = [*transform_cases(arguments.repeats), reading_case(arguments.repeats), *loading_cases(arguments.repeats)]
    report(cases, arguments.json)


if __name__ == "__main__":
    main()
