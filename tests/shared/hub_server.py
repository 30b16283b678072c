"""A small in-memory model hub on 127.0.0.1 that the real ``huggingface_hub`` client can talk to.

It answers what the client asks while a model is pushed, listed and loaded: repository creation, commits on
``main``, uploads (text inside the commit, weights through git LFS), file trees and downloads. What it does
not know, such as a pull request or a deletion, it refuses with a plain 501. It accepts every model card, does
not compare parent commits, and sends whole files where a byte range is asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Lock, Thread
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest

from tests.shared.versions import hub_clients_of_transformers

LFS_SUFFIXES = (".safetensors", ".bin")


class Blob(NamedTuple):
    """The content of one file, and whether it came through git LFS."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        size = len(self.data)
        lfs = {"lfs": {"oid": self.oid, "size": size, "pointerSize": 0}} if self.lfs else {}
        return {"type": "file", "path": path, "size": size, "oid": self.oid, **lfs}


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Refusal(Exception):
    """A request that is turned down, with the reason as the client's error code."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.reply = Reply(status, {"X-Error-Code": reason, "X-Error-Message": reason, **(headers or {})}, b"{}")


class HubServer:
    """A hub that runs for the length of its ``with`` block and lists every "METHOD path" in ``requests``."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        # Repository -> commit id -> path -> file, with the newest commit last.
        self._history: dict[str, dict[str, dict[str, Blob]]] = {}
        self._uploads: dict[str, bytes] = {}
        self._lock = Lock()
        model, revision = "/api/models/([^/?]+(?:/[^/?]+)?)", "([^/?]+)"
        self._routes: dict[str, Callable[..., Reply]] = {
            "GET /api/whoami-v2": lambda body: _json({"type": "user", "name": "me", "orgs": []}),
            "POST /api/validate-yaml": lambda body: _json({"errors": [], "warnings": []}),
            "POST /api/repos/create": self._create,
            f"POST {model}/preupload/{revision}": self._preupload,
            f"POST {model}/commit/main": self._commit,
            f"GET {model}(?:/revision/{revision})?": self._info,
            rf"GET {model}/tree/{revision}(?:/([^?]+))?\?recursive=(true|false)&expand=false": self._tree,
            f"(?:GET|HEAD) /(.+?)/resolve/{revision}/(.+)": self._resolve,
            r"POST /(.+)\.git/info/lfs/objects/batch": self._lfs_batch,
            r"PUT /lfs/(\w+)": self._lfs_upload,
            r"POST /lfs/(\w+)/verify": lambda body, oid: _json({"size": len(self._uploaded(oid))}),
        }

    def __enter__(self) -> HubServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of every file of a repository, by path."""
        return {path: blob.data for path, blob in self._find(repo_id, revision)[1].items()}

    def env(self, home: Path) -> dict[str, str]:
        """The whole environment of a fresh process that uses this hub and keeps its cache under ``home``."""
        inherited = {name: value for name, value in os.environ.items() if not _is_client_setting(name)}
        return inherited | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home / "huggingface"),
            "HF_TOKEN": "hf_dummy",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "no_proxy": "127.0.0.1",
        }

    def answer(self, method: str, target: str, body: bytes, has_token: bool) -> Reply:
        """The reply to one request, whose path and query are still percent-encoded."""
        self.requests.append(f"{method} {target.partition('?')[0]}")
        try:
            if method == "POST" and not has_token and target != "/api/validate-yaml":
                raise Refusal(401, "Invalid username or password.")
            for pattern, route in self._routes.items():
                if match := re.fullmatch(pattern, f"{method} {target}"):
                    with self._lock:
                        return route(body, *(group and unquote(group) for group in match.groups()))
            raise Refusal(501, f"The test hub does not know {method} {target}")
        except Refusal as refusal:
            return refusal.reply

    def _find(self, repo_id: str, revision: str | None = None) -> tuple[str, dict[str, Blob]]:
        if repo_id not in self._history:
            raise Refusal(404, "RepoNotFound")
        commits = self._history[repo_id]
        commit = list(commits)[-1] if revision in (None, "main") else revision
        if commit not in commits:
            raise Refusal(404, "RevisionNotFound")
        return commit, commits[commit]

    def _append(self, repo_id: str, files: dict[str, Blob]) -> str:
        commits = self._history.setdefault(repo_id, {})
        content = [repo_id, len(commits), sorted((path, blob.oid) for path, blob in files.items())]
        commit = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        commits[commit] = files
        return commit

    def _create(self, body: bytes) -> Reply:
        wanted = json.loads(body)
        repo_id = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        exists = repo_id in self._history
        if not exists:
            attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
            self._append(repo_id, {".gitattributes": Blob(attributes.encode(), lfs=False)})
        return _json({"url": f"{self.url}/{repo_id}"}, status=409 if exists else 200)

    def _preupload(self, body: bytes, repo_id: str, revision: str) -> Reply:
        present = self._find(repo_id, revision)[1]
        files: list[dict[str, Any]] = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = present[path].oid if path in present else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json({"files": files})

    def _commit(self, body: bytes, repo_id: str) -> Reply:
        files = dict(self._find(repo_id)[1])
        for line in map(json.loads, body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif kind == "lfsFile":
                files[value["path"]] = Blob(self._uploaded(value["oid"]), lfs=True)
            elif kind != "header":
                raise Refusal(501, f"The test hub does not know the commit line {kind}")
        commit = self._append(repo_id, files)
        return _json({"commitOid": commit, "commitUrl": f"{self.url}/{repo_id}/commit/{commit}"})

    def _info(self, body: bytes, repo_id: str, revision: str | None) -> Reply:
        commit, files = self._find(repo_id, revision)
        siblings = [{"rfilename": path} for path in files]
        return _json({"id": repo_id, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _tree(self, body: bytes, repo_id: str, revision: str, folder: str | None, recursive: str) -> Reply:
        files = self._find(repo_id, revision)[1]
        folders = {parent for path in files for parent in PurePosixPath(path).parents}
        entries = {str(path): {"type": "directory", "path": str(path), "oid": ""} for path in folders}
        entries |= {path: blob.entry(path) for path, blob in files.items()}
        root = PurePosixPath(folder or ".")
        if root not in folders:
            raise Refusal(404, "EntryNotFound")
        depth = None if recursive == "true" else 1
        inside = [path for path in sorted(entries) if root in list(PurePosixPath(path).parents)[:depth]]
        return _json([entries[path] for path in inside])

    def _resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> Reply:
        commit, files = self._find(repo_id, revision)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            raise Refusal(404, "EntryNotFound", headers)
        blob = files[path]
        headers["ETag"] = f'"{blob.oid}"'
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        return Reply(200, headers, blob.data)

    def _lfs_batch(self, body: bytes, repo_id: str) -> Reply:
        self._find(repo_id)
        objects: list[dict[str, Any]] = json.loads(body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self._uploads:
                href = f"{self.url}/lfs/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, body: bytes, oid: str) -> Reply:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "The content does not match its sha256")
        self._uploads[oid] = body
        return _json({})

    def _uploaded(self, oid: str) -> bytes:
        if oid not in self._uploads:
            raise Refusal(400, f"The LFS object {oid} was never uploaded")
        return self._uploads[oid]


class _Handler(BaseHTTPRequestHandler):
    """Carries one request over HTTP to the hub and its reply back."""

    def __init__(self, hub: HubServer, *connection: Any) -> None:
        self.hub = hub
        super().__init__(*connection)

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        reply = self.hub.answer(self.command, self.path, body, "Authorization" in self.headers)
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: ``HubServer.requests`` is the log."""


