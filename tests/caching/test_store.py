"""Tensors by key on disk: exact, whole or absent, found among many."""

import numpy as np
import pytest
import torch

from tgol_trainer.caching.store import TensorStore, keys_of

KEYS = keys_of([f"text {number}" for number in range(7)])


def entries(number, dtype=torch.float32, shape=(3, 4)):
    generator = torch.Generator().manual_seed(number)
    return [{"x": torch.randn(shape, generator=generator).to(dtype)} for _ in range(number)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_is_read_is_what_was_written_whatever_the_order_and_the_file(tmp_path, dtype):
    store, written = TensorStore(tmp_path), entries(7, dtype)
    store.write(KEYS[:4], written[:4])
    store.write(KEYS[4:], written[4:])
    assert len(store) == 0
    store.refresh()
    assert len(store) == 7
    order = [6, 0, 3, 3, 5]
    found = store.read(KEYS[order])["x"]
    assert found.dtype == dtype
    assert torch.equal(found, torch.stack([written[index]["x"] for index in order]))


def test_keys_that_share_a_half_are_told_apart(tmp_path):
    keys = np.array([[1, 5], [1, 6], [2, 5], [1, 4]], dtype=np.uint64)
    store, written = TensorStore(tmp_path), entries(4)
    store.write(keys, written)
    store.refresh()
    assert torch.equal(store.read(keys)["x"], torch.stack([entry["x"] for entry in written]))
    asked = np.array([[1, 5], [1, 7], [2, 4], [3, 5], [0, 0], [1, 4]], dtype=np.uint64)
    assert store.missing(asked).tolist() == [False, True, True, True, True, False]


def test_zero_rows_at_the_end_are_not_stored_and_come_back(tmp_path):
    """Wan's embeddings have 512 rows of which a prompt fills a few."""
    rows = []
    for used in (0, 2, 512, 7):
        x = torch.zeros(512, 64, dtype=torch.bfloat16)
        x[:used] = torch.randn(used, 64).to(torch.bfloat16)
        if used > 2:
            x[1] = 0  # a zero row in the middle stays
        rows.append({"x": x, "mask": x.sum(1)})
    store = TensorStore(tmp_path, ragged=True)
    store.write(KEYS[:4], rows)
    store.refresh()
    found = store.read(KEYS[[3, 0, 1, 2]])
    for name in ("x", "mask"):
        assert torch.equal(found[name], torch.stack([rows[index][name] for index in (3, 0, 1, 2)]))
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_size < 2 * 64 * (2 + 512 + 7) + 4 * 512 * 2 + 1000


def test_tensors_of_a_ragged_store_keep_their_own_lengths_and_their_zeros(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 1, 3, 4):
        text = torch.randn(length, 2, 3, generator=generator)
        text[length // 2 :] = 0
        rows.append({"text": text, "mask": text.flatten(1).any(1), "pooled": torch.tensor([0.0, 1.0, 0.0])})
    store = TensorStore(tmp_path, ragged=True)
    store.write(KEYS[:4], rows)
    store.refresh()
    found = store.read_rows(KEYS[[2, 0, 3, 1, 2]])
    for name in rows[0]:
        assert [tensor.tolist() for tensor in found[name]] == [rows[index][name].tolist() for index in (2, 0, 3, 1, 2)]


def test_a_file_that_was_cut_is_removed_and_only_its_entries_are_missing(tmp_path, caplog):
    store, written = TensorStore(tmp_path), entries(7)
    store.write(KEYS[:4], written[:4])
    (cut,) = tmp_path.glob("*.safetensors")
    store.write(KEYS[4:], written[4:])
    cut.write_bytes(cut.read_bytes()[:-20])
    store = TensorStore(tmp_path)
    assert str(cut) in caplog.text
    assert store.missing(KEYS).tolist() == [True] * 4 + [False] * 3
    with pytest.raises(KeyError, match="4 of 7 entries are not in"):
        store.read(KEYS)
    store.write(KEYS[:4], written[:4])
    store.refresh()
    assert torch.equal(store.read(KEYS)["x"], torch.stack([entry["x"] for entry in written]))


def test_a_store_in_another_process_reads_through_maps_of_its_own(tmp_path):
    import pickle

    store, written = TensorStore(tmp_path), entries(2)
    store.write(KEYS[:2], written)
    store.refresh()
    store.read(KEYS[:2])
    sent = pickle.dumps(store)
    assert len(sent) < 2000
    assert torch.equal(pickle.loads(sent).read(KEYS[1:2])["x"][0], written[1]["x"])
