"""Folders without a table: prompts that programs wrote into images, captions, stars, names of folders, archives."""

import gzip
import json
import os
import stat
import struct
import unicodedata
import zipfile
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.sources.pictures import PARAMETERS, RATED, SIZE, comment, image, rated, rows, stars
from tgol_trainer.data import Columns, DataError, prepare_dataset
from tgol_trainer.data.images import ImageError, open_image
from tgol_trainer.data.rows import CAUSES
from tgol_trainer.sources import load_scored_dataset
from tgol_trainer.sources.comfyui import read_graph
from tgol_trainer.sources.files import read_file
from tgol_trainer.sources.found import found_in
from tgol_trainer.sources.generation import read_parameters
from tgol_trainer.sources.loading import load_columns
from tgol_trainer.sources.stars import StarsError, xmp_stars

BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]><x>&b;</x>'


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


GRAPH = {
    "1": node("CheckpointLoaderSimple", ckpt_name="base.safetensors"),
    "2": node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name="x"),
    "3": node("CLIPTextEncode", clip=["2", 1], text=["10", 0]),
    "4": node("CLIPTextEncode", clip=["2", 1], text="blurry"),
    "5": node("KSampler", model=["2", 0], positive=["11", 0], negative=["11", 1], seed=5, steps=9, cfg=4.5),
    "6": node("VAEDecode", samples=["5", 0]),
    "7": node("SaveImage", images=["6", 0]),
    "10": node("StringConcatenate", string_a="a lamp", string_b=["12", 0], delimiter=", "),
    "11": node("ControlNetApplyAdvanced", positive=["13", 0], negative=["4", 0], strength=1.0),
    "12": node("PrimitiveString", value="on a desk"),
    "13": node("FluxGuidance", conditioning=["3", 0], guidance=3.5),
}


# ---- What programs write ----


def test_a_prompt_of_a1111_comes_apart_into_prompt_negative_prompt_seed_and_settings():
    found = read_parameters(PARAMETERS)
    assert (found.prompt, found.negative_prompt) == ("a fox, (red:1.2) in the snow", "blurry, ugly")
    assert found.seed == 2**64 - 1
    assert found.settings["Lora hashes"] == "one: 1f, two: 2e"
    assert found.settings["Version"] == "v1.10" and "Seed" not in found.settings
    plain = read_parameters("only a prompt")
    assert (plain.prompt, plain.negative_prompt, plain.seed, plain.settings) == ("only a prompt", None, None, {})


def test_a_graph_of_comfyui_gives_the_text_that_the_sampler_was_given():
    found = read_graph(GRAPH)
    assert (found.prompts, found.negative_prompt, found.seed) == (["a lamp, on a desk"], "blurry", 5)
    assert found.settings == {"steps": 9, "cfg": 4.5, "model": "base.safetensors"}


def test_a_switch_of_a_graph_is_followed_and_the_question_to_a_language_model_is_no_prompt():
    switched = GRAPH | {
        "3": node("CLIPTextEncode", clip=["2", 1], text=["40", 0]),
        "40": node("ComfySwitchNode", switch=["41", 0], on_false=["42", 0], on_true=["12", 0]),
        "41": node("PrimitiveBoolean", value=True),
        "42": node("TextGenerate", prompt=["43", 0]),
        "43": node("PrimitiveString", value="Write a prompt about a lamp."),
    }
    assert read_graph(switched).prompts == ["on a desk"]
    switched["41"] = node("PrimitiveBoolean", value=False)
    assert read_graph(switched).prompts == []


def test_of_two_passes_of_a_graph_the_last_one_counts_and_of_two_images_neither():
    second = GRAPH | {
        "20": node("CLIPTextEncode", text="a sharp lamp"),
        "21": node("KSampler", model=["1", 0], positive=["20", 0], negative=["4", 0], latent_image=["5", 0], seed=6),
        "22": node("SaveImage", images=["21", 0]),
    }
    assert (read_graph(second).prompts, read_graph(second).seed) == (["a sharp lamp"], 6)
    second["21"]["inputs"]["latent_image"] = ["30", 0]
    assert read_graph(second).prompts == ["a sharp lamp", "a lamp, on a desk"]


