"""The cache gives what encoding at each step gives, encodes nothing twice, and notices every change."""

import os
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage

from tests.conftest import scored_dataset
from tests.helpers import over
from tests.pipelines import SLOW, TINY
from tests.tiny import stable_diffusion
from tgol_trainer import TGOLConfig, TGOLTrainer
from tgol_trainer.caching import EncodingCache, Workers
from tgol_trainer.data import Collator, Columns, prepare_dataset
from tgol_trainer.families import load_family

SIZE = (16, 16)


def prepared(dataset):
    return prepare_dataset(dataset, Columns(), SIZE)[0]


def counted(family, monkeypatch):
    """Count the images and prompts that are encoded."""
    seen = {"images": 0, "prompts": []}
    encode_one, encode_prompts = family.encode_one, family.encode_unique_prompts

    def image(pixels):
        seen["images"] += 1
        return encode_one(pixels)

    def prompt(texts):
        seen["prompts"] += texts
        return encode_prompts(texts)

    monkeypatch.setattr(family, "encode_one", image)
    monkeypatch.setattr(family, "encode_unique_prompts", prompt)
    return seen


@over(TINY, [name for name in TINY if name not in SLOW])
def test_cached_and_uncached_training_give_the_same_losses_and_weights_to_the_bit(name, tmp_path):
    facts = TINY[name]
    losses, weights = [], []
    for cache in (True, False):
        settings = {"max_steps": 2, "random_flip": True, "caption_dropout": 0.3, "cache": cache, "seed": 3}
        settings |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
        settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        settings |= {"cache_dir": str(tmp_path / "cache") if cache else None}
        trainer = TGOLTrainer(
            facts.build(),
            TGOLConfig(output_dir=str(tmp_path / "run"), **{**facts.settings, **settings}),
            facts.dataset(),
        )
        trainer.train()
        losses.append([(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line])
        weights.append([value.detach() for _, value in trainer.model.named_parameters() if value.requires_grad])
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) >= 3  # images, mirror images, prompts
    assert losses[0] == losses[1]
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_evaluation_of_cached_rows_is_that_of_encoded_rows(config, dataset):
    found = []
    for cache in (True, False):
        trainer = TGOLTrainer(stable_diffusion(), config(cache=cache), dataset, eval_dataset=scored_dataset(8, seed=1))
        both = trainer.evaluate() | trainer.evaluate(scored_dataset(6, seed=2), metric_key_prefix="own")
        found.append({key: value for key, value in both.items() if "time" not in key and "per_second" not in key})
    assert {"eval_loss", "own_loss"} < set(found[0])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["cached", "a stream", "cache=False"])
def test_what_is_encoded_at_each_step_keeps_its_encoders_on_the_device(kind, config, dataset, tmp_path, monkeypatch):
    options = {"cache": False} if kind == "cache=False" else {"cache_dir": str(tmp_path / "cache")}
    rows = dataset.to_iterable_dataset() if kind == "a stream" else dataset
    trainer = TGOLTrainer(stable_diffusion(), config(max_steps=2, **options), rows)
    placed = []
    monkeypatch.setattr(trainer.family, "to", placed.append)
    trainer.train()
    assert (tmp_path / "cache").exists() == (kind == "cached")
    assert placed == ([] if kind == "cached" else [trainer.args.device])


def test_nothing_that_is_saved_names_the_folder_of_the_cache(config, dataset, tmp_path):
    args = config(cache_dir=str(tmp_path / "private"), max_steps=1)
    trainer = TGOLTrainer(stable_diffusion(), args, dataset)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    texts = [file.read_text() for file in (tmp_path / "saved").iterdir() if file.suffix in (".json", ".md")]
    assert len(texts) >= 4
    assert not [text for text in texts if "cache_dir" in text or str(tmp_path) in text]


def test_each_image_and_prompt_is_encoded_once_over_runs_and_images_of_equal_pixels_once(tmp_path, monkeypatch):
    dataset = scored_dataset(6, num_prompts=2)
    twice = Dataset.from_dict({name: [*dataset[name], *dataset[name]] for name in dataset.column_names})
    rows = prepared(twice)
    for run in range(2):
        family = load_family(stable_diffusion())
        seen = counted(family, monkeypatch)
        cache = EncodingCache(family, tmp_path, Collator(SIZE))
        cache.add(rows, [*rows.prompts, ""], mirrored=bool(run))
        assert seen["images"] == 6  # of the second run: the mirror images
        assert seen["prompts"] == ([] if run else ["prompt number 0", "prompt number 1", ""])
    pixels = Collator(SIZE)([rows[2], rows[8]])["pixel_values"]
    expected = family.encode(pixels)
    found = cache.read_images(rows.image_keys[[2, 8]], [False, False], SIZE)
    turned = cache.read_images(rows.image_keys[[2, 8]], [True, False], SIZE)
    flipped = family.encode(pixels.flip(-1))
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert torch.equal(turned[name], torch.stack([flipped[name][0], value[1]]))


def changed_weights(pipeline):
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3


