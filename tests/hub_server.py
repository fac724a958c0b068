"""A dataset with the layout of C4, and a hub on this machine that serves folders as datasets and tokenizers.

The hub has the addresses of the real one. It can break a transfer in the middle, and it can go away.
"""

import gzip
import hashlib
import json
import os
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
# Not text for training
"""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def texts_of(split: str, number: int, count: int) -> list[str]:
    chance = random.Random(f"{split}/{number}")
    words = ["".join(chance.choices(LETTERS, k=chance.randrange(2, 9))) for _ in range(2000)]
    return [
        f"{split} {number} {row}: {' '.join(chance.choices(words, k=chance.randrange(1, 60)))}" for row in range(count)
    ]


def like_c4(folder: Path, rows: int = 400) -> dict[str, list[str]]:
    """Write a dataset with the layout of C4. Return the texts of its splits."""
    (folder / "en").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    for split, files in (("train", 3), ("validation", 1)):
        for number in range(files):
            own = texts_of(split, number, rows)
            texts[split] += own
            records = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for text in own]
            name = f"c4-{split}.{number:05}-of-{files:05}.json.gz"
            with gzip.open(folder / "en" / name, "wt") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
    return texts


def with_hub(tmp_path: Path, address: str) -> dict[str, str]:
    """The environment with a hub at this address, and an empty cache."""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    return {**os.environ, **own}


REVISION = "1234567890abcdef1234567890abcdef12345678"


class Hub:
    """Serves each folder of `root`, OWNER/NAME, as a repository."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.breaks: list[int] = []
        """For each of the next transfers of data files, the bytes after which the connection breaks; 0 for none."""
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    hub = Hub(root)
    try:
        yield hub
    finally:
        hub.stop()


class _Handler(BaseHTTPRequestHandler):
    owner: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *values: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body)

    def _answer(self, body: bytes = b"") -> None:
        parsed = urlparse(self.path)
        path = unquote(parsed.path)
        self.owner.requests.append(f"{self.command} {path}")
        if path in ("", "/"):
            self._send(b"")
            return
        found = re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(/.*)?", path)
        if found:
            self._api(found[1], found[2], found[3] or "", parse_qs(body.decode() if body else parsed.query), body)
            return
        found = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found:
            self._file(self.owner.root / found[2] / found[4])
            return
        self._missing()

    def _api(self, kind: str, name: str, rest: str, query: dict[str, list[str]], body: bytes) -> None:
        folder = self.owner.root / name
        if not folder.is_dir():
            self._missing("RepoNotFound")
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        entries = [self._entry(folder, path) for path in files]
        if rest in ("", "/") or re.fullmatch(r"/revision/[^/]+", rest):
            siblings = [{"rfilename": entry["path"]} for entry in entries]
            info = {"id": name, "sha": REVISION, "siblings": siblings, "private": False, "gated": False, "tags": []}
            self._json({**info, "downloads": 0, "likes": 0, "disabled": False, "lastModified": "2026-01-01T00:00:00Z"})
            return
        tree = re.fullmatch(r"/tree/[^/]+/?(.*)", rest)
        if tree:
            below = tree[1].rstrip("/")
            chosen = [entry for entry in entries if not below or entry["path"].startswith(f"{below}/")]
            if query.get("recursive", ["false"])[0].lower() != "true":
                start = len(below) + 1 if below else 0
                folders = {
                    entry["path"][:start] + entry["path"][start:].split("/")[0]
                    for entry in chosen
                    if "/" in entry["path"][start:]
                }
                chosen = [entry for entry in chosen if "/" not in entry["path"][start:]]
                chosen += [{"type": "directory", "path": path, "oid": "0", "size": 0} for path in sorted(folders)]
            self._json(chosen)
            return
        if rest.startswith("/paths-info/"):
            paths = query.get("paths") or json.loads(body)["paths"]
            folders = {str(parent) for entry in entries for parent in Path(entry["path"]).parents}
            chosen = [entry for entry in entries if entry["path"] in paths]
            chosen += [{"type": "directory", "path": path, "oid": "0", "size": 0} for path in paths if path in folders]
            self._json(chosen)
            return
        self._missing()

    def _entry(self, folder: Path, path: Path) -> dict[str, Any]:
        digest = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": digest}

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._missing("EntryNotFound")
            return
        content = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(found[1]), int(found[2] or len(content) - 1)) if found else (0, len(content) - 1)
        part = content[first : last + 1]
        is_data = self.command == "GET" and not path.name.endswith((".md", ".json"))
        limit = self.owner.breaks.pop(0) if is_data and self.owner.breaks else 0
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        if found:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part[:limit] if limit else part)
        if limit:
            self.close_connection = True

    def _json(self, values: Any) -> None:
        self._send(json.dumps(values).encode(), "application/json")

    def _send(self, content: bytes, kind: str = "text/plain") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, code: str = "") -> None:
        self.send_response(404)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
