"""`tgol evaluate`: the same numbers whatever is killed, shared or dropped, for images and videos, and the card."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from pyarrow import parquet

from tests import tiny
from tgol_trainer import adapters, cli
from tgol_trainer.data import DataError
from tgol_trainer.evaluation import compare_models
from tgol_trainer.families import wrap_pipeline
from tgol_trainer.jobs import (
    EvaluationJob,
    GenerationSettings,
    ScoringSettings,
    run_evaluation,
)
from tgol_trainer.jobs.evaluate_adapters import named_adapters
from tgol_trainer.rewards import RewardLoader
from tgol_trainer.saving.card import CardFacts, read_facts, write_card

PROMPTS = ["a red circle", "a blue cross", "a green square"]


def brightness(images, prompts):
    return [float(np.mean(image)) for image in images]


def redness(images, prompts):
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def save_adapter(pipe, folder, scale):
    """Save a LoRA of the pipeline's denoiser; with scale 0 it changes nothing."""
    family = wrap_pipeline(pipe)
    family.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), "default")
    generator = torch.Generator().manual_seed(0)
    for name, weight in family.denoiser.named_parameters():
        if "lora_B" in name:
            weight.data = scale * torch.randn(weight.shape, generator=generator)
    adapters.save_adapter(type(pipe), family.denoiser_name, family.denoiser, folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    scales = {"nothing": 0.0, "moved": 2.0}
    return {name: save_adapter(tiny.stable_diffusion(), folder / name, scale) for name, scale in scales.items()}


class Loader:
    """Loads the tiny pipeline with an adapter, and remembers what was asked for."""

    def __init__(self, make=tiny.stable_diffusion):
        self.make, self.asked = make, []

    def __call__(self, adapter):
        self.asked.append(adapter)
        pipe = self.make()
        if adapter is not None:
            adapters.load_trained(pipe, wrap_pipeline(pipe).denoiser_name, adapter)
        return pipe, None


def evaluate(folder, models, *, loader=None, rewards=("brightness",), share=(0, 1), features=None, **overrides):
    known = {"brightness": lambda: brightness, "redness": lambda: redness}
    keep_images, mean_over_frames = overrides.pop("keep_images", True), overrides.pop("mean_over_frames", None)
    settings = {"images_per_prompt": 2, "batch_size": 2, "shard_size": 2, "num_inference_steps": 2}
    settings = GenerationSettings(**{**settings, **overrides})
    job = EvaluationJob(folder, {"base": None, **models}, PROMPTS, settings)
    missing = run_evaluation(
        job,
        loader or Loader(),
        {name: known[name] for name in rewards},
        ScoringSettings(mean_over_frames=mean_over_frames),
        share=share,
        features=features,
        keep_images=keep_images,
        progress=False,
    )
    return job, missing


def results(job, rewards=("brightness",)):
    return {name: job.rows(name, list(rewards), None) for name in job.models}


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].scores == two[name].scores and one[name].measures == two[name].measures
        for kind, values in one[name].descriptors.items():
            assert np.array_equal(values, two[name].descriptors[kind])


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    job, missing = evaluate(tmp_path_factory.mktemp("whole"), trained)
    assert missing == 0
    return job


def test_an_adapter_that_changes_nothing_gives_exactly_one_half_and_another_does_not(whole):
    rows = results(whole)
    gallery = whole.gallery(["u", "v", "v"])
    assert gallery.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    assert gallery.numbers == [0, 1] * 3 and gallery.categories == ["u", "u", "v", "v", "v", "v"]
    assert len(gallery.previews[1]) == 6 and gallery.thumbnails[0][0].startswith(b"\x89PNG")
    found = compare_models(gallery.prompts, rows["base"], [rows["nothing"], rows["moved"]])
    nothing, moved = (adapter.scores[0] for adapter in found.adapters)
    assert nothing.win_rate == 0.5 and nothing.interval == (0.5, 0.5) and nothing.ties == 6
    assert moved.ties == 0 and moved.mean_after != moved.mean_before
    assert found.adapters[0].measures[0].name == "seed_spread"