def test_flux_graphs_with_a_guider_and_texts_of_two_encoders_are_read():
    graph = {
        "1": node("CLIPTextEncodeFlux", clip=["9", 0], clip_l="lamp", t5xxl="a long lamp", guidance=3.5),
        "2": node("BasicGuider", model=["8", 0], conditioning=["1", 0]),
        "3": node("RandomNoise", noise_seed=77),
        "4": node("SamplerCustomAdvanced", noise=["3", 0], guider=["2", 0], latent_image=["7", 0]),
        "5": node("SaveImage", images=["4", 0]),
        "8": node("UNETLoader", unet_name="flux.safetensors"),
    }
    found = read_graph(graph)
    assert (found.prompts, found.negative_prompt, found.seed) == (["a long lamp"], None, 77)
    assert found.settings == {"model": "flux.safetensors"}


def test_a_graph_that_goes_in_circles_ends():
    graph = {
        "1": node("ConditioningCombine", conditioning_1=["1", 0], conditioning_2=["2", 0]),
        "2": node("ConditioningCombine", conditioning_1=["1", 0], conditioning_2=["3", 0]),
        "3": node("CLIPTextEncode", text=["4", 0]),
        "4": node("Note", text=["4", 0]),
        "5": node("KSampler", model=["5", 0], positive=["1", 0], negative=["1", 0], seed=["5", 0]),
    }
    assert read_graph(graph).prompts == []


def test_the_workflow_of_a_file_is_read_where_the_graph_is_missing():
    workflow = {
        "nodes": [
            {"id": 1, "type": "CLIPTextEncode", "inputs": [{"name": "clip", "link": 9}], "widgets_values": ["a lamp"]},
            {"id": 2, "type": "CLIPTextEncode", "inputs": [], "widgets_values": ["dim"]},
            {
                "id": 3,
                "type": "KSampler",
                "inputs": [{"name": "positive", "link": 1}, {"name": "negative", "link": 2}],
                "widgets_values": [41, "randomize", 20, 8, "euler"],
            },
            {"id": 4, "type": "SaveImage", "inputs": [{"name": "images", "link": 3}], "widgets_values": ["x"]},
        ],
        "links": [[1, 1, 0, 3, 0, "CONDITIONING"], [2, 2, 0, 3, 1, "CONDITIONING"], [3, 3, 0, 4, 0, "IMAGE"]],
    }
    found = read_graph(workflow)
    assert (found.prompts, found.negative_prompt, found.seed) == (["a lamp"], "dim", 41)


TEXTS = {
    "a1111": ({"parameters": PARAMETERS}, "a fox, (red:1.2) in the snow", 2**64 - 1, "A1111 parameters"),
    "comfyui": ({"prompt": json.dumps(GRAPH)}, "a lamp, on a desk", 5, "ComfyUI graph"),
    "invokeai": (
        {"invokeai_metadata": json.dumps({"positive_prompt": "a cup", "negative_prompt": "dim", "seed": 3})},
        *("a cup", 3, "InvokeAI metadata"),
    ),
    "invokeai2": (
        {"sd-metadata": json.dumps({"image": {"prompt": [{"prompt": "a cup [dim]", "weight": 1}], "seed": 3}})},
        *("a cup", 3, "InvokeAI metadata"),
    ),
    "dream": ({"Dream": '"a cup [dim]" -s 50 -S 3 -W 512'}, "a cup", 3, "InvokeAI metadata"),
    "novelai": (
        {"Software": "NovelAI", "Description": "a tower", "Comment": json.dumps({"seed": 8, "uc": "dim"})},
        *("a tower", 8, "NovelAI comment"),
    ),
    "novelai4": (
        {
            "Software": "NovelAI",
            "Description": "two towers",
            "Comment": json.dumps(
                {
                    "seed": 8,
                    "uc": "dim",
                    "v4_prompt": {"caption": {"base_caption": "two", "char_captions": [{"char_caption": "a tower"}]}},
                }
            ),
        },
        *("two, a tower", 8, "NovelAI comment"),
    ),
    "fooocus": (
        {"parameters": json.dumps({"prompt": "a tree", "negative_prompt": "dim", "seed": "9"})},
        *("a tree", 9, "Fooocus parameters"),
    ),
    "ruined fooocus": (
        {"parameters": json.dumps({"Prompt": "a leaf", "Negative": "dim", "seed": 9})},
        *("a leaf", 9, "Fooocus parameters"),
    ),
    "swarm": (
        {"parameters": json.dumps({"sui_image_params": {"prompt": "a hat", "negativeprompt": "dim", "seed": 4}})},
        *("a hat", 4, "SwarmUI parameters"),
    ),
}


