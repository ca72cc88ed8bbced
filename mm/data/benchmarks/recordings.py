"""Sets of recordings: ESC-50, AudioCaps, Clotho, LibriSpeech. Media are ``"audio"``, as the files are."""

from collections.abc import Mapping
from pathlib import Path

from mm.data.benchmarks.layout import Benchmark, Copy, files_below
from mm.data.benchmarks.names import vocabulary
from mm.data.benchmarks.source import BenchmarkSource, Files
from mm.data.files import AUDIO_SUFFIXES

LIBRISPEECH_SPLITS = (
    "test-clean",
    "test-other",
    "dev-clean",
    "dev-other",
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
)


def _open_esc50(copy: Copy) -> BenchmarkSource:
    """All 2,000 recordings (zero-shot figures use all five folds); field ``fold`` is 1 to 5."""
    words = vocabulary("esc50")
    assert words.folders is not None, "the data file of the set names its categories"
    base = copy.find("ESC-50-master", "ESC-50", ".")
    table = base / "meta" / "esc50.csv"
    if not table.is_file() or not (base / "audio").is_dir():
        raise copy.error(f"no meta/esc50.csv and audio in {base}")
    rows = copy.rows(table, "filename", "fold", "category")
    index = {category: label for label, category in enumerate(words.folders)}
    for row in rows:
        if row["category"] not in index or not row["fold"].isdecimal():
            raise copy.error(f"{table}: '{row['category']}' in fold '{row['fold']}' is not of this set")
    return BenchmarkSource(
        copy,
        Files(base / "audio", [row["filename"] for row in rows]),
        vocabulary=words,
        labels=[index[row["category"]] for row in rows],
        extras=[{"fold": int(row["fold"])} for row in rows],
        modality="audio",
    )


def _open_audiocaps(copy: Copy) -> BenchmarkSource:
    """Five captions a recording in test and val. Recordings that are no longer to be had count as missing files.

    Files are called after the video, with or without a ``Y`` before or the start in seconds behind, or after the caption.
    """
    table = copy.find(f"{copy.split}.csv", f"dataset/{copy.split}.csv", f"csv/{copy.split}.csv")
    rows = copy.rows(table, "audiocap_id", "youtube_id", "start_time", "caption")
    root = copy.find(f"audio/{copy.split}", copy.split, f"waveforms/{copy.split}", "audio", ".")
    names = {Path(name).stem: name for name in files_below(root, AUDIO_SUFFIXES | {".m4a"})}
    if not names:
        raise copy.error(f"no recordings in {root}")
    paths: dict[tuple[str, str], str] = {}
    captions: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        video, start = clip = (row["youtube_id"], row["start_time"])
        stems = (f"{video}_{start}", video, f"Y{video}", f"Y{video}_{start}", row["audiocap_id"])
        found = next((names[stem] for stem in stems if stem in names), None)
        paths[clip] = found or paths.get(clip, f"{video}_{start}.wav")
        captions.setdefault(clip, []).append(row["caption"])
    files = Files(root, list(paths.values()), [f"{video}_{start}" for video, start in paths])
    return BenchmarkSource(copy, files, captions=[tuple(c) for c in captions.values()], modality="audio")


def _open_clotho(copy: Copy) -> BenchmarkSource:
    """Five captions a recording."""
    name = f"clotho_captions_{copy.split}.csv"
    columns = [f"caption_{number}" for number in range(1, 6)]
    rows = copy.rows(copy.find(name, f"clotho_csv_files/{name}"), "file_name", *columns)
    archive = f"clotho_audio_{copy.split}"
    root = copy.find(copy.split, f"clotho_audio_files/{copy.split}", f"{archive}/{copy.split}", archive)
    files = Files(root, [row["file_name"] for row in rows])
    captions = [tuple(row[column] for column in columns) for row in rows]
    return BenchmarkSource(copy, files, captions=captions, modality="audio")


def _open_librispeech(copy: Copy) -> BenchmarkSource:
    """Utterances with their transcripts in capitals; fields ``speaker`` and ``chapter``."""
    root = copy.find(f"LibriSpeech/{copy.split}", copy.split)
    paths, captions, extras = [], [], []
    for transcript in sorted(root.glob("*/*/*.trans.txt")):
        chapter = transcript.parent.relative_to(root)
        for line in copy.lines(transcript):
            utterance, _, text = line.partition(" ")
            paths.append(f"{chapter.as_posix()}/{utterance}.flac")
            captions.append((text,))
            extras.append({"speaker": chapter.parts[0], "chapter": chapter.parts[1]})
    return BenchmarkSource(copy, Files(root, paths), captions=captions, extras=extras, modality="audio")


SETS: Mapping[str, Benchmark] = {
    "esc50": Benchmark(_open_esc50, "meta/esc50.csv and audio/*.wav", ("all",)),
    "audiocaps": Benchmark(_open_audiocaps, "test.csv and audio/test/<youtube_id>.wav", ("test", "val", "train"), "retrieval"),
    "clotho": Benchmark(
        _open_clotho,
        "clotho_captions_evaluation.csv and evaluation/*.wav",
        ("evaluation", "validation", "development"),
        "retrieval",
    ),
    "librispeech": Benchmark(
        _open_librispeech,
        "LibriSpeech/test-clean/<speaker>/<chapter>/*.flac and *.trans.txt",
        LIBRISPEECH_SPLITS,
        "transcription",
    ),
}