def test_two_processes_make_the_rows_of_one_and_the_last_knows_it(whole, trained, tmp_path):
    _, missing = evaluate(tmp_path, trained, share=(1, 2))
    assert missing == 6  # two of three shards of three models
    job, missing = evaluate(tmp_path, trained, share=(0, 2))
    assert missing == 0
    same(results(job), results(whole))


def test_what_a_kill_left_undone_is_done_alone_and_the_same(whole, trained, tmp_path):
    shutil.copytree(whole.output_dir, tmp_path / "copy")
    job, _ = evaluate(tmp_path / "copy", trained)
    lost = job.shards["moved"].path(1)
    lost.unlink()  # killed before the results of this shard, after its images
    job.images("nothing", 2).unlink()
    job.shards["nothing"].path(2).unlink()  # killed before the images of this one
    loader = Loader()
    again, missing = evaluate(tmp_path / "copy", trained, loader=loader)
    assert missing == 0 and loader.asked == [trained["nothing"]]
    same(results(again), results(whole))


def test_dropped_images_are_made_again_only_for_a_score_that_is_new(whole, trained, tmp_path):
    one = {"moved": trained["moved"]}
    evaluate(tmp_path, one, keep_images=False)
    assert not list((tmp_path / "images").rglob("*.parquet"))
    loader = Loader()
    evaluate(tmp_path, one, loader=loader, keep_images=False)
    assert loader.asked == []
    job, _ = evaluate(tmp_path, one, loader=loader, rewards=("brightness", "redness"))
    assert loader.asked == [None, trained["moved"]]
    assert job.score_columns(["redness", "brightness"]) == ["redness", "brightness"]
    rows = results(job, ["brightness", "redness"])
    assert rows["moved"].scores["brightness"] == results(whole)["moved"].scores["brightness"]
    assert rows["moved"].scores["redness"] != rows["base"].scores["redness"]
    assert not list(tmp_path.rglob(".work/*"))


def test_a_shard_size_that_is_no_multiple_of_the_default_batch_is_rounded_up_for_images_and_results_alike(tmp_path):
    job, missing = evaluate(tmp_path, {}, batch_size=None, shard_size=3, images_per_prompt=3)
    shards = job.shards["base"]
    assert missing == 0 and len(job.gallery(None).previews[0]) == 9
    assert [parquet.read_metadata(shards.path(shard)).num_rows for shard in range(2)] == [8, 1]
    assert [len(shards.rows(shard)) for shard in range(2)] == [8, 1]


def test_features_measure_spread_too(trained, tmp_path):
    def corner(images):
        return torch.tensor(np.stack([np.asarray(image)[0, 0] for image in images])).float() + 1

    job, _ = evaluate(tmp_path, {}, features=lambda: corner)
    values = job.rows("base", ["brightness"], None).descriptors["feature_spread"]
    assert len(values) == 6 and all(value.shape == (3,) and value.min() >= 1 for value in values)


def test_other_settings_or_other_weights_in_the_same_folder_are_refused(whole, trained, tmp_path):
    with pytest.raises(DataError, match="num_inference_steps: 2 there, 3 now"):
        evaluate(whole.output_dir, trained, num_inference_steps=3)
    shutil.copytree(trained["moved"], tmp_path / "moved")
    evaluate(tmp_path / "out", {"x": str(tmp_path / "moved")})
    save_adapter(tiny.stable_diffusion(), tmp_path / "moved", 1.0)
    with pytest.raises(DataError, match="weights_blake2b"):
        evaluate(tmp_path / "out", {"x": str(tmp_path / "moved")})


def test_videos_flow_through_with_their_motion(tmp_path):
    pytest.importorskip("av")
    adapter = save_adapter(tiny.wan(), tmp_path / "adapter", 2.0)
    sampling = {"num_inference_steps": 2, "num_frames": 5, "height": 32, "width": 32}
    options = {"batch_size": 1, "shard_size": 3, "mean_over_frames": 2, **sampling}
    job, missing = evaluate(tmp_path / "out", {"x": adapter}, loader=Loader(tiny.wan), **options)
    assert missing == 0
    rows = results(job)
    assert all(value > 0 for value in rows["base"].measures["motion"])
    assert rows["x"].scores["brightness"] != rows["base"].scores["brightness"]
    gallery = job.gallery(None)
    assert gallery.previews[1][5][:4] == b"RIFF" and b"ANIM" in gallery.previews[1][5]


