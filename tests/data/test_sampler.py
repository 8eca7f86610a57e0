"""The order of rows that keeps a prompt's images together."""

from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from tgol_trainer.data import GroupSampler, innermost_sampler


def groups_of(seed=0, num_groups=30, sizes=(1, 11)):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_groups), rng.integers(*sizes, size=num_groups))
    return rng.permutation(groups)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_an_epoch_has_every_row_once_and_blocks_are_as_pure_as_the_groups_allow(size):
    groups = groups_of()
    order = list(GroupSampler(groups, size, seed=3))
    assert sorted(order) == list(range(len(groups)))
    blocks = [groups[order[start : start + size]] for start in range(0, len(order), size)]
    pure = Counter(block[0] for block in blocks if len(block) == size and len(set(block)) == 1)
    for group, count in Counter(groups.tolist()).items():
        assert pure[group] == count // size, group
    if size > 2:  # what is left of a group is in one block
        for group in set(groups.tolist()):
            rest = [block for block in blocks if (block == group).any() and len(set(block.tolist())) > 1]
            assert len(rest) <= 1


def test_groups_of_one_size_fill_every_block():
    groups = np.tile(np.arange(12), 8)
    order = list(GroupSampler(groups, 8))
    assert all(len(set(groups[order[start : start + 8]])) == 1 for start in range(0, 96, 8))


def test_the_order_depends_on_seed_and_epoch_alone():
    groups = groups_of()
    first, second, other = GroupSampler(groups, 4, seed=1), GroupSampler(groups, 4, seed=1), GroupSampler(groups, 4, 2)
    assert list(first) == list(first) == list(second)
    assert list(first) != list(other)
    first.set_epoch(1)
    assert list(first) != list(second)
    second.set_epoch(1)
    assert list(first) == list(second)


def test_no_rows_give_no_order():
    assert list(GroupSampler(np.array([], dtype=np.int64), 2)) == []


def test_a_process_of_two_that_resumes_inside_the_second_epoch_goes_on_with_that_epochs_order():
    """accelerate's own `set_epoch` stops at the wrappers that this loader has, and would give the first epoch's."""
    groups = np.tile(np.arange(6), 4)
    expected = GroupSampler(groups, 4, seed=5)
    expected.set_epoch(1)
    order = list(expected)
    loader = DataLoader(range(24), batch_size=4, sampler=GroupSampler(groups, 4, seed=5))
    loader = prepare_data_loader(loader, num_processes=2, process_index=1, put_on_device=False)
    loader = skip_first_batches(loader, 1)
    loader.set_epoch(1)
    innermost_sampler(loader).set_epoch(1)
    assert [batch.tolist() for batch in loader] == [order[12:16], order[20:24]]
