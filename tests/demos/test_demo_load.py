"""The app under load and attack: many visitors at once, and what a bad one may send. ``MM_LOAD_SECONDS`` sets for how long."""

import io
import json
import os
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from demo_server import APP, CANARY, Server, Start
from gradio_client import Client, handle_file
from ui.safety import MAX_WRONG

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("MM_LOAD_SECONDS", "120"))
CLIENTS = 16
PATIENCE = 300
"""Seconds that a client waits for a part of an answer, on machines that others use, too."""
BURST = 40
ROUTES = ("/gradio_api/file=", "/file=", "/file/", "/static/", "/assets/", "/svelte/", "/gradio_api/file/", "/")
"""Ways to ask for a file."""

GROWTH_BYTES = 400 << 20
"""More memory than after a few requests of each kind that the app may come to hold."""


def _png(width: int, height: int) -> bytes:
    """A PNG whose header promises that many pixels, and whose data is a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def picture(cache: Path, server: Server) -> str:
    return str(next(cache.glob("demo-*/tiger face.png")))


def _client(server: Server) -> Client:
    return Client(server.url, verbose=False, httpx_kwargs={"timeout": PATIENCE})


@pytest.fixture
def client(server: Server) -> Client:
    return _client(server)


def _requests(client: Client, picture: str) -> list[tuple[str, Any]]:
    """A request of each kind, with a check of its answer."""

    def classify() -> bool:
        return (
            client.predict("emoji-clip", handle_file(picture), "tiger face, pear", api_name="/classify")["label"]
            == "tiger face"
        )

    def search() -> bool:
        found, said = client.predict("emoji-clip", "emoji", 3, "pear", api_name="/search_by_text")
        return len(found) == 3 and "The best 3" in said

    def describe() -> bool:
        return client.predict("emoji-captioner", "en", handle_file(picture), api_name="/describe") == "tiger face"

    def create() -> bool:
        return client.predict(["emoji-flow"], "red heart", 0, 3, 1, api_name="/create")[1] is not None

    def hear() -> bool:
        spoken = handle_file(str(APP.parent / "spoken" / "wine glass.mp3"))
        return len(client.predict("emoji-audio", "emoji", 3, spoken, api_name="/search_by_audio")[0]) == 3

    return [(handler.__name__, handler) for handler in (classify, search, describe, create, hear)]


def test_many_visitors_are_all_answered_within_bounded_memory(server: Server, picture: str) -> None:
    for _, request in _requests(_client(server), picture):
        assert request()
    before = server.resident()
    until = time.monotonic() + SECONDS
    peak = before

    def visit(number: int) -> Counter[str]:
        seen: Counter[str] = Counter()
        requests = _requests(_client(server), picture)
        turn = number
        while time.monotonic() < until:
            name, request = requests[turn % len(requests)]
            turn += 1
            try:
                seen[f"{name} {'right' if request() else 'wrong'}"] += 1
            except Exception as error:
                seen[f"{name} {type(error).__name__}: {error}"] += 1
        return seen

    with ThreadPoolExecutor(CLIENTS) as pool:
        visits = [pool.submit(visit, number) for number in range(CLIENTS)]
        while not all(one.done() for one in visits):
            peak = max(peak, server.resident())
            time.sleep(0.2)
    seen = sum((one.result() for one in visits), Counter())
    print(f"\n{sum(seen.values())} requests of {CLIENTS} clients in {SECONDS:.0f} s: {dict(seen)}")
    print(f"memory {before >> 20} MiB before, {peak >> 20} MiB at most; started in {server.seconds:.1f} s")
    assert all(what.endswith(" right") for what in seen), seen
    assert sum(seen.values()) >= CLIENTS
    assert peak - before < GROWTH_BYTES


def test_a_full_queue_is_told_and_recovers(server: Server, client: Client) -> None:
    """Each of a burst is either answered or told that the queue is full; then all is as before."""
    answers: Counter[int] = Counter()
    joined = threading.Barrier(BURST)
    words: set[str] = set()

    def join(number: int) -> None:
        given = {"data": [["emoji-flow"], "red heart", number, 3, 1]}
        joined.wait()
        got = httpx.post(f"{server.url}/gradio_api/call/create", json=given, timeout=PATIENCE)
        answers[got.status_code] += 1
        if got.status_code == httpx.codes.OK:
            _drain(server, got.json()["event_id"])
        else:
            words.add(got.json()["detail"])

    with ThreadPoolExecutor(BURST) as pool:
        list(pool.map(join, range(BURST)))
    print(f"\nburst of {BURST}: {dict(answers)}")
    assert answers.keys() == {200, 503}
    assert answers[200] >= 16
    assert all("Queue is full" in said for said in words)
    assert client.predict(["emoji-flow"], "pear", 0, 3, 1, api_name="/create")


def _drain(server: Server, event: str) -> None:
    with httpx.stream("GET", f"{server.url}/gradio_api/call/create/{event}", timeout=PATIENCE) as answer:
        *_, last = (line for line in answer.iter_lines() if line.startswith("event:"))
        assert last == "event: complete"


def _error(server: Server, api: str, data: list[Any]) -> str:
    """What an endpoint says to what it cannot use: at once, or as its answer."""
    got = httpx.post(f"{server.url}/gradio_api/call/{api}", json={"data": data}, timeout=PATIENCE)
    if got.status_code != httpx.codes.OK:
        return f"{got.status_code} {got.json()['detail']}"
    answer = httpx.get(f"{server.url}/gradio_api/call/{api}/{got.json()['event_id']}", timeout=PATIENCE).text
    assert "event: error" in answer, answer
    return str(json.loads(answer.partition("data: ")[2].partition("\n")[0])["error"])


def _upload(server: Server, name: str, data: bytes) -> httpx.Response:
    return httpx.post(f"{server.url}/gradio_api/upload", files={"files": (name, data)}, timeout=PATIENCE)


@pytest.fixture(autouse=True)
def alive(server: Server, picture: str) -> Iterator[None]:
    """Afterwards the app answers, and the canary has not been seen."""
    yield
    assert _requests(_client(server), picture)[0][1]()
    assert server.canary.read_text() == CANARY
    assert CANARY not in server.log.read_text()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("bomb.png", _png(50_000, 50_000), "too many pixels"),
        ("wide.png", _png(2_000_000_000, 1), "too many pixels"),
        ("page.jpg", b"<!doctype html><script>alert(1)</script>", "unknown format"),
        ("drawing.jpg", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "unknown format"),
        ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unknown format"),
        ("cut.png", _png(64, 64)[:60], "undecodable"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pictures_that_are_none_are_refused_in_words(server: Server, name: str, data: bytes, said: str) -> None:
    before = server.resident()
    uploaded = _upload(server, name, data).json()[0]
    given = {"path": uploaded, "meta": {"_type": "gradio.FileData"}}
    told = _error(server, "classify", ["emoji-clip", given, "a, b"])
    assert told.startswith(f"This picture cannot be used: {said}")
    assert server.resident() - before < 100 << 20
    served = httpx.get(f"{server.url}/gradio_api/file={uploaded}", timeout=PATIENCE)
    assert served.headers["content-type"] in ("application/octet-stream", "image/png", "image/jpeg"), "never shown as a page"
    assert served.headers["x-content-type-options"] == "nosniff"


def _silence(seconds: int) -> bytes:
    """A FLAC file of a few bytes a second."""
    file, rate = io.BytesIO(), 16_000
    with soundfile.SoundFile(file, "w", rate, 1, format="FLAC") as writing:
        for _ in range(seconds // 60):
            writing.write(np.zeros(60 * rate, np.int16))
    return file.getvalue()


def _claiming(seconds: int) -> bytes:
    """A WAV file whose header promises so much, and whose data is a second."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(16_000, np.int16), 16_000, format="WAV")
    whole, claimed = bytearray(file.getvalue()), seconds * 32_000
    whole[4:8], whole[40:44] = struct.pack("<I", claimed + 36), struct.pack("<I", claimed)
    return bytes(whole)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("hours.flac", lambda: _silence(7200), "too long"),
        ("hours.wav", lambda: _claiming(7200), "truncated"),
        ("cut.flac", lambda: _silence(60)[:500], "undecodable"),
        ("page.wav", lambda: b"<!doctype html><script>alert(1)</script>", "unknown format"),
        ("picture.mp3", lambda: _png(8, 8), "unknown format"),
    ],
)
def test_recordings_that_are_none_are_refused_in_words(server: Server, name: str, make: Callable[[], bytes], said: str) -> None:
    before = server.resident()
    given = {"path": _upload(server, name, make()).json()[0], "meta": {"_type": "gradio.FileData"}}
    told = _error(server, "search_by_audio", ["emoji-audio", "emoji", 3, given])
    assert told.startswith(f"This recording cannot be used: {said}")
    assert server.resident() - before < 100 << 20