def _read_by_people(page):
    """Return the text of a page outside its styles and scripts, and the texts that its script writes into it."""
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[-1]
    written = [text for text in re.findall(r'["`][^"`\n]*["`]', script) if " " in text and "data:" not in text]
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    labels = re.findall(r'(?:alt|aria-label|title)="([^"]*)"', body)
    return " ".join([html.unescape(re.sub(r"<[^>]*>", " ", body)), *labels, *written])


def test_what_is_said_of_a_model_of_videos_speaks_of_videos_alone(tmp_path, capfd):
    pytest.importorskip("av")
    tiny.wan().save_pretrained(tmp_path / "wan")
    save_adapter(tiny.wan(), tmp_path / "x", 2.0)
    write_card(CardFacts(model_name="x", usage="pipe = load()"), tmp_path / "x")
    (tmp_path / "p.txt").write_text("a\nb\n")
    arguments = ["evaluate", "--model_name_or_path", str(tmp_path / "wan"), "--adapters", str(tmp_path / "x")]
    arguments += ["--prompts", str(tmp_path / "p.txt"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    arguments += ["--rewards", "jpeg_compressibility", "--trained_rewards", "jpeg_compressibility", "--update_card"]
    sizes = {"num_inference_steps": 1, "num_frames": 5, "height": 32, "width": 32, "mean_over_frames": 2}
    assert cli.main([*arguments, *(f"--{name}={value}" for name, value in sizes.items())]) == 0
    out, printed, card = tmp_path / "out", capfd.readouterr(), (tmp_path / "x" / "README.md").read_text()
    page = (out / "report.html").read_text(encoding="utf-8")
    rows = json.loads(re.search(r'id="rows">(.*?)</script>', page, re.DOTALL)[1])
    said = {
        "page": _read_by_people(page),
        "tables": (out / "tables.md").read_text(encoding="utf-8"),
        "terminal": printed.out,
        "progress": printed.err,
        "card": card[card.index("2 prompts (") :].split("\n")[0],
    }
    said = {name: re.sub(re.escape(str(tmp_path)), "", text).lower() for name, text in said.items()}
    assert rows["medium"] == "video"
    assert not {name for name, text in said.items() if "image" in text}
    assert not {name for name, text in said.items() if "video" not in text}
    assert "one video per prompt" in said["page"] and "2 videos of each model" in said["page"]
    assert all(re.search(rf"{bar}: 100%[^\r\n]*video", printed.err) for bar in ("Generating", "Scoring"))
    assert "Videos of the base model beside" in card


@pytest.mark.parametrize(
    ("make", "reward", "mean", "said"),
    [
        (
            tiny.wan,
            "jpeg_compressibility",
            None,
            "'jpeg_compressibility' scores images, and 'video' is a column of vid",
        ),
        (tiny.stable_diffusion, "videoreward", None, "'videoreward' scores videos, and 'image' is a column of images"),
        (tiny.stable_diffusion, "jpeg_compressibility", 8, "`mean_over_frames`: the column 'image' holds images"),
    ],
)
def test_a_reward_that_cannot_score_what_the_model_draws_is_refused_before_it_draws(
    make, reward, mean, said, tmp_path
):
    job = EvaluationJob(tmp_path, {"base": None}, PROMPTS)
    settings = ScoringSettings(mean_over_frames=mean)
    with pytest.raises(DataError, match=said):
        run_evaluation(job, Loader(make), {reward: RewardLoader(reward)}, settings, share=(0, 1), progress=False)
    assert not list(tmp_path.rglob("*.parquet"))


def test_weights_that_were_fine_tuned_whole_are_loaded(tmp_path):
    pipe = tiny.stable_diffusion()
    pipe.unet.conv_out.bias.data += 1
    pipe.unet.save_pretrained(tmp_path / "unet")
    loaded, _ = Loader()(str(tmp_path))
    assert torch.equal(loaded.unet.conv_out.bias, pipe.unet.conv_out.bias)


def test_a_folder_without_weights_for_the_pipeline_is_refused(tmp_path):
    folder = save_adapter(tiny.stable_diffusion_3(), tmp_path, 1.0)
    with pytest.raises(ValueError, match="holds no LoRA weights for StableDiffusionPipeline"):
        Loader()(folder)


# ---- The command ----


def test_adapters_are_named_by_what_tells_them_apart(tmp_path):
    assert named_adapters(["runs/a", "owner/b", "mine=x/c"]) == {"a": "runs/a", "b": "owner/b", "mine": "x/c"}
    assert list(named_adapters(["one/out", "two/out/"])) == ["one-out", "two-out"]
    with pytest.raises(ValueError, match="NAME=c"):
        named_adapters(["base=c"])
    with pytest.raises(ValueError, match="that of 'a' too"):
        named_adapters(["x=a", "x=b"])


@pytest.fixture(scope="module")
def shapes_adapter(tmp_path_factory):
    from tgol_trainer.shapes import load_pipeline

    folder = tmp_path_factory.mktemp("shapes") / "dark"
    save_adapter(load_pipeline(), folder, 0.5)
    (folder / "training_args.json").write_text(json.dumps({"score_column": "background_darkness"}))
    write_card(CardFacts(model_name="dark", usage="pipe = load()"), folder)
    return folder


def command(folder, adapter, *options):
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"a red {kind}", "kind": kind}) + "\n" for kind in ("circle", "cross"))
    )
    arguments = ["evaluate", "--model_name_or_path", "shapes", "--adapters", str(adapter), "--use_cpu"]
    arguments += ["--prompts", str(folder / "prompts.jsonl"), "--output_dir", str(folder / "out")]
    arguments += ["--images_per_prompt", "2", "--num_inference_steps", "3", "--category_column", "kind"]
    return cli.main([*arguments, "--rewards", "background_darkness", *options])


