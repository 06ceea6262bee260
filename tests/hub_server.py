"""A loopback server with the part of the hub's API that push and pull use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_loopback"


class Repository:
    """A model repository; `commits` holds a hash and the files of each."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"})

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the last commit."""
        return self.commits[-1][1]

    def commit(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode())
        self.commits.append((digest.hexdigest(), files))
        return digest.hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = {"main": self.commits[-1]} | {sha: (sha, files) for sha, files in self.commits}
        return commits.get(revision)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requested.append(f"{self.command} {path}")
        if path == "/":
            return self.send(200)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name, revision = (api[1], api[3]) if api else (file[1], file[2]) if file else ("", "")
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.is_authorised):
            return self.send(404, X_Error_Code="RepoNotFound")
        commit = repository.at(revision or "main")
        if commit is None:
            return self.send(404, X_Error_Code="RevisionNotFound")
        sha, files = commit
        if file is not None:
            content = files[file[3]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.send(200, content, X_Repo_Commit=sha, ETag=etag)
        assert api is not None
        if api[2] == "tree":
            blobs = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            return self.send_json(blobs)
        siblings = [{"rfilename": path} for path in files]
        about = {"id": name, "sha": sha, "private": repository.private, "siblings": siblings}
        return self.send_json(about)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.body()
        path = urllib.parse.unquote(self.path)
        self.server.requested.append(f"POST {path}")
        if not self.is_authorised:
            return self.send(401)
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            status = 409 if name in self.server.repositories else 200
            private = request.get("visibility") == "private" or bool(request.get("private"))
            self.server.repositories.setdefault(name, Repository(private))
            return self.send_json({"url": f"{self.server.url}/{name}"}, status)
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                each | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.send_json({"objects": objects})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        assert match is not None, path
        if match[2] == "preupload":
            modes = {True: "lfs", False: "regular"}
            return self.send_json({"files": [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": modes[file["path"].endswith(".safetensors")]}
                for file in json.loads(body)["files"]
            ]})  # fmt: skip
        repository = self.server.repositories[match[1]]
        files = dict(repository.files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files)
        url = f"{self.server.url}/{match[1]}/commit/{sha}"
        return self.send_json({"commitUrl": url, "commitOid": sha})

    def do_PUT(self) -> None:
        content = self.body()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.send(200)

    @property
    def is_authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []  # chunked
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send_json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class Hub(ThreadingHTTPServer):
    """Attributes: `repositories` by name; `requested`, every request so far as `GET /path`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requested: list[str] = []


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub that runs during the block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