def test_the_texts_of_each_program_give_prompt_negative_prompt_and_seed(tmp_path, said):
    for name, (texts, *_) in TEXTS.items():
        image(tmp_path / f"{name}.png", texts)
    found = rows(tmp_path)
    for name, (_, prompt, seed, place) in TEXTS.items():
        row = found[f"{name}.png"]
        assert (row["prompt"], row["seed"], row["prompt_from"]) == (prompt, str(seed), place), name
        assert row["negative_prompt"] in ("dim", "blurry", "blurry, ugly"), name
    assert "score" not in found["a1111.png"]
    assert "3 from InvokeAI metadata" in said.text
    assert "scores: none in 10 files (a1111.png, comfyui.png, dream.png, ...)" in said.text


def test_jpeg_and_webp_hold_the_texts_in_exif(tmp_path):
    image(tmp_path / "a.jpg", exif=comment(PARAMETERS))
    make = Image.Exif()
    make[0x0110] = "prompt:" + json.dumps(GRAPH)
    image(tmp_path / "b.webp", exif=make)
    found = rows(tmp_path)
    assert (found["a.jpg"]["prompt"], found["a.jpg"]["negative_prompt"]) == (
        "a fox, (red:1.2) in the snow",
        "blurry, ugly",
    )
    assert (found["b.webp"]["prompt"], found["b.webp"]["seed"]) == ("a lamp, on a desk", "5")


def in_exif(value, tag, block=None):
    exif = Image.Exif()
    (exif if block is None else exif.get_ifd(block))[tag] = value
    return exif


EXIF = {
    # A node writes the comment into the first block, others the graph into description and make.
    "saveimage-plus": (in_exif(json.dumps({"prompt": GRAPH}), 0x9286), "a lamp, on a desk", "5", "ComfyUI graph"),
    "description": (in_exif("Workflow:" + json.dumps(GRAPH), 0x010E), "a lamp, on a desk", "5", "ComfyUI graph"),
    "civitai": (
        comment(json.dumps({**GRAPH, "extraMetadata": json.dumps({"prompt": "a bridge", "seed": 6})})),
        *("a bridge", "6", "Civitai metadata"),
    ),
    "civitai graph": (
        comment(json.dumps({**GRAPH, "extra": {"airs": []}})),
        "a lamp, on a desk",
        "5",
        "ComfyUI graph",
    ),
    "novelai": (
        in_exif(
            b"ASCII\0\0\0"
            + json.dumps({"Comment": json.dumps({"prompt": "a cloud", "seed": 7, "uc": "dim"})}).encode(),
            *(0x9286, 0x8769),
        ),
        *("a cloud", "7", "NovelAI comment"),
    ),
    "swarm": (
        comment(json.dumps({"sui_image_params": {"prompt": "a hat", "seed": 4}})),
        *("a hat", "4", "SwarmUI parameters"),
    ),
    "early swarm": (
        in_exif(json.dumps({"sui_image_params": {"prompt": "a hat", "seed": 4}}), 0x0110),
        *("a hat", "4", "SwarmUI parameters"),
    ),
}


