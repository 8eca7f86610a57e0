"""Push a folder: make the repository, upload the files, and check that every file arrived."""

from __future__ import annotations

import dataclasses
import glob
import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from .errors import PushError, push_error
from .selection import checkpoint_files, checkpoints, refuse_secrets, run_files

logger = logging.getLogger(__name__)

Gate: TypeAlias = Literal["auto", "manual", False]
"""Who may read the files of a public repository: `"auto"` all who ask, `"manual"` those you let in, False all."""

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
        kind (`str`, *optional*, defaults to `"model"`): `"model"`, `"dataset"` or `"space"` (of Docker).
        revision (`str`, *optional*): Branch. The default is `main`.
        token (`str`, *optional*): Access token. The default is the one of HF_TOKEN or of `hf auth login`.
        resume (`str`, *optional*): The sentence of an error message that says how to continue.
    """

    id: str
    kind: Literal["model", "dataset", "space"] = "model"
    revision: str | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    resume: str | None = None

    def __post_init__(self) -> None:
        if self.token is not None:  # a token read from a file ends with a newline, which cannot be sent
            object.__setattr__(self, "token", self.token.strip() or None)

    @property
    def where(self) -> dict[str, Any]:
        """The arguments that every call of the client takes."""
        return {"repo_id": self.id, "repo_type": self.kind}

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn any failure of the block into a [`PushError`] that says what was tried."""
        try:
            yield
        except PushError:
            raise
        except Exception as error:  # the client raises errors of six libraries; `push_error` explains them
            raise push_error(error, what, token=self.token or get_token(), resume=self.resume)  # noqa: B904


def open_repository(target: Repository, *, private: bool | None = None, gated: Gate | None = None) -> Repository:
    """
    Make a repository and its branch if they do not exist, and check that the token may write to it.

    Args:
        target ([`Repository`]): Where to push. An `id` without an owner gets the owner of the token.
        private (`bool`, *optional*):
            Hide a new repository from others. By default the Hub decides. An existing one keeps its visibility.
        gated (`"auto"`, `"manual"` or `False`, *optional*):
            Ask people for their contact details before they get the files. By default this is left unchanged.

    Returns:
        [`Repository`]: the target with its complete `id`.

    Raises:
        PushError: if the Hub refuses a step, or if a private repository is wanted and a public one exists.
    """
    api = HfApi(token=target.token)
    with target.explained(f"creating the repository {target.id}"):
        sdk = "docker" if target.kind == "space" else None
        made = api.create_repo(target.id, repo_type=target.kind, private=private, space_sdk=sdk, exist_ok=True)
        target = dataclasses.replace(target, id=made.repo_id)
    with target.explained(f"asking for the right to write to {target.id}"):
        api.auth_check(**target.where, write=True)  # now, so that no long work ends in a push that is refused
    if private is not None:
        with target.explained(f"reading the settings of {target.id}"):
            hidden = api.repo_info(**target.where).private
        if private and not hidden:
            raise PushError(
                f"{target.id} exists and is public, and `private=True` has no effect on a repository that exists. "
                "Nothing was uploaded. Make it private in its settings on the Hub, or give another name."
            )
        if hidden and not private:
            logger.warning("%s exists and stays private. You can change that in its settings on the Hub.", target.id)
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

    A file that is already on the Hub unchanged is not sent again, so a failed push continues where it stopped.

    Args:
        target ([`Repository`]): The result of [`open_repository`].
        folder (`str` or `Path`): Folder of the files.
        files (`Mapping[str, Path]`): Each file by its path in `folder`, as [`run_files`] returns them.
        message (`str`): Title of the commit.
        path_in_repo (`str`, *optional*): Folder in the repository.

    Returns:
        `huggingface_hub.CommitInfo`: the last commit.

    Raises:
        PushError: if the upload fails, if a file holds a token, or if a file on the Hub differs from the local one.
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
                allow_patterns=[glob.escape(path) for path in files],
            )
    except PushError as error:
        failure = error
    # The answer to a commit that was made can be lost, so the files on the Hub decide.
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
            prefix = "" if target.kind == "model" else f"{target.kind}s/"
            commit = CommitInfo(
                commit_url=f"{api.endpoint}/{prefix}{target.id}/commit/{info.sha}",
                commit_message=message,
                commit_description="",
                oid=str(info.sha),
            )
    return commit


def _differences(
    api: HfApi, target: Repository, files: Mapping[str, Path], path_in_repo: str, failure: PushError | None
) -> list[str]:
    """Return the files that the Hub lacks or holds with other content. After a failure it may not answer: then all."""
    local = {f"{path_in_repo}/{path}" if path_in_repo else path: file for path, file in files.items()}
    names = list(local)
    held: dict[str, RepoFile] = {}
    try:
        with target.explained(f"comparing the files of {target.id} with {len(files)} local files"):
            for start in range(0, len(names), _BATCH):
                part = names[start : start + _BATCH]
                found = api.get_paths_info(**target.where, paths=part, revision=target.revision)
                held |= {item.path: item for item in found if isinstance(item, RepoFile)}
    except PushError:
        if failure is None:
            raise
        return names
    return [name for name, file in local.items() if name not in held or not _same(file, held[name])]


def _same(file: Path, held: RepoFile) -> bool:
    if held.size != file.stat().st_size:
        return False
    if held.lfs is None:  # a small file, which git names by its SHA-1
        return git_hash(file.read_bytes()) == held.blob_id
    with file.open("rb") as content:
        return sha_fileobj(content).hex() == held.lfs.sha256


def push_run(target: Repository, folder: str | Path, message: str, *, strategy: Strategy = "end") -> CommitInfo:
    """
    Push a run's folder, and its checkpoints if the strategy asks for them.

    Args:
        target ([`Repository`]): The result of [`open_repository`].
        folder (`str` or `Path`): Output folder of a run.
        message (`str`): Title of the commit.
        strategy (`str`, *optional*, defaults to `"end"`):
            Trainer's `hub_strategy`. `"checkpoint"` adds the newest checkpoint as `last-checkpoint`,
            `"all_checkpoints"` adds every one under its name. Both include optimizer and random states.

    Returns:
        `huggingface_hub.CommitInfo`: the commit of the run's files.

    Raises:
        PushError: if there is nothing to push, or as [`push_files`].
    """
    commit = push_files(target, folder, run_files(folder), message)
    saved = checkpoints(folder)
    for checkpoint in {"checkpoint": saved[-1:], "all_checkpoints": saved}.get(strategy, []):
        name = "last-checkpoint" if strategy == "checkpoint" else checkpoint.name
        title = f"{message}, {checkpoint.name}"
        push_files(target, checkpoint, checkpoint_files(checkpoint), title, path_in_repo=name)
    return commit


def resume_command(
    folder: str | Path,
    repository: str,
    kind: Literal["model", "dataset"] = "model",
    revision: str | None = None,
    strategy: Strategy = "end",
) -> str:
    """Return the sentence that says how to continue a push."""
    words = ["tgol", "push", str(folder), f"--hub_{kind}_id", repository]
    words += ["--revision", revision] if revision not in (None, MAIN) else []
    words += ["--hub_strategy", strategy] if strategy in ("checkpoint", "all_checkpoints") else []
    return f"Nothing is lost: `{shlex.join(map(str, words))}` pushes {folder} again and sends only what is missing."