def test_the_command_leaves_every_file_and_a_card_that_says_it(shapes_adapter, tmp_path, capfd):
    assert command(tmp_path, shapes_adapter, "colour_faithfulness", "--update_card", "--drop_images") == 0
    printed = capfd.readouterr()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"metrics.json", "tables.md", "report.html", "score_distributions.png", "before_after.png"} <= names
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {name: score["trained"] for name, score in metrics["scores"].items()} == {
        "background_darkness": True,
        "colour_faithfulness": False,
    }
    assert set(metrics["adapters"]["dark"]["categories"]) == {"circle", "cross"}
    assert metrics["settings"]["images of each prompt"] == 2
    assert "dark against the base model" in printed.out and "seed_spread" in printed.out
    assert "Traceback" not in printed.err and "warning" not in printed.err.lower()
    card = (shapes_adapter / "README.md").read_text()
    facts = read_facts(shapes_adapter)
    assert facts.usage == "pipe = load()" and facts.evaluations[0].trained
    assert facts.evaluations[0].win_rate == pytest.approx(metrics["scores"]["background_darkness"]["win_rate"])
    assert "seed_spread" in card and "before_after.png" in card and str(tmp_path) not in card
    assert (shapes_adapter / "before_after.png").is_file()


def test_what_a_reader_will_miss_is_said_before_the_work(shapes_adapter, tmp_path, capfd):
    assert command(tmp_path, shapes_adapter) == 0
    assert "dark was trained on every score given" in capfd.readouterr().err
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(shapes_adapter / "pytorch_lora_weights.safetensors", bare)
    with pytest.raises(SystemExit):
        command(tmp_path, bare, "--update_card", "--output_dir", str(tmp_path / "other"))
    assert "--trained_rewards NAME, or --trained_rewards none" in capfd.readouterr().err
    assert not (tmp_path / "other").exists()
    with pytest.raises(SystemExit):
        command(tmp_path, bare, "--trained_rewards", "none", "--update_card", "--output_dir", str(tmp_path / "other"))
    assert "holds no card_facts.json" in capfd.readouterr().err
    for options, message in (
        (["--rewards", "colour_faithfulnes"], "Did you mean 'colour_faithfulness'"),
        (["--adapters", "nowhere"], "'nowhere' (nowhere) is neither a folder here nor a Hub id"),
    ):
        with pytest.raises(SystemExit):
            command(tmp_path, bare, *options, "--output_dir", str(tmp_path / "other"))
        assert message in capfd.readouterr().err
    assert not (tmp_path / "other").exists()
    assert Path(tmp_path / "out" / "report.html").stat().st_size > 10_000
