"""What the commands share: how a command is called from here."""

import sys

from tgol_trainer.cli.console import program


def test_a_program_that_the_shell_does_not_find_is_named_by_its_path(tmp_path, monkeypatch):
    own = tmp_path / "venv" / "tgol"
    own.parent.mkdir()
    own.touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(own.with_name("python")))
    monkeypatch.setenv("PATH", "/nowhere")
    assert program() == "venv/tgol"  # as after `make quickstart`, whose environment is not active
    monkeypatch.setenv("PATH", str(own.parent))
    assert program() == "tgol"
    own.unlink()
    assert program() == "tgol"  # a Space, which runs the package from a folder