@pytest.mark.parametrize("name", EXIF)
def test_what_each_program_writes_into_exif_is_read(tmp_path, name):
    exif, prompt, seed, place = EXIF[name]
    image(tmp_path / "a.webp", exif=exif)
    (row,) = rows(tmp_path).values()
    assert (row["prompt"], row["seed"], row["prompt_from"]) == (prompt, seed, place)


def test_utf8_where_the_format_says_latin_1_is_read_as_it_was_meant(tmp_path):
    for name, content in (("a", "ein Käfer, 猫".encode()), ("b", "ein Käfer".encode("latin-1"))):
        info = PngInfo()
        info.add(b"tEXt", b"parameters\0" + content)
        Image.new("RGB", SIZE).save(tmp_path / f"{name}.png", pnginfo=info)
    assert [row["prompt"] for row in rows(tmp_path).values()] == ["ein Käfer, 猫", "ein Käfer"]


def test_a_remark_of_a_phone_or_camera_is_no_prompt_and_unknown_is_none(tmp_path):
    image(tmp_path / "a.jpg", exif=comment("Screenshot"))
    unknown = "unknown\nNegative prompt: unknown\nSteps: 20, Seed: 0"
    image(tmp_path / "b.png", {"parameters": unknown})
    image(tmp_path / "c.png", {"parameters": unknown, "prompt": json.dumps(GRAPH)})
    assert [row["prompt"] for row in rows(tmp_path).values()] == [None, None, "a lamp, on a desk"]


def hidden(path, word, content):
    """Write into the alpha channel, bit by bit down each column."""
    data = word.encode() + struct.pack(">I", 8 * len(content)) + content
    alpha = np.full(512 * 512, 255, np.uint8)
    alpha[: 8 * len(data)] = 254 | np.unpackbits(np.frombuffer(data, np.uint8))
    made = Image.new("RGB", (512, 512), (90, 9, 9))
    made.putalpha(Image.fromarray(alpha.reshape(512, 512).T.copy()))
    made.save(path)


def test_a_text_hidden_in_the_transparency_is_read_and_one_that_grows_without_end_is_not(tmp_path):
    novelai = {"Software": "NovelAI", "Comment": json.dumps({"prompt": "a moon", "seed": 3})}
    hidden(tmp_path / "a.png", "stealth_pngcomp", gzip.compress(json.dumps(novelai).encode()))
    hidden(tmp_path / "b.png", "stealth_pnginfo", PARAMETERS.encode())
    hidden(tmp_path / "c.png", "stealth_pngcomp", gzip.compress(bytes(20_000_000)))
    hidden(tmp_path / "d.png", "stealth_pngcomp", b"no gzip")
    Image.new("RGBA", (2, 2)).save(tmp_path / "e.png")
    found = rows(tmp_path)
    assert (found["a.png"]["prompt"], found["a.png"]["seed"]) == ("a moon", "3")
    assert found["b.png"]["prompt"] == "a fox, (red:1.2) in the snow"
    assert [found[f"{name}.png"]["prompt"] for name in "cde"] == [None, None, None]


def test_a_text_behind_the_pixels_of_a_png_file_is_found(tmp_path):
    image(tmp_path / "a.png")
    content, chunk = (tmp_path / "a.png").read_bytes(), b"tEXtparameters\0a late text"
    late = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(content[:-12] + late + content[-12:])
    assert rows(tmp_path)["a.png"]["prompt"] == "a late text"


# ---- Captions, stars, names of folders ----


def test_a_caption_beside_an_image_counts_before_the_text_in_it(tmp_path):
    for name in ("a", "b", "c", "d"):
        image(tmp_path / f"{name}.png", {"parameters": "from the file"})
    (tmp_path / "a.txt").write_text("my own\nwords\n", encoding="utf-8")
    (tmp_path / "b.caption").write_text("\ufeffanother", encoding="utf-8")
    (tmp_path / "c.txt").write_text(PARAMETERS)  # as A1111 writes it beside its images
    found = rows(tmp_path)
    assert [found[f"{name}.png"]["prompt"] for name in "abcd"] == [
        *("my own words", "another", "a fox, (red:1.2) in the snow", "from the file"),
    ]
    assert [found[f"{name}.png"]["prompt_from"] for name in "abc"] == [".txt files", ".caption files", ".txt files"]
    assert found["c.png"]["negative_prompt"] == "blurry, ugly"


