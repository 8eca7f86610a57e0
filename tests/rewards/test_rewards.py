"""Rewards: the protocol, what `score_images` refuses, and JPEG sizes."""

import functools
import math
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tgol_trainer.rewards import (
    REWARDS,
    RewardFacts,
    WeightedReward,
    find_reward,
    jpeg_compressibility,
    jpeg_incompressibility,
    load_reward,
    reward_facts,
    reward_name,
    reward_takes,
    score_columns,
    score_images,
)


def some_images(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(count)]


def redness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [float(image.getpixel((0, 0))[0]) for image in images]


def returning(value):
    def reward(images, prompts):
        return value

    return reward


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_scores_come_back_in_order_whatever_the_batch_size(batch_size):
    assert score_images(redness, some_images(7), ["p"] * 7, batch_size=batch_size) == [0, 1, 2, 3, 4, 5, 6]


def test_a_reward_sees_lists_no_longer_than_the_batch_and_the_prompt_of_each_image():
    seen = []

    def reward(images, prompts):
        assert type(images) is list and type(prompts) is list
        seen.append([(image.getpixel((0, 0))[0], prompt) for image, prompt in zip(images, prompts, strict=True)])
        return [0.0] * len(images)

    score_images(reward, tuple(some_images(5)), tuple("abcde"), batch_size=2)
    assert seen == [[(0, "a"), (1, "b")], [(2, "c"), (3, "d")], [(4, "e")]]


def test_none_is_kept_as_could_not_be_scored():
    assert score_images(returning([1, None]), some_images(2), ["p", "q"]) == [1.0, None]


@pytest.mark.parametrize(
    "returned",
    [np.array([1.5, 2.0], dtype=np.float32), torch.tensor([1.5, 2.0]), [np.float32(1.5), torch.tensor(2)], (1.5, 2)],
    ids=["array", "tensor", "scalars", "tuple"],
)
def test_arrays_and_tensors_become_plain_floats(returned):
    scores = score_images(returning(returned), some_images(2), ["p", "q"])
    assert scores == [1.5, 2.0] and all(type(score) is float for score in scores)


def test_no_images_give_no_scores_and_no_call():
    assert score_images(None, [], []) == []


def test_an_image_that_is_not_there_has_no_score_and_is_not_shown_to_the_reward():
    class Both:
        def __call__(self, images, prompts):
            return self.columns(images, prompts)[""]

        def columns(self, images, prompts):
            return {"": [float(prompt) for prompt in prompts], "_red": redness(images, prompts)}

    images = some_images(5)
    images[1] = images[3] = images[4] = None
    expected = {"": [10.0, None, 12.0, None, None], "_red": [0.0, None, 2.0, None, None]}
    prompts = ["10", "11", "12", "13", "14"]
    assert score_columns(Both(), images, prompts, batch_size=2) == expected
    assert score_images(Both(), images, prompts, batch_size=2) == expected[""]
    assert score_columns(redness, images, prompts, batch_size=2) == {"": expected["_red"]}


def test_rows_are_counted_past_images_that_are_not_there_and_from_the_number_given():
    with pytest.raises(ValueError, match=r"row 102 \(nan, prompt 'c'\)"):
        score_images(returning([math.nan]), [None, None, *some_images(1)], ["a", "b", "c"], first_row=100)


