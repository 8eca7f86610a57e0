"""Recipes: a recipe sets defaults, a settings file overrides them, and flags override both."""

import json

import pytest
from trl import TrlParser

from tgol_trainer import TGOLConfig
from tgol_trainer.cli import main
from tgol_trainer.cli.recipes import parse_flags
from tgol_trainer.cli.train import TrainArguments
from tgol_trainer.config import RECIPES, MethodArguments


@pytest.fixture
def parsed(tmp_path):
    def parse(*flags, file=None):
        if file is not None:
            (tmp_path / "settings.yaml").write_text(file)
            flags = ("--config", str(tmp_path / "settings.yaml"), *flags)
        flags = [*flags, "--use_cpu", "true", "--output_dir", str(tmp_path)]
        return parse_flags(TrlParser((TrainArguments, TGOLConfig)), flags)[1]

    return parse


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_fields_in_python_and_on_the_command_line(parsed, tmp_path, name):
    settings = {"use_cpu": True, "output_dir": str(tmp_path)}
    written = TGOLConfig(**RECIPES[name], **settings).to_dict()
    assert TGOLConfig.from_recipe(name, **settings).to_dict() == written
    assert parsed("--recipe", name).to_dict() == parsed(f"--recipe={name}").to_dict() == written
    assert set(RECIPES[name]) <= set(MethodArguments.__dataclass_fields__)


def test_the_recipe_of_the_paper_is_the_defaults(parsed):
    assert parsed("--recipe", "paper").to_dict() == parsed().to_dict()


def test_a_file_overrides_a_recipe_and_flags_override_both(parsed):
    file = "recipe: anchored\nanchor: 0.2\ngroup_statistic: percentile\n"
    found = parsed(file=file)
    assert (found.loss_type, found.anchor, found.group_statistic) == ("tgol_anchored", 0.2, "percentile")
    found = parsed("--anchor", "0.3", "--group_statistic", "mean", file=file)
    assert (found.loss_type, found.anchor, found.group_statistic) == ("tgol_anchored", 0.3, "mean")
    assert parsed("--recipe", "paper", file="recipe: anchored\n").loss_type == "tgol"
    found = TGOLConfig.from_recipe("anchored", loss_type="kto", value_baseline=False, use_cpu=True)
    assert (found.loss_type, found.threshold_strategy) == ("kto", "group")


def test_label_shows_the_labels_of_a_recipe(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,score\n" + "".join(f"p{i % 3},{i * i % 17}\n" for i in range(24)))
    shown = []
    for flags in (["--recipe", "anchored"], [f"--{name}={value}" for name, value in RECIPES["anchored"].items()]):
        data = ["--dataset_name", str(tmp_path / "rows.csv")]
        assert main(["label", *data, *flags, "--output_dir", str(tmp_path / "out")]) == 0
        shown.append(json.loads((tmp_path / "out" / "label.json").read_text()))
    assert shown[0]["threshold"] == shown[1]["threshold"] and shown[0]["weights"] == shown[1]["weights"]
    assert shown[0]["threshold"]["source"] == "group"


@pytest.mark.parametrize("command", ["label", "train", "plan"])
def test_a_recipe_that_nobody_knows_is_refused_with_the_names(capsys, command):
    with pytest.raises(SystemExit, match="--recipe: `recipe` must be one of paper, anchored, got 'best'"):
        main([command, "--recipe", "best"])
    with pytest.raises(ValueError, match="one of paper, anchored"):
        TGOLConfig.from_recipe("best")
