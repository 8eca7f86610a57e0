"""What a dataset's card says of the model that made its images."""

import logging

import pyarrow
import pyarrow.parquet

from tgol_trainer.jobs.publish import _generators


def test_folders_of_this_machine_in_the_columns_model_and_adapter_are_warned_about(tmp_path, caplog):
    shard = tmp_path / "shard.parquet"
    rows = {"model": ["shapes", "shapes"], "adapter": [str(tmp_path), None]}
    pyarrow.parquet.write_table(pyarrow.table(rows), shard)
    with caplog.at_level(logging.WARNING, logger="tgol_trainer"):
        made = _generators([shard], {"model", "adapter"})
    assert [record.getMessage() for record in caplog.records] == [
        f"The column `adapter` holds {str(tmp_path)!r}, a path of this machine, which becomes public."
    ]
    assert {facts["license"] for facts in made} == {"apache-2.0"}