def test_a_wrong_number_of_scores_names_the_reward_and_the_rows():
    def forgetful(images, prompts):
        return [1.0] * min(len(images), 1)

    with pytest.raises(ValueError, match=r"'forgetful' returned 1 scores for 2 images \(rows 0 to 1\)"):
        score_images(forgetful, some_images(3), ["p"] * 3, batch_size=2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_names_the_reward_the_row_and_the_prompt(bad):
    def unstable(images, prompts):
        return [bad if prompt == "cat" else 0.0 for prompt in prompts]

    with pytest.raises(ValueError, match=rf"'unstable' returned NaN or infinity for row 3 \({bad}, prompt 'cat'\)"):
        score_images(unstable, some_images(5), ["a", "b", "c", "cat", "e"], batch_size=2)


def test_only_the_first_offending_rows_are_listed():
    with pytest.raises(ValueError, match=r"row 0 .*row 1 .*row 2 .* and 7 more"):
        score_images(returning([math.nan] * 10), some_images(10), ["p"] * 10)


@pytest.mark.parametrize("returned", ["12", 1.0, iter([1.0, 2.0]), {0: 1.0, 1: 2.0}, None])
def test_anything_but_a_list_is_a_type_error(returned):
    with pytest.raises(TypeError, match="must return a list"):
        score_images(returning(returned), some_images(2), ["p", "q"])


async def waiting():
    return [1.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "remedy"),
    [
        ({"score": [1.0], "b": [2.0]}, r"Return the list under one of its keys \('score', 'b'\)"),
        ((value for value in (1.0, 2.0)), r"Make a list of it: `list\(...\)`"),
        (None, "lack its `return`"),
        (0.5, "called with a list of images, not with one"),
        (torch.tensor(0.5), "called with a list of images, not with one"),
        (torch.zeros(2, 1), r"`.flatten\(\)` makes one of shape"),
        (np.zeros((2, 2)), r"`.diagonal\(\)` of a table"),
    ],
)
def test_what_is_returned_instead_of_a_list_gets_an_answer_that_fits_it(returned, remedy):
    with pytest.raises(TypeError, match=f"must return a list with one number, or None, per image.*{remedy}"):
        score_images(returning(returned), some_images(2), ["p", "q"])


@pytest.mark.parametrize("returned", [0.5, [1.0], [math.nan, 1.0], ["a", 1.0], np.zeros((2, 2)), {0: 1.0}])
def test_what_is_said_of_a_reward_of_videos_speaks_of_videos(returned, capsys):
    reward = returning(returned)
    reward.takes = "videos"
    for prompts in (["p", "q"], ["p"], "p"):
        with pytest.raises((TypeError, ValueError)) as error:
            score_images(reward, [some_images(2), some_images(2)], prompts, progress=True)
        assert "image" not in str(error.value)
    assert "video" in capsys.readouterr().err


def test_an_async_function_is_told_how_it_can_be_called():
    coroutine = waiting()
    with pytest.raises(TypeError, match="is not awaited"):
        score_images(returning(coroutine), some_images(2), ["p", "q"])
    coroutine.close()


def test_arguments_whose_names_do_not_tell_are_swapped_where_the_reward_works_that_way_round():
    def swapped(a, b):
        return [len(text) + image.width for text, image in zip(a, b, strict=True)]

    def failing(a, b):
        return [image.absent for image in a]

    with pytest.raises(TypeError, match=r"'swapped' takes prompts first: .*TypeError.* Swap its arguments"):
        score_images(swapped, some_images(2), ["p", "q"])
    with pytest.raises(AttributeError, match="absent"):
        score_images(failing, some_images(2), ["p", "q"])


