"""Repositories: branches of commits, each a table of paths, and the blobs behind them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from typing import Any

LIMIT = 512 * 2**20
"""Bytes that all blobs may take together; a test that exceeds it has a mistake."""


class Refused(Exception):
    """An answer that is no success: status, `X-Error-Code`, message, and a body where the client reads one."""

    def __init__(self, status: int, code: str | None, message: str, body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.body = body if body is not None else {"error": message}


def git_blob(content: bytes) -> str:
    """SHA-1 of a blob as git counts it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The file that git keeps in place of a large one."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Entry:
    """One file of a commit: its git id and size, and of a large one the sha256 and the size of its pointer."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    id: str
    title: str
    message: str
    parent: str | None
    files: dict[str, Entry]


@dataclass
class Repository:
    """A repository of models or datasets."""

    kind: str
    id: str
    private: bool = False
    gated: str | bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.branches:
            self.branches["main"] = self._record(Commit("", "initial commit", "", None, {}))

    def _record(self, commit: Commit) -> str:
        number = hashlib.sha1(f"{self.kind}/{self.id}/{len(self.commits)}".encode()).hexdigest()
        self.commits[number] = Commit(number, commit.title, commit.message, commit.parent, commit.files)
        return number

    def at(self, revision: str) -> Commit:
        """Return the commit of a branch, tag or (shortened) id."""
        number = self.branches.get(revision) or self.tags.get(revision)
        if number is None and len(revision) >= 7:
            number = next((known for known in self.commits if known.startswith(revision)), None)
        if number is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[number]

    def history(self, revision: str) -> list[Commit]:
        """Return the commits of a revision, newest first."""
        found: list[Commit] = []
        number: str | None = self.at(revision).id
        while number is not None:
            found.append(self.commits[number])
            number = found[-1].parent
        return found

    def branch(self, name: str, start: str) -> None:
        """Make a branch."""
        if name in self.branches:
            raise Refused(409, None, f"Reference already exists: refs/heads/{name}")
        self.branches[name] = self.at(start).id

    def commit(self, branch: str, header: dict[str, Any], files: dict[str, Entry]) -> Commit:
        """Move a branch on."""
        if branch not in self.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        parent, wanted = self.branches[branch], header.get("parentCommit")
        if wanted is not None and not parent.startswith(wanted):
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        new = Commit("", header["summary"], header.get("description", ""), parent, files)
        self.branches[branch] = self._record(new)
        return self.commits[self.branches[branch]]


class Store:
    """All repositories, and the content of their files by SHA-1 (small) or SHA-256 (large)."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.small: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.xet_of: dict[str, str] = {}  # sha256 -> hash of the file in xet
        self.damaged: set[str] = set()  # paths that are kept with another content than was sent
        self.lock = threading.RLock()

    def keep(self, content: bytes) -> None:
        """Keep a large file."""
        total = sum(map(len, self.small.values())) + sum(map(len, self.large.values()))
        if total + len(content) > LIMIT:
            raise Refused(413, None, f"The loopback Hub keeps at most {LIMIT} bytes.")
        self.large[hashlib.sha256(content).hexdigest()] = content

    def content(self, entry: Entry) -> bytes:
        """Return a file's bytes."""
        return self.large[entry.sha256] if entry.sha256 else self.small[entry.oid]

    def apply(self, files: dict[str, Entry], line: dict[str, Any]) -> None:
        """Carry out one line of a commit on a table of files."""
        kind, value = line["key"], line["value"]
        path = value["path"]
        if kind == "file":
            if value.get("encoding") != "base64":
                raise Refused(400, None, f"{path}: encoding {value.get('encoding')!r}")
            content = base64.b64decode(value["content"]) + (b"?" if path in self.damaged else b"")
            self.small[git_blob(content)] = content
            files[path] = Entry(git_blob(content), len(content))
        elif kind == "lfsFile":
            found = self.large.get(value["oid"])
            if found is None or value["algo"] != "sha256":
                raise Refused(400, None, f"{path}: large file {value['oid']} was not uploaded")
            files[path] = Entry(git_blob(pointer(value["oid"], len(found))), len(found), value["oid"])
        elif kind == "deletedFile":
            if files.pop(path, None) is None:
                raise Refused(404, "EntryNotFound", f"{path} does not exist")
        elif kind == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        else:
            raise Refused(400, None, f"operation {kind!r} of a commit is unknown to the loopback Hub")

    def commit(self, repository: Repository, branch: str, body: bytes) -> Commit:
        """Carry out a commit as the client sends it: lines of JSON, the first with the message."""
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header":
            raise Refused(400, None, "the first line of a commit must be its header")
        with self.lock:
            files = dict(repository.at(branch).files)
            for line in lines[1:]:
                self.apply(files, line)
            return repository.commit(branch, lines[0]["value"], files)
