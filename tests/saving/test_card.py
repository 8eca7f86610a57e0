"""The model card: what it states, what it hides, and that a person's edits outlive every rewrite."""

import ast
import dataclasses
import enum
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from tests import ROOT
from tgol_trainer.saving.card import (
    SECTIONS,
    CardFacts,
    CardImage,
    DatasetCardFacts,
    DatasetFacts,
    EvaluationRow,
    ExportRow,
    Hyperparameter,
    SharedFile,
    read_facts,
    render_card,
    update_card,
    write_card,
    write_dataset_card,
)
from tgol_trainer.saving.card import rendering as card

TOKEN = "hf_" + "a1B2c3D4e5" * 3
USAGE = """import torch


pipe = load("me/shapes-tgol")
text = '''a
```
b'''
"""

HOSTILE = {
    "heading": "fine\n# Owned\n## Owned too",
    "setext": "Owned\n=====\n-----",
    "table": "a | b | c\n|---|---|\n| d | e | f |",
    "escaped pipe": "a \\| b \\\\| c |",
    "link": "x](https://evil.example) [y](https://evil.example) ![z](https://evil.example/z.png)",
    "autolink": "<https://evil.example>",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)></details>",
    "comment": "--> <!-- tgol:end title -->\n<!-- tgol:end title -->\n<!-- tgol:sections title usage -->",
    "marker": "<!-- tgol:begin limits 00000000 -->\nforged\n<!-- tgol:end limits -->",
    "backticks": "` `` ``` ```` `end",
    "fence": "\n```\nforged\n```\n~~~\nforged",
    "emphasis": "*a* **b** _c_ __d__ ~~e~~ $x$ $$y$$",
    "jinja": "{{ 7 * 7 }}{% for x in y %}{# c #}{{ self.__init__.__globals__ }}",
    "entity": "&lt;b&gt; &#60;i&#62;",
    "list": "- one\n* two\n1. three\n+ four",
    "number": "1. first",
    "quote": "> quoted",
    "rule": "---\n***\n___",
    "front matter": "x\n---\nlicense: stolen\n---\n",
    "reference": "[a]: https://evil.example",
    "yaml": "'\" : {a: [b, &c *d !!python/object:os.system",
    "separators": "a\u2028# b\u2029# c\x85# d\x0b# e\x0c# f\r# g",
    "controls": "a\x00b\x1b[31mc\u202ed\ud800e",
    "backslash": "ends in \\",
    "empty": "",
}


def full_facts() -> CardFacts:
    return CardFacts(
        model_name="shapes-tgol",
        hub_model_id="me/shapes-tgol",
        base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        base_model_revision="451f4fe16113",
        pipeline_class="StableDiffusionPipeline",
        license="apache-2.0",
        license_name="ignored without `other`",
        datasets=[DatasetFacts("me/scored-shapes", "f00dfeed", 12345, 6, ["prompt", "image", "score"])],
        threshold={
            "value": 0.28125,
            "source": "percentile",
            "percentile": 50.0,
            "num_positive": 6200,
            "num_negative": 6145,
            "num_ties": 17,
            "moved_from": 0.125,
            "normalization": {"method": "zscore", "center": 0.25, "scale": 0.02},
        },
        weights={"mean": 1.25, "max": 9.5, "top_1_percent_share": 0.034, "confidence_scale": 5.0},
        adapter={"r": 16, "lora_alpha": 32, "target_modules": ["to_q", "to_k"], "rank_pattern": None},
        hyperparameters=[
            Hyperparameter("beta", 2.5),
            Hyperparameter("temperature", 0.001, is_default=True),
            Hyperparameter("max_steps", None, is_default=True),
        ],
        training={"steps": 78, "epochs": 1.0, "train_seconds": 7980.4, "loss": 0.6913, "rewards/accuracies": 0.61},
        evaluations=[
            EvaluationRow("HPSv2.1", True, 0.71, (0.604, 0.802), 0.2469, 0.286, 100, 400),
            EvaluationRow("CLIP", False, 0.5, (0.4, 0.6), 0.31, 0.311, 100, 400),
        ],
        evaluation_note="95% Wilson intervals, seed 0.",
        pictures=[CardImage("images/grid.png", "Before on the left, after on the right", "a red circle")],
        example_prompt="a red circle",
        usage=USAGE,
        files=[
            SharedFile("pytorch_lora_weights.safetensors", "diffusers", "ComfyUI loads nothing."),
            SharedFile("a_comfyui.safetensors", "ComfyUI", "diffusers reads it.", "read back"),
        ],
        exports=[
            ExportRow("comfyui", ["a.safetensors"], "float32", 0.5, 96, True, 0.00000018, 0.132, 0.0, "Copy it.")
        ],
        hardware="1 NVIDIA T4",
        versions={"torch": "2.13.0", "diffusers": "0.42.0"},
        limits=["Trained on drawings of three shapes only."],
        created="2026-05-06",
    )


