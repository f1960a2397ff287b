"""Downloads from a small server on the loopback that speaks the hub's endpoints, and misbehaves."""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, logging
from safetensors.torch import load

from engine.checkpoint.hub import resolve
from engine.checkpoint.tensors import Checkpoint
from engine.errors import CheckpointError
from tests.asking import Ask

NAME = "some-org/some-llava"
COMMIT = "c" * 40
SHARD = "model.safetensors"


class Hub(ThreadingHTTPServer):
    """The hub's model API over some files; what it does wrong is in its attributes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.sent_instead: dict[str, bytes] = {}
        self.stalls: set[str] = set()  # files of which half is sent, and then nothing
        self.over = Event()
        self.breaks: dict[str, int] = {}  # how many more times a file's connection breaks
        self.refusal: tuple[int, str] | None = None
        self.asked: list[tuple[str, str]] = []  # (file, Range)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        pass  # a client that left

    def listing(self, kind: str) -> Any:
        rows = []
        for name, data in self.files.items():
            row: dict[str, Any] = {"size": len(data), "type": "file", "path": name}
            row |= {"rfilename": name, "oid": git_hash(data), "blobId": git_hash(data)}
            if name.endswith((".safetensors", ".bin")):
                digest = hashlib.sha256(data).hexdigest()
                row["lfs"] = {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 9}
            rows.append(row)
        return rows if kind == "tree" else {"id": NAME, "sha": COMMIT, "siblings": rows}


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request to a ``Hub``."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/api/models/"):
            self.api(path)
        else:
            self.file(path.rsplit("/", 1)[1])

    def api(self, path: str) -> None:
        if self.server.refusal:
            status, code = self.server.refusal
            self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})
            return
        kind = "tree" if "/tree/" in path else "info"
        body = json.dumps(self.server.listing(kind)).encode()
        self.answer(200, body, {"Content-Type": "application/json"})

    def file(self, name: str) -> None:
        data = self.server.files[name]
        large = name.endswith((".safetensors", ".bin"))
        etag = hashlib.sha256(data).hexdigest() if large else git_hash(data)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if self.command == "GET":
            self.server.asked.append((name, self.headers.get("Range", "")))
        body = self.server.sent_instead.get(name, data)
        status, start = 200, 0
        if asked := self.headers.get("Range"):
            status, start = 206, int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        broken = self.command == "GET" and self.server.breaks.get(name, 0) > 0
        if broken:
            self.server.breaks[name] -= 1
        stalled = self.command == "GET" and name in self.server.stalls
        self.answer(status, body[start:], headers, broken or stalled)
        if stalled:
            self.server.over.wait(30)

    def answer(
        self, status: int, body: bytes, headers: dict[str, str], broken: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if broken else body)
        self.close_connection = self.close_connection or broken


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client library talks to, and an empty cache."""
    server = Hub()
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "DOWNLOAD_CHUNK_SIZE": 1 << 16,
    }.items():
        monkeypatch.setattr(constants, name, value)
    logging.set_verbosity_error()
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its attempts
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


@pytest.fixture
def files(hub: Hub, checkpoint: Callable[..., Path]) -> dict[str, bytes]:
    """A whole model on the hub, and beside it what must never be fetched."""
    for path in checkpoint().iterdir():
        hub.files[path.name] = path.read_bytes()
    hub.files |= {"pytorch_model.bin": b"pickle", "README.md": b"read me", "run.py": b"evil"}
    return hub.files