def test_swapped_arguments_and_another_number_of_them_are_refused_before_the_first_call(tmp_path, monkeypatch):
    def swapped(prompts, images):
        raise AssertionError

    with pytest.raises(TypeError, match=r"takes \(prompts, images\), prompts first.*reward\(images, prompts\): swap"):
        score_images(swapped, some_images(1), ["p"])
    with pytest.raises(TypeError, match=r"takes \(images\): too many positional arguments"):
        score_images(lambda images: [1.0], some_images(1), ["p"])
    with pytest.raises(TypeError, match="missing a required argument: 'seed'"):
        score_images(lambda images, prompts, seed: [1.0], some_images(1), ["p"])
    score_images(lambda *args, **options: [1.0], some_images(1), ["p"])
    score_images(lambda x, y, seed=0: [1.0], some_images(1), ["p"])
    (tmp_path / "my_swapped_reward.py").write_text("def swapped(captions, images):\n    return []\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="swap its arguments"):
        load_reward("my_swapped_reward:swapped")


@pytest.mark.parametrize("entry", ["1.0", [1.0], 1j])
def test_an_entry_that_is_no_number_is_a_type_error_with_its_row(entry):
    with pytest.raises(TypeError, match="is not a number for row 1"):
        score_images(returning([1.0, entry]), some_images(2), ["p", "q"])


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        score_images(redness, some_images(2), ["p"])
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        score_images(redness, some_images(1), ["p"], batch_size=0)
    with pytest.raises(TypeError, match="is one string"):
        score_images(redness, some_images(2), "ab")

    class Several:
        def columns(self, images, prompts):
            return {"": [0.0] * len(images)}

    with pytest.raises(ValueError, match="2 images and 3 prompts"):
        score_columns(Several(), some_images(2), ["p", "q", "r"])
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        score_columns(Several(), some_images(1), ["p"], batch_size=0)


def test_names_of_functions_partials_and_objects():
    class Aesthetic:
        def __call__(self, images, prompts):
            return [0.0] * len(images)

    assert reward_name(redness) == "redness"
    assert reward_name(functools.partial(redness, prompts=[])) == "redness"
    assert reward_name(Aesthetic()) == "Aesthetic"


def test_jpeg_score_is_minus_the_kilobytes_of_the_saved_file(tmp_path):
    rng = random.Random(0)
    noise = Image.frombytes("RGB", (64, 48), rng.randbytes(64 * 48 * 3))
    noise.save(tmp_path / "noise.jpg", quality=95)
    assert jpeg_compressibility([noise], [""]) == [-(tmp_path / "noise.jpg").stat().st_size / 1000]


def test_a_plain_image_scores_higher_than_noise():
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    plain = Image.new("RGB", (64, 64), "red")
    scores = score_images(jpeg_compressibility, [noise, plain], ["", ""])
    assert scores[0] < scores[1] < 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_images_of_every_mode_are_scored_as_their_rgb_form(mode):
    image = Image.new(mode, (16, 16))
    assert jpeg_compressibility([image], [""]) == jpeg_compressibility([image.convert("RGB")], [""])


@pytest.mark.parametrize("name", ["background_darkness", "colour_faithfulness"])
def test_scores_of_the_shapes_world_take_any_mode_and_size_and_any_prompt(name):
    reward = load_reward(name)
    for size in [(1, 1), (3, 90), (33, 32)]:
        image = Image.new("RGBA", size, (255, 0, 0, 9))
        expected = {
            "background_darkness": 2 / 3,
            "colour_faithfulness": reward([Image.new("RGB", (32, 32), "red")], ["red"])[0],
        }
        for mode in ("RGBA", "RGB"):
            assert score_images(reward, [image.convert(mode)], ["red"]) == pytest.approx([expected[name]])
    assert load_reward("colour_faithfulness")([Image.new("L", (32, 32))], ["a cow"]) == [None]


def test_the_two_jpeg_rewards_are_opposites():
    images = [Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3)), Image.new("RGB", (64, 64))]
    sizes = jpeg_incompressibility(images, ["", ""])
    assert sizes == [-score for score in jpeg_compressibility(images, ["", ""])]
    assert sizes[0] > sizes[1] > 0


# ---- Facts ----


def test_facts_come_from_the_attribute_and_name_the_reward():
    facts = RewardFacts("mine", "owner/name", "abc", "0 to 1")

    class Reward:
        def __init__(self, facts):
            self.facts = facts

        def __call__(self, images, prompts, extra=0):
            return [0.0] * len(images)

    assert reward_facts(Reward(facts)) is facts
    assert reward_facts(functools.partial(Reward(facts), extra=1)) is facts
    assert reward_name(Reward(facts)) == "mine"
    assert reward_facts(Reward({"name": "a dict of something else"})) == RewardFacts("Reward")
    assert reward_facts(redness) == RewardFacts("redness", None, None, "")


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_of_the_catalogue_states_its_name_and_scale(name):
    found = find_reward(name)
    if isinstance(found, type):
        assert (found.name, bool(found.scale)) == (name, True)
    else:
        assert (reward_facts(found).name, bool(reward_facts(found).scale)) == (name, True)


# ---- By name ----


def test_a_function_of_the_user_is_found_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_own_reward.py").write_text(
        "def width(images, prompts):\n    return [image.width for image in images]\n\n"
        "class Scaled:\n    def __init__(self, factor=1):\n        self.factor = factor\n"
        "    def __call__(self, images, prompts):\n        return [self.factor * image.width for image in images]\n"
    )
    monkeypatch.chdir(tmp_path)
    # As a console script has it: the folder of the script first, not the current one.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "my_own_reward", raising=False)
    assert load_reward("my_own_reward:width")(some_images(2), ["a", "b"]) == [8, 8]
    assert load_reward("my_own_reward:Scaled", factor=3)(some_images(1), ["a"]) == [24]
    with pytest.raises(TypeError, match=r"is not a class, so it takes no options \(factor\)"):
        load_reward("my_own_reward:width", factor=3)
    monkeypatch.delitem(sys.modules, "my_own_reward")


