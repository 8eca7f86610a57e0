"""What counts as a Hub id, everywhere: the form that huggingface_hub accepts."""

import pytest

from tgol_trainer._hub_ids import is_hub_id
from tgol_trainer.families import load_family


@pytest.mark.parametrize("name", ["owner/name", "o/n.1-b_c", "1/2"])
def test_an_owner_and_a_name_are_a_hub_id(name):
    assert is_hub_id(name) and is_hub_id(name, owner=False)


def test_a_name_alone_is_one_only_where_no_owner_is_asked_for():
    assert is_hub_id("gpt2", owner=False) and not is_hub_id("gpt2")


@pytest.mark.parametrize(
    "name", [None, "", "./run", "../run", "~/run", "/run", "a/b/c", "a/", "a--b/c", "a b/c", "a/b\n"]
)
def test_paths_and_other_text_are_none(name):
    assert not is_hub_id(name) and not is_hub_id(name, owner=False)


def test_a_folder_that_does_not_exist_is_named_as_such_and_not_asked_for_at_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"\./run does not exist"):
        load_family("./run")
