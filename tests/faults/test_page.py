"""docs/faults.md and the tests stay in step."""

import ast
import re
from pathlib import Path

from promises import PAGE, promises

TESTS = Path(__file__).parents[1]


def marked() -> dict[int, set[str]]:
    """Number of each fault to the files with tests that are marked with it."""
    found: dict[int, set[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for decorator in function.decorator_list if isinstance(function, ast.FunctionDef) else ():
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
                    for number in decorator.args:
                        found.setdefault(ast.literal_eval(number), set()).add(path.relative_to(TESTS).as_posix())
    return found


def test_every_fault_has_its_tests_and_its_row() -> None:
    rows, files = promises(), marked()
    assert list(rows) == sorted(files) == list(range(1, 16))
    for number, (name, tests) in rows.items():
        assert set(re.findall(r"`tests/([^`]+)`", tests)) == files[number], f"{PAGE.name}: row {number}, {name}"