def hostile_facts(text: str) -> CardFacts:
    return CardFacts(
        model_name=text,
        hub_model_id=text,
        base_model=text,
        base_model_revision=text,
        base_model_note=text,
        pipeline_class=text,
        pipeline_tag=text,
        license=text,
        license_name=text,
        license_link=text,
        datasets=[DatasetFacts(text, text, 3, 1, [text, "score"])],
        threshold={"value": 1.0, "source": text, text: text, "normalization": {"method": text, "center": text}},
        weights={"mean": text, "max": text},
        adapter={"r": text, text: [text, {text: text}]},
        hyperparameters=[Hyperparameter(text, text), Hyperparameter(text, {text: [text]}, is_default=True)],
        training={"steps": text, text: text, "loss": text, "train_seconds": text},
        evaluations=[EvaluationRow(text, True, 0.5, (0.4, 0.6), 1.0, 2.0, 3, 4), EvaluationRow(text, win_rate=0.5)],
        evaluation_note=text,
        pictures=[CardImage("images/a b(1).png", text, text)],
        example_prompt=text,
        files=[SharedFile(text, text, text), SharedFile(text, "ComfyUI", text, text)],
        exports=[ExportRow(text, [text, text], text, 0.5, 3, False, 0.1, 0.2, 0.3, text), ExportRow(text)],
        usage=f"prompt = {text!r}\n" + text.replace("\ud800", ""),
        hardware=text,
        versions={text: text},
        limits=[text, text],
        created=text,
    )


@functools.cache
def full_card() -> str:
    return render_card(full_facts())


def section(text: str, name: str) -> str:
    return re.search(rf"(?ms)^<!-- tgol:begin {name} \w+ -->\n(.*?)^<!-- tgol:end {name} -->$", text)[1]


def section_names(text: str) -> list[str]:
    return re.findall(r"(?m)^<!-- tgol:begin (\w+) ", text)


@functools.cache
def markdown_parser():
    markdown_it = pytest.importorskip("markdown_it")
    return markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])


@functools.cache
def structure(hostile: str) -> list:
    """Block tokens, links, images, emphasis and HTML of a card whose every fact is this text."""
    found = []
    for token in markdown_parser().parse(render_card(hostile_facts(hostile)).split("\n---\n", 1)[1]):
        if token.type == "html_block":
            found.append(re.sub("[0-9a-f]{8}|tgol:metadata.*", "", token.content).strip())
        elif token.type == "inline":
            wanted = {"link_open", "image", "em_open", "strong_open", "s_open"}
            found += [child.type for child in token.children if child.type in wanted]
            html = {child.content for child in token.children if child.type == "html_inline"}
            assert html <= {"<code>", "</code>"}
        else:
            found.append((token.type, token.tag, token.info))
    return found


def metadata(text: str) -> dict:
    return ModelCard(text).data.to_dict()


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (text.count(old), old)
    path.write_text(text.replace(old, new), encoding="utf-8")


# What the card states


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("title", "# shapes-tgol\n"),
        ("title", "LoRA adapter for [`stable-diffusion-v1-5/stable-diffusion-v1-5`](https://huggingface.co/stable"),
        ("title", "revision `451f4fe16113` (pipeline `StableDiffusionPipeline`)."),
        ("title", "https://arxiv.org/abs/2605.04653"),
        ("pictures", "![Before on the left, after on the right](images/grid.png)"),
        ("pictures", "Prompt: a red circle"),
        (
            "threshold",
            "[`me/scored-shapes`](https://huggingface.co/datasets/me/scored-shapes) | `f00dfeed` | 12,345 | 6 |",
        ),
        ("threshold", "`prompt`, `image`, `score` |"),
        ("threshold", "τ = 0.28125, source `percentile`, percentile 50."),
        ("threshold", "6,200 positive and 6,145 negative; 17 scores equal τ."),
        ("threshold", "The percentile itself, 0.125, left no sample on the negative side"),
        ("threshold", "by `zscore`, center 0.25, scale 0.02; τ is in normalised units."),
        ("threshold", "c = 5; mean 1.25; maximum 9.5; the largest 1% of the weights carry 3.4% of the total."),
        ("evaluation", "| HPSv2.1 | **yes** | 71.0% (60.4% to 80.2%) | 0.2469 | 0.286 | 100 | 400 |"),
        ("evaluation", "| CLIP | no | 50.0% (40.0% to 60.0%) | 0.31 | 0.311 | 100 | 400 |"),
        ("evaluation", "Not used in training: `CLIP`."),
        ("evaluation", "Note: 95% Wilson intervals, seed 0."),
        ("hyperparameters", "| `target_modules` | to_q, to_k |"),
        ("hyperparameters", "| `beta` | 2.5 |"),
        ("hyperparameters", "| `temperature` | 0.001 |"),
        ("hyperparameters", "| `max_steps` | None |"),
        ("training", "Optimizer steps: 78\n"),
        ("training", "7,980 s (2.2 h)\n"),
        ("training", "| `rewards/accuracies` | 0.61 |"),
        ("training", "The loss does not measure progress."),
        ("training", "Hardware: 1 NVIDIA T4"),
        ("training", "`torch` 2.13.0, `diffusers` 0.42.0"),
        ("training", "Card written: 2026-05-06"),
        ("limits", "* Trained on drawings of three shapes only."),
        (
            "exports",
            "| `comfyui` | `a.safetensors` | float32 | 0.5 | 96, none unmatched | bit for bit | 1.8e-07 | 0.13 |",
        ),
        ("exports", "`comfyui`: Copy it."),
        ("citation", "Threshold-Guided Optimization for Visual Generative Models"),
        ("citation", "@software{tgol_trainer,"),
    ],
)
def test_a_fact_stands_in_its_section(name, expected):
    assert expected in section(full_card(), name)


