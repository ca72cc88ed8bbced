"""Safe defaults of the app: a private working folder, what a request may hold, and who may be served.

`Guard` stands before Gradio. Gradio itself refuses files that were not uploaded and takes uploads of a bounded size; the guard
adds what it has no setting for: a bound on everything else that is sent, no addresses in place of files, no routes that the
page does not need, one bound on all uploads together, one on wrong passwords, and headers that keep the page to this server.
"""

import json
import math
import os
import shutil
import stat
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm.errors import UserError

MAX_UPLOAD_BYTES = 10 << 20
MAX_REQUEST_BYTES = 1 << 20
"""Of everything that is no upload: texts, settings and names of uploaded files."""

MAX_FOLDER_BYTES = 1 << 30
"""Of all that was uploaded and made and is not yet deleted."""

DELETED_EVERY, DELETED_AFTER = 300, 3600
"""Seconds: how often files are looked through, and how old they become."""

MAX_WAITING = 16
"""Requests that wait; one more is told that the queue is full."""

MAX_WRONG, WRONG_SECONDS = 10, 900
"""So many wrong passwords from one address in so many seconds; then it waits."""

MAX_ADDRESSES = 10_000
"""Whose wrong passwords are remembered; of more, the oldest are forgotten."""

BOUNDARY_BYTES = 64 << 10
"""What an upload may take beside the file."""

ROUTES = (
    *("info", "file=", "upload", "queue/", "call/", "cancel", "reset", "heartbeat/", "startup-events", "theme.css"),
    *("app_id", "user", "login_check", "run/predict"),
)
"""What the page and `gradio_client` ask for behind `API`; ``run/predict`` answers for examples alone, all else must queue."""

API = "/gradio_api/"
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/login", "/logout", "/robots.txt", "/manifest.json")
STATIC = ("/assets/", "/static/", "/svelte/")

