"""Metadata and build. The wheel gets its copy of `model_card_template.md` here; the root keeps the only other one."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "tgol_trainer/__init__.py").read_text(), re.MULTILINE)[1]


class BuildWithTemplate(build_py):
    """Copy the card template beside the modules of a built package; an editable install reads it at the root."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            shutil.copy(ROOT / "model_card_template.md", Path(self.build_lib) / "tgol_trainer")


FORMATS = ["pillow-heif>=1.1", "pillow-jxl-plugin>=1.3"]
REWARDS = ["ftfy>=6.2"]
RANKING = ["choix>=0.4"]
RATE = ["starlette>=0.47", "uvicorn>=0.35"]
QUANTIZATION = ["bitsandbytes>=0.50"]
VIDEO = ["av>=14.1"]
NOTEBOOKS = ["ipykernel>=6.29", "ipywidgets>=8.1", "nbclient>=0.10", "nbformat>=5.10"]
DEVELOPMENT = [
    "build>=1.2",
    "hypothesis>=6.100",
    "mypy>=1.18",
    "pytest>=8.4",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.8",
    "ruff>=0.14",
]
DEVELOPMENT += ["scipy>=1.13", "sentencepiece>=0.2.1", "tensorboard>=2.20", "types-PyYAML", "types-tqdm"]

setup(
    name="tgol_trainer",
    version=VERSION,
    description="Align visual generative models from unpaired scores with threshold-guided optimization (TGO).",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["tgol_trainer", "tgol_trainer.*"]),
    package_data={
        "tgol_trainer.evaluation.report": ["report.*"],
        "tgol_trainer.rating": ["page/*"],
        "tgol_trainer.shapes": ["*pipeline/*.json", "*pipeline/*/*.json", "*pipeline/*/*.safetensors"],
    },
    cmdclass={"build_py": BuildWithTemplate},
    # Lower bounds are what `make test-min` installs, but for torch, which is only tested at its pinned version.
    install_requires=[
        "accelerate>=1.13",
        "datasets>=5.0",
        "diffusers>=0.41",
        "huggingface_hub>=1.33",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "pandas>=2.3",
        "peft>=0.20",
        "pillow>=11.3",
        "pyarrow>=21.0",
        "pyyaml>=6.0",
        "safetensors>=0.8",
        "torch>=2.9",
        "tqdm>=4.66",
        "transformers>=5.18",
        "trl>=1.10",
        "xxhash>=3.5",
    ],
    extras_require={
        "formats": FORMATS,
        "quantization": QUANTIZATION,
        "ranking": RANKING,
        "rate": RATE,
        "rewards": REWARDS,
        "video": VIDEO,
        "notebooks": NOTEBOOKS,
        "dev": [*QUANTIZATION, *RANKING, *RATE, *REWARDS, *VIDEO, *NOTEBOOKS, *DEVELOPMENT],
    },
    entry_points={"console_scripts": ["tgol = tgol_trainer.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