def test_stars_behind_the_pixels_of_a_png_file_are_found(tmp_path):
    image(tmp_path / "a.png", {"parameters": "in front"})
    content, chunk = (tmp_path / "a.png").read_bytes(), b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + stars(4).encode()
    late = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(content[:-12] + late + content[-12:])
    found = rows(tmp_path)["a.png"]
    assert (found["prompt"], found["score"]) == ("in front", 4.0)


@pytest.mark.parametrize(
    ("number", "expected"), [("4", 4.0), ("5.0", 5.0), ("0", None), ("-1", 0.0), ("7", None), ("many", None)]
)
def test_stars_are_one_to_five_and_a_rejected_image_has_none_of_them(number, expected):
    assert xmp_stars(stars(number).encode()) == expected
    element = RATED.format(prefix="xap", attribute="", element=f"<xap:Rating>{number}</xap:Rating>")
    assert xmp_stars(element.encode("utf-16")) == expected


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ('MicrosoftPhoto:Rating="75"', 4.0),
        ('MicrosoftPhoto:Rating="1"', 1.0),
        ('MicrosoftPhoto:Rating="99" xmp:Rating="2"', 2.0),
        ('MicrosoftPhoto:Rating="50" xmp:Rating="0"', 3.0),
        ('xmpDM:pick="-1" xmpDM:good="false"', 0.0),
        ('xmpDM:good="False"', 0.0),
        ('xmpDM:pick="1" xmpDM:good="true"', None),
        ('digiKam:PickLabel="1" xmp:Rating="0"', 0.0),
        ('digiKam:PickLabel="3" digiKam:ColorLabel="1"', None),
        ('digiKam:PickLabel="1" xmp:Rating="3"', 3.0),
    ],
)
def test_percentages_of_windows_and_rejections_of_photo_programs_are_read(attributes, expected):
    spaces = {
        "xmp": "http://ns.adobe.com/xap/1.0/",
        "MicrosoftPhoto": "http://ns.microsoft.com/photo/1.0/",
        "xmpDM": "http://ns.adobe.com/xmp/1.0/DynamicMedia/",
        "digiKam": "http://www.digikam.org/ns/1.0/",
    }
    declared = " ".join(f'xmlns:{name}="{address}"' for name, address in spaces.items())
    packet = RATED.format(prefix="y", attribute=f"{declared} {attributes}", element="")
    assert xmp_stars(f"<?xpacket begin=''?>{packet}<?xpacket end='w'?>".encode()) == expected


def test_the_rating_of_another_image_inside_a_packet_is_not_this_images():
    inner = stars(5).split("<rdf:RDF", 1)[1].split(">", 1)[1].split("</rdf:RDF>")[0]
    pantry = f'<a:Pantry xmlns:a="urn:a"><rdf:Bag><rdf:li>{inner}</rdf:li></rdf:Bag></a:Pantry>'
    packet = RATED.format(prefix="xmp", attribute="", element=pantry)
    assert "Rating" in packet and xmp_stars(packet.encode()) is None


def test_the_sidecar_with_the_whole_name_goes_before_the_one_of_a_raw_file(tmp_path):
    image(tmp_path / "a.jpg")
    (tmp_path / "a.xmp").write_text(stars(1))
    (tmp_path / "a.jpg.xmp").write_text(stars(4))
    image(tmp_path / "b.jpg", exif=in_exif(75, 0x4749))
    found = rows(tmp_path)
    assert [row["score"] for row in found.values()] == [4.0, 4.0]
    assert [row["score_from"] for row in found.values()] == ["XMP sidecars", "EXIF"]


