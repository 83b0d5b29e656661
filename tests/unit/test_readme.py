"""What the README and the other pages tell a reader exists: commands, settings, names, links, examples."""

import argparse
import ast
import doctest
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from lcl_ds import __main__ as program
from lcl_ds.bench import __main__ as bench
from lcl_ds.config import ds_config_path, load_config, recipe_path
from lcl_ds.data.corpora import READERS
from lcl_ds.objectives import NAMES
from lcl_ds.study.jobs import runs_of
from lcl_ds.study.settings import STUDIES, load_study, study_path
from lcl_ds.training.resume import flatten
from tests.support.pages import PAGES, anchors_of, blocks_of, prose_of
from tests.support.ranks import ROOT

COMMAND_WORDS = (
    *("python", "python3", ".venv/bin/python", "deepspeed", "torchrun", "srun", "accelerate"),
    *("lcl", "make", "pip", "source"),
)
TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""Pages about what is; the changelog is also about what was."""


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def inline_code(page: Path) -> list[str]:
    """Everything between single backticks."""
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose_of(page))]


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command in blocks of shell and between backticks, without variables in front of it."""
    lines = [line for block in blocks_of(page) if block.language == "bash" for line in block.text.splitlines()]
    lines += [code for code in inline_code(page) if code.split()[0] in COMMAND_WORDS and " " in code]
    actual = []
    for line in lines:
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            actual += [words] if words else []
    return actual


COMMANDS = [(page, words) for page in TODAY for words in commands_of(page)]


SPOKEN = ("data", "models", "objectives", "evaluation", "report")
"""Packages whose docstrings and messages were read for words that nobody says."""


FILES = (".py", ".json", ".yaml", ".md", ".jsonl", ".safetensors", ".onnx", ".data", ".pt2")
"""Ends of names of files, which look like settings where they begin with ``model.`` or ``evaluation.``."""


class Parsed(Exception):
    """Raised in the place of a command's work, once its arguments were understood."""


@pytest.fixture
def parse(monkeypatch):
    """Let a command read its arguments and go no further."""

    def stop_after(original):
        def method(*arguments, **keywords):
            raise Parsed(original(*arguments, **keywords))

        return method

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop_after(getattr(argparse.ArgumentParser, name)))

    def parse(module: str, arguments: list[str]) -> argparse.Namespace:
        is_package = importlib.util.find_spec(module).submodule_search_locations is not None
        main = importlib.import_module(f"{module}.__main__" if is_package else module).main
        with pytest.raises(Parsed) as parsed:
            main(arguments)
        return parsed.value.args[0]

    return parse


def test_the_pages_have_commands():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value.name if isinstance(value, Path) else None)
def test_commands_are_valid(page, words, parse):
    first, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    script = next((word for word in words if word.startswith("launch/")), None)
    if first == "lcl" and rest[0] in ("--help", "--version"):
        assert program.main(rest) == 0
    elif script == "launch/study.py" or words[:2] == ["lcl", "study"]:
        arguments = parse("lcl_ds.study", words[words.index(script or "study") + 1 :])
        for name in arguments.studies:
            runs_of(load_study(study_path(name)), study_path(name))
    elif script or words[:2] == ["lcl", "train"] or "lcl_ds.train" in words:
        module, after = ("lcl_ds.train", "train") if first == "lcl" else ("lcl_ds.train", "lcl_ds.train")
        if script:
            after = script
        if script and script.endswith(".py"):
            module = script.removesuffix(".py").replace("/", ".")
        arguments = parse(module, words[words.index(after) + 1 :])
        assert (ROOT / ds_config_path(arguments.ds_config)).is_file()
        is_there_yet = arguments.overrides != ["objective.name=alignment"] and arguments.recipe != "mine.yaml"
        if is_there_yet:  # the worked example of an objective, and the recipe that init writes, are not
            load_config(recipe_path(arguments.recipe), arguments.overrides)
    elif first == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / path).exists() for path in rest[2:])
    elif rest[:2] == ["-m", "venv"] or first == "source":
        assert rest[-1].startswith(".venv")
    elif rest[:1] == ["-m"] and rest[1].startswith("tests.kernels."):
        assert importlib.util.find_spec(rest[1])
    elif first == "accelerate" and "-m" in rest:
        module, *arguments = rest[rest.index("-m") + 1 :]
        parse(module, arguments)
    elif rest[:1] == ["-m"]:
        arguments = parse(rest[1], rest[2:])
        if rest[1] == "lcl_ds.bench" and arguments.job in bench.METHODS:
            assert bench.choose_cases(arguments, "cpu")
            assert bench.choose_cases(arguments, "cuda")
        if rest[1] == "lcl_ds.plan":
            load_config(recipe_path(arguments.recipe), arguments.overrides)
            assert (ROOT / ds_config_path(arguments.ds_config)).is_file()
    else:
        check_installation(first, rest)


def check_installation(first: str, rest: list[str]) -> None:
    """What is left are commands of pip and pre-commit, which are listed, and of programs that need the internet."""
    assert [first, *rest] in (
        ["pip", "install", "-r", "requirements.txt", "-e", "."],
        ["pip", "install", "lcl_ds[caption]"],
        ["pip", "install", "lcl_ds[onnx]"],
        ["pip", "install", "lcl_ds[open_clip]"],
        ["pip", "install", "lcl_ds[parquet]"],
        ["pip", "install", "lcl_ds[tensorboard]"],
        ["pip", "install", "lcl_ds[timm]"],
        ["pip", "install", "."],
        ["pip", "install", "./kernels"],
        ["pip", "install", "pre-commit"],
        ["accelerate", "launch"],
    ) or first in ("hf", "img2dataset")


