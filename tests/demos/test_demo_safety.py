"""Safe defaults of the app, each without a server: what the guard passes on, where files lie, who may start it how."""

import asyncio
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from app import main
from ui.safety import (
    API,
    BOUNDARY_BYTES,
    MAX_REQUEST_BYTES,
    MAX_UPLOAD_BYTES,
    MAX_WRONG,
    WRONG_SECONDS,
    Attempts,
    Guard,
    Refused,
    check_address,
    is_loopback,
    private_folder,
    read_accounts,
)

from mm.errors import UserError


class Inner:
    """An app that reads the whole body and keeps it."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})


def ask(
    folder: Path, path: str, body: bytes | Sequence[bytes] = b"", *, method: str = "POST", length: bytes | None = None
) -> tuple[int, dict[bytes, bytes], bytes, list[bytes]]:
    """Status, headers and body of the guard's answer, and the bodies that reached what is behind it."""
    inner, parts = Inner(), [body] if isinstance(body, bytes) else list(body)
    waiting = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return waiting.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [] if length is None else [(b"content-length", length)]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(Guard(inner, folder)(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"], inner.bodies


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    below = tmp_path / "files"
    below.mkdir()
    return below.resolve()


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/config",
        "/assets/index.js",
        "/static/img/logo.svg",
        API + "info",
        API + "heartbeat/abc",
        API + "queue/data",
        "/login",
    ],
)
def test_what_the_page_needs_is_passed_on(folder: Path, path: str) -> None:
    status, headers, body, _ = ask(folder, path, method="GET")
    assert (status, body) == (200, b"fine")
    assert b"default-src 'self'" in headers[b"content-security-policy"]
    assert headers[b"x-content-type-options"] == b"nosniff"


@pytest.mark.parametrize(
    "path",
    [
        *(
            API + route
            for route in ("proxy=http://10.0.0.1/", "vibe-edit", "run/classify", "api/classify", "monitoring", "runs")
        ),
        *("/monitoring", "/file/etc/passwd", "/proxy=http://10.0.0.1/", "/docs", "/openapi.json", API + "process_recording"),
        *(API + "run-history/records", API + "dev/reload", "/run/classify"),
    ],
)
def test_what_the_page_does_not_need_is_not_there(folder: Path, path: str) -> None:
    status, _, body, reached = ask(folder, path, method="GET")
    assert status == 404
    assert json.loads(body)["detail"] == "there is nothing here"
    assert not reached


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../canary.txt", "a/../../canary.txt", "..", "\0", "/", "files\0/../..", "canary.txt", "", "~/x"]
)
def test_files_outside_the_folder_are_neither_served_nor_taken(folder: Path, name: str) -> None:
    status, _, body, reached = ask(folder, f"{API}file={name}", method="GET")
    assert (status, reached) == (403, [])
    given = json.dumps({"data": [{"path": name, "meta": {"_type": "gradio.FileData"}}]}).encode()
    for route in ("queue/join", "call/classify", "call/v2/classify", "run/predict"):
        status, _, body, reached = ask(folder, API + route, given)
        assert (status, reached) == (403, [])
        assert "not uploaded" in json.loads(body)["detail"]


def test_a_link_out_of_the_folder_is_not_followed(folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent)
    assert ask(folder, f"{API}file={folder}/link/canary.txt", method="GET")[0] == 403


@pytest.mark.parametrize(
    "name",
    ["http://10.0.0.1/a.png", "https://example.com/a.png", "file:///etc/passwd", "//host/share", "data:image/png;base64,AA"],
)
def test_addresses_are_not_fetched(folder: Path, name: str) -> None:
    given = json.dumps({"data": ["text", [{"deep": {"path": name}}]]}).encode()
    status, _, body, reached = ask(folder, API + "queue/join", given)
    assert (status, reached) == (400, [])
    assert "not fetched" in json.loads(body)["detail"]
    assert ask(folder, f"{API}file={name}", method="GET")[0] == 400


def test_an_uploaded_file_and_an_escaped_key_are_seen(folder: Path) -> None:
    (folder / "abc").mkdir()
    given = json.dumps({"data": [{"path": str(folder / "abc" / "a.png"), "url": "http://127.0.0.1:7860/x"}]}).encode()
    assert ask(folder, API + "queue/join", given)[0] == 403, "not yet uploaded"
    (folder / "abc" / "a.png").write_bytes(b"a")
    assert ask(folder, API + "queue/join", given)[3] == [given]
    assert ask(folder, f"{API}file={folder}/abc/a.png", method="GET")[0] == 200
    hidden = b'{"data": [{"\\u0070ath": "\\u0068ttp://10.0.0.1/"}]}'
    assert ask(folder, API + "queue/join", hidden)[0] == 400


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_refused(folder: Path, body: bytes) -> None:
    status, _, said, reached = ask(folder, API + "queue/join", body)
    assert (status, reached) == (400, [])
    assert json.loads(said)["detail"] == "not JSON"