def test_stars_come_from_sidecars_then_from_xmp_then_from_exif(tmp_path):
    image(tmp_path / "a.jpg", exif=rated(2))
    image(tmp_path / "b.jpg", exif=rated(2), xmp=stars(3).encode())
    image(tmp_path / "c.png", {"XML:com.adobe.xmp": stars(4)})
    image(tmp_path / "d.jpg", xmp=stars(3).encode())
    (tmp_path / "d.xmp").write_text(stars(5))
    image(tmp_path / "e.webp", xmp=stars(1).encode())
    (tmp_path / "e.webp.xmp").write_text(stars(0))
    image(tmp_path / "f.png")
    found = rows(tmp_path)
    assert [row["score"] for row in found.values()] == [2, 3, 4, 5, 1, None]
    assert [row["score_from"] for row in found.values()] == [
        *("EXIF", "XMP in the files", "XMP in the files", "XMP sidecars", "XMP in the files", None)
    ]
    counts = found_in(load_scored_dataset(str(tmp_path)))["scores"]
    assert counts.places == {"EXIF": 1, "XMP in the files": 3, "XMP sidecars": 1}
    assert (counts.num_lacking, counts.lacking) == (1, ["f.png"])


def test_one_star_in_sidecars_of_darktable_is_read_and_said_since_import_gives_it(tmp_path, caplog):
    for name, number in (("a", 1), ("b", 1), ("c", 4)):
        image(tmp_path / f"{name}.jpg")
        sidecar = stars(number).replace("<rdf:Description", '<rdf:Description xmlns:d="http://darktable.sf.net/"')
        (tmp_path / f"{name}.jpg.xmp").write_text(sidecar)
    image(tmp_path / "d.jpg")
    (tmp_path / "d.jpg.xmp").write_text(stars(1))  # of another program
    found = rows(tmp_path)
    assert [row["score"] for row in found.values()] == [1, 1, 4, 1]
    assert caplog.text.count("2 images have one star in sidecars of darktable") == 1


def test_names_of_folders_are_scores_on_request_alone(tmp_path):
    for name in ("5/a.png", "2.5/b.png", "5/other/c.png", "10_cats/d.png"):
        image(tmp_path / name)
    assert "score" not in rows(tmp_path)["a.png"]
    found = rows(tmp_path, folder_scores=True)
    assert {name: row["score"] for name, row in found.items()} == {
        **{"a.png": 5.0, "b.png": 2.5, "c.png": 5.0, "d.png": None}
    }
    image(tmp_path / "good/e.png")
    with pytest.raises(DataError, match=r"numbers \('2.5'\) and by words \('good'\), which are two scales"):
        load_scored_dataset(str(tmp_path), folder_scores=True)


def test_good_and_bad_are_one_and_nothing_and_other_names_are_refused(tmp_path, said):
    image(tmp_path / "Good/a.png")
    image(tmp_path / "bad/b.png")
    assert "score" not in rows(tmp_path)["a.png"]
    assert "To take the folders ['Good', 'bad'] for scores: `--folder_scores`" in said.text
    assert [row["score"] for row in rows(tmp_path, folder_scores=True).values()] == [1.0, 0.0]
    assert load_columns(str(tmp_path), ["score"], folder_scores=True)["score"] == [1.0, 0.0]
    os.rename(tmp_path / "Good", tmp_path / "x")
    os.rename(tmp_path / "bad", tmp_path / "y")
    with pytest.raises(DataError, match=r"no folder .* the folders are \['x', 'y'\]"):
        load_scored_dataset(str(tmp_path), folder_scores=True)


# ---- The folder ----


def test_a_folder_as_it_is_trains_and_a_new_star_is_seen(tmp_path):
    for number in range(4):
        image(tmp_path / f"{number}.png", {"parameters": f"prompt {number}"})
        (tmp_path / f"{number}.xmp").write_text(stars(number + 1))
    kept, _ = prepare_dataset(load_scored_dataset(str(tmp_path)), Columns(), SIZE)
    assert kept.scores.tolist() == [1.0, 2.0, 3.0, 4.0]
    (tmp_path / "0.xmp").write_text(stars(5) + " ")
    assert load_scored_dataset(str(tmp_path))["score"] == [5.0, 2.0, 3.0, 4.0]
    stream = load_scored_dataset(str(tmp_path), streaming=True)
    assert [row["score"] for row in stream] == [5.0, 2.0, 3.0, 4.0]


