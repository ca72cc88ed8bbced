"""What every picture tokenizer accepts."""

from torch import Tensor

from mm.errors import UserError


def check_pictures(image: Tensor, side: int) -> None:
    """Raises `UserError` for anything but pictures ``(B, 3, side, side)``."""
    if image.shape[1:] != (3, side, side):
        raise UserError(
            f"image tokenizer: pictures of shape {tuple(image.shape[1:])} where (3, {side}, {side}) is expected; "
            "prepare them with the model's processor"
        )


def check_ids(ids: Tensor, grid: tuple[int, int], vocab_size: int) -> None:
    """Raises `UserError` for another number of tokens than the grid has and, on CPUs, where looking is free, unknown ids."""
    rows, columns = grid
    if ids.shape[1] != rows * columns:
        raise UserError(f"image tokenizer: {ids.shape[1]} tokens where {rows} x {columns} make a picture")
    if ids.device.type == "cpu" and ids.numel() and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise UserError(f"image tokenizer: ids from {int(ids.min())} to {int(ids.max())} where 0 to {vocab_size - 1} are known")