HEADERS = {
    "content-security-policy": (
        "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


@contextmanager
def private_folder() -> Iterator[Path]:
    """An empty folder of this user alone that becomes the working folder and holds all temporary files; deleted at the end.

    Gradio serves what lies in its temporary folder and returns what lies in the working folder, so nothing else lies there.
    Settings of Gradio in the environment are dropped: a forgotten ``GRADIO_SHARE`` must not open the app to the world.
    """
    folder, before = Path(tempfile.mkdtemp(prefix="mm-demo-")).resolve(), Path.cwd()
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_TEMP_DIR": str(folder / "files"), "GRADIO_ANALYTICS_ENABLED": "False"}
    (folder / "files").mkdir()
    (folder / "empty").mkdir()
    os.chdir(folder / "empty")
    tempfile.tempdir = str(folder / "files")
    try:
        yield folder / "files"
    finally:
        os.chdir(before)
        tempfile.tempdir = None
        shutil.rmtree(folder, ignore_errors=True)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def read_accounts(path: Path) -> list[tuple[str, str]]:
    """Names and passwords of a file with a line ``NAME:PASSWORD`` each.

    Raises:
        UserError: No such file, others may read it, or it holds no account.
    """
    try:
        mode, lines = path.stat().st_mode, path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--auth {path}: cannot be read ({error}); give a file with a line NAME:PASSWORD each") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"--auth {path}: others may read it; chmod 600 {path}")
    accounts = [(name, password) for name, _, password in (line.partition(":") for line in lines) if name and password]
    if not accounts:
        raise UserError(f"--auth {path}: holds no line NAME:PASSWORD")
    return accounts


def check_address(host: str, accounts: list[tuple[str, str]]) -> None:
    """Raises `UserError` where others reach the app and need no password."""
    if not is_loopback(host) and not accounts:
        raise UserError(f"--host {host}: others would reach the app; give --auth FILE with a line NAME:PASSWORD each")


class Refused(Exception):  # noqa: N818 - an answer to the one who asked
    """A request that is not passed on, with the status and what is said."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class Attempts:
    """Attempts to log in, by address. One counts as wrong from its beginning, so that many at once are no way around the bound.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, list[float]] = OrderedDict()

    def begin(self, address: str) -> None:
        """Count one more. Raises `Refused` where there were too many."""
        place, now = _network(address), self._clock()
        wrong = self._wrong[place] = [begun for begun in self._wrong.pop(place, ()) if now - begun < WRONG_SECONDS]
        if len(self._wrong) > MAX_ADDRESSES:
            self._wrong.popitem(last=False)
        if len(wrong) >= MAX_WRONG:
            minutes = math.ceil((wrong[0] + WRONG_SECONDS - now) / 60)
            raise Refused(429, f"{MAX_WRONG} wrong passwords from this address; try again in {minutes} minutes")
        wrong.append(now)

    def was_right(self, address: str) -> None:
        """Do not count the last one; those that were wrong stay, so that an own account is no help in guessing others."""
        if wrong := self._wrong.get(_network(address)):
            wrong.pop()


def _network(address: str) -> str:
    """What one visitor may have: an address of IPv4, 64 bits of IPv6."""
    try:
        found = ip_address(address)
    except ValueError:
        return address
    found = (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found
    return str(ip_network((found, 64 if found.version == 6 else 32), strict=False))


class Guard:
    """ASGI middleware; see the head of this file.

    Args:
        app: What it stands before.
        folder: Where uploads lie.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self.app, self.folder, self.attempts = app, folder, Attempts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        begun, address = False, (scope.get("client") or ("",))[0]
        logs_in = scope["method"] == "POST" and scope["path"] == "/login"

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                if logs_in and message["status"] < 400:
                    self.attempts.was_right(address)
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        try:
            if logs_in:
                self.attempts.begin(address)
            await self.app(scope, await self._checked(scope, receive), send_with_headers)
        except Refused as refused:
            if begun:
                raise
            await JSONResponse({"detail": str(refused)}, refused.status)(scope, receive, send_with_headers)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        path = scope["path"]
        route = path.removeprefix(API) if path.startswith(API) else None
        known = path in PAGES or path.startswith(STATIC) if route is None else route.startswith(ROUTES)
        if not known:
            raise Refused(404, "there is nothing here")
        if route is not None and route.startswith("file="):
            self._check_file(route.removeprefix("file="))
        if scope["method"] != "POST":
            return receive
        if route == "upload":
            if _bytes_below(self.folder) > MAX_FOLDER_BYTES:
                raise Refused(507, "too much was uploaded in the last hour; try again later")
            return _at_most(receive, scope, MAX_UPLOAD_BYTES + BOUNDARY_BYTES)
        body = await _read(_at_most(receive, scope, MAX_REQUEST_BYTES))
        if route is not None and route.startswith(("queue/", "call/", "run/")):
            for name in _file_names(body):
                self._check_file(name)
        return _replay(body, receive)

    def _check_file(self, name: str) -> None:
        if "://" in name or name.startswith(("//", "\\\\", "data:")):
            raise Refused(400, "addresses are not fetched; upload the file itself")
        path = Path(name)
        if "\0" in name or not path.is_absolute() or not path.resolve().is_relative_to(self.folder) or not path.is_file():
            raise Refused(403, "this file was not uploaded here")


def _bytes_below(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # files come and go meanwhile
                total += os.stat(os.path.join(place, name)).st_size
    return total


def _at_most(receive: Receive, scope: Scope, limit: int) -> Receive:
    """The same body; raises `Refused` by its announced length, or as soon as more than that many bytes have come."""
    words = f"larger than {limit >> 20} MB; send less"
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    if not announced.isdigit() or int(announced) > limit:
        raise Refused(413, words)
    come = 0

    async def counted() -> Message:
        nonlocal come
        message = await receive()
        come += len(message.get("body", b""))
        if come > limit:
            raise Refused(413, words)
        return message

    return counted


async def _read(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the request broke off")
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A body that was read, then whatever comes next, which is that the other side leaves."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _file_names(body: bytes) -> Iterator[str]:
    """Every ``path`` of a JSON body. Raises `Refused` for what is no JSON."""
    try:
        waiting: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        raise Refused(400, "not JSON") from None
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("path"), str):
                yield value["path"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