def test_folders_of_splits_are_splits(tmp_path):
    for name in ("train/a.png", "val/b.png"):
        image(tmp_path / name)
    assert list(rows(tmp_path)) == ["a.png"]
    assert list(rows(tmp_path, split="validation")) == ["b.png"]
    with pytest.raises(DataError, match="no rows in a folder of 'test'"):
        load_scored_dataset(str(tmp_path), split="test")


def test_columns_have_the_names_that_are_asked_for_and_json_beside_images_is_no_table(tmp_path):
    image(tmp_path / "a.png", {"parameters": "p"})
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.png.json").write_text("{}")
    dataset = load_scored_dataset(str(tmp_path), columns=Columns(prompt="text", image="photo", score="stars"))
    assert {"text", "photo"} <= set(dataset.column_names)
    assert dataset["text"] == ["p"]


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        ({}, r"no scores yet.*tgol score.*tgol rate"),
        ({"jpeg": [1.0], "hps": [2]}, r"'hps', 'jpeg'.*--score_column hps`"),
    ],
)
def test_generated_images_are_to_be_scored_and_scored_ones_have_the_column_named(more, remedy):
    made = {"prompt": ["p"], "image": [Image.new("RGB", SIZE)], "seed": [1], "image_index": [0]}
    made |= {"model": ["m"], "settings": ["{}"]}
    with pytest.raises(DataError, match=remedy):
        prepare_dataset(datasets.Dataset.from_dict({**made, **more}), Columns(), SIZE)


def test_without_scores_training_is_refused_with_the_ways_to_give_them(tmp_path):
    image(tmp_path / "a.png", {"parameters": "p"})
    with pytest.raises(DataError, match=r"no image of the folder has a score.*--folder_scores.*tgol score"):
        prepare_dataset(load_scored_dataset(str(tmp_path)), Columns(), SIZE)


# ---- What would do harm ----


def test_xml_that_declares_entities_is_refused_in_files_and_beside_them(tmp_path, said):
    with pytest.raises(StarsError, match="declares a document type"):
        xmp_stars(BOMB.encode())
    image(tmp_path / "a.jpg", xmp=BOMB.encode())
    image(tmp_path / "b.png")
    (tmp_path / "b.xmp").write_text("<x>")
    image(tmp_path / "c.png", {"XML:com.adobe.xmp": stars(4)})
    assert [row["score"] for row in rows(tmp_path).values()] == [None, None, 4.0]
    assert "a.jpg: its XMP declares a document type" in said.text
    assert "b.png: b.xmp: its XMP is not XML" in said.text


def test_a_text_that_unpacks_to_a_hundred_megabytes_is_refused_with_its_file(tmp_path, said):
    info = PngInfo()
    info.add_text("parameters", "a" * 100_000_000, zip=True)
    Image.new("RGB", SIZE).save(tmp_path / "a.png", pnginfo=info)
    image(tmp_path / "b.png", {"prompt": "[" * 100_000, "parameters": "{" * 100_000})
    assert rows(tmp_path)["a.png"]["prompt"] is None
    assert "a.png: it cannot be opened: Decompressed data too large" in said.text


def test_links_out_of_the_folder_are_not_followed(tmp_path, said):
    image(tmp_path / "elsewhere/secret.png")
    image(tmp_path / "mine/a.png")
    (tmp_path / "mine/link.png").symlink_to(tmp_path / "elsewhere/secret.png")
    (tmp_path / "mine/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine/inside.png").symlink_to("a.png")
    assert list(rows(tmp_path / "mine")) == ["a.png", "inside.png"]
    assert "lead out of the folder are not followed: 2 (folder, link.png)" in said.text


