"""What is published: the wheel and its metadata, the pinned versions, and the commands of the repository."""

import ast
import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import ROOT
from tgol_trainer import __version__

pytestmark = pytest.mark.xdist_group("packaging")  # the wheel is built once

CONSTRAINTS = ROOT / "constraints.txt"


def run(command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **{k: str(v) for k, v in environment.items()}},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        pytest.fail(
            f"exit code {done.returncode}\n--- stdout\n{done.stdout[-3000:]}\n--- stderr\n{done.stderr[-3000:]}"
        )
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the repository holds: a build leaves files beside the source."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what belongs to the repository is not known")
    copy = tmp_path_factory.mktemp("packaging") / "source"
    listing = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source):
    target = source.parent / "dist"
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, source], source)
    (file,) = target.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(content):
    (name,) = [name for name in content if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(content[name].decode())


@pytest.fixture(scope="module")
def requirements(metadata):
    """Every requirement of the published package, with its extra or None."""
    found = []
    for line in metadata.get_all("Requires-Dist"):
        extra = re.search(r'extra == "([^"]+)"', line)
        found.append((Requirement(line), extra[1] if extra else None))
    assert len(found) > 10
    return found


# ---- The wheel ----


def test_the_wheel_holds_every_file_of_the_package_as_it_is_and_nothing_else_but_the_template(source, content):
    expected = {str(file.relative_to(source)): file for file in (source / "tgol_trainer").rglob("*") if file.is_file()}
    expected["tgol_trainer/model_card_template.md"] = source / "model_card_template.md"
    inside = {name for name in content if ".dist-info/" not in name}
    assert inside == set(expected)
    assert not [name for name, file in expected.items() if content[name] != file.read_bytes()]


@pytest.mark.parametrize(
    ("folder", "parts"),
    [("pipeline", {"unet", "vae", "text_encoder"}), ("masked_pipeline", {"transformer", "vqvae", "text_encoder"})],
)
def test_the_wheel_holds_the_embedded_models(content, folder, parts):
    inside = f"tgol_trainer/shapes/{folder}/"
    names = [name for name in content if name.startswith(inside) and name.endswith(".safetensors")]
    assert {Path(name).parent.name for name in names} == parts
    assert all(len(content[name]) > 10_000 for name in names)
    assert inside + "model_index.json" in content


def test_the_card_template_of_the_wheel_is_the_one_at_the_root(content):
    assert content["tgol_trainer/model_card_template.md"] == (ROOT / "model_card_template.md").read_bytes()
    assert not (ROOT / "tgol_trainer" / "model_card_template.md").exists()  # the root's is the only copy


def test_the_wheel_carries_the_license_and_says_so(content, metadata):
    licenses = [data for name, data in content.items() if name.endswith("/LICENSE")]
    assert licenses == [(ROOT / "LICENSE").read_bytes()]
    assert (metadata["License-Expression"] or metadata["License"]) == "Apache-2.0"


def test_the_metadata_name_version_command_and_readme(content, metadata):
    assert (metadata["Name"], metadata["Version"]) == ("tgol_trainer", __version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    (commands,) = [data.decode() for name, data in content.items() if name.endswith("entry_points.txt")]
    assert commands.split() == ["[console_scripts]", "tgol", "=", "tgol_trainer.cli:main"]


# ---- An installation outside the checkout ----


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel alone in a folder of its own; what it needs comes from the environment, nothing is downloaded."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "-c", CONSTRAINTS]
    run([*pip, "--target", folder, wheel], folder)
    return folder


def test_an_installed_package_writes_a_card_without_the_checkout(installed, tmp_path):
    program = (
        "import tgol_trainer.saving.card as card\n"
        "print(card.__file__)\n"
        "card.write_card(card.CardFacts(model_name='from-a-wheel', limits=['One limit.']), 'card')\n"
    )
    output = run([sys.executable, "-c", program], tmp_path, PYTHONPATH=installed)
    assert Path(output.strip()) == installed / "tgol_trainer" / "saving" / "card" / "__init__.py"
    card = (tmp_path / "card" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "# from-a-wheel" in card
    assert "One limit." in card


def test_the_installed_command_runs_and_prints_its_version(installed, tmp_path):
    program = (
        "import importlib.metadata, sys\n"
        f"(package,) = importlib.metadata.distributions(name='tgol_trainer', path=[{str(installed)!r}])\n"
        "(command,) = package.entry_points.select(group='console_scripts', name='tgol')\n"
        "main = command.load()\n"
        "print(sys.modules[main.__module__].__file__)\n"
        "sys.exit(main(['--version']))\n"
    )
    file, version = run([sys.executable, "-c", program], tmp_path, PYTHONPATH=installed).splitlines()
    assert file == str(installed / "tgol_trainer" / "cli" / "__init__.py")
    assert version == f"tgol_trainer {__version__}"
    assert run([installed / "bin" / "tgol", "--version"], tmp_path, PYTHONPATH=installed).splitlines() == [version]


# ---- Requirements ----


def pins(file):
    """Name to pinned version, of the lines that hold for this Python."""
    found = {}
    for line in file.read_text().splitlines():
        if not line.split("#")[0].strip():
            continue
        pin = Requirement(line.split("#")[0])
        (exact,) = pin.specifier
        assert exact.operator == "==", line
        if pin.marker is None or pin.marker.evaluate():
            found[canonicalize_name(pin.name)] = exact.version
    return found


def test_what_is_installed_satisfies_every_lower_bound(requirements):
    for requirement, extra in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            assert extra is not None, f"{requirement.name} is not installed"
            continue
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, installed {version}"


def test_every_requirement_has_a_lower_bound_and_no_upper_one(requirements):
    for requirement, extra in requirements:
        operators = {part.operator for part in requirement.specifier}
        stubs = extra is not None and requirement.name.startswith("types-")
        assert operators == (set() if stubs else {">="}), str(requirement)


def test_the_constraints_pin_every_requirement_and_extra_to_a_version_it_allows(requirements):
    pinned = pins(CONSTRAINTS)
    wrong = []
    for requirement, _ in requirements:
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement}, pinned: {version}")
    assert not wrong


def test_the_oldest_versions_tested_are_the_lower_bounds(requirements):
    """But for torch, whose oldest declared version is not tested, and for tools, which may be new."""
    pinned = pins(ROOT / "constraints-min.txt")
    for requirement, extra in requirements:
        name = canonicalize_name(requirement.name)
        if extra is None and name != "torch":
            (bound,) = requirement.specifier
            release = Version(bound.version).release
            assert Version(pinned[name]).release[: len(release)] == release, f"{requirement}, pinned {pinned[name]}"


def test_every_library_that_the_package_imports_is_required(source, requirements):
    required = {canonicalize_name(requirement.name) for requirement, extra in requirements if extra is None}
    optional = {canonicalize_name(requirement.name) for requirement, extra in requirements if extra is not None}
    # Written to where a user has installed one and Trainer reports to it; nothing of ours needs them.
    optional |= {"trackio", "wandb"}
    optional |= {"torchao"}  # of `--torchao`, whose error names it: its version follows that of torch
    providers = importlib.metadata.packages_distributions()
    missing = {}
    for file in (source / "tgol_trainer").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        at_once = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for library in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"tgol_trainer"}:
                offered_by = {canonicalize_name(name) for name in providers.get(library, [library])}
                # An extra's library may only be imported when it is used.
                allowed = required if id(node) in at_once else required | optional
                if not offered_by & allowed:
                    missing[library] = f"{file.relative_to(source)}, line {node.lineno}"
    assert not missing


# ---- The commands of the repository ----


def recipes():
    """Target to its recipe, from the Makefile."""
    found, target = {}, None
    for line in (ROOT / "Makefile").read_text().splitlines():
        if match := re.match(r"^([a-z][\w-]*):(?!=)", line):
            target = match[1]
            found[target] = ""
        elif line.startswith("\t") and target:
            found[target] += line + "\n"
        else:
            target = None
    return found


@pytest.mark.parametrize(
    ("target", "commands"),
    [
        ("quickstart", ["tgol quickstart"]),
        ("test", ["-m pytest"]),
        ("test-min", ["constraints-min.txt", "-m pytest"]),
        ("quality", ["ruff check .", "ruff format --check .", "mypy"]),
        ("style", ["ruff check --fix .", "ruff format ."]),
    ],
)
def test_the_makefile_has_the_target(target, commands):
    recipe = recipes()[target]
    for command in commands:
        assert command in recipe
    phony = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert target in phony


def test_continuous_integration_runs_quality_and_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.stat().st_mode & stat.S_IXUSR
    lines = [line.strip() for line in script.read_text().splitlines()]
    assert lines[0].startswith("#!")
    assert "set -euo pipefail" in lines
    assert {"make quality", "make test"} <= set(lines)


def test_every_installation_names_its_constraints():
    """Without them pip would take the newest torch, gigabytes of it."""
    makefile = (ROOT / "Makefile").read_text()
    installs = [line for line in makefile.splitlines() if "pip install" in line]
    assert len(installs) > 2
    assert not [line for line in installs if "-c constraints" not in line]
    checked = 0
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            words = [part.value for part in getattr(node, "elts", []) if isinstance(part, ast.Constant)]
            if "install" in words and "pip" in words:
                checked += 1
                assert "-c" in words, f"{file.name}, line {node.lineno}"
    assert checked
