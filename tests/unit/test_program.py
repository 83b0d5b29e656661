"""The program ``lcl``: all commands under one name."""

import importlib
import re
import sys

import pytest

from lcl_ds import __version__
from lcl_ds.__main__ import COMMANDS, main


def test_help_lists_every_command_with_a_line(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        named = [line.split()[0] for line in lines if line.startswith("  ")]
        assert named == list(COMMANDS)
        assert all(len(line) <= 100 for line in lines)


def test_the_version_is_the_package_s(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lcl {__version__}\n"


def test_a_mistyped_command_is_one_sentence_with_the_one_that_was_meant(capsys):
    assert main(["trian", "train.steps=3"]) == 2
    assert capsys.readouterr().err == (
        f"error: lcl trian: there is no such command (did you mean 'train'?); there are {', '.join(COMMANDS)}\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_that_of_its_module_with_a_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert re.match(rf"usage: .*\b{name}\b", capsys.readouterr().out)
    module, _ = COMMANDS[name]
    assert module.removesuffix(".__main__") == f"lcl_ds.{name}"
    assert importlib.import_module(module).main


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "bench"])
def test_the_help_names_the_program_that_was_called(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/anywhere/bin/lcl", name])
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: lcl {name} ")


def test_the_exit_code_of_a_command_is_the_program_s(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