def test_a_command_that_does_not_exist_is_noticed(parse):
    with pytest.raises(SystemExit):
        importlib.import_module("lcl_ds.data.__main__").main(["built", "a", "b"])


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", prose_of(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def settings_of_all_objectives() -> set[str]:
    """Names of all settings and of groups of them, with dots."""
    names = {"data.document_tokens"}
    for objective in NAMES:
        config = load_config(
            recipe_path("demo"),
            [f"objective.name={objective}", "model.vision={shape: vit_b16}", "data.textured={folder: x}"],
        )
        names |= set(flatten(config.model_dump()))
    return names | {".".join(parts[:n]) for parts in (name.split(".") for name in names) for n in range(1, len(parts))}


def test_settings_on_pages_exist():
    known = settings_of_all_objectives()
    groups = {name.split(".")[0] for name in known}
    for page in TODAY:
        for code in inline_code(page):
            name = code.partition("=")[0]
            is_setting = re.fullmatch(r"\w+(\.\w+)+", name) and name.split(".")[0] in groups
            if is_setting and Path(name).suffix not in FILES:
                assert name in known, f"{page_id(page)}: {code}"


def sources() -> dict[Path, str]:
    folders = ("lcl_ds", "kernels", "launch", "tests")
    return {path: path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")}


def names_in(text: str) -> set[str]:
    """What a module defines: classes, functions, methods, attributes and constants."""
    actual = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            actual.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            actual.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            actual.add(node.attr)
    return actual


def test_names_on_pages_exist():
    texts = sources()
    defined = set().union(*(names_in(text) for text in texts.values()))
    words = set(re.findall(r"\w+", " ".join(texts.values()))) | {path.stem for path in STUDIES.glob("*.yaml")}
    for page in TODAY:
        for code in inline_code(page):
            where = f"{page_id(page)}: {code}"
            if re.fullmatch(r"(lcl_ds|kernels|launch|tests|docs|ds_configs|bench_results)/[\w./-]*", code):
                assert "NAME" in code or (ROOT / code).exists(), where
            elif re.fullmatch(r"[A-Z][a-z]+[A-Z]\w*", code):
                assert code in defined or hasattr(transformers, code), where
            elif re.fullmatch(r"[A-Z]\w*(_\w+)+", code):
                assert code in defined or code in words, where
            elif re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", code):
                assert code in defined or code in words or hasattr(torch, code), where


def test_the_glossary_says_where_each_name_lives():
    text = (ROOT / "docs" / "glossary.md").read_text()
    homes = re.findall(r"`(\w+)` in `([\w/]+\.py)`", text)
    assert len(homes) > 50
    for name, path in homes:
        assert name in names_in((ROOT / path).read_text()), f"{name} in {path}"


def test_the_glossary_explains_each_word_once():
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]* ?\|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    words = [row for row in rows if row != "word"]
    assert len(words) > 60
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("word", ["upstream", "for ever", "of late", "mend", "mended", "mending"])
def test_pages_and_docstrings_use_the_words_of_the_glossary(word):
    own = [path for folder in SPOKEN for path in (ROOT / "lcl_ds" / folder).rglob("*.py")]
    pages = [page for page in TODAY if page.parent != ROOT / "kernels"]
    actual = [page_id(path) for path in [*own, *pages] if re.search(rf"\b{word}\b", path.read_text(), re.IGNORECASE)]
    assert actual == []


def test_the_way_of_a_document_is_as_the_page_shows_it():
    blocks = [block for block in blocks_of(ROOT / "docs" / "architecture.md") if block.language == "pycon"]
    example = doctest.DocTestParser().get_doctest("\n".join(b.text for b in blocks), {}, "architecture.md", None, 0)
    report: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert results.attempted > 40
    assert not results.failed, "".join(report)


def test_the_example_of_the_kernels_runs():
    (example,) = [block.text for block in blocks_of(ROOT / "kernels" / "README.md") if block.language == "python"]
    variables: dict = {}
    exec(example, variables)
    assert variables["weight"].grad.isfinite().all()
    assert variables["scale"].grad.isfinite()
    assert 0 <= variables["accuracy"] <= 1


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_blocks_of_python_are_python(page):
    for block in blocks_of(page):
        assert block.language in {"bash", "python", "pycon", "text", "yaml"}, block
        if block.language == "python":
            ast.parse(block.text)


def test_the_data_example_is_a_valid_recipe():
    (example,) = [block.text for block in blocks_of(ROOT / "docs" / "data.md") if block.language == "yaml"]
    settings = yaml.safe_load(example)["data"]
    overrides = [f"data.{key}={yaml.safe_dump(value)}" for key, value in settings.items()]
    config = load_config(recipe_path("demo"), overrides)
    assert [source.name for source in config.data.shards] == ["mmc4", "laion"]


def test_the_table_of_objectives_is_complete():
    for page in (ROOT / "README.md", ROOT / "docs" / "objectives.md"):
        listed = re.findall(r"^\| `(\w+)` \| [A-Z]", page.read_text(), re.MULTILINE)
        assert sorted(listed) == sorted(NAMES), page


def test_every_format_of_build_is_documented():
    assert set(READERS) <= set(inline_code(ROOT / "docs" / "data.md"))


def test_the_files_of_the_forge_are_valid():
    files = [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
    assert len(files) == 5
    trees = {path.name: yaml.safe_load(path.read_text()) for path in files}
    (job,) = trees["ci.yml"]["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    (local,) = trees[".pre-commit-config.yaml"]["repos"]
    assert local["repo"] == "local"
    pins = (ROOT / "requirements.txt").read_text()
    for hook in local["hooks"]:
        program = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert f"\n{program}==" in pins


def test_the_requirements_pin_everything():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"^[\w.-]+==[\w.]+", pin) for pin in pins)
    assert any(pin.startswith("torch==2.13.0") for pin in pins)
