"""Drawing an archive of SVG pictures as PNG, in helper processes, because the renderer holds Python's lock while it draws.

The helper is this very file, started by path: it imports the renderer and nothing of mm, so it starts in a moment, needs no
``if __name__ == "__main__"`` in the user's program and inherits no threads. Frames on its pipe: 8 bytes of length, then the
PNG.
"""

import io
import lzma
import subprocess
import sys
import tarfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import resvg_py
from PIL import Image

_LENGTH_BYTES = 8


def svg_names(archive: Path) -> list[str]:
    """Names of the SVG files in an archive, in its order."""
    with _open(archive) as files:
        return [member.name for member in files if member.isfile()]


def rasterize(archive: Path, size: int, processes: int) -> Iterator[bytes]:
    """Yield every picture of an archive, in its order, as RGBA PNG of ``size`` pixels square.

    Args:
        archive: ``.tar.xz`` of SVG files that came with the package.
        size: Side in pixels; a picture that is not square is centred on a transparent square.
        processes: Helper processes to draw with.

    Raises:
        RuntimeError: A helper failed; the message ends with what it said.
    """
    with ExitStack() as stack:
        helpers = [stack.enter_context(_start(archive, size, part, processes)) for part in range(processes)]
        stack.callback(_stop, helpers)
        turn = 0
        while (png := _receive(helpers[turn % processes])) is not None:
            yield png
            turn += 1


def draw(archive: Path, wanted: Collection[str], size: int) -> dict[str, bytes]:
    """A few pictures of an archive by name, drawn in this process; see `rasterize`. Names that it lacks are left out."""
    with _open(archive) as files:
        members = [member for member in files if member.isfile() and member.name in wanted]
        opened = {member.name: files.extractfile(member) for member in members}
        return {name: _draw(file.read().decode(), size) for name, file in opened.items() if file is not None}


def _start(archive: Path, size: int, part: int, parts: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", __file__, str(archive), str(size), str(part), str(parts)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # noqa: S603


def _stop(helpers: "list[subprocess.Popen[bytes]]") -> None:
    for helper in helpers:
        helper.kill()


def _receive(helper: "subprocess.Popen[bytes]") -> bytes | None:
    assert helper.stdout is not None
    assert helper.stderr is not None
    head = helper.stdout.read(_LENGTH_BYTES)
    length = int.from_bytes(head, "little")
    data = helper.stdout.read(length)
    if len(head) == _LENGTH_BYTES and len(data) == length:
        return data
    if helper.wait() == 0 and not head:
        return None
    said = helper.stderr.read().decode(errors="replace").strip().splitlines()
    raise RuntimeError(f"drawing the pictures failed: {said[-1] if said else f'helper ended with {helper.returncode}'}")


def _open(archive: Path) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(lzma.decompress(archive.read_bytes())))


def _draw(svg: str, size: int) -> bytes:
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    return png if (width, height) == (size, size) else _squared(png, size)


def _squared(png: bytes, size: int) -> bytes:
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        canvas = Image.new("RGBA", (size, size))
        canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    out = io.BytesIO()
    canvas.save(out, "PNG")
    return out.getvalue()


def _help(archive: Path, size: int, part: int, parts: int, out: IO[bytes]) -> None:
    """What a helper does: draw every ``parts``-th picture, starting at ``part``."""
    with _open(archive) as files:
        for number, member in enumerate(member for member in files if member.isfile()):
            if number % parts == part:
                opened = files.extractfile(member)
                assert opened is not None
                png = _draw(opened.read().decode(), size)
                out.write(len(png).to_bytes(_LENGTH_BYTES, "little") + png)
                out.flush()


if __name__ == "__main__":
    _help(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.stdout.buffer)
