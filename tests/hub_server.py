"""A small Hub on this machine that the real huggingface_hub client accepts: model info, files, gates, revisions, uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "1" * 40


class HubServer(ThreadingHTTPServer):
    """Serves `repos`: id → {file name: bytes}; ids in `gated` need a token. `asked` lists the files that were fetched."""

    def __init__(self, repos: dict[str, dict[str, bytes]], gated: set[str] = frozenset()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.gated, self.asked = repos, gated, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if (files := self.find(match[1], match[2])) is not None:
                siblings = [{"rfilename": name} for name in files]
                self.answer(json.dumps({"id": match[1], "sha": SHA, "siblings": siblings}).encode(), {"Content-Type": "application/json"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if (files := self.find(match[1], match[2])) is not None:
                tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files.items()]
                self.answer(json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (files := self.find(match[1], match[2])) is not None:
                body = files[match[3]]
                if self.command == "GET":
                    self.server.asked.append(match[3])
                self.answer(body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": SHA})
        else:
            self.refuse(404, "", "no such page")

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "Authorization" not in self.headers:
            self.refuse(401, "", "Invalid username or password.")
        elif path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}"
            self.server.repos.setdefault(repo, {})
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
        if repo not in self.server.repos:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if repo in self.server.gated and "Authorization" not in self.headers:
            return self.refuse(401, "GatedRepo", "Access is restricted")
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
