"""The documentation agrees with the code: keys, links, commands, names."""

import re

import pytest
import yaml

from tests import ROOT
from tgol_trainer.cli import COMMANDS
from tgol_trainer.config import TGOLConfig
from tgol_trainer.families import FAMILIES
from tgol_trainer.metrics import LOGGED_METRICS
from tgol_trainer.sampling import DRIFT_METRICS, SAMPLE_METRICS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = sorted((ROOT / "scripts" / "configs").glob("*.yaml"))


def test_the_page_of_metrics_lists_exactly_the_logged_keys_with_their_meaning():
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(\S+)` \| (.+) \|$", text, re.MULTILINE))
    assert rows == {**LOGGED_METRICS, **SAMPLE_METRICS, **DRIFT_METRICS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_parse_and_import_names_that_exist(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, page.name, "exec")
        for line in re.findall(r"^from tgol_trainer.* import .*$", block, re.MULTILINE):
            exec(line, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_settings_named_in_prose_exist(page):
    text = page.read_text()
    for command in re.findall(r"\btgol (\w+)", text):
        assert command in COMMANDS, command
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z][\w-]+)`", text):
        assert target in targets, target


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_settings_files_hold_only_known_fields(path):
    from dataclasses import fields

    from tgol_trainer.cli.model import ModelArguments
    from tgol_trainer.cli.train import SampleArguments, TrainArguments

    known = {
        item.name for kind in (TGOLConfig, ModelArguments, TrainArguments, SampleArguments) for item in fields(kind)
    }
    assert set(yaml.safe_load(path.read_text())) <= known


def test_the_page_of_families_states_what_the_code_does():
    rows = {}
    for line in (ROOT / "docs" / "families.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == 7:
            rows[cells[0].strip("` ")] = cells
    assert set(rows) == set(FAMILIES)
    for name, family in FAMILIES.items():
        # Wan 2.2 has two, and a run trains one.
        assert re.findall(r"`([^`]+)`", rows[name][2])[0] == family.denoiser_name
        assert tuple(re.findall(r"`([^`]+)`", rows[name][5])) == family.default_target_modules


RUN = {"model_name_or_path", "dataset_name", "output_dir", "model_init_kwargs", "activation_checkpointing"}
RUN |= {"dataset_num_proc", "dataloader_num_workers", "logging_steps", "save_strategy"}


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_each_value_of_a_settings_file_names_its_source(path):
    """What concerns the machine and the run needs none; shapes.yaml is the quickstart's as a whole."""
    lines = [line for line in path.read_text().splitlines() if re.match(r"\s*\w+:", line)]
    bare = {line.split(":")[0].strip() for line in lines if "  # " not in line}
    assert bare <= RUN or path.stem == "shapes"


def test_the_readmes_table_has_a_row_for_each_family_and_tells_how_it_is_loaded():
    from tests.pipelines import TINY, load_lora

    table = re.search(r"## What works\n\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)[1].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len(rows) == len(FAMILIES) and {len(cells) for cells in rows} == {len(head)}
    loaded = {type(facts.build()).__name__: facts.load is load_lora for facts in TINY.values()}
    loaded.setdefault("KolorsPipeline", True)  # built where sentencepiece is installed
    says = [cells[head.index("`pipe.load_lora_weights`")] == "yes" for cells in rows]
    assert sorted(says) == sorted(loaded[name] for name in FAMILIES)
