"""What `tgol rate` shows: every image that can be rated, in an order that tells nothing."""

import io
import string

import datasets
import pytest
from PIL import Image

from tgol_trainer.data import DataError
from tgol_trainer.rating.tasks import Picture, Pictures, make_tasks, order_for

PROMPTS = [f"prompt {number}" for number in range(8)]


def pictures(each):
    return [Picture(f"{prompt} {index}", 0, prompt) for prompt in PROMPTS for index in range(each)]


def names(tasks):
    return [task.id for task in tasks]


def test_the_order_depends_on_rater_and_seed_alone_and_shows_each_once():
    tasks = make_tasks(pictures(4), "ratings", 0)
    first = order_for(tasks, "anna", 0, by_prompt=False)
    assert names(first) == names(order_for(tasks[::-1], "anna", 0, by_prompt=False))
    assert sorted(names(first)) == sorted(names(tasks)) and names(first) != sorted(names(tasks))
    assert names(first) != names(order_for(tasks, "bob", 0, by_prompt=False))
    assert names(first) != names(order_for(tasks, "anna", 1, by_prompt=False))


def test_images_that_come_later_leave_the_others_in_their_order():
    few, many = make_tasks(pictures(3), "ratings", 0), make_tasks(pictures(5), "ratings", 0)
    known = set(names(few))
    later = [name for name in names(order_for(many, "anna", 0, by_prompt=False)) if name in known]
    assert later == names(order_for(few, "anna", 0, by_prompt=False))


def test_by_prompt_each_prompt_is_one_stretch():
    ordered = order_for(make_tasks(pictures(4), "ratings", 0), "anna", 0, by_prompt=True)
    stretches = [ordered[start : start + 4] for start in range(0, len(ordered), 4)]
    assert all(len({task.prompt for task in stretch}) == 1 for stretch in stretches)
    assert [stretch[0].prompt for stretch in stretches] != PROMPTS


@pytest.mark.parametrize("each", [2, 3, 4, 9])
def test_pairs_connect_the_images_of_a_prompt_and_each_meets_at_most_four_others(each):
    tasks = make_tasks(pictures(each), "pairs", 0)
    met = {picture.id: set() for picture in pictures(each)}
    for task in tasks:
        one, other = task.pictures
        assert one.rpartition(" ")[0] == other.rpartition(" ")[0] == task.prompt
        met[one].add(other)
        met[other].add(one)
    assert len({frozenset(task.pictures) for task in tasks}) == len(tasks)
    assert all(min(2, each - 1) <= len(others) <= 4 for others in met.values())
    for prompt in PROMPTS:
        reached = {f"{prompt} 0"}
        for _ in range(each):
            reached |= {other for one in reached for other in met[one]}
        assert len(reached) == each
    on_the_left = sum(task.pictures == tuple(sorted(task.pictures)) for task in tasks)
    assert each < 4 or len(tasks) / 4 < on_the_left < len(tasks) * 3 / 4


def test_pairs_need_two_images_of_a_prompt():
    with pytest.raises(DataError, match="needs two images of one prompt"):
        make_tasks(pictures(1), "pairs", 0)


def encoded(kind, colour=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(file, kind)
    return file.getvalue()


def test_rows_without_prompt_or_image_are_counted_and_ids_tell_nothing_of_files(tmp_path):
    (tmp_path / "best_picture.png").write_bytes(encoded("PNG"))
    rows = {
        "prompt": ["a", " ", None, "b", "a"],
        "image": [str(tmp_path / "best_picture.png")] * 3 + [str(tmp_path / "none.png"), None],
    }
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    found = Pictures(dataset, folder=tmp_path)
    ((name, picture),) = found.by_id.items()
    assert found.num_left_out == 4 and picture.prompt == "a" and not found.numbered
    assert set(name) <= set(string.hexdigits) and found.content(name) == encoded("PNG")


def test_images_whose_package_is_missing_are_left_out_and_named(tmp_path, monkeypatch):
    """By their first bytes, of files and of what a table holds: the name of a file says nothing."""
    monkeypatch.setattr("tgol_trainer.data.images.readable_formats", lambda: ["PNG"])
    heic = b"\0\0\0\x18ftypheic" + bytes(8)
    (tmp_path / "IMG_1.png").write_bytes(heic)
    cells = [{"path": str(tmp_path / "IMG_1.png")}, {"bytes": heic}, {"bytes": encoded("PNG")}]

    def pictures(number):
        cast = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
        images = [{"path": None, "bytes": None, **cell} for cell in cells[:number]]
        return Pictures(datasets.Dataset.from_dict({"prompt": ["a"] * number, "image": images}, cast), folder=tmp_path)

    found = pictures(3)
    assert [line.partition(":")[0] for line in found.lacking] == ["IMG_1.png", "row 1"]
    assert [picture.row for picture in found.by_id.values()] == [2] and found.num_left_out == 0
    with pytest.raises(DataError, match=r"IMG_1.png: it is HEIF, which `pip install 'tgol_trainer\[formats\]'` reads"):
        pictures(2)


def test_a_turned_webp_which_browsers_show_unturned_is_sent_upright(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("a.webp", "b.jpg"):
        Image.new("RGB", (6, 4)).save(tmp_path / name, exif=turned)
    rows = {"prompt": ["a", "b"], "image": [str(tmp_path / name) for name in ("a.webp", "b.jpg")]}
    found = Pictures(datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()))
    contents = {picture.prompt: found.for_browser(name) for name, picture in found.by_id.items()}
    assert contents["a"][1] == "image/jpeg" and Image.open(io.BytesIO(contents["a"][0])).size == (4, 6)
    assert contents["b"] == ((tmp_path / "b.jpg").read_bytes(), "image/jpeg")


def test_a_browser_gets_what_it_knows_as_it_is_and_png_of_what_has_no_losses():
    files = [encoded("PNG"), encoded("JPEG"), encoded("TIFF", 200), b"broken"]
    rows = {"prompt": ["a"] * 4, "image": [{"bytes": content, "path": None} for content in files]}
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    found = Pictures(datasets.Dataset.from_dict(rows, features=features))
    by_row = {picture.row: name for name, picture in found.by_id.items()}
    assert found.numbered and len(by_row) == 4
    assert found.for_browser(by_row[0]) == (files[0], "image/png")
    assert found.for_browser(by_row[1]) == (files[1], "image/jpeg")
    content, kind = found.for_browser(by_row[2])
    assert kind == "image/png" and Image.open(io.BytesIO(content)).getpixel((0, 0)) == (200, 0, 0)
