"""Seeds are pure functions of their parts, on every platform and in every process."""

import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from mm.seeding import derive_seed, generator

parts = st.lists(st.integers() | st.text(), max_size=4)


@given(parts, parts)
def test_different_parts_give_different_seeds(first: list[int | str], second: list[int | str]) -> None:
    same_types = [(type(p), p) for p in first] == [(type(p), p) for p in second]
    assert (derive_seed(*first) == derive_seed(*second)) == same_types
    assert 0 <= derive_seed(*first) < 2**63


def test_seed_is_the_same_in_another_process() -> None:
    code = "from mm.seeding import derive_seed; print(derive_seed(7, 'crop', 'ünï'))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(printed.stdout) == derive_seed(7, "crop", "ünï")


def test_generators_of_different_purposes_are_independent() -> None:
    first, again, other = (generator(1, 2, "id", purpose).random(4).tolist() for purpose in ("crop", "crop", "flip"))
    assert first == again
    assert first != other
