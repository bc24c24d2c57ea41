"""A small Hub on this machine that the real huggingface_hub client accepts: model info, files, gates, revisions, uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "1" * 40


def large(name: str, body: bytes, key: str = "sha256") -> dict[str, dict]:
    """What the Hub says of a file that it keeps as a large one."""
    return {"lfs": {key: hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}} if name.endswith(".safetensors") else {}


class HubServer(ThreadingHTTPServer):
    """Serves `repos`: id → {file name: bytes}. Weights are large files, with a SHA-256.

    Of ids in `gated` the files need a token, but not what is said of them; those in `private` are not there for who has none;
    those in `forbidden` no token opens. Of tokens only those in `tokens` are known, or all where that is None. `asked` lists
    the files that were fetched, `sent` the bytes of each; `requests` counts all that was asked. Of files in `wrong` another byte
    is sent than their SHA-256 is of, of files in `short` the last byte is missing. After each number of bytes in `cuts` a
    connection is cut, `pause` makes weights come slowly, in seconds for each 64 kB. A `silent` server takes questions and answers none.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]], gated: set[str] = frozenset(), wrong: set[str] = frozenset(), cuts: list[int] | None = None, pause: float = 0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.gated, self.wrong, self.cuts, self.pause = repos, gated, wrong, cuts or [], pause
        self.private, self.forbidden, self.tokens, self.short, self.silent = set(), set(), None, set(), False
        self.asked, self.sent, self.requests = [], {}, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def parse_request(self):
        if not self.server.silent:
            return super().parse_request()
        while self.server.silent:
            time.sleep(0.1)
        self.close_connection = True
        return False

    @property
    def token(self) -> str:
        """What was given, known or not."""
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.requests += 1
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if (files := self.find(match[1], match[2])) is not None:
                siblings = [{"rfilename": n, "size": len(b), **large(n, b)} for n, b in files.items()]
                self.answer(json.dumps({"id": match[1], "sha": SHA, "private": match[1] in self.server.private, "siblings": siblings}).encode(), {"Content-Type": "application/json"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if (files := self.find(match[1], match[2])) is not None:
                tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest(), **large(n, b, "oid")} for n, b in files.items()]
                self.answer(json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (files := self.find(match[1], match[2])) is not None:
                if match[1] in self.server.gated and not self.token:
                    self.refuse(401, "GatedRepo", f"Access to model {match[1]} is restricted.")
                else:
                    self.send_file(match[3], files[match[3]])
        else:
            self.refuse(404, "", "no such page")

    def send_file(self, name: str, body: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(body, headers)
        self.server.asked.append(name)
        if name in self.server.wrong:
            body = bytes([body[0] ^ 1]) + body[1:]
        if name in self.server.short:
            body = body[:-1]
        start = int(re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", "bytes=0-"))[1])
        if start >= len(body):
            return self.answer(b"", {"Content-Range": f"bytes */{len(body)}"}, 416)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(len(body) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        cut = self.server.cuts.pop() if self.server.cuts and name.endswith(".safetensors") else len(body)
        for at in range(start, min(len(body), start + cut), 2**16):
            part = body[at : min(at + 2**16, start + cut)]
            self.wfile.write(part)
            self.server.sent[name] = self.server.sent.get(name, 0) + len(part)
            time.sleep(self.server.pause if name.endswith(".safetensors") else 0)
        if start + cut < len(body):
            self.close_connection = True

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.token:
            self.refuse(401, "", "Invalid username or password.")
        elif path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}"
            if repo not in self.server.repos:
                self.server.repos[repo] = {}
                self.server.private |= {repo} if given.get("visibility") == "private" or given.get("private") else set()
            self.answer(json.dumps({"url": f"{self.server.url}/{repo}"}).encode(), {"Content-Type": "application/json"})
        elif path == "/api/validate-yaml":
            self.answer(b'{"errors": [], "warnings": []}', {"Content-Type": "application/json"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            self.answer(json.dumps({"files": files}).encode(), {"Content-Type": "application/json"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            rows = [json.loads(line) for line in body.splitlines()]
            self.server.repos[match[1]] |= {r["value"]["path"]: base64.b64decode(r["value"]["content"]) for r in rows if r["key"] == "file"}
            done = {"success": True, "commitOid": SHA, "commitUrl": f"{self.server.url}/{match[1]}/commit/{SHA}", "hookOutput": ""}
            self.answer(json.dumps(done).encode(), {"Content-Type": "application/json"})
        else:
            self.refuse(404, "", "no such page")

    def find(self, repo: str, revision: str | None) -> dict[str, bytes] | None:
        if self.token and self.server.tokens is not None and self.token not in self.server.tokens:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if repo not in self.server.repos or (repo in self.server.private and not self.token):
            return self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if repo in self.server.forbidden:
            return self.refuse(403, "", "Please enable access to this repository in your token's settings")
        if revision not in (None, "main", "v1", SHA):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        return self.server.repos[repo]

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(b"{}", {"X-Error-Code": code, "X-Error-Message": message}, status)

    def answer(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