def changed_text_encoder(pipeline):
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).view(-1)[0] += 1e-3


def changed_dtype(pipeline):
    pipeline.vae.to(torch.bfloat16)


def changed_tokenizer(pipeline):
    pipeline.tokenizer.add_tokens(["tgol"])


def tiled(pipeline):
    pipeline.vae.enable_tiling()


def changed_denoiser(pipeline):
    with torch.no_grad():
        pipeline.unet.conv_in.weight += 1


@pytest.mark.parametrize(
    ("change", "images", "prompts"),
    [
        (changed_weights, 3, 0),
        (changed_dtype, 3, 0),
        (tiled, 3, 0),
        (changed_text_encoder, 0, 1),
        (changed_tokenizer, 0, 1),
        (changed_denoiser, 0, 0),
    ],
)
def test_what_a_network_or_tokenizer_made_is_not_taken_for_anothers(tmp_path, monkeypatch, change, images, prompts):
    rows = prepared(scored_dataset(3))
    EncodingCache(load_family(stable_diffusion()), tmp_path, Collator(SIZE)).add(rows, ["a"])
    pipeline = stable_diffusion()
    change(pipeline)
    family = load_family(pipeline)
    seen = counted(family, monkeypatch)
    EncodingCache(family, tmp_path, Collator(SIZE)).add(rows, ["a"])
    assert (seen["images"], len(seen["prompts"])) == (images, prompts)


def test_another_resolution_is_another_entry_and_a_renamed_file_is_not(tmp_path, monkeypatch):
    family = load_family(stable_diffusion())
    seen = counted(family, monkeypatch)

    def add(names, size=SIZE):
        data = Dataset.from_dict({"prompt": ["a"] * len(names), "image": names, "score": np.arange(float(len(names)))})
        data = data.cast_column("image", Image())
        before = seen["images"]
        EncodingCache(family, tmp_path / "cache", Collator(size)).add(prepared(data), ["a"])
        return seen["images"] - before

    rng = np.random.default_rng(0)
    names = [str(tmp_path / f"{number}.png") for number in range(3)]
    for name in names:
        PILImage.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(name)
    assert add(names) == 3
    assert add(names, (32, 32)) == 3
    os.rename(names[0], tmp_path / "renamed.png")
    assert add([str(tmp_path / "renamed.png"), *names[1:]]) == 0
    # Another image under an old name: the name is in the cache of the check before training, the pixels are not.
    PILImage.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(names[1])
    assert add([str(tmp_path / "renamed.png"), *names[1:]]) == 1


def test_a_job_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("tgol_trainer.caching.filling._SHARD_SECONDS", 0.0)  # a file for each entry
    rows, family = prepared(scored_dataset(8)), load_family(stable_diffusion())
    encode_one, done = family.encode_one, []

    def dies(pixels):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return encode_one(pixels)

    monkeypatch.setattr(family, "encode_one", dies)
    with pytest.raises(KeyboardInterrupt):
        EncodingCache(family, tmp_path, Collator(SIZE)).add(rows, ["a"])
    monkeypatch.setattr(family, "encode_one", encode_one)
    seen = counted(family, monkeypatch)
    cache = EncodingCache(family, tmp_path, Collator(SIZE))
    cache.add(rows, ["a"])
    assert (seen["images"], seen["prompts"]) == (3, [])
    expected = family.encode(Collator(SIZE)([rows[index] for index in range(8)])["pixel_values"])
    found = cache.read_images(rows.image_keys, [False] * 8, SIZE)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("machines", [1, 2])
def test_processes_share_the_work_of_a_machine_and_each_machine_ends_with_every_entry(tmp_path, monkeypatch, machines):
    """Threads stand in for processes; with two machines, each has a disk of its own and one process."""
    rows, world = prepared(scored_dataset(9)), 2
    barrier, seen, caches = threading.Barrier(world, timeout=60), [], []
    for index in range(world):
        local = (index, world) if machines == 1 else (0, 1)
        workers = Workers(index, world, *local, progress=False, wait=barrier.wait)
        family = load_family(stable_diffusion())
        seen.append(counted(family, monkeypatch))
        folder = tmp_path / str(index % machines)
        caches.append(EncodingCache(family, folder, Collator(SIZE), workers))
    threads = [threading.Thread(target=cache.add, args=(rows, ["a", "b", "c"])) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [cache.read_images(rows.image_keys, [False] * 9, SIZE) for cache in caches]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    if machines == 1:
        assert sum(one["images"] for one in seen) == 9 and min(one["images"] for one in seen) > 0
        assert sorted(seen[0]["prompts"] + seen[1]["prompts"]) == ["a", "b", "c"]
    else:
        assert [one["images"] for one in seen] == [9, 9]


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    rows, family = prepared(scored_dataset(8)), load_family(stable_diffusion())
    with pytest.raises(OSError, match=r"Encoding 1 prompts once takes about .* has 1 kB left\. Set `cache_dir`"):
        EncodingCache(family, tmp_path, Collator(SIZE)).add(rows, ["a"])
    assert not list(tmp_path.rglob("*.safetensors"))