def test_sections_come_in_the_order_of_the_template():
    assert section_names(full_card()) == list(SECTIONS) == list(card._template().blocks)


def test_only_non_default_hyperparameters_stand_outside_the_fold():
    text = section(full_card(), "hyperparameters")
    unfolded, folded = text.split("<details>")
    assert "`beta`" in unfolded
    assert "`beta`" not in folded
    assert "`temperature`" in folded
    assert "`temperature`" not in unfolded
    assert "rank_pattern" not in text


@pytest.mark.parametrize(
    ("emptied", "gone"),
    [
        ({"pictures": []}, "pictures"),
        ({"usage": ""}, "usage"),
        ({"exports": []}, "exports"),
        ({"datasets": [DatasetFacts()], "threshold": {"value": None}, "weights": {}}, "threshold"),
        ({"evaluations": [], "evaluation_note": None}, "evaluation"),
        ({"adapter": {"r": None}, "hyperparameters": [Hyperparameter("hub_token", "x")]}, "hyperparameters"),
        ({"training": {"loss": None}, "hardware": None, "versions": {}, "created": None}, "training"),
        ({"limits": []}, "limits"),
    ],
)
def test_a_section_without_facts_leaves_nothing_behind(emptied, gone):
    before, after = full_card(), render_card(dataclasses.replace(full_facts(), **emptied))
    heading = section(before, gone).strip().split("\n")[0]
    assert heading.startswith("## ")
    assert heading in before
    assert heading not in after
    assert section_names(after) == [name for name in SECTIONS if name != gone]