def _json(value: Any, status: int = 200) -> Reply:
    return Reply(status, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _is_client_setting(name: str) -> bool:
    return name.startswith(("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running hub that this process, and any process it starts, uses for the length of one test."""
    from huggingface_hub import close_session, constants, hf_api
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    showed_progress = not are_progress_bars_disabled()
    disable_progress_bars()
    with HubServer() as server, warnings.catch_warnings():
        # The client sends LFS content through a parameter its HTTP library deprecates; no caller can help it.
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)

        # These two clients live as long as the process and keep the endpoint they were made with.
        for client in (hf_api.api, *hub_clients_of_transformers()):
            monkeypatch.setattr(client, "endpoint", server.url)

        environment = server.env(tmp_path)
        for name in filter(_is_client_setting, list(os.environ)):
            monkeypatch.delenv(name)
        for name, value in environment.items() - os.environ.items():
            monkeypatch.setenv(name, value)

        home = environment["HF_HOME"]
        settings: dict[str, str | bool] = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": home,
            "HF_HUB_CACHE": f"{home}/hub",
            "HF_TOKEN_PATH": f"{home}/token",
            "HF_STORED_TOKENS_PATH": f"{home}/stored_tokens",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        for name, setting in settings.items():
            monkeypatch.setattr(constants, name, setting)

        # The client's shared session may have been opened with a proxy, and must not outlive the hub.
        close_session()
        yield server
        close_session()
    if showed_progress:
        enable_progress_bars()
