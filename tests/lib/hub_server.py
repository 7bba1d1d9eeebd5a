"""A hub in miniature on the loopback: repositories are folders, each with one commit.

It speaks just what huggingface_hub asks when it lists, fetches and uploads, and keeps a log.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ERRORS = {"gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound")}


@dataclass
class Hub:
    """repos: name -> folder. log: (method, path, Range header, bytes sent). uploads: repo -> file -> bytes.

    drop: file name whose first so many bytes are sent before the line goes dead, once.
    """

    repos: dict[str, Path]
    log: list[tuple[str, str, str, int]] = field(default_factory=list)
    uploads: dict[str, dict[str, bytes]] = field(default_factory=dict)
    drop: dict[str, int] = field(default_factory=dict)
    endpoint: str = ""
    token: str = "hf_thisIsASecretToken"

    def sent(self, name: str) -> int:
        """Bytes of a file that were sent."""
        return sum(size for method, path, _, size in self.log if method == "GET" and path.endswith(name))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlparse(self.path).path
        if path == "/api/repos/create":
            name = json.loads(body)["name"]
            if name == "broken":
                return self.error(500, "")
            repo = f"{json.loads(body).get('organization') or 'me'}/{name}"
            self.hub.uploads.setdefault(repo, {})
            self.json({"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo})
        elif path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(body)["files"]]  # fmt: skip
            self.json({"files": files})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    value = line["value"]
                    self.hub.uploads[match[1]][value["path"]] = base64.b64decode(value["content"])
            self.json({"commitUrl": f"{self.hub.endpoint}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.json({"errors": [], "warnings": []})
        return None

    def answer(self) -> None:
        path = urlparse(self.path).path
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self.api(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(match[1], match[3])
        elif path == "/api/whoami-v2" and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.error(401, "")
        else:
            self.json({})

    def api(self, repo: str, what: str | None, revision: str | None) -> None:
        if repo.split("/", maxsplit=1)[0] in ERRORS:
            return self.error(*ERRORS[repo.split("/", maxsplit=1)[0]])
        if repo not in self.hub.repos and repo not in self.hub.uploads:
            return self.error(404, "RepoNotFound")
        if revision not in (None, "main", "v1", COMMIT):
            return self.error(404, "RevisionNotFound")
        folder = self.hub.repos.get(repo)
        files = sorted(path for path in folder.iterdir() if path.is_file()) if folder else []
        if what == "tree":
            entries = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": etag(path)}
                       for path in files]  # fmt: skip
            return self.json(entries)
        siblings = [{"rfilename": path.name} for path in files]
        return self.json({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def resolve(self, repo: str, name: str) -> None:
        folder = self.hub.repos.get(repo)
        if folder is None or not (folder / name).is_file():
            return self.error(404, "EntryNotFound")
        content = (folder / name).read_bytes()
        wanted = self.headers.get("Range", "")
        status, headers = 200, {"ETag": f'"{etag(folder / name)}"', "X-Repo-Commit": COMMIT}
        total = len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted):
            start, end = int(match[1]), min(int(match[2] or total - 1), total - 1)
            content = content[start : end + 1]
            status, headers["Content-Range"] = 206, f"bytes {start}-{end}/{total}"
        self.send(
            status, content, headers, wanted, self.hub.drop.pop(name, None) if self.command == "GET" else None
        )
        return None

    def json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def send(
        self, status: int, content: bytes, headers: dict[str, str], wanted: str = "", cut: int | None = None
    ) -> None:
        body = b"" if self.command == "HEAD" else content[:cut]
        self.hub.log.append((self.command, urlparse(self.path).path, wanted, len(body)))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(body)
        if cut is not None:
            self.close_connection = True


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


def serve(repos: dict[str, Path]) -> tuple[Hub, ThreadingHTTPServer]:
    """A running hub; the caller shuts the server down."""
    hub = Hub(repos)
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return hub, server