def test_uploads_and_texts_have_a_size(server: Server) -> None:
    big = _upload(server, "big.png", bytes(11 << 20))
    assert big.status_code == 413
    assert "larger than 10 MB" in big.text
    assert "larger than 1 MB" in _error(server, "create", [["emoji-flow"], "a" * (10 << 20), 0, 3, 1])
    assert "900,000 letters are too many" in _error(server, "create", [["emoji-flow"], "a" * 900_000, 0, 3, 1])


@pytest.mark.parametrize(
    "name", ["../../canary.txt", "..%2f..%2fcanary.txt", "/etc/cron.d/x", "a/../../../canary.txt", "\\..\\canary.txt"]
)
def test_names_of_uploads_lead_nowhere(server: Server, name: str) -> None:
    got = _upload(server, name, b"overwritten")
    if got.status_code == httpx.codes.OK:
        place = Path(got.json()[0]).resolve()
        assert place.is_relative_to(next(server.canary.parent.glob("mm-demo-*")).resolve())
    assert server.canary.read_text() == CANARY


def test_the_canary_is_never_served(server: Server) -> None:
    files = next(server.canary.parent.glob("mm-demo-*/files"))
    names = [str(server.canary), f"{files}/../../canary.txt", "../../canary.txt", "canary.txt", f"file://{server.canary}"]
    for name in names:
        encoded = name.replace("/", "%2f").replace(".", "%2e")
        for path in (name, encoded, encoded.replace("%", "%25")):
            for route in ROUTES:
                got = httpx.get(httpx.URL(server.url + "/").copy_with(raw_path=(route + path).encode()), timeout=PATIENCE)
                assert CANARY not in got.text, (route, path)
                assert got.status_code >= 400, (route, path)
        given = {"path": name, "meta": {"_type": "gradio.FileData"}}
        assert _error(server, "classify", ["emoji-clip", given, "a, b"])[:3] in ("400", "403")