@pytest.mark.parametrize(("route", "limit"), [("queue/join", MAX_REQUEST_BYTES), ("upload", MAX_UPLOAD_BYTES + BOUNDARY_BYTES)])
def test_too_much_is_refused_by_its_announcement_and_while_it_comes(folder: Path, route: str, limit: int) -> None:
    text = json.dumps("a" * (limit - 2)).encode()
    assert ask(folder, API + route, text, length=str(len(text)).encode())[3] == [text]
    for body, length in ((b"x", str(limit + 1).encode()), (b"x", b"lots"), ([text, b" "], None), ([text, b" "], b"5")):
        status, _, said, reached = ask(folder, API + route, body, length=length)
        assert (status, reached) == (413, [])
        assert "send less" in json.loads(said)["detail"]


def test_uploads_end_when_the_folder_is_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "b.png").write_bytes(bytes(1000))
    monkeypatch.setattr("ui.safety.MAX_FOLDER_BYTES", 1000)
    assert ask(folder, API + "upload", b"x")[0] == 200
    (folder / "c.png").write_bytes(b"1")
    assert ask(folder, API + "upload", b"x")[0] == 507


def test_wrong_passwords_are_bounded_by_address_and_time() -> None:
    now = [0.0]
    attempts = Attempts(lambda: now[0])

    def refused(address: str) -> bool:
        try:
            attempts.begin(address)
        except Refused:
            return True
        return False

    for _ in range(3 * MAX_WRONG):  # those that are right are not counted
        assert not refused("1.2.3.4")
        attempts.was_right("1.2.3.4")
    assert [refused("1.2.3.4") for _ in range(MAX_WRONG + 2)] == [False] * MAX_WRONG + [True] * 2
    assert not refused("1.2.3.5")
    now[0] = WRONG_SECONDS - 1
    assert refused("1.2.3.4")
    now[0] = WRONG_SECONDS
    assert not refused("1.2.3.4"), "what was refused did not make the wait longer"
    assert [refused(f"2001:db8::{number:x}") for number in range(MAX_WRONG + 1)] == [False] * MAX_WRONG + [True]
    assert not refused("2001:db8:0:1::1")
    assert not any(refused(f"::ffff:5.6.7.{number}") for number in range(2 * MAX_WRONG))


def test_no_more_addresses_are_remembered_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ui.safety.MAX_ADDRESSES", 3)
    attempts = Attempts()
    for number in range(10):
        attempts.begin(f"1.2.3.{number}")
    assert list(attempts._wrong) == [f"1.2.3.{number}/32" for number in (7, 8, 9)]


def test_the_guard_counts_what_the_app_calls_wrong(folder: Path) -> None:
    inner = Inner(status=400)
    guard = Guard(inner, folder)  # type: ignore[arg-type]

    def log_in(path: str = "/login", method: str = "POST") -> int:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": [], "client": ("1.2.3.4", 5)}
        asyncio.run(guard(scope, receive, send))  # type: ignore[arg-type]
        return sent[0]["status"]

    inner.status = 200
    assert {log_in() for _ in range(MAX_WRONG + 1)} == {200}
    inner.status = 400
    assert [log_in() for _ in range(MAX_WRONG)] == [400] * MAX_WRONG
    assert log_in("/login/") == 404, "no other way in"
    inner.status = 200
    assert log_in() == 429, "not even the right one"
    assert log_in("/", "GET") == 200


@pytest.fixture
def place() -> Iterator[None]:
    before = Path.cwd()
    yield
    assert Path.cwd() == before


@pytest.mark.usefixtures("place")
def test_the_working_folder_is_private_empty_and_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/nowhere")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    with private_folder() as folder:
        assert not list(Path.cwd().iterdir())
        assert not list(folder.iterdir())
        assert folder.parent.stat().st_mode & 0o077 == 0
        assert tempfile.gettempdir() == os.environ["GRADIO_TEMP_DIR"] == str(folder)
        settings = {name: value for name, value in os.environ.items() if name.startswith("GRADIO_")}
        assert settings == {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),  # noqa: S104
        ("::", False),
        ("192.168.0.7", False),
        ("127.0.0.1.example.com", False),
        ("", False),
    ],
)
def test_other_addresses_need_accounts(host: str, alone: bool) -> None:
    assert is_loopback(host) == alone
    check_address(host, [("ann", "secret")])
    if alone:
        check_address(host, [])
    else:
        with pytest.raises(UserError, match="--auth"):
            check_address(host, [])


def test_accounts_are_read_from_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "accounts"
    path.write_text("ann:a:b\n\nnobody\nempty:\nbob:c\n")
    path.chmod(0o600)
    assert read_accounts(path) == [("ann", "a:b"), ("bob", "c")]
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        read_accounts(path)
    path.chmod(0o600)
    path.write_text("nobody\n")
    with pytest.raises(UserError, match="no line"):
        read_accounts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_accounts(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--auth FILE"),  # noqa: S104
        (["--models", "/no/such/run"], "/no/such/run"),
        (["--folders", "/no/such/folder"], "no such folder"),
    ],
)
def test_a_wrong_start_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert str(ended.value).startswith("error: ")
    assert said in str(ended.value)
    assert "\n" not in str(ended.value)