def test_a_card_without_facts_is_valid_and_has_a_title_and_the_citation():
    text = render_card(CardFacts())
    assert section_names(text) == ["title", "citation"]
    assert "# TGO adapter\n" in text
    assert "Base model: not recorded." in text
    data = metadata(text)
    assert data == {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": data["tags"]}
    assert data["tags"] == ["lora", "tgol", "trl", "text-to-image"]


def test_a_base_without_hub_id_is_described_by_its_note():
    note = "the shapes model embedded in tgol_trainer"
    text = render_card(CardFacts(base_model_note=note))
    assert f"Base model: {note}" in text
    assert "base_model" not in metadata(text)


@pytest.mark.parametrize(
    ("changes", "sentence", "relation"),
    [
        ({}, "This is a LoRA adapter for [`o/b`]", "adapter"),
        ({"full_finetuning": True}, "These are fine-tuned weights for [`o/b`]", "finetune"),
        (
            {"merged": True},
            "complete pipeline with a LoRA adapter merged into its weights made from [`o/b`]",
            "finetune",
        ),
        ({"merged": True, "full_finetuning": True}, "pipeline with fine-tuned weights made from [`o/b`]", "finetune"),
    ],
)
def test_the_card_says_what_the_folder_holds_and_how_it_relates_to_its_base(changes, sentence, relation):
    text = render_card(CardFacts(base_model="o/b", **changes))
    assert sentence in text
    data = metadata(text)
    assert data["base_model_relation"] == relation
    assert data["tags"] == [*(["lora"] if relation == "adapter" else []), "tgol", "trl", "text-to-image"]


def test_name_and_link_of_a_license_are_metadata_of_other_alone():
    named = {"license_name": "flux-1-dev", "license_link": "https://example.org/LICENSE.md"}
    data = metadata(render_card(CardFacts(license="other", **named)))
    assert {key: data[key] for key in named} == named
    assert not set(named) & set(metadata(render_card(CardFacts(license="mit", **named))))
    assert not {*named, "license"} & set(metadata(render_card(CardFacts(**named))))


def test_without_an_untrained_score_the_card_says_so():
    facts = dataclasses.replace(full_facts(), evaluations=[EvaluationRow("HPSv2.1", trained=True, win_rate=0.7)])
    text = section(render_card(facts), "evaluation")
    assert "Every score in this table was used in training." in text
    assert "| HPSv2.1 | **yes** | 70.0% | – | – | – | – |" in text


def test_the_loss_remark_needs_a_loss():
    facts = dataclasses.replace(full_facts(), training={"rewards/accuracies": 0.6})
    assert "does not measure progress" not in render_card(facts)


def test_the_usage_snippet_is_shown_as_given_and_still_parses():
    text = section(full_card(), "usage")
    source = re.search(r"(?ms)^(`{4,})python\n(.*?)\n\1$", text)[2]
    assert source == USAGE.rstrip("\n")
    ast.parse(source)


def test_facts_are_json_serialisable_whatever_numbers_they_hold():
    class Kind(str, enum.Enum):
        LINEAR = "linear"

    facts = CardFacts(
        hyperparameters=[
            Hyperparameter("a", np.float64(0.1)),
            Hyperparameter("b", np.int64(3)),
            Hyperparameter("c", float("nan")),
            Hyperparameter("d", Kind.LINEAR),
            Hyperparameter("e", {"x": (1, Path("y"))}),
            Hyperparameter("f", {"to_v", "to_k"}),
            Hyperparameter("g", np.zeros(2)),
            Hyperparameter("h", max),
        ],
        evaluations=[EvaluationRow("s", win_rate=float("nan"), mean_after=np.float32(0.5))],
    )
    data = json.loads(json.dumps(facts.to_dict(), allow_nan=False))
    values = [item["value"] for item in data["hyperparameters"]]
    assert values == [0.1, 3, "nan", "linear", {"x": [1, "y"]}, ["to_k", "to_v"], [0.0, 0.0], "max"]
    text = render_card(facts)
    assert "| `e` | x=1, y |" in text
    assert [result.metric_type for result in ModelCard(text).data.eval_results] == ["mean_score"]


# Metadata


def test_the_metadata_loads_and_survives_a_round_trip_through_the_hub_library():
    text = full_card()
    data = ModelCard(text).data
    assert data.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert data.base_model_relation == "adapter"
    assert data.library_name == "diffusers"
    assert data.license == "apache-2.0"
    assert data.tags == ["lora", "tgol", "trl", "text-to-image"]
    assert data.datasets == ["me/scored-shapes"]
    assert data.widget == [{"text": "a red circle", "output": {"url": "images/grid.png"}}]
    written = yaml.safe_load(text.split("---\n")[1])
    assert ModelCardData(**data.to_dict()).to_dict() == data.to_dict()
    assert {key: data.to_dict()[key] for key in written} == written
    assert "&id" not in text.split("---\n")[1]


def test_the_model_index_becomes_eval_results_that_name_trained_scores():
    data = ModelCard(full_card()).data
    assert data.model_name == "shapes-tgol"
    found = [(result.metric_type, result.metric_value, result.metric_name) for result in data.eval_results]
    assert found == [
        ("win_rate", 0.71, "HPSv2.1 (used in training): win rate against the base model"),
        ("mean_score", 0.286, "HPSv2.1 (used in training): mean"),
        ("win_rate", 0.5, "CLIP (not used in training): win rate against the base model"),
        ("mean_score", 0.311, "CLIP (not used in training): mean"),
    ]
    assert data.eval_results[0].metric_args["interval"] == [0.604, 0.802]
    assert data.eval_results[0].metric_args["trained"] is True


def test_prompts_stay_readable_on_one_line_of_the_metadata():
    prompt = "ein rotes Schloß 城 🏰 " + "sehr " * 40 + "groß"
    text = render_card(CardFacts(pictures=[CardImage("a.png", prompt=prompt)]))
    assert f"- text: {prompt}\n" in text


def test_an_image_path_with_brackets_and_spaces_is_encoded_in_the_link_only():
    text = render_card(CardFacts(pictures=[CardImage("images/a b(1).png", "both")]))
    assert "![both](images/a%20b%281%29.png)" in text
    assert metadata(text)["widget"] == [{"text": "both", "output": {"url": "images/a b(1).png"}}]


@pytest.mark.parametrize(
    ("name", "hub_id", "title"),
    [
        ("SD 1.5 / shapes", None, "SD 1.5 / shapes"),
        ("me/shapes-tgol", None, "shapes-tgol"),
        ("/home/me/runs/shapes-tgol/", "me/other", "shapes-tgol"),
        ("C:\\runs\\shapes-tgol", None, "shapes-tgol"),
        ("", "me/other", "other"),
        ("..", "me/other", "other"),
    ],
)
def test_the_title_is_the_last_part_of_a_path_or_id(name, hub_id, title):
    assert f"\n# {title}\n" in render_card(CardFacts(model_name=name, hub_model_id=hub_id))


LOCAL_PATHS = [
    "/home/alice/private",
    "~/private",
    "./private",
    "../private",
    ".private",
    "C:\\Users\\alice\\private",
    "\\\\server\\private",
    "D:/alice/private",
    "runs/alice/private",
]


@pytest.mark.parametrize("path", LOCAL_PATHS)
def test_a_local_path_never_reaches_the_metadata(path):
    facts = CardFacts(model_name=path, base_model=path, datasets=[DatasetFacts(path, num_rows=3)])
    text = render_card(facts)
    assert "base_model" not in metadata(text)
    assert "datasets" not in metadata(text)
    assert path not in text or path == ".private"  # a bare name, shown as the title
    assert "alice" not in text.split("\n---\n")[0]


def test_a_local_path_among_the_settings_is_replaced_by_a_remark():
    paths = [path for path in LOCAL_PATHS if path != ".private"]
    text = render_card(CardFacts(hyperparameters=[Hyperparameter("nested", {"a": [path]}) for path in paths]))
    assert text.count("| `nested` | a=(a local path) |") == len(paths)
    assert "private" not in text


def test_a_folder_of_this_machine_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "data" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    facts = CardFacts(base_model="data/train", datasets=[DatasetFacts("data/train"), DatasetFacts("data/test")])
    data = metadata(render_card(facts))
    assert "base_model" not in data
    assert data["datasets"] == ["data/test"]


def test_a_dataset_needs_an_owner_and_a_base_model_does_not():
    data = metadata(render_card(CardFacts(base_model="gpt2", datasets=[DatasetFacts("imdb"), DatasetFacts("a/b")])))
    assert data["base_model"] == "gpt2"
    assert data["datasets"] == ["a/b"]


# What the card refuses


@pytest.mark.parametrize(
    "facts",
    [
        CardFacts(usage=f'login(\n"{TOKEN}")\n{TOKEN}'),
        CardFacts(limits=["fine", f"x{TOKEN}"]),
        CardFacts(training={"note": {"deep": [TOKEN]}}),
        CardFacts(versions={TOKEN: "1"}),
        CardFacts(hyperparameters=[Hyperparameter("model_init_kwargs", {"auth": TOKEN})]),
        CardFacts(pictures=[CardImage("a.png", prompt=f"\n{TOKEN}")]),
    ],
)
def test_a_token_anywhere_is_refused_without_being_repeated(facts, tmp_path):
    with pytest.raises(ValueError, match="access token") as error:
        write_card(facts, tmp_path)
    assert TOKEN not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_token_in_the_facts_of_a_dataset_is_refused_without_being_repeated(tmp_path):
    made = [{"model": "o/m", "settings": json.dumps({"auth": TOKEN})}]
    with pytest.raises(ValueError, match=r"DatasetCardFacts\.generators.*access token") as error:
        write_dataset_card(DatasetCardFacts("o/d", 1, {"prompt": "string"}, generators=made), tmp_path)
    assert TOKEN not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_card_of_a_dataset_of_videos_speaks_of_videos_alone(tmp_path):
    columns = dict.fromkeys(["prompt", "video", "seed", "video_index", "model", "revision", "adapter"], "string")
    write_dataset_card(DatasetCardFacts("o/d", 2, columns, generators=[{"model": "o/m"}], video=True), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "image" not in text.lower() and "model that made the videos" in text and "seed of this video" in text


def test_settings_named_like_secrets_are_left_out():
    names = ["hub_token", "push_to_hub_token", "db_password", "client_secret", "token", "Api_Key"]
    settings = [Hyperparameter(name, "hush") for name in names]
    settings += [Hyperparameter("model_init_kwargs", {"token": TOKEN, "dtype": "bfloat16"})]
    settings += [Hyperparameter("hub_token", TOKEN)]
    text = render_card(CardFacts(hyperparameters=settings))
    assert "hush" not in text
    assert "| `model_init_kwargs` | dtype=bfloat16 |" in text
    assert not any(f"`{name}`" in text for name in names)


@pytest.mark.parametrize("path", ["/tmp/a.png", "../a.png", "a/../../b.png", "~/a.png", "a\\b.png", "C:a.png", ""])
def test_an_image_outside_the_folder_is_refused(path):
    with pytest.raises(ValueError, match=r"CardImage\.path"):
        render_card(CardFacts(pictures=[CardImage(path)]))


# Data stays data


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_forges_no_marker_and_no_metadata(text):
    rendered = render_card(hostile_facts(text))
    data = metadata(rendered)
    assert set(data) <= set(metadata(full_card()))
    assert data.get("license") == (" ".join(re.sub("[\x00\x1b\u202e\ud800]", "\ufffd", text).split()) or None)
    names = section_names(rendered)
    assert names == list(SECTIONS)
    assert re.findall(r"(?m)^<!-- tgol:end (\w+) -->$", rendered) == names
    assert len(re.findall(r"(?m)^\s*<!-- tgol:(?:sections|metadata)", rendered)) == 2
    assert "49" not in re.sub(r"tgol:\S+( \S+)* -->", "", rendered)
    rendered.encode("utf-8")
    prose = re.sub(r"(?ms)^(`{3,})python$.*?^\1$", "", rendered)
    assert (
        len(re.findall(r"(?m)^ {0,3}(?:#|={3}|-{3}$)", prose)) == len(SECTIONS) + 2
    )  # headings and the metadata's rules
    for table in re.findall(r"(?m)(?:^\|.*\n)+", prose):
        assert len({row.count("|") for row in table.splitlines()}) == 1


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_survives_a_rewrite_without_growing(text, tmp_path):
    first = write_card(hostile_facts(text), tmp_path).read_bytes()
    assert write_card(hostile_facts(text), tmp_path).read_bytes() == first
    later = write_card(CardFacts(), tmp_path).read_text(encoding="utf-8")
    assert section_names(later) == ["title", "citation"]
    assert "forged" not in later
    assert "wned" not in later


@pytest.mark.parametrize(
    "text", [text for text in HOSTILE.values() if text], ids=[name for name in HOSTILE if HOSTILE[name]]
)
def test_hostile_text_changes_nothing_in_the_structure_of_the_page(text):
    assert structure(text) == structure("no hub id")


def test_text_reads_as_it_was_meant():
    parser = markdown_parser()
    for text in (text for name, text in HOSTILE.items() if name not in ("controls", "empty")):
        wanted = " ".join(text.split())
        tokens = parser.parse(f"| {card.cell(text)} | {card.code(text)} |\n|---|---|\n\n* {card.running_text(text)}\n")
        inline = [token for token in tokens if token.type == "inline"]
        shown = ["".join(child.content for child in token.children if child.type != "html_inline") for token in inline]
        path = card._LOCAL_PATH.match(text)
        assert shown == (["(a local path)"] * 2 if path else [wanted] * 2) + [wanted], text


def test_the_template_cannot_print_data_unescaped():
    environment = card._template().environment
    assert environment.from_string("{{ x }} {{ '<' ~ x }}").render(x="<b>") == "&lt;b&gt; &lt;&lt;b&gt;"
    with pytest.raises(Exception, match="undefined"):
        environment.from_string("{{ y }}").render()


# A person's edits


def changed_facts() -> CardFacts:
    return dataclasses.replace(
        full_facts(),
        base_model_revision="newer",
        training={"steps": 156, "loss": 0.7},
        limits=["Another limit."],
        threshold={"value": 0.5},
    )


def test_an_unchanged_rewrite_changes_no_byte(tmp_path):
    first = write_card(full_facts(), tmp_path).read_bytes()
    assert first.decode() == full_card()
    assert write_card(full_facts(), tmp_path).read_bytes() == first


def test_an_edited_section_stays_and_the_others_follow_over_two_rewrites(tmp_path):
    write_card(full_facts(), tmp_path)
    edit(tmp_path, "* Trained on drawings of three shapes only.", "* I checked: hands are poor.")
    edited = section((tmp_path / "README.md").read_text(encoding="utf-8"), "limits")
    for facts in (changed_facts(), full_facts(), dataclasses.replace(changed_facts(), limits=[])):
        text = write_card(facts, tmp_path).read_text(encoding="utf-8")
        assert section(text, "limits") == edited
        assert f"Optimizer steps: {facts.training['steps']}\n" in text
        assert section_names(text) == list(SECTIONS)


def test_text_between_and_inside_stays_where_it_was(tmp_path):
    write_card(full_facts(), tmp_path)
    edit(tmp_path, "\n<!-- tgol:begin usage", "\n## My story\n\nThree  spaces   stay.\n\n<!-- tgol:begin usage")
    edit(tmp_path, "pipe = load", "pipe = load_mine")
    write_card(changed_facts(), tmp_path)
    text = write_card(changed_facts(), tmp_path).read_text(encoding="utf-8")
    assert text.index("tgol:end pictures") < text.index("Three  spaces   stay.") < text.index("tgol:begin usage")
    assert text.count("## My story") == 1
    assert "pipe = load_mine" in text
    assert "Optimizer steps: 156" in text


def test_a_deleted_section_stays_deleted_and_one_whose_facts_return_comes_back(tmp_path):
    write_card(full_facts(), tmp_path)
    path = tmp_path / "README.md"
    path.write_text(re.sub(r"(?s)<!-- tgol:begin limits.*?tgol:end limits -->\n", "", path.read_text()))
    for facts in (full_facts(), dataclasses.replace(full_facts(), limits=[], usage=""), changed_facts()):
        text = write_card(facts, tmp_path).read_text(encoding="utf-8")
        assert "limits" not in section_names(text)
        assert ("usage" in section_names(text)) == bool(facts.usage)
    assert section_names(text) == [name for name in SECTIONS if name != "limits"]


def test_a_section_whose_markers_alone_were_deleted_is_the_persons(tmp_path):
    write_card(full_facts(), tmp_path)
    path = tmp_path / "README.md"
    path.write_text(re.sub(r"<!-- tgol:(begin|end) training.*?-->\n", "", path.read_text()))
    text = write_card(changed_facts(), tmp_path).read_text(encoding="utf-8")
    assert text.count("## Training\n") == 1
    assert "Optimizer steps: 78\n" in text


def test_new_sections_are_inserted_in_their_order(tmp_path):
    write_card(CardFacts(usage="x = 1"), tmp_path)
    text = write_card(full_facts(), tmp_path).read_text(encoding="utf-8")
    assert section_names(text) == list(SECTIONS)
    path = tmp_path / "README.md"
    write_card(CardFacts(), tmp_path)
    path.write_text(re.sub(r"(?s)<!-- tgol:begin title.*?tgol:end title -->\n", "", path.read_text()))
    text = write_card(full_facts(), tmp_path).read_text(encoding="utf-8")
    assert section_names(text) == list(SECTIONS[1:])


def test_metadata_keys_follow_their_owner(tmp_path):
    write_card(full_facts(), tmp_path)
    edit(tmp_path, "license: apache-2.0\n", "license: openrail  # asked the lawyer\nthumbnail: 0.50\n")
    edit(tmp_path, "pipeline_tag: text-to-image\n", "")
    edit(tmp_path, "- trl\n", "- trl\n- mine\n")
    facts = dataclasses.replace(full_facts(), license="mit", datasets=[DatasetFacts("me/other")], pictures=[])
    for _ in range(2):
        text = write_card(facts, tmp_path).read_text(encoding="utf-8")
        data = metadata(text)
        assert data["license"] == "openrail"
        assert "license: openrail  # asked the lawyer\nthumbnail: 0.50\n" in text
        assert "pipeline_tag" not in data
        assert data["tags"] == ["lora", "tgol", "trl", "mine", "text-to-image"]
        assert data["datasets"] == ["me/other"]
        assert "widget" not in data
    assert "widget" in metadata(write_card(full_facts(), tmp_path).read_text(encoding="utf-8"))


def test_a_generated_key_stays_ours_where_an_older_version_wrote_its_parts_in_another_order(tmp_path):
    path = write_card(full_facts(), tmp_path)
    lines = ("      name: Evaluation prompts\n", "      type: prompts\n")
    edit(tmp_path, "".join(lines), "".join(reversed(lines)))
    path.write_text(re.sub(r"model-index=\w+", "model-index=d9c05dde", path.read_text()))
    write_card(full_facts(), tmp_path)
    text = write_card(dataclasses.replace(full_facts(), model_name="other"), tmp_path).read_text()
    assert metadata(text)["model-index"][0]["name"] == "other"


def test_comments_in_the_metadata_survive_a_replaced_key(tmp_path):
    write_card(full_facts(), tmp_path)
    edit(tmp_path, "datasets:\n", "# about the data\ndatasets:\n# below\n")
    facts = dataclasses.replace(full_facts(), datasets=[DatasetFacts("me/other")], license="mit")
    text = write_card(facts, tmp_path).read_text(encoding="utf-8")
    assert "# about the data\n" in text
    assert "# below\n" in text
    assert metadata(text)["datasets"] == ["me/other"]


@pytest.mark.parametrize(
    "block", ["{license: mit, a: [1]}", "a: &x [1]\nlicense: mit", "# only a comment", "", "'license': \"mit\"\n\n"]
)
def test_any_form_of_metadata_is_kept_and_extended(block, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{block}\n---\nMine.\n")
    text = write_card(full_facts(), tmp_path).read_text(encoding="utf-8")
    data = metadata(text)
    assert data | (yaml.safe_load(block) or {}) == data
    assert data["library_name"] == "diffusers"
    assert "\nMine.\n" in text
    assert write_card(full_facts(), tmp_path).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("block", ["license: [mit", "just words", "- a\n- list"])
def test_metadata_that_cannot_be_read_is_left_alone_with_a_warning(block, tmp_path, caplog):
    (tmp_path / "README.md").write_text(f"---\n{block}\n---\nMine.\n")
    text = write_card(full_facts(), tmp_path).read_text(encoding="utf-8")
    assert text.startswith(f"---\n{block}\n---\n")
    assert section_names(text) == list(SECTIONS)
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize(
    "text", ["# By hand\n\nLine  \nbreak.\n", "---\nlicense: mit\n---\n", "---\nlicense: mit\n---\n\n# By hand\n", ""]
)
def test_a_readme_without_markers_is_kept_and_ours_follows(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    rewritten = write_card(full_facts(), tmp_path).read_text(encoding="utf-8")
    body = text.rpartition("---\n")[2].strip("\n")
    assert body in rewritten.split("<!-- tgol:begin title")[0]
    assert section_names(rewritten) == list(SECTIONS)
    assert metadata(rewritten)["license"] == ("mit" if "mit" in text else "apache-2.0")
    assert write_card(full_facts(), tmp_path).read_text(encoding="utf-8") == rewritten


def test_windows_line_endings_are_understood_and_kept(tmp_path):
    path = write_card(full_facts(), tmp_path)
    edit(tmp_path, "* Trained on drawings of three shapes only.", "* Mine.")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    content = write_card(changed_facts(), tmp_path).read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n")
    text = content.decode().replace("\r\n", "\n")
    assert "* Mine." in text
    assert "Optimizer steps: 156" in text
    assert section_names(text) == list(SECTIONS)


def test_bytes_that_are_no_utf8_and_a_byte_order_mark_do_no_harm(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\ncaf\xe9\n")
    content = write_card(full_facts(), tmp_path).read_bytes()
    assert b"\ncaf\xe9\n" in content
    assert content.startswith(b"---\nlicense: mit\n")


def test_writing_replaces_the_file_in_one_step(tmp_path, monkeypatch):
    path = write_card(full_facts(), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "README.md"
    path.chmod(0o640)
    before = path.read_bytes()

    def fail(source, target):
        raise OSError("disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk is gone"):
            write_card(changed_facts(), path.parent)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["README.md", "card_facts.json"]
    write_card(changed_facts(), path.parent)
    assert path.stat().st_mode & 0o777 == 0o640


# Updates from what a folder holds


def test_facts_come_back_from_the_folder_as_they_were(tmp_path):
    write_card(full_facts(), tmp_path)
    assert dataclasses.replace(read_facts(tmp_path), adapter={}) == dataclasses.replace(full_facts(), adapter={})
    assert read_facts(tmp_path).adapter == {"r": 16, "lora_alpha": 32, "target_modules": ["to_q", "to_k"]}


def test_an_update_gives_the_card_that_a_run_with_these_facts_would_have_had_and_keeps_edits(tmp_path):
    bare = dataclasses.replace(full_facts(), evaluations=[], evaluation_note=None, pictures=[])
    write_card(bare, tmp_path)
    assert "No evaluation of generated images is recorded" in (tmp_path / "README.md").read_text()
    full = full_facts()
    path = update_card(
        tmp_path, evaluations=full.evaluations, evaluation_note=full.evaluation_note, pictures=full.pictures
    )
    text = path.read_text()
    assert {name: section(text, name) for name in SECTIONS} == {name: section(full_card(), name) for name in SECTIONS}
    assert metadata(text) == metadata(full_card())
    edit(tmp_path, "Before on the left", "On the left before")
    text = update_card(tmp_path, evaluations=[EvaluationRow("CLIP", win_rate=0.25)]).read_text()
    assert "| CLIP | no | 25.0% |" in text
    assert "HPSv2.1" not in text
    assert "On the left before" in text


def test_what_is_kept_beside_the_card_holds_no_path_of_this_machine_and_no_secret(tmp_path):
    private = "/home/alice/private/x"
    facts = CardFacts(
        model_name=private,
        hub_model_id=private,
        base_model=private,
        datasets=[DatasetFacts(private, num_rows=3)],
        hyperparameters=[Hyperparameter("model_init_kwargs", {"cache_dir": private, "token": "hush"})],
    )
    write_card(facts, tmp_path)
    text = (tmp_path / "card_facts.json").read_text()
    assert "alice" not in text
    assert "hush" not in text
    assert read_facts(tmp_path).model_name == "x"


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "holds no card_facts"), ("[1]", "cannot be read"), ('{"colour": 1}', "colour")]
)
def test_a_folder_without_readable_facts_is_refused_with_the_remedy(content, problem, tmp_path):
    if content is not None:
        (tmp_path / "card_facts.json").write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=problem) as error:
        update_card(tmp_path, evaluations=[])
    assert "write_card" in str(error.value)


def test_a_change_that_is_no_fact_is_refused(tmp_path):
    write_card(CardFacts(), tmp_path)
    with pytest.raises(TypeError, match="evaluation_table"):
        update_card(tmp_path, evaluation_table=[])


# The module


def test_the_template_is_found_beside_the_module_first_then_at_the_root_else_named(tmp_path, monkeypatch):
    module = tmp_path / "tgol_trainer" / "saving" / "card" / "rendering.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(card, "__file__", str(module))
    with pytest.raises(FileNotFoundError, match=r"model_card_template\.md"):
        card._template_text()
    (tmp_path / "model_card_template.md").write_text("root")
    assert card._template_text() == "root"
    (module.parents[2] / "model_card_template.md").write_text("installed")
    assert card._template_text() == "installed"


def test_importing_the_module_loads_no_torch():
    code = "import sys, tgol_trainer.saving.card; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