def test_models_and_folders_are_not_named_by_paths(server: Server, picture: str) -> None:
    folder = str(server.canary.parent)
    assert "emoji" in _error(server, "search_by_text", ["emoji-clip", folder, 3, "pear"])
    assert "not in the list" in _error(server, "search_by_text", [folder, "emoji", 3, "pear"])


def test_nobody_passes_the_queue(server: Server) -> None:
    """What computes is answered by the queue alone; only examples are filled in directly."""
    known = httpx.get(f"{server.url}/config", timeout=PATIENCE).json()["dependencies"]
    computing = [one["id"] for one in known if one["api_visibility"] == "public"]
    assert len(computing) == 9
    for number in computing:
        given = {"fn_index": number, "data": [], "session_hash": "x"}
        assert httpx.post(f"{server.url}/gradio_api/run/predict", json=given, timeout=PATIENCE).status_code == 404


def test_endpoints_are_named_and_described(server: Server) -> None:
    named = httpx.get(f"{server.url}/gradio_api/info", timeout=PATIENCE).json()["named_endpoints"]
    search = {"/search_by_text", "/search_by_image", "/search_by_audio"}
    known = search | {"/classify", "/describe", "/ask", "/locate", "/create", "/compare"}
    assert named.keys() == known
    assert all(endpoint["description"] for endpoint in named.values())


def test_accounts_are_asked_for(start: Start, tmp_path: Path) -> None:
    (tmp_path / "accounts").write_text("ann:secret\n")
    (tmp_path / "accounts").chmod(0o600)
    guarded = start("--auth", str(tmp_path / "accounts"))
    for path in ("/config", "/gradio_api/info"):
        assert httpx.get(guarded.url + path, timeout=PATIENCE).status_code == 401
    assert httpx.post(f"{guarded.url}/gradio_api/call/classify", json={"data": []}, timeout=PATIENCE).status_code == 401
    assert _upload(guarded, "a.png", b"x").status_code == 401
    assert Client(guarded.url, auth=("ann", "secret"), verbose=False, httpx_kwargs={"timeout": PATIENCE}).view_api(
        return_format="dict"
    )
    given = {"username": "ann", "password": "wrong"}
    told = [httpx.post(f"{guarded.url}/login", data=given, timeout=PATIENCE) for _ in range(MAX_WRONG + 1)]
    assert [one.status_code for one in told] == [400] * MAX_WRONG + [429]
    assert "try again in" in told[-1].json()["detail"]
