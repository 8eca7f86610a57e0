"""One push: the repository, the upload, and the proof that every file arrived."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.hf_api import RepoFile

from .errors import PushError, push_error
from .selection import checkpoint_files, checkpoints, refuse_secrets, run_files

logger = logging.getLogger(__name__)

Gate: TypeAlias = Literal["auto", "manual", False]
"""Who gets access to the files of a public repository: `"auto"` all who ask, `"manual"` whom you let in, False all."""

Strategy: TypeAlias = Literal["end", "every_save", "checkpoint", "all_checkpoints"]
"""Trainer's `hub_strategy`."""

MAIN = "main"
_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Repository:
    """
    Where to push.

    Args:
        id (`str`): `owner/name`.
        kind (`str`, *optional*, defaults to `"model"`): `"model"` or `"dataset"`.
        revision (`str`, *optional*): Branch; by default `main`.
        token (`str`, *optional*): By default that of the environment or of `hf auth login`.
        resume (`str`, *optional*): What to say in errors about going on.
    """

    id: str
    kind: Literal["model", "dataset"] = "model"
    revision: str | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    resume: str | None = None

    def __post_init__(self) -> None:
        if self.token is not None:  # a line end, as files have, cannot be sent
            object.__setattr__(self, "token", self.token.strip() or None)

    @property
    def where(self) -> dict[str, Any]:
        """What every call of the client takes."""
        return {"repo_id": self.id, "repo_type": self.kind}

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn any failure inside into a [`PushError`] that says what was tried."""
        try:
            yield
        except PushError:
            raise
        except Exception as error:  # the client raises from six libraries; what it means is worked out there
            raise push_error(error, what, token=self.token or get_token(), resume=self.resume)  # noqa: B904


def open_repository(
    target: Repository, *, private: bool | None = None, gated: Gate | None = None, write: bool = True
) -> Repository:
    """
    Make a repository where there is none, and its branch, and check that this token may write to it.

    Args:
        target ([`Repository`]):
            Its `id` may lack the owner, who is then the owner of the token.
        private (`bool`, *optional*):
            Hide a new repository from others. The Hub decides where not given. One that exists keeps its visibility.
        gated (`"auto"`, `"manual"` or `False`, *optional*):
            Ask those who want the files to share their contact details first; unchanged where not given.
        write (`bool`, *optional*, defaults to `True`):
            Check the right to write before a long work ends in a push that is refused.

    Returns:
        [`Repository`], its `id` complete.

    Raises:
        PushError: if any of it is refused, or if a private repository is wanted and a public one exists.
    """
    api = HfApi(token=target.token)
    with target.explained(f"creating the repository {target.id}"):
        made = api.create_repo(target.id, repo_type=target.kind, private=private, exist_ok=True)
        target = dataclasses.replace(target, id=made.repo_id)
    if write:
        with target.explained(f"asking for the right to write to {target.id}"):
            api.auth_check(**target.where, write=True)
    if private is not None:
        with target.explained(f"reading the settings of {target.id}"):
            hidden = api.repo_info(**target.where).private
        if private and not hidden:
            raise PushError(
                f"{target.id} exists and is public, and `private=True` has no effect on a repository that exists. "
                "Nothing was uploaded. Make it private in its settings on the Hub, or give another name."
            )
        if hidden and not private:
            logger.warning("%s exists and is private; it stays so. Its settings on the Hub change that.", target.id)
    if gated is not None:
        with target.explained(f"setting the access to {target.id}"):
            api.update_repo_settings(**target.where, gated=gated)
    if target.revision not in (None, MAIN):
        with target.explained(f"making the branch {target.revision} of {target.id}"):
            api.create_branch(**target.where, branch=str(target.revision), exist_ok=True)
    return target


def push_files(
    target: Repository, folder: str | Path, files: Mapping[str, Path], message: str, *, path_in_repo: str = ""
) -> CommitInfo:
    """
    Upload files and compare each with what the Hub says it holds.

    Files that are there already, unchanged, are not sent again, so a push that failed continues where it stopped.

    Args:
        target ([`Repository`]):
            As [`open_repository`] returned it.
        folder (`str` or `Path`):
            Holds the files.
        files (`Mapping[str, Path]`):
            Path in `folder` to file, as [`run_files`] chooses them.
        message (`str`):
            Title of the commit.
        path_in_repo (`str`, *optional*):
            Folder of the repository.

    Returns:
        `huggingface_hub.CommitInfo`: the last commit.

    Raises:
        PushError: if the upload fails, if a file holds a token, or if the Hub holds something else than was sent.
    """
    token = target.token or get_token()
    refuse_secrets(files, [token])
    api = HfApi(token=target.token)
    commit: CommitInfo | None = None
    failure: PushError | None = None
    try:
        with target.explained(f"uploading {folder} to {target.id}"):
            commit = api.upload_folder(
                **target.where,
                folder_path=folder,
                path_in_repo=path_in_repo,
                commit_message=message,
                revision=target.revision,
                allow_patterns=_patterns(files),
            )
    except PushError as error:
        failure = error
    # An answer can be lost on the way back although the commit was made: what the Hub holds decides.
    wrong = _differences(api, target, files, path_in_repo, failure)
    if failure is not None and (wrong or not files):
        raise failure
    if wrong:
        raise PushError(
            f"The push to {target.id} arrived damaged: {', '.join(wrong[:5])} differ"
            f"{'s' if len(wrong) == 1 else ''} from the local file{'' if len(wrong) == 1 else 's'}. "
            f"{target.resume or 'Push again.'}"
        )
    if commit is None:
        logger.warning("The Hub's answer to the commit was lost, but %s holds every file.", target.id)
        with target.explained(f"reading {target.id}"):
            info = api.repo_info(**target.where, revision=target.revision)
            prefix = "" if target.kind == "model" else "datasets/"
            commit = CommitInfo(
                commit_url=f"{api.endpoint}/{prefix}{target.id}/commit/{info.sha}",
                commit_message=message,
                commit_description="",
                oid=str(info.sha),
            )
    return commit


def _patterns(files: Mapping[str, Path]) -> list[str]:
    """Return patterns that match these files alone; brackets keep the signs of patterns in names literal."""
    return ["".join(f"[{sign}]" if sign in "*?[" else sign for sign in path) for path in files]


def _differences(
    api: HfApi, target: Repository, files: Mapping[str, Path], path_in_repo: str, failure: PushError | None
) -> list[str]:
    """Return the files that the Hub lacks or holds with other content; all of them where it cannot be asked."""
    prefix = f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    local = {f"{prefix}{path}": file for path, file in files.items()}
    held: dict[str, RepoFile] = {}
    names = list(local)
    try:
        with target.explained(f"comparing what {target.id} holds with {len(files)} local files"):
            for start in range(0, len(names), _BATCH):
                part = names[start : start + _BATCH]
                for item in api.get_paths_info(**target.where, paths=part, revision=target.revision):
                    if isinstance(item, RepoFile):
                        held[item.path] = item
    except PushError:
        if failure is None:
            raise
        return names
    return [name for name, file in local.items() if name not in held or not _same(file, held[name])]


def _same(file: Path, held: RepoFile) -> bool:
    size = file.stat().st_size
    if held.size != size:
        return False
    # Large files are named by their SHA-256, the others by git's SHA-1 over a header and the content.
    digest = hashlib.sha256() if held.lfs is not None else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest() == (held.lfs.sha256 if held.lfs is not None else held.blob_id)


def push_run(
    target: Repository,
    folder: str | Path,
    message: str,
    *,
    strategy: Strategy = "end",
) -> CommitInfo:
    """
    Push a run's folder, and its checkpoints where the strategy asks for them.

    Args:
        target ([`Repository`]):
            As [`open_repository`] returned it.
        folder (`str` or `Path`):
            Output folder of a run.
        message (`str`):
            Title of the commit.
        strategy (`str`, *optional*, defaults to `"end"`):
            Trainer's `hub_strategy`: `"checkpoint"` adds the newest checkpoint as `last-checkpoint`,
            `"all_checkpoints"` every one under its name, with optimizer and random states.

    Returns:
        `huggingface_hub.CommitInfo`: the commit of the run's files.

    Raises:
        PushError: if there is nothing to push, or as [`push_files`] does.
    """
    commit = push_files(target, folder, run_files(folder), message)
    saved = checkpoints(folder)
    chosen = {"checkpoint": saved[-1:], "all_checkpoints": saved}.get(strategy, [])
    for checkpoint in chosen:
        name = "last-checkpoint" if strategy == "checkpoint" else checkpoint.name
        push_files(
            target, checkpoint, checkpoint_files(checkpoint), f"{message}, {checkpoint.name}", path_in_repo=name
        )
    return commit


def resume_command(
    folder: str | Path,
    repository: str,
    kind: Literal["model", "dataset"] = "model",
    revision: str | None = None,
    strategy: Strategy = "end",
) -> str:
    """Return the sentence that says how a push goes on."""
    words = ["tgol", "push", str(folder), f"--hub_{kind}_id", repository]
    words += ["--revision", revision] if revision not in (None, MAIN) else []
    words += ["--hub_strategy", strategy] if strategy in ("checkpoint", "all_checkpoints") else []
    return f"Nothing is lost: `{shlex.join(map(str, words))}` pushes {folder} again and sends only what is missing."
