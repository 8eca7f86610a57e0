"""The licence of a base model: read from its own card, carried on whole, never guessed."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from tests.tiny import stable_diffusion
from tgol_trainer import TGOLTrainer
from tgol_trainer.families import ModelOrigin, hub_license
from tgol_trainer.families.licenses import folder_license

OTHER = "license: other\nlicense_name: flux-1-dev-non-commercial-license\nlicense_link: "
NAME = "flux-1-dev-non-commercial-license"


def card(folder: Path, metadata: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n\nlicense: mit\n")
    return folder


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: creativeml-openrail-m", {"license": "creativeml-openrail-m"}),
        ("tags: [a]", {}),
        ("license: [mit, apache-2.0]", {}),
        ("license: mit\nlicense_name: ignored", {"license": "mit"}),
        (
            f"{OTHER}https://example.org/LICENSE",
            {"license": "other", "license_name": NAME, "license_link": "https://example.org/LICENSE"},
        ),
        (f"{OTHER}LICENSE.md", {"license": "other", "license_name": NAME}),
        ("license: [mit", {}),
    ],
)
def test_a_folders_card_is_read_and_a_link_into_the_folder_is_left_out(metadata, expected, tmp_path):
    assert folder_license(card(tmp_path, metadata)) == expected


def test_a_folder_without_a_card_has_no_known_license(tmp_path):
    assert folder_license(tmp_path) == {}


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Put a card into a cache of the Hub, as a download leaves it."""

    def place(metadata, commit="0" * 40):
        folder = tmp_path / "models--owner--base"
        card(folder / "snapshots" / commit, metadata)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub_license.cache_clear()
    yield place
    hub_license.cache_clear()


def test_the_copy_of_a_card_in_the_cache_is_read_and_its_link_made_whole(cached):
    cached(f"{OTHER}./LICENSE.md")
    link = "https://huggingface.co/owner/base/blob/main/LICENSE.md"
    assert hub_license("owner/base", None) == {"license": "other", "license_name": NAME, "license_link": link}


@pytest.mark.parametrize("link", ["../../etc/LICENSE", "/home/alice/LICENSE", "~/LICENSE"])
def test_a_link_out_of_the_repository_is_left_out(link, cached):
    cached(f"{OTHER}{link}")
    assert "license_link" not in hub_license("owner/base", None)


def test_offline_and_without_a_copy_the_license_is_not_known(cached):
    assert hub_license("owner/base", None) == {}


def test_a_hub_that_cannot_be_asked_costs_the_license_only(cached, monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionError("down")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.model_info", fail)
    assert hub_license("owner/base", "1") == {}


def test_the_card_of_a_run_has_the_license_of_its_base_from_folder_or_hub(cached, config, dataset, tmp_path):
    base = card(tmp_path / "base", "license: openrail++")
    stable_diffusion().save_pretrained(base)
    card(base, "license: openrail++")
    trainer = TGOLTrainer(str(base), config(), dataset)
    trainer.save_model(str(tmp_path / "a"))
    data = ModelCard.load(tmp_path / "a" / "README.md").data.to_dict()
    assert data["license"] == "openrail++"
    assert "base_model" not in data
    cached(f"{OTHER}LICENSE.md")
    trainer.family.origin = ModelOrigin(hub_id="owner/base")
    trainer.save_model(str(tmp_path / "b"))
    data = ModelCard.load(tmp_path / "b" / "README.md").data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", NAME)
