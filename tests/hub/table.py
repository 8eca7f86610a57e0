"""
Every fault that docs/sharing.md lists, met by a real push; `python -m tests.hub.table xet|lfs` says what came of each.

One process for all, since importing the client takes longer than a push. The client's waits between tries are counted
instead of waited, in this process alone.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .server import LoopbackHub

Case = dict[str, Any]


def status(route: str, status: int, **options: Any) -> Case:
    """An answer that refuses, always unless `times` is given."""
    return {"route": route, "kind": "status", "status": status, "times": None, **options}


def other(route: str, kind: str, **options: Any) -> Case:
    """A fault of another kind, once."""
    return {"route": route, "kind": kind, **options}


SLOW = {"headers": {"Retry-After": "0"}, "times": 1}

CASES: dict[str, Case] = {
    "create: no token": {"token": ""},
    "create: 401": status("create", 401, message="Invalid credentials in Authorization header"),
    "create: 403": {"owner": "someone-else"},
    "create: 409, it exists": {"exists": "public"},
    "create: 429": status("create", 429),
    "create: 500": status("create", 500),
    "create: a page of HTML": other("create", "html", status=502, times=None),
    "create: reset": other("create", "reset", times=None),
    "create: a stall": other("create", "stall", seconds=0.5),
    "create: offline": {"offline": True},
    "rights: a token that may only read": {"exists": "public", "token": "read"},
    "private: a public one exists": {"exists": "public", "private": True},
    "gated: 403": status("settings", 403, message="Your plan has no gated repositories", gated="manual"),
    "branch: 409, it exists": {"exists": "public", "branch": "v1"},
    "preupload: 401": status("preupload", 401, message="Invalid credentials in Authorization header"),
    "preupload: 403": status("preupload", 403),
    "preupload: 404": status("preupload", 404, code="RepoNotFound"),
    "preupload: 429 with Retry-After, once": status("preupload", 429, **SLOW),
    "preupload: 500, once": status("preupload", 500, times=1),
    "preupload: 500, always": status("preupload", 500),
    "preupload: reset, once": other("preupload", "reset"),
    "preupload: cut in mid-body, once": other("preupload", "cut"),
    "storage: 403": status("@store", 403),
    "storage: 500, once": status("@store", 500, times=1),
    "storage: reset, once": other("@store", "reset"),
    "storage: access refused (403)": status("@grant", 403),
    "commit: 403": status("commit", 403),
    "commit: 409": status("commit", 409),
    "commit: 412": status("commit", 412, message="A commit has happened since."),
    "commit: 429 with Retry-After, once": status("commit", 429, **SLOW),
    "commit: 500, once": status("commit", 500, times=1),
    "commit: 500, always": status("commit", 500),
    "commit: a page of HTML": other("commit", "html", status=502, times=None),
    "commit: the answer is lost": other("commit", "lost"),
    "compare: 500": status("paths-info", 500),
    "compare: a file arrived damaged": {"damaged": "training_args.json"},
    "files: a token in a JSON file": {"secret": True},
}
ROUTES = {"xet": {"@store": "xorb", "@grant": "xet-token"}, "lfs": {"@store": "lfs-put", "@grant": "lfs-batch"}}


def write_run(folder: Path, seed: int) -> None:
    """Write what a run leaves, with weights of its own, so that no storage has them yet."""
    import random

    folder.mkdir(parents=True)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(random.Random(seed).randbytes(120_000))
    (folder / "README.md").write_text("---\ntags: [lora]\n---\n# A run\n")
    (folder / "training_args.json").write_text(json.dumps({"seed": seed}))
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"state")
    (folder / "trainer_state.json").write_text("{}")


def meet(hub: LoopbackHub, folder: Path, name: str, case: Case, way: str) -> dict[str, Any]:
    """Push with a fault, then once more without."""
    from huggingface_hub import HfApi, constants

    from tgol_trainer.saving.hub import PushError, Repository, open_repository, push_run, resume_command

    case = dict(case)
    owner = case.pop("owner", hub.user)
    token = {"read": hub.read_token, "": "", None: None}[case.pop("token", None)]
    private, gated, branch = case.pop("private", None), case.pop("gated", None), case.pop("branch", None)
    if case.pop("exists", None):
        HfApi().create_repo(name)
    if branch:
        HfApi().create_branch(f"{hub.user}/{name}", branch=branch)
    if case.pop("secret", False):
        (folder / "notes.json").write_text(json.dumps({"key": hub.token}))
    if damaged := case.pop("damaged", None):
        hub.store.damaged.add(damaged)
    constants.HF_HUB_OFFLINE = case.pop("offline", False)
    if token == "":
        os.environ.pop("HF_TOKEN", None)
        token = None
    if case:
        route = case.pop("route")
        hub.fail(ROUTES[way].get(route, route), case.pop("kind"), case.pop("status", 500), **case)
    target = Repository(
        f"{owner}/{name}", revision=branch, token=token, resume=resume_command(folder, f"{owner}/{name}")
    )
    found: dict[str, Any] = {"error": None}

    def push() -> None:
        push_run(open_repository(target, private=private, gated=gated), folder, "A push")

    slept.clear()
    try:
        push()
    except PushError as error:
        found["error"] = str(error)
    found["waited"] = round(sum(slept), 1)
    found["arrived"] = arrived(hub, name, folder, branch)
    hub.faults.clear()
    hub.store.damaged.clear()
    constants.HF_HUB_OFFLINE = False
    os.environ["HF_TOKEN"] = hub.token
    (folder / "notes.json").unlink(missing_ok=True)
    if found["error"] and owner == hub.user and not private:
        target = Repository(f"{owner}/{name}", revision=branch)
        push()
        found["again"] = arrived(hub, name, folder, branch)
    repository = hub.store.repositories.get(("models", f"{hub.user}/{name}"))
    found["commits"] = [commit.title for commit in repository.history(branch or "main")] if repository else []
    return found


def arrived(hub: LoopbackHub, name: str, folder: Path, branch: str | None) -> bool:
    """Whether the Hub holds what should be published of a folder, and nothing else."""
    names = ("pytorch_lora_weights.safetensors", "README.md", "training_args.json")
    local = {path: (folder / path).read_bytes() for path in names}
    known = ("models", f"{hub.user}/{name}") in hub.store.repositories
    return known and hub.files(f"{hub.user}/{name}", revision=branch or "main") == local


slept: list[float] = []

if __name__ == "__main__":
    way = sys.argv[1]
    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as scratch:
        os.environ.update(hub.environment(Path(scratch) / "home"))
        os.environ.pop("HF_HUB_DISABLE_XET", None)
        if way == "lfs":
            os.environ["HF_HUB_DISABLE_XET"] = "1"
        import huggingface_hub  # noqa: F401 - reads the environment once

        time.sleep = slept.append
        results = {}
        for number, (title, case) in enumerate(CASES.items()):
            run = Path(scratch) / f"run-{number}"
            write_run(run, number)
            results[title] = meet(hub, run, f"run-{number}", case, way)
        sys.stdout.write(json.dumps(results))
