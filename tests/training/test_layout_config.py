"""Numbers of processes that cannot be shared out, and options that say nothing, are refused in one line."""

from typing import Any

import pytest

from mm.config import validate
from mm.errors import ConfigError
from mm.training.config import ParallelConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 2}, "replicas is for data: fsdp"),
        ({"microbatches": 4}, "microbatches is for a pipeline"),
        ({"pipeline": 2, "data": "fsdp"}, "pipeline goes with data: ddp"),
        ({"pipeline": 2, "schedule": "1f1b"}, "1f1b is for a pipeline of several microbatches"),
        ({"pipeline": 2, "microbatches": 2, "schedule": "interleaved"}, "schedule"),
        ({"tensors": 2}, "tensors"),
        ({"recompute": "some"}, "recompute"),
    ],
)
def test_what_cannot_be_meant(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(ParallelConfig, values, "test")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "world_size", "expected"),
    [
        ({}, 6, 6),
        ({"tensor": 2}, 6, 3),
        ({"tensor": 2, "pipeline": 2}, 8, 2),
        ({"data": "fsdp", "replicas": 2}, 8, 8),
        ({"tensor": 2}, 3, None),
        ({"pipeline": 4}, 1, None),
        ({"data": "fsdp", "replicas": 3}, 4, None),
    ],
)
def test_parts_of_the_global_batch(values: dict[str, Any], world_size: int, expected: int | None) -> None:
    config = validate(ParallelConfig, values, "test")
    if expected is not None:
        assert config.data_size(world_size) == expected
        return
    with pytest.raises(ConfigError, match="does not divide the"):
        config.data_size(world_size)
