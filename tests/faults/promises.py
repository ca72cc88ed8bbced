"""What docs/faults.md says, for the tests and for the table after them."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"


def promises() -> dict[int, tuple[str, str]]:
    """Number of each fault in docs/faults.md to its name and to what its row says of tests."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| [^|]+ \| ([^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {int(number): (name.strip(), tests) for number, name, tests in rows}
