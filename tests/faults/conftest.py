"""After a run that met faults, a table: each row of docs/faults.md and how many of its tests passed."""

from collections import Counter, defaultdict

import pytest
from promises import promises


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("fault"):
            item.user_properties.extend(("fault", number) for number in mark.args)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, number in getattr(report, "user_properties", ()):
                if key == "fault" and (report.when == "call" or outcome != "passed"):
                    counts[number][outcome] += 1
    if counts:
        terminalreporter.section("faults")
    for number, (name, _) in promises().items():
        if number in counts:
            told = ", ".join(f"{count} {outcome}" for outcome, count in counts[number].items())
            terminalreporter.write_line(f"{number:3}  {name:60}  {told}")
