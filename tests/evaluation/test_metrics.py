"""Intervals: the figure itself, coverage, clusters drawn whole, and what a result writes."""

import json

import numpy as np
import pytest
from rich.console import Console

from mm.errors import UserError
from mm.evaluation.metrics import Interval, Result, bootstrap, mean_per_class, median, selections, share


def weights_of(draws: list[int], n: int) -> np.ndarray:
    return np.bincount(draws, minlength=n)[None].astype(float)


def test_statistics_equal_the_figures_of_the_drawn_sample() -> None:
    random = np.random.default_rng(0)
    n, m = 30, 90
    hits, labels = random.random(n) < 0.4, random.integers(0, 6, n)
    values, units = random.integers(1, 40, m), np.sort(random.integers(0, n, m))
    for _ in range(20):
        draws = random.integers(0, n, n)
        weights = weights_of(draws.tolist(), n)
        assert share(hits)(weights)[0] == pytest.approx(hits[draws].mean())
        recalls = [hits[draws][labels[draws] == c].mean() for c in np.unique(labels[draws])]
        assert mean_per_class(hits, labels)(weights)[0] == pytest.approx(np.mean(recalls))
        drawn_values = np.concatenate([values[units == draw] for draw in draws])
        assert median(values, units)(weights)[0] == np.median(drawn_values)


def test_value_is_the_plain_figure_and_intervals_repeat_with_the_seed() -> None:
    hits = np.arange(200) % 4 == 0
    first = bootstrap({"top1": share(hits)}, 200, seed=3)["top1"]
    assert first == bootstrap({"top1": share(hits)}, 200, seed=3)["top1"]
    assert first != bootstrap({"top1": share(hits)}, 200, seed=4)["top1"]
    assert first.value == 0.25
    assert first.low < 0.25 < first.high


def test_interval_agrees_with_the_binomial_one() -> None:
    n, rate = 2000, 0.3
    interval = bootstrap({"rate": share(np.arange(n) < rate * n)}, n)["rate"]
    half = 1.96 * np.sqrt(rate * (1 - rate) / n)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.1)


def test_interval_covers_the_truth_about_95_times_in_a_hundred() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        interval = bootstrap({"x": share(random.random(150) < 0.4)}, 150, seed=seed, resamples=300)["x"]
        covered += interval.low <= 0.4 <= interval.high
    assert 178 <= covered <= 199


def test_units_are_drawn_whole() -> None:
    """Five captions that always hit together carry the evidence of one: the interval must not shrink."""
    hits = np.arange(400) % 2
    alone = bootstrap({"x": share(hits)}, 400)["x"]
    together = bootstrap({"x": share(5 * hits, np.full(400, 5))}, 400)["x"]
    assert alone == together


def test_blocks_of_draws_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = {"x": share(np.arange(50) % 3 == 0)}
    whole = bootstrap(statistics, 50)
    monkeypatch.setattr("mm.evaluation.metrics.MAX_WEIGHTS", 500)
    assert bootstrap(statistics, 50) == whole


def test_nothing_to_evaluate_and_wrong_subsets_are_refused() -> None:
    with pytest.raises(UserError, match="nothing to evaluate"):
        bootstrap({"x": share(np.zeros(0))}, 0)
    with pytest.raises(UserError, match="'novel': no picture"):
        selections({"novel": np.zeros(3, dtype=bool)}, 3)
    with pytest.raises(UserError, match="'novel': expected 3"):
        selections({"novel": np.ones(2, dtype=bool)}, 3)


def test_result_writes_the_stable_json(tmp_path) -> None:
    result = Result({"top1": Interval(0.5, 0.4, 0.6)}, {"split": "emoji:test", "templates": ["{}", "an emoji of {}"]})
    other = Result({"baseline_top1": Interval(0.3, 0.2, 0.4)}, {"split": "emoji:train", "index": "train artists"})
    joint = result | Result(other.metrics, {**other.protocol, "seed": 1})
    joint.write(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "metrics": {"top1": {"value": 0.5, "low": 0.4, "high": 0.6}, "baseline_top1": {"value": 0.3, "low": 0.2, "high": 0.4}},
        "protocol": {
            "split": "emoji:test | emoji:train",
            "templates": ["{}", "an emoji of {}"],
            "index": "train artists",
            "seed": 1,
        },
    }
    with pytest.raises(UserError, match="existing folder"):
        joint.write(tmp_path / "missing" / "out.json")


def test_statements_of_both_protocols_are_kept_each_once() -> None:
    prompts, pairs = Result({}, {"interval": "over prompts", "k": 5}), Result({}, {"interval": "over pairs", "k": 5})
    joint = prompts | pairs | prompts | Result({}, {"interval": {"resamples": 10}})
    assert joint.protocol == {"interval": "over prompts | over pairs | resamples 10", "k": 5}
    assert list((Result({}, {"model": "m", "k": 5}) | pairs).protocol) == ["model", "k", "interval"], "the first one's first"


def test_table_shows_percent_numbers_and_the_stamp_without_reading_markup() -> None:
    metrics = {"top1": Interval(0.432, 0.41, 0.454), "median_rank": Interval(3.5, 3, 4, unit="number")}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(Result(metrics, {"split": "[red]test[/red]"}).table("zero-shot"))
        text = console.export_text()
    assert "43.2 %" in text
    assert "41.0 to 45.4" in text
    assert "3.5" in text
    assert "split: [red]test[/red]" in text