def test_a_model_is_downloaded_said_first_and_then_found_without_network(
    hub: Hub, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = resolve(NAME)
    read = {name for name in files if not name.endswith((".bin", ".md", ".py"))}
    assert {path.name for path in folder.iterdir()} == read
    assert {name for name, _ in hub.asked} == read
    assert all((folder / name).read_bytes() == files[name] for name in read)
    size = sum(len(files[name]) for name in read) / 1e6
    said = capsys.readouterr().err
    assert f"downloading {NAME}: {len(read)} files, {size:,.1f} MB, to " in said
    with Checkpoint.open(folder) as opened:
        assert opened.tensors
    hub.refusal = (500, "Down")
    asked = len(hub.asked)
    assert resolve(NAME) == resolve(NAME, offline=True) == folder
    assert resolve(NAME, revision=COMMIT) == folder
    assert len(hub.asked) == asked


def test_a_connection_that_breaks_is_taken_up_where_it_was(
    hub: Hub, files: dict[str, bytes]
) -> None:
    hub.breaks[SHARD] = 2
    folder = resolve(NAME)
    assert (folder / SHARD).read_bytes() == files[SHARD]
    ranges = [asked for name, asked in hub.asked if name == SHARD]
    assert ranges[0] == ""
    assert len(ranges) == 3
    starts = [int(asked.removeprefix("bytes=").split("-")[0]) for asked in ranges[1:]]
    assert 0 < starts[0] < starts[1] < len(files[SHARD])


def test_a_connection_that_stays_broken_is_explained_and_can_be_resumed(
    hub: Hub, files: dict[str, bytes]
) -> None:
    hub.breaks[SHARD] = 1000
    with pytest.raises(CheckpointError) as caught:
        resolve(NAME)
    assert "could not be downloaded" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "same command again" in caught.value.hint
    with pytest.raises(CheckpointError, match=r"is (not|only partly) in the hub cache|is not a"):
        resolve(NAME, offline=True)
    hub.breaks[SHARD] = 0
    kept = [name for name, _ in hub.asked if name == "config.json"]
    folder = resolve(NAME)
    assert (folder / SHARD).read_bytes() == files[SHARD]
    assert [name for name, _ in hub.asked if name == "config.json"] == kept  # not fetched again


def test_a_file_with_the_wrong_hash_is_refused_and_not_kept(
    hub: Hub, files: dict[str, bytes]
) -> None:
    flipped = bytearray(files[SHARD])
    flipped[-1] ^= 1
    hub.sent_instead[SHARD] = bytes(flipped)
    with pytest.raises(CheckpointError, match=rf"{SHARD} arrived damaged: the checksum"):
        resolve(NAME)
    cache = Path(constants.HF_HUB_CACHE)
    assert not any(
        path.is_file() and path.read_bytes() == bytes(flipped) for path in cache.rglob("*")
    )
    hub.sent_instead.clear()
    assert (resolve(NAME) / SHARD).read_bytes() == files[SHARD]


@pytest.mark.parametrize(
    ("status", "code", "message", "hint"),
    [
        (403, "GatedRepo", "is gated", "HF_TOKEN"),
        (404, "RepoNotFound", "no such model", "spelling"),
        (404, "RevisionNotFound", "has no revision v9", "branch"),
    ],
)
def test_a_refusal_says_what_to_do(
    hub: Hub, status: int, code: str, message: str, hint: str
) -> None:
    hub.refusal = (status, code)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(NAME, revision="v9")
    assert NAME in str(caught.value)
    assert hint in caught.value.hint


def test_a_connection_that_stalls_is_given_up(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 5)
    hub.stalls.add(SHARD)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="could not be downloaded") as caught:
        resolve(NAME)
    assert time.monotonic() - began < 20
    assert "same command again" in caught.value.hint
    hub.stalls.clear()
    assert (resolve(NAME) / SHARD).read_bytes() == files[SHARD]


def test_a_hub_out_of_reach_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError, match="the connection to the hub failed") as caught:
        resolve(NAME)
    assert "\n" not in str(caught.value)


