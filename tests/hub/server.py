"""The routes of both origins over one store."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import yaml

from .faults import Fault, Faults
from .http import Answer, Origin, Request, Route, as_json
from .store import Entry, Refused, Repository, Store, git_blob, pointer
from .xet import ContentStore

LIFE = 600.0
"""Seconds after which a server stops by itself."""
ID = r"([^/]+/[^/]+)"
API = rf"/api/(models|datasets|spaces)/{ID}"


class LoopbackHub:
    """
    A Hub and its storage on two ports of 127.0.0.1.

    Use it as a context manager; `environment(home)` is what a client process needs, before it imports huggingface_hub.

    Args:
        user: Owner of the token, and of repositories named without an owner.
        small: Files of at most this many bytes, that look like text, are regular files of git; all others are large.
        chunk: Where given, large files over plain HTTP are uploaded in parts of this many bytes.
    """

    def __init__(self, user: str = "tester", small: int = 100_000, chunk: int | None = None) -> None:
        self.user, self.small, self.chunk = user, small, chunk
        self.token = f"hf_{'loopback' * 3}{secrets.token_hex(5)}"
        self.read_token = f"hf_{'readonly' * 3}{secrets.token_hex(5)}"
        self.storage_token = f"xet-{secrets.token_hex(8)}"
        self.store, self.xet, self.faults = Store(), ContentStore(), Faults()
        self.requests: list[Request] = []
        self.parts: dict[str, dict[int, bytes]] = {}
        self._stopped = threading.Event()
        shared = self.faults, self.requests
        self._origins = [
            Origin("hub", "127.0.0.1", self._hub_routes(), *shared),
            # Of another name, as on the Hub: huggingface_hub 1 tells origins apart by their hosts alone.
            Origin("storage", "localhost", self._storage_routes(), *shared),
        ]
        self.endpoint, self.storage = (origin.url for origin in self._origins)
        self._timer = threading.Timer(LIFE, self.stop)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> LoopbackHub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is None:
            self.check()

    def stop(self) -> None:
        """Close both ports and wake what stalls."""
        if not self._stopped.is_set():
            self._stopped.set()
            self.faults.clear()
            self._timer.cancel()
            for origin in self._origins:
                origin.stop()

    def wait(self, seconds: float) -> None:
        """Return when the server has stopped, or after `seconds`."""
        self._stopped.wait(seconds)

    def environment(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """
        Return the environment of a client: this Hub, an empty cache in `home`, and nothing that leaves the machine.

        Args:
            home: A new folder for each client, since a warm cache hides failures.
            token: By default that of a user who may write; `""` for none.
        """
        token = self.token if token is None else token
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            **({"HF_TOKEN": token} if token else {}),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_DATASETS_CACHE": str(Path(home) / "datasets"),
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms",
        }

    def fail(self, route: str, kind: str = "status", status: int = 500, **options: Any) -> None:
        """Let the next requests of a route meet a [`Fault`]."""
        self.faults.add(route, Fault(kind, status, **options))

    def repository(self, name: str, kind: str = "models") -> Repository:
        """Return a repository."""
        return self.store.repositories[kind, name]

    def put(self, name: str, kind: str, files: dict[str, bytes]) -> None:
        """Make a repository of any owner with files that others put there."""
        found = self.store.repositories.setdefault((kind, name), Repository(kind, name))
        lines = [{"key": "header", "value": {"summary": "Files"}}]
        for path, content in files.items():
            value = {"path": path, "encoding": "base64", "content": base64.b64encode(content).decode()}
            lines.append({"key": "file", "value": value})
        self.store.commit(found, "main", b"\n".join(json.dumps(line).encode() for line in lines))

    def files(self, name: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        """Return the files of a revision."""
        found = self.repository(name, kind).at(revision).files
        return {path: self.store.content(entry) for path, entry in found.items()}

    def leaks(self) -> list[str]:
        """Return the requests that carried a token of the Hub to the storage."""
        found = []
        for request in self.requests:
            carried = "\n".join([request.path, str(request.query), *request.headers.values()]).encode() + request.body
            if request.origin == "storage" and any(t.encode() in carried for t in (self.token, self.read_token)):
                found.append(f"{request.method} {request.path}")
        return found

    def check(self) -> None:
        """Raise if a route was asked for that is not here, or if a token went to the storage."""
        unknown = sorted(
            {f"{request.method} {request.path}" for request in self.requests if request.route == "unknown"}
        )
        if unknown or self.leaks():
            raise RuntimeError(f"loopback Hub: no routes for {unknown}; tokens at the storage: {self.leaks()}")

    # ---- Who asks, and for what ----

    def _may_write(self, request: Request) -> None:
        if request.token is None:
            raise Refused(401, None, "Invalid username or password.")
        if request.token not in (self.token, self.read_token):
            raise Refused(401, None, "Invalid credentials in Authorization header")
        if request.token != self.token:
            raise Refused(403, None, "You don't have the rights to create or change a repository with this token")

    def _find(self, request: Request, kind: str | None, name: str | None) -> Repository:
        known = request.token in (self.token, self.read_token)
        if request.token is not None and not known:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        found = self.store.repositories.get((kind or "models", name or ""))
        if found is None or (found.private and not known):
            raise Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        return found

    def _readable(self, request: Request, kind: str | None, name: str | None) -> Repository:
        found = self._find(request, kind, name)
        if found.gated and request.token != self.token:
            message = f"Access to {found.kind[:-1]} {found.id} is restricted. You must be granted access to it."
            raise Refused(403 if request.token else 401, "GatedRepo", message)
        return found

    # ---- The Hub ----

    def _hub_routes(self) -> list[Route]:
        file = rf"/(?:(datasets)/)?{ID}/resolve/([^/]+)/(.+)"
        return [
            ("control", "POST", r"/loopback/(fail|clear)", self._control),
            ("harnesses", "GET", r"/api/agent-harnesses", lambda _: as_json({"standardEnvVars": [], "harnesses": {}})),
            ("telemetry", "HEAD", r"/api/telemetry/.*", lambda _: Answer()),
            ("whoami", "GET", r"/api/whoami-v2", self._whoami),
            ("create", "POST", r"/api/repos/create", self._create),
            ("auth-check", "GET", rf"{API}/auth-check(/write)?", self._auth_check),
            ("settings", "PUT", rf"{API}/settings", self._settings),
            ("secrets", "POST", rf"{API}/secrets", self._secrets),
            ("validate-yaml", "POST", r"/api/validate-yaml", self._validate),
            ("preupload", "POST", rf"{API}/preupload/([^/]+)", self._preupload),
            ("commit", "POST", rf"{API}/commit/([^/]+)", self._commit),
            ("branch", "POST", rf"{API}/branch/([^/]+)", self._branch),
            ("tag", "POST", rf"{API}/tag/([^/]+)", self._tag),
            ("refs", "GET", rf"{API}/refs", self._refs),
            ("commits", "GET", rf"{API}/commits/([^/]+)", self._commits),
            ("info", "GET", rf"{API}(?:/revision/([^/]+))?", self._info),
            ("info", "GET", r"/api/(models|datasets)/([^/]+)(?:/revision/[^/]+)?", self._no_owner),
            ("tree", "GET", rf"{API}/tree/([^/]+)(?:/(.*))?", self._tree),
            ("paths-info", "POST", rf"{API}/paths-info/([^/]+)", self._paths_info),
            ("xet-token", "GET", rf"{API}/xet-(read|write)-token/([^/]+)", self._xet_token),
            ("lfs-batch", "POST", rf"/(?:(datasets)/)?{ID}\.git/info/lfs/objects/batch", self._lfs_batch),
            ("lfs-verify", "POST", r"/lfs-verify", self._lfs_verify),
            ("resolve", "HEAD", file, self._resolve),
            ("download", "GET", file, self._resolve),
        ]

    def _control(self, request: Request) -> Answer:
        if request.groups[0] == "clear":
            self.faults.clear()
        else:
            self.fail(**request.json())
        return as_json({})

    def _whoami(self, request: Request) -> Answer:
        if request.token not in (self.token, self.read_token):
            raise Refused(401, None, "Invalid credentials in Authorization header")
        role = "write" if request.token == self.token else "read"
        return as_json({"name": self.user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}})

    def _create(self, request: Request) -> Answer:
        wanted = request.json()
        self._may_write(request)
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        kind = f"{wanted.get('type', 'model')}s"
        url = f"{self.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
        if not name.startswith(f"{self.user}/"):
            raise Refused(403, None, f"You don't have the rights to create a {kind[:-1]} under this namespace")
        with self.store.lock:
            if (kind, name) in self.store.repositories:
                raise Refused(409, None, "You already created this repo", {"error": "exists", "url": url})
            private = wanted.get("visibility") == "private"
            self.store.repositories[kind, name] = Repository(kind, name, private)
        return as_json({"url": url, "name": name})

    def _auth_check(self, request: Request) -> Answer:
        kind, name, write = request.groups
        self._readable(request, kind, name)
        if write:
            self._may_write(request)
        return as_json({})

    def _settings(self, request: Request) -> Answer:
        self._may_write(request)
        found, wanted = self._find(request, *request.groups[:2]), request.json()
        found.gated = wanted.get("gated", found.gated)
        found.private = wanted["visibility"] == "private" if "visibility" in wanted else found.private
        return as_json({"gated": found.gated, "private": found.private})

    def _secrets(self, request: Request) -> Answer:
        self._may_write(request)
        found, wanted = self._find(request, *request.groups[:2]), request.json()
        found.secrets[wanted["key"]] = wanted["value"]
        return as_json({})

    def _validate(self, request: Request) -> Answer:
        text = request.json()["content"]
        errors = []
        try:
            block = text.split("---\n")[1] if text.startswith("---\n") else ""
            if not isinstance(yaml.safe_load(block) or {}, dict):
                errors.append({"message": "metadata must be a mapping"})
        except (yaml.YAMLError, IndexError) as error:
            errors.append({"message": str(error)})
        return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, request: Request) -> Answer:
        kind, name, revision = request.groups
        self._may_write(request)
        known = self._find(request, kind, name).at(unquote(revision or "")).files
        answers = []
        for file in request.json()["files"]:
            text = b"\0" not in base64.b64decode(file["sample"])
            large = file["size"] > self.small or not text
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if (entry := known.get(file["path"])) is not None:
                answer["oid"] = entry.sha256 or entry.oid
            answers.append(answer)
        return as_json({"files": answers})

    def _commit(self, request: Request) -> Answer:
        kind, name, revision = request.groups
        self._may_write(request)
        found = self._find(request, kind, name)
        made = self.store.commit(found, unquote(revision or ""), request.body)
        return as_json({"commitUrl": f"{self.endpoint}/{name}/commit/{made.id}", "commitOid": made.id})

    def _branch(self, request: Request) -> Answer:
        self._may_write(request)
        start = (request.json() if request.body else {}).get("startingPoint") or "main"
        self._find(request, *request.groups[:2]).branch(unquote(request.groups[2] or ""), start)
        return as_json({})

    def _tag(self, request: Request) -> Answer:
        self._may_write(request)
        found, wanted = self._find(request, *request.groups[:2]), request.json()["tag"]
        if wanted in found.tags:
            raise Refused(409, None, "Tag reference exists already")
        found.tags[wanted] = found.at(unquote(request.groups[2] or "")).id
        return as_json({})

    def _refs(self, request: Request) -> Answer:
        found = self._find(request, *request.groups[:2])
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in found.branches.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in found.tags.items()]
        return as_json({"branches": branches, "tags": tags, "converts": []})

    def _commits(self, request: Request) -> Answer:
        found = self._find(request, *request.groups[:2])
        return as_json(
            [
                {"id": c.id, "title": c.title, "message": c.message, "authors": [], "date": "2026-01-01T00:00:00.000Z"}
                for c in found.history(unquote(request.groups[2] or ""))
            ]
        )

    def _info(self, request: Request) -> Answer:
        kind, name, revision = request.groups
        found = self._find(request, kind, name)
        commit = found.at(unquote(revision or "main"))
        readme = commit.files.get("README.md")
        card = _front_matter(self.store.content(readme)) if readme else {}
        return as_json(
            {
                "id": name,
                "sha": commit.id,
                "private": found.private,
                "gated": found.gated,
                "tags": card.get("tags", []),
                "cardData": card,
                "siblings": [
                    {"rfilename": path, **({"size": entry.size} if "blobs" in request.query else {})}
                    for path, entry in sorted(commit.files.items())
                ],
            }
        )

    def _no_owner(self, request: Request) -> Answer:
        raise Refused(404, "RepoNotFound", "Repository not found")

    def _item(self, path: str, entry: Entry) -> dict[str, Any]:
        item: dict[str, Any] = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
        if entry.sha256:
            size = len(pointer(entry.sha256, entry.size))
            item["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": size}
            if entry.sha256 in self.store.xet_of:
                item["xetHash"] = self.store.xet_of[entry.sha256]
        return item

    def _folder(self, path: str) -> dict[str, Any]:
        return {"type": "directory", "path": path, "oid": git_blob(path.encode()), "size": 0}

    def _tree(self, request: Request) -> Answer:
        kind, name, revision, folder = request.groups
        commit = self._readable(request, kind, name).at(unquote(revision or ""))
        prefix = f"{unquote(folder).strip('/')}/" if folder else ""
        inside = {path: entry for path, entry in sorted(commit.files.items()) if path.startswith(prefix)}
        if prefix and not inside:
            raise Refused(404, "EntryNotFound", f"{prefix} does not exist on {revision}")
        recursive = request.query.get("recursive", ["false"])[0].lower() == "true"
        items = [
            self._item(path, entry) for path, entry in inside.items() if recursive or "/" not in path[len(prefix) :]
        ]
        folders = set()
        for path in inside:
            steps = path[len(prefix) :].split("/")[:-1]
            folders |= {prefix + "/".join(steps[:depth]) for depth in range(1, len(steps) + 1 if recursive else 2)}
        folders.discard(prefix.rstrip("/"))
        return as_json([self._folder(path) for path in sorted(folders) if path != prefix] + items)

    def _paths_info(self, request: Request) -> Answer:
        kind, name, revision = request.groups
        commit = self._readable(request, kind, name).at(unquote(revision or ""))
        wanted = parse_qs(request.body.decode()).get("paths", [])
        items = [self._item(path, commit.files[path]) for path in wanted if path in commit.files]
        items += [
            self._folder(path)
            for path in wanted
            if path not in commit.files and any(name.startswith(f"{path.rstrip('/')}/") for name in commit.files)
        ]
        return as_json(items)

    def _xet_token(self, request: Request) -> Answer:
        kind, name, purpose, _ = request.groups
        if purpose == "write":
            self._may_write(request)
        self._readable(request, kind, name)
        until = int(time.time()) + 3600
        headers = {
            "X-Xet-Cas-Url": self.storage,
            "X-Xet-Access-Token": self.storage_token,
            "X-Xet-Token-Expiration": str(until),
        }
        return as_json({"casUrl": self.storage, "exp": until, "accessToken": self.storage_token}, **headers)

    def _lfs_batch(self, request: Request) -> Answer:
        self._may_write(request)
        self._find(request, *request.groups)
        answers = []
        for item in request.json()["objects"]:
            oid, size = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.store.large:
                upload: dict[str, Any] = {"href": f"{self.storage}/lfs/{oid}?signature=loopback"}
                if self.chunk and size > self.chunk:
                    upload["href"] = f"{self.storage}/lfs-complete/{oid}"
                    upload["header"] = {"chunk_size": str(self.chunk)} | {
                        str(part + 1): f"{self.storage}/lfs-part/{oid}/{part + 1}"
                        for part in range(-(-size // self.chunk))
                    }
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.endpoint}/lfs-verify"}}
            answers.append(answer)
        return as_json({"transfer": "basic", "objects": answers})

    def _lfs_verify(self, request: Request) -> Answer:
        self._may_write(request)
        wanted = request.json()
        if len(self.store.large.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, None, "the object was not uploaded")
        return as_json({})

    def _resolve(self, request: Request) -> Answer:
        kind, name, revision, path = request.groups
        found = self._readable(request, kind, name)
        commit = found.at(unquote(revision or ""))
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        entry = commit.files.get(unquote(path or ""))
        if entry is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        if entry.sha256 is None:
            return _ranged(request, self.store.content(entry), {**headers, "ETag": f'"{entry.oid}"'})
        headers |= {"ETag": f'"{entry.sha256}"', "X-Linked-ETag": f'"{entry.sha256}"'}
        headers |= {
            "X-Linked-Size": str(entry.size),
            "Location": f"{self.storage}/lfs/{entry.sha256}?signature=loopback",
        }
        if (xet := self.store.xet_of.get(entry.sha256)) is not None:
            url = f"{self.endpoint}/api/{found.kind}/{found.id}/xet-read-token/{quote(commit.id, safe='')}"
            headers |= {"X-Xet-Hash": xet, "Link": f'<{url}>; rel="xet-auth"'}
        return Answer(302, b"", headers)

    # ---- The storage ----

    def _storage_routes(self) -> list[Route]:
        reconstruct = r"/v1/reconstructions/([0-9a-f]{64})"
        return [
            ("lfs-put", "PUT", r"/lfs/([0-9a-f]{64})", self._lfs_put),
            ("lfs-part", "PUT", r"/lfs-part/([0-9a-f]{64})/(\d+)", self._lfs_part),
            ("lfs-complete", "POST", r"/lfs-complete/([0-9a-f]{64})", self._lfs_complete),
            ("lfs-get", "GET", r"/lfs/([0-9a-f]{64})", self._lfs_get),
            ("lfs-get", "HEAD", r"/lfs/([0-9a-f]{64})", self._lfs_get),
            ("chunks", "GET", r"/v1/chunks/.*", lambda _: as_json({}, 404)),
            # Newer requests, which the client gives up on 404 for the older ones below.
            ("grants", "POST", r"/v1/xorb-grants(?:/.*)?", lambda _: as_json({}, 404)),
            ("new-shard", "POST", r"/v2/shards", lambda _: as_json({}, 404)),
            ("new-reconstruction", "GET", r"/v2/reconstructions/.*", lambda _: as_json({}, 404)),
            ("xorb", "POST", r"/v1/xorbs/default/([0-9a-f]{64})", self._xorb),
            ("shard", "POST", r"/v1/shards", self._shard),
            ("reconstruction", "GET", reconstruct, self._reconstruction),
            ("xorb-get", "GET", r"/xorbs/([0-9a-f]{64})", self._xorb_get),
            ("telemetry", "POST", r"/v1/telemetry", lambda _: as_json({})),
        ]

    def _lfs_put(self, request: Request) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != request.groups[0]:
            raise Refused(400, None, "the body has another SHA-256")
        self.store.keep(request.body)
        return Answer(200, b"", {"ETag": '"whole"'})

    def _lfs_part(self, request: Request) -> Answer:
        oid, part = request.groups
        self.parts.setdefault(oid or "", {})[int(part or 0)] = request.body
        return Answer(200, b"", {"ETag": f'"part-{part}"'})

    def _lfs_complete(self, request: Request) -> Answer:
        numbers = [part["partNumber"] for part in request.json()["parts"]]
        body = b"".join(self.parts[request.groups[0] or ""][number] for number in numbers)
        if hashlib.sha256(body).hexdigest() != request.groups[0]:
            raise Refused(400, None, "the parts have another SHA-256")
        self.store.keep(body)
        return as_json({})

    def _lfs_get(self, request: Request) -> Answer:
        return _ranged(request, self.store.large[request.groups[0] or ""], {"ETag": f'"{request.groups[0]}"'})

    def _with_access(self, request: Request) -> None:
        if request.token != self.storage_token:
            raise Refused(401, None, "no access token of the storage")

    def _xorb(self, request: Request) -> Answer:
        self._with_access(request)
        self.xet.xorbs[request.groups[0] or ""] = request.body
        return as_json({"was_inserted": True})

    def _shard(self, request: Request) -> Answer:
        self._with_access(request)
        for name, sha256, content in self.xet.add_shard(request.body):
            if hashlib.sha256(content).hexdigest() != sha256:
                raise Refused(400, None, f"{name}: the chunks have another SHA-256")
            self.store.keep(content)
            self.store.xet_of[sha256] = name
        return as_json({"result": 1})

    def _reconstruction(self, request: Request) -> Answer:
        self._with_access(request)
        first, last = _range(request) or (0, None)
        found = self.xet.reconstruction(request.groups[0] or "", first, last, self.storage)
        return as_json(found) if found is not None else as_json({}, 416)

    def _xorb_get(self, request: Request) -> Answer:
        return _ranged(request, self.xet.xorbs[request.groups[0] or ""], {})


def _front_matter(readme: bytes) -> dict[str, Any]:
    parts = readme.decode(errors="replace").replace("\r\n", "\n").split("---\n")
    return (yaml.safe_load(parts[1]) or {}) if len(parts) > 2 and not parts[0] else {}


def _range(request: Request) -> tuple[int, int | None] | None:
    unit, _, span = request.headers.get("range", "").partition("=")
    if unit != "bytes":
        return None
    first, _, last = span.partition("-")
    return int(first), int(last) if last else None


def _ranged(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    span = _range(request)
    headers = {"Content-Type": "application/octet-stream", **headers}
    if span is None:
        return Answer(200, content, {**headers, "Content-Length": str(len(content))})
    first, last = span[0], len(content) - 1 if span[1] is None else min(span[1], len(content) - 1)
    if first >= len(content):
        return Answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    part = content[first : last + 1]
    return Answer(206, part, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"})
