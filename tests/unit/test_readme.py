"""What the README tells a reader to type exists."""

import re
import shlex

import pytest
import yaml

from launch import compare_objectives
from lcl_ds import __main__ as program
from lcl_ds import convert
from lcl_ds.bench import __main__ as bench
from lcl_ds.config import ds_config_path, load_config, recipe_path
from lcl_ds.data import __main__ as data
from lcl_ds.report import __main__ as report
from lcl_ds.train import parse_arguments
from tests.support.ranks import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "launch/train.py" in c])
def test_training_commands_are_valid(command):
    words = shlex.split(command)
    arguments = parse_arguments(words[words.index("launch/train.py") + 1 :])
    assert (ROOT / ds_config_path(arguments.ds_config)).is_file()
    load_config(recipe_path(arguments.recipe), arguments.overrides)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("lcl ")])
def test_commands_of_the_program_are_valid(command):
    _, name, *words = shlex.split(command)
    assert name in {"--help", *program.COMMANDS}
    if name == "train":
        arguments = parse_arguments(words)
        assert ds_config_path(arguments.ds_config).is_file()
        load_config(recipe_path(arguments.recipe), arguments.overrides)


@pytest.mark.parametrize("target", [c.split()[1] for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m lcl_ds\.(\w+)", README))))
def test_module_commands_exist(module, capsys):
    with pytest.raises(SystemExit) as exit:
        {"bench": bench, "convert": convert, "data": data, "report": report}[module].main(["--help"])
    assert exit.value.code == 0
    assert f"lcl_ds.{module}" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if "lcl_ds.bench" in c])
def test_benchmark_commands_are_valid(command):
    arguments = bench.build_parser().parse_args(shlex.split(command)[3:])
    if arguments.job in bench.METHODS:
        assert bench.choose_cases(arguments, "cpu")
        assert bench.choose_cases(arguments, "cuda")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "lcl_ds.data" in c])
def test_data_commands_are_valid(command):
    assert data.build_parser().parse_args(shlex.split(command)[3:]).run


@pytest.mark.parametrize("command", [c for c in COMMANDS if "compare_objectives.py" in c])
def test_the_comparison_of_objectives_is_valid(command):
    words = shlex.split(command)
    assert compare_objectives.build_parser().parse_args(words[words.index("launch/compare_objectives.py") + 1 :])


def test_the_example_of_the_kernels_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "kernels" / "README.md").read_text(), re.DOTALL)
    variables: dict = {}
    exec(example, variables)
    assert variables["weight"].grad.isfinite().all()
    assert variables["scale"].grad.isfinite()
    assert 0 <= variables["accuracy"] <= 1


def test_the_data_example_is_a_valid_recipe():
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    settings = yaml.safe_load(example)["data"]
    overrides = [f"data.{key}={yaml.safe_dump(value)}" for key, value in settings.items()]
    config = load_config(recipe_path("demo"), overrides)
    assert [source.name for source in config.data.shards] == ["mmc4", "laion"]


def test_linked_files_exist():
    for page in (ROOT / "README.md", ROOT / "kernels" / "README.md"):
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), target


def test_the_requirements_pin_everything():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"^[\w.-]+==[\w.]+", pin) for pin in pins)
    assert any(pin.startswith("torch==2.13.0") for pin in pins)