def test_too_little_space_is_said_before_anything_is_fetched(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB, and .* has 0\.0 GB free") as caught:
        resolve(NAME)
    assert "HF_HUB_CACHE" in caught.value.hint
    assert not hub.asked


def test_a_disk_that_fills_up_meanwhile_is_named(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(CheckpointError, match=r"the disk of .* is full"):
        resolve(NAME)


def spoil_hash(hub: Hub, _: pytest.MonkeyPatch) -> None:
    hub.sent_instead[SHARD] = hub.files[SHARD][:-1] + b"\0"


def fill_disk(_: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def break_always(hub: Hub, _: pytest.MonkeyPatch) -> None:
    hub.breaks[SHARD] = 1000


def refuse_with(status: int, code: str) -> Callable[[Hub, pytest.MonkeyPatch], None]:
    return lambda hub, _: setattr(hub, "refusal", (status, code))


TROUBLE: dict[str, tuple[Callable[[Hub, pytest.MonkeyPatch], None], str, str]] = {
    "gated": (refuse_with(403, "GatedRepo"), "is gated", "HF_TOKEN"),
    "missing": (refuse_with(404, "RepoNotFound"), "no such model", "spelling"),
    "down": (refuse_with(500, "Down"), "could not be downloaded", "same command again"),
    "wrong hash": (spoil_hash, "arrived damaged", "same command again"),
    "disk full": (fill_disk, "GB free", "HF_HUB_CACHE"),
    "broken": (break_always, "could not be downloaded", "same command again"),
    "pickles only": (lambda hub, _: hub.files.pop(SHARD), "no .safetensors", "--convert"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_the_command_line_says_it_in_one_line(
    name: str, hub: Hub, files: dict[str, bytes], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause, words, hint = TROUBLE[name]
    cause(hub, monkeypatch)
    asked = ask("--model", NAME, "-p", "Hello", "--quiet")
    assert asked.code == 4
    assert len(asked.errors) == len(asked.hints) == 1, asked.err
    assert NAME in asked.errors[0] or name == "wrong hash"
    assert words in asked.errors[0]
    assert hint in asked.hints[0]
    assert not asked.out
    assert "Traceback" not in asked.err


def test_check_names_the_file_whose_content_is_not_the_hubs(
    hub: Hub, files: dict[str, bytes], ask: Ask
) -> None:
    blob = (resolve(NAME) / SHARD).resolve()
    assert ask("--check", "--model", NAME, "--offline").code == 0
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    asked = ask("--check", "--model", NAME, "--offline", "--json")
    checks = {each["name"]: each for each in json.loads(asked.out)["checks"]}
    assert asked.code == 4
    assert not checks["hashes"]["ok"]
    assert SHARD in checks["hashes"]["text"]


def test_a_conversion_downloads_its_source_as_models_are(
    hub: Hub, files: dict[str, bytes], ask: Ask, tmp_path: Path
) -> None:
    """Said first, only the files that are read, checked, and not twice."""
    tensors = load(files.pop(SHARD))
    stream = io.BytesIO()
    torch.save(tensors, stream)
    files["pytorch_model.bin"] = stream.getvalue()
    files["training_args.bin"] = b"pickle"
    target = tmp_path / "out"
    for _ in range(2):
        asked = ask("--model", NAME, "--convert", target)
        assert asked.code == 0, asked.err
    assert asked.out == f"{target}\n"
    fetched = [name for name, _ in hub.asked]
    assert len(fetched) == len(set(fetched))
    assert not {"training_args.bin", "README.md", "run.py"} & set(fetched)
    assert ask("--model", target, "-p", "Hello", "-n", "2", "--device", "cpu").code == 0
    hub.sent_instead["pytorch_model.bin"] = stream.getvalue()[:-1] + b"\1"
    shutil.rmtree(constants.HF_HUB_CACHE)
    asked = ask("--model", NAME, "--convert", tmp_path / "other", "--quiet")
    assert asked.code == 4
    assert "pytorch_model.bin arrived damaged" in asked.errors[0]
    assert not (tmp_path / "other").exists()


def test_the_command_line_downloads_by_name(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    """A process of its own, told of the hub by HF_ENDPOINT alone."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = keep | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "main.py", "--model", NAME, "-p", "Hello", "-n", "3", "--device", "cpu"],
        cwd=Path(__file__).parents[1],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"\n")
    assert f"downloading {NAME}".encode() in done.stderr
    assert not any(name.endswith(".bin") for name, _ in hub.asked)
