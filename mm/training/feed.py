"""Batches on the device, with the stream position that belongs to the last one taken."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mm.errors import DataError
from mm.types import Batch, BatchStream


class Feed:
    """Takes batches from a stream and moves them to the device, one ahead where the device computes by itself.

    Args:
        stream: Endless supply of this process's batches.
        device: Where they go.
    """

    def __init__(self, stream: BatchStream, device: torch.device) -> None:
        self._stream = stream
        self._device = device
        self._iterator: Iterator[Batch] | None = None
        self._ahead: Batch | None = None
        self._position_before_ahead: dict[str, Any] = {}
        self._failure: Exception | None = None

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after a position; before the first batch is taken."""
        assert self._iterator is None
        self._stream.restore(state)

    def take(self) -> Batch:
        """The next batch."""
        if self._failure is not None:
            raise self._failure
        batch, self._ahead = self._ahead, None
        return self._fetch() if batch is None else batch

    def look_ahead(self) -> None:
        """Begin to move the following batch while an accelerator is busy with the one that was taken."""
        if self._device.type != "cpu" and self._ahead is None:
            self._position_before_ahead = self._stream.state()
            try:
                self._ahead = self._fetch()
            except Exception as error:  # the step at work can still be finished and saved; the next one reports it
                self._failure = error

    def state(self) -> dict[str, Any]:
        """Position after the last batch that was taken."""
        return self._stream.state() if self._ahead is None else self._position_before_ahead

    def _fetch(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._stream)
        try:
            return next(self._iterator).to(self._device)
        except StopIteration:
            raise DataError("the data ended before the last training step; a training stream repeats its epochs") from None
