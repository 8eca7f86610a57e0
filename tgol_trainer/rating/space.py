"""Make a Space on the Hub that serves the rating page: this package, a Dockerfile and the command."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from tgol_trainer.saving.hub import Repository, push_files

logger = logging.getLogger(__name__)

PORT = 7860
_PACKAGE = Path(__file__).parents[1]
_NOT_NEEDED = {"__pycache__", "pipeline", "masked_pipeline"}  # the embedded models' weights
_RUN = "import sys; from tgol_trainer.cli import main; sys.exit(main())"
_README = """---
title: Rate images
sdk: docker
app_port: {port}
pinned: false
datasets: [{dataset}, {ratings}]
---
The page of `tgol rate` for [{dataset}](https://huggingface.co/datasets/{dataset}). Ratings go to
[{ratings}](https://huggingface.co/datasets/{ratings}).
"""
_DOCKERFILE = """FROM python:{python}-slim
RUN useradd --create-home --uid 1000 user
USER user
ENV PATH=/home/user/.local/bin:$PATH PYTHONPATH=/home/user/app PYTHONUNBUFFERED=1
WORKDIR /home/user/app
COPY --chown=user requirements.txt .
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -r requirements.txt
COPY --chown=user . .
CMD {command}
"""


def write_space(folder: Path, dataset: str, ratings: str, options: Sequence[str]) -> None:
    """
    Write the files of a Space.

    Args:
        folder (`Path`): An empty folder.
        dataset (`str`): Hub id of what is rated.
        ratings (`str`): Hub id of the dataset that gets the ratings.
        options (`Sequence[str]`): Further options of `tgol rate`.
    """
    command = ["python", "-c", _RUN, "rate", dataset, "--host", "0.0.0.0", "--port", str(PORT)]  # noqa: S104 - a container
    command += ["--output_dir", "ratings", "--push_to_hub", "--hub_dataset_id", ratings, *options]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    names = {"dataset": dataset, "ratings": ratings}
    (folder / "README.md").write_text(_README.format(port=PORT, **names), encoding="utf-8")
    (folder / "Dockerfile").write_text(
        _DOCKERFILE.format(python=python, command=json.dumps(command)), encoding="utf-8"
    )
    (folder / "requirements.txt").write_text("\n".join(_requirements()) + "\n", encoding="utf-8")
    for source in sorted(_PACKAGE.rglob("*")):
        path = source.relative_to(_PACKAGE)
        if source.is_file() and not _NOT_NEEDED & set(path.parts):
            (folder / "tgol_trainer" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / "tgol_trainer" / path)


def _requirements() -> list[str]:
    """Return what the package and the page need, at the versions that are installed here."""
    wanted = [line for line in importlib.metadata.requires("tgol_trainer") or [] if "extra ==" not in line]
    names = [re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0] for line in wanted]
    names += ["starlette", "uvicorn"]
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in dict.fromkeys(names)]


def push_space(
    target: Repository, dataset: str, ratings: str, options: Sequence[str], secret: str | None
) -> CommitInfo:
    """
    Write the files of a Space and push them.

    Args:
        target ([`hub.Repository`]): As [`hub.open_repository`] returned it, of kind `"space"`.
        dataset (`str`), ratings (`str`), options (`Sequence[str]`): As in [`write_space`].
        secret (`str`, *optional*):
            Token that may read `dataset` and write to `ratings`; it becomes the Space's secret HF_TOKEN.

    Returns:
        `huggingface_hub.CommitInfo`

    Raises:
        PushError: if the push fails.
    """
    with tempfile.TemporaryDirectory() as draft:
        folder = Path(draft)
        write_space(folder, dataset, ratings, options)
        if secret is not None:  # before the files: they start the Space
            with target.explained(f"setting the secret HF_TOKEN of {target.id}"):
                HfApi(token=target.token).add_space_secret(target.id, "HF_TOKEN", secret)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        return push_files(target, folder, files, f"Rate {dataset}")