def test_a_class_with_from_pretrained_gets_device_and_dtype(tmp_path, monkeypatch):
    (tmp_path / "my_own_model.py").write_text(
        "class Model:\n    @classmethod\n    def from_pretrained(cls, source='x', *, device, dtype):\n"
        "        made = cls()\n        made.given = (source, device, dtype)\n        return made\n"
        "    def __call__(self, images, prompts):\n        return [0.0] * len(images)\n\n"
        "class Mute:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("my_own_model:Model").given == ("x", "cpu", None)
    made = load_reward("my_own_model:Model", device="meta", dtype=torch.float16, source="y")
    assert made.given == ("y", "meta", torch.float16)
    assert load_reward("my_own_model:Model", dtype="bfloat16").given == ("x", "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="'bf16', which is not a torch dtype"):
        load_reward("my_own_model:Model", dtype="bf16")
    with pytest.raises(TypeError, match=r"'my_own_model:Model': .*'sauce'\. It takes source, device, dtype"):
        load_reward("my_own_model:Model", sauce="y")
    with pytest.raises(TypeError, match="cannot be called with images and prompts"):
        load_reward("my_own_model:Mute")


@pytest.mark.parametrize("spec", [":reward", ".module:reward"])
def test_a_function_without_its_module_is_refused(spec):
    with pytest.raises(ValueError, match=f"{re.escape(repr(spec))} is not a known reward.*module:function"):
        load_reward(spec)


@pytest.mark.parametrize(("spec", "close"), [("hpsv2", "hpsv2.1"), ("pick_score", "pickscore")])
def test_a_wrong_name_is_answered_with_the_nearest_and_all_names(spec, close):
    with pytest.raises(ValueError, match=f"Did you mean '{close}'") as error:
        load_reward(spec)
    assert all(name in str(error.value) for name in REWARDS)


def test_the_catalogue_is_imported_without_torch_and_transformers():
    program = (
        "import sys; from tgol_trainer.rewards import REWARDS, load_reward; load_reward('jpeg_compressibility');"
        "print(*({'torch', 'transformers', 'diffusers', 'safetensors'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.split() == []


# ---- Weighted ----


def test_a_weighted_reward_is_the_sum_and_none_where_a_part_is_none():
    both = WeightedReward({"red": (redness, 2), "other": (returning([10.0, None, 30.0]), -0.5)})
    assert score_images(both, some_images(3), ["p"] * 3) == [-5.0, None, 4.0 - 15.0]
    assert reward_name(both) == "2*red + -0.5*other"
    assert both([], []) == []


def test_a_weighted_reward_says_what_its_parts_are_and_takes_what_they_take():
    class Model:
        def __init__(self, facts, takes="images"):
            self.facts, self.takes = facts, takes

        def __call__(self, images, prompts):
            return [0.0] * len(images)

    a = Model(RewardFacts("a", "owner/a", "abc", "0 to 1"))
    b = Model(RewardFacts("b", "here/b", None, "in kB"))
    facts = WeightedReward({"x": (a, 1), "y": (b, -2), "z": (redness, 1)}).facts
    scale = "weighted sum (x: 0 to 1; y: in kB)"
    assert facts == RewardFacts("1*x + -2*y + 1*z", "x: owner/a; y: here/b", "x: abc", scale)
    assert WeightedReward({"z": (redness, 1)}).facts.model_id is None
    film = Model(RewardFacts("film"), "videos")
    assert [reward_takes(WeightedReward({"x": (part, 1)})) for part in (a, film)] == ["images", "videos"]
    with pytest.raises(ValueError, match="x scores images, y scores videos"):
        WeightedReward({"x": (a, 1), "y": (film, 1)})


def test_a_weighted_reward_checks_its_parts():
    with pytest.raises(ValueError, match="is empty"):
        WeightedReward({})
    with pytest.raises(ValueError, match="the weight of b is not finite"):
        WeightedReward({"a": (redness, 1), "b": (redness, math.nan)})
    broken = WeightedReward({"a": (redness, 1), "b": (returning([1.0]), 1)})
    with pytest.raises(ValueError, match="returned 1 scores for 2 images"):
        broken(some_images(2), ["p", "q"])
