"""A stand-in for the Hugging Face hub on 127.0.0.1: one repository, or one status for everything."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMIT = "a" * 40


@contextmanager
def fake_hub(status: int = 200, folder: Path | None = None, cut: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield (address, paths asked for). `folder` is served as every repository; file `cut` breaks off half-way."""
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            if status != 200 or folder is None:
                return self.send(b"", {"X-Error-Code": "GatedRepo"} if status == 403 else {})
            if "/resolve/" in self.path:
                revision, name = self.path.split("/resolve/")[-1].split("/", 1)
                return self.send_file(folder / name, COMMIT if revision == "main" else revision)
            files = [{"rfilename": f.name} for f in sorted(folder.iterdir())]
            tree = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": digest(f)} for f in folder.iterdir()
            ]
            asked_for = re.search(r"/revision/([0-9a-f]{40})", self.path)
            about = {
                "id": "x/y",
                "sha": asked_for[1] if asked_for else COMMIT,
                "siblings": files,
                "private": False,
                "downloads": 0,
                "tags": [],
            }
            self.send(json.dumps(tree if "/tree/" in self.path else about).encode(), {})

        do_HEAD = do_GET

        def send_file(self, file: Path, commit: str) -> None:
            body = file.read_bytes()
            self.send(body, {"ETag": f'"{digest(file)}"', "X-Repo-Commit": commit}, file.name == cut)

        def send(self, body: bytes, headers: dict[str, str], broken: bool = False) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if broken else body)
            if broken and self.command == "GET":
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