def test_a_caption_that_is_no_text_is_named_with_its_line_and_character(tmp_path, said):
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("ein Käfer".encode("cp1252"))
    image(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("x" * 200_000)
    assert [row["prompt"] for row in rows(tmp_path).values()] == [None, None]
    assert "line 1, character 6 is the byte 0xe4" in said.text and "Save the file as UTF-8" in said.text
    assert "b.txt has 200000 bytes" in said.text


def test_what_lies_beside_an_image_is_found_in_another_unicode_form_and_with_capital_endings(tmp_path):
    name = "caf\u00e9"
    image(tmp_path / f"{unicodedata.normalize('NFD', name)}.png")
    (tmp_path / f"{unicodedata.normalize('NFC', name)}.TXT").write_text("a cup")
    (tmp_path / f"{unicodedata.normalize('NFC', name)}.xmp").write_text(stars(3))
    (row,) = rows(tmp_path).values()
    assert (row["prompt"], row["score"]) == ("a cup", 3.0)


def test_captions_that_are_links_out_of_the_folder_and_pipes_are_not_read(tmp_path, said):
    (tmp_path / "secret").write_text("root:x:0")
    for name in ("a", "b"):
        image(tmp_path / f"mine/{name}.png")
    (tmp_path / "mine/a.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "mine/a.xmp").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "mine/b.txt")
    os.mkfifo(tmp_path / "mine/c.png")
    assert [row["prompt"] for row in rows(tmp_path / "mine").values()] == [None, None]
    assert "a.txt is a link that leads out of the folder" in said.text
    assert "root:x" not in said.text


def zipped(path, **files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_zip_file_is_read_as_the_folder_in_it(tmp_path):
    image(tmp_path / "mine/a.png", {"parameters": "p"})
    image(tmp_path / "mine/b.png")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in sorted((tmp_path / "mine").iterdir()):
            archive.write(file, f"mine/{file.name}")
    found = rows(tmp_path / "all.zip")
    assert [row["prompt"] for row in found.values()] == ["p", None]
    with zipfile.ZipFile(tmp_path / "all.zip", "a") as archive:
        archive.writestr("mine/metadata.jsonl", '{"file_name": "b.png", "prompt": "table", "score": 1}\n')
    assert [row["prompt"] for row in rows(tmp_path / "all.zip").values()] == ["table"]


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "..\\a.png", "C:\\a.png"])
def test_a_zip_file_that_leads_out_of_its_folder_is_refused_and_nothing_is_left(tmp_path, name):
    with pytest.raises(DataError, match=r"is refused: .* leads out of the folder"):
        load_scored_dataset(str(zipped(tmp_path / "a.zip", **{name: "x"})))
    assert not list((datasets.config.HF_DATASETS_CACHE / "tgol_zip").iterdir())


def test_a_zip_file_that_grows_a_thousandfold_holds_links_or_is_broken_is_refused(tmp_path):
    bomb = zipped(tmp_path / "bomb.zip", **{"a.png": bytes(200_000_000)})
    with pytest.raises(DataError, match="would have 200000000 unpacked, as no image does"):
        load_scored_dataset(str(bomb))
    link = zipfile.ZipInfo("a.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="is a link"):
        load_scored_dataset(str(tmp_path / "link.zip"))
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="cannot be unpacked: File is not a zip file"):
        load_scored_dataset(str(tmp_path / "broken.zip"))


def test_a_phones_image_whose_package_is_not_there_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("tgol_trainer.data.images._PLUGIN_FORMATS", ())
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (tmp_path / "IMG_2.HEIC").write_bytes(b"neither this nor that" + bytes(40))
    unread = [read_file(tmp_path / f"IMG_{number}.HEIC", tmp_path).unread for number in (1, 2)]
    assert unread == ["it is HEIF, which `pip install 'tgol_trainer[formats]'` reads", "its format is not read"]
    remedies = []
    for number in (1, 2):
        with pytest.raises(ImageError) as caught:
            open_image(str(tmp_path / f"IMG_{number}.HEIC"))
        remedies.append(CAUSES[caught.value.cause][1])
    assert remedies[0] == "# pip install 'tgol_trainer[formats]'"
    assert "save the {medium} again" in remedies[1]
