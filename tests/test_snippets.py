"""What the documentation shows can be pasted: Python runs as it stands there, shell lines name scripts, flags and
targets that exist.

Each Python snippet runs by itself in an empty folder that looks like the root of a checkout. What an earlier command
of its page would have left there, such as `runs/mine`, is made small by `MADE_BEFORE`.
"""

import argparse
import ast
import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import export_for_hub
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from components import random_pixels, seeded, tiny_rq_pipeline
from hub_server import HubServer, Token
from peft import LoraConfig, get_peft_model_state_dict

from rq_draft_revise import DraftAndRevisePipeline
from rq_draft_revise.features import ImageClassifierModel, load_feature_network
from rq_draft_revise.metrics import ReferenceStatistics, moments


ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "pipelines" / "emoji-scenes" / "README.md",
    ROOT / "pipelines" / "cifar10-32" / "README.md",
]


class Snippet(NamedTuple):
    page: str
    line: int  # where it begins, counted from 1
    language: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def snippets_of(page: Path) -> list[Snippet]:
    """The fenced blocks of a page, and its indented ones as language `indented`."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix()
    found, outside = [], text
    for match in re.finditer(r"^(```+)(\w*)\n(.*?)^\1$", text, re.M | re.S):
        found.append(Snippet(name, text[: match.start()].count("\n") + 2, match.group(2), match.group(3)))
        outside = outside.replace(match.group(), "\n" * match.group().count("\n"))
    for match in re.finditer(r"(?<=\n\n)((?: {4}.*\n)+)", outside):
        lines = re.sub("^ {4}", "", match.group(), flags=re.M)
        found.append(Snippet(name, outside[: match.start()].count("\n") + 1, "indented", lines))
    return found


SNIPPETS = [snippet for page in PAGES for snippet in snippets_of(page)]


# ---------------------------------------------------------------------------------------------------------------------
# Python
# ---------------------------------------------------------------------------------------------------------------------


def python_of(snippet: Snippet) -> list[Snippet]:
    """The Python of a snippet: all of it, or what a shell line hands to `python -`."""
    if snippet.language == "python":
        return [snippet]
    parts = re.finditer(r"^python - <<'(\w+)'\n(.*?)^\1$", snippet.text, re.M | re.S)
    return [
        snippet._replace(line=snippet.line + snippet.text[: part.start(2)].count("\n"), text=part.group(2))
        for part in parts
    ]


PYTHON = [part for snippet in SNIPPETS for part in python_of(snippet)]


def make_pipeline(path: Path):
    path.symlink_to(ROOT / "pipelines" / "emoji-scenes", target_is_directory=True)


def make_converted(path: Path):
    """The baseline with class names, as the converted ImageNet models have them."""
    pipe = tiny_rq_pipeline("class")
    pipe.register_to_config(id2label={i: name for i, name in enumerate(["goldfish", "volcano", "harp", "owl", "cat"])})
    pipe.save_pretrained(path)


def make_export(path: Path):
    export_for_hub.main([str(ROOT / "pipelines" / "emoji-scenes"), str(path)])


def make_adapter(path: Path):
    pipe = DraftAndRevisePipeline.from_pretrained(ROOT / "pipelines" / "emoji-scenes")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    config = pipe.transformer.peft_config["default"].to_dict()
    weights = get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(path, weights, transformer_lora_adapter_metadata=config)


def make_classifier(path: Path):
    with seeded(0):
        ImageClassifierModel(10, 32, block_channels=(8, 16), layers_per_block=1).save_pretrained(path)


def make_statistics(path: Path):
    """Of a few random images, by the classifier beside it."""
    network = load_feature_network(str(path.parents[1] / "runs" / "classifier"))
    features = network(((random_pixels(8, 32) + 1) * 127.5).to(torch.uint8)).features
    record = dict(num_samples=8, resolution=32, protocol="torch-fidelity", network=network.name)
    ReferenceStatistics(*moments(features), features=features, network_sha256=network.sha256, **record).save(path)


# What a snippet names -> how it came about, in this order. The command that makes it is on the snippet's page.
MADE_BEFORE = {
    "runs/mine": make_pipeline,
    "runs/my-lora": make_adapter,
    "runs/classifier": make_classifier,
    "statistics/train.npz": make_statistics,
    "outputs/emoji-scenes-hub": make_export,
    "rq-imagenet-256-1.4b": make_converted,
}
# These talk to the Hub, or load code of a repository into the process.
OF_THE_HUB = ("push_to_hub(", "trust_remote_code")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty folder that looks like the root of a checkout: what a snippet saves does not land in the real one."""
    folder = tmp_path / "checkout"
    (folder / "docs" / "images").mkdir(parents=True)
    (folder / "pipelines").symlink_to(ROOT / "pipelines", target_is_directory=True)
    monkeypatch.chdir(folder)
    # a reader does not have the folders of scripts on the path, where `import evaluate` would find one of them
    scripts = {str(ROOT / name) for name in ("examples", "benchmarks", "conversion_scripts", "tests")}
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in scripts])
    return folder


def run_with_a_hub(snippet: Snippet, folder: Path):
    """In a process of its own, with the tests' stand-in for the Hub, whose user is called `me` as in the documents."""
    (folder / "snippet.py").write_text(snippet.text, encoding="utf-8")
    with HubServer() as hub:
        hub.tokens["hf_me"] = Token("me")
        environment = os.environ | hub.environment(folder / "home", "hf_me")
        environment |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "snippet.py"]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
        assert result.returncode == 0, f"{snippet}\n{result.stdout}\n{result.stderr}"
        for repo_id in re.findall(r'push_to_hub\("([^"]+)"', snippet.text):
            assert "model_index.json" in hub.files(repo_id), f"{snippet}: nothing was published"


@pytest.mark.slow
@pytest.mark.parametrize("snippet", PYTHON, ids=str)
def test_python_runs(snippet, checkout):
    needed = [name for name in MADE_BEFORE if name in snippet.text]
    if "statistics/train.npz" in needed and "runs/classifier" not in needed:
        needed.insert(0, "runs/classifier")
    for name in needed:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        MADE_BEFORE[name](checkout / name)
    before = set(checkout.rglob("*"))
    if any(word in snippet.text for word in OF_THE_HUB):
        run_with_a_hub(snippet, checkout)
    else:
        exec(compile(snippet.text, str(snippet), "exec"), {"__name__": "__main__"})
    # `.save(` of an image is the last line of most: something must be there
    written = {path.suffix for path in set(checkout.rglob("*")) - before}
    assert ".save(" not in snippet.text or written & {".png", ".gif"}, f"{snippet} saved no picture"


def test_every_page_that_should_have_python_has_some():
    number = {page: sum(snippet.page == page for snippet in PYTHON) for page in {snippet.page for snippet in SNIPPETS}}
    assert number["README.md"] >= 3
    for name in ("index", "quickstart", "how-it-works", "sampling", "inpainting", "conversion", "evaluation", "hub"):
        assert number[f"docs/{name}.md"] >= 1, name


def test_what_is_made_before_is_named_by_a_snippet():
    for name in MADE_BEFORE:
        assert any(name in snippet.text for snippet in PYTHON), f"no snippet names {name} any more"


# ---------------------------------------------------------------------------------------------------------------------
# The shell
# ---------------------------------------------------------------------------------------------------------------------

# What a reader's own machine has, and what is downloaded: nothing to check here.
OF_THE_SYSTEM = ("cd", "export", "git", "sudo")


class Command(NamedTuple):
    snippet: Snippet
    words: list[str]

    def __str__(self):
        return f"{self.snippet.page}: {' '.join(self.words[:5])}"


def commands_of(snippet: Snippet) -> list[Command]:
    """The command lines of a snippet, without comments and variables before them."""
    text = re.sub(r"^python - <<'(\w+)'\n.*?^\1$", "", snippet.text, flags=re.M | re.S)
    text = text.replace("\\\n", " ")
    if snippet.language == "":  # a transcript
        lines = re.findall(r"^\$ (.*)$", text, re.M)
    elif snippet.language == "indented":
        lines = re.findall(r"^((?:[A-Z_]+=\S+ )*(?:python|accelerate|make|pip) .*)$", text, re.M)
    elif snippet.language == "bash":
        lines = text.splitlines()
    else:
        lines = []
    commands = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            commands.append(Command(snippet, words))
    return commands


COMMANDS = [command for snippet in SNIPPETS for command in commands_of(snippet)]


@functools.cache
def script_at(path: str):
    """By its path and under another name: `import evaluate` may mean the library."""
    name = f"documented_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Parsed(Exception):
    """The flags are read; nothing is run."""


def check_flags(path: str, flags: list[str], monkeypatch):
    """The script's own parser takes them, and its own checks of them, where it has some."""
    assert (ROOT / path).is_file(), f"there is no {path}"
    script = script_at(path)
    if hasattr(script, "parse_args"):
        script.parse_args(flags)
        return
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, args=None, namespace=None):
        raise Parsed(parse_args(parser, args, namespace))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed):
            script.main(flags)


WITH_FLAGS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("benchmarks", "conversion_scripts", "examples")
    for path in sorted((ROOT / folder).glob("*.py"))
    if re.search(r"^def main\(|^def parse_args\(", path.read_text(encoding="utf-8"), re.M)
]


@pytest.mark.parametrize("path", WITH_FLAGS)
def test_a_flag_that_is_cut_short_is_refused(path, monkeypatch):
    """`--gradient_checkpoint` may be a slip for `--checkpointing_steps`, and is not taken for another flag."""

    def stop(parser, args=None, namespace=None):
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    script = script_at(path)
    with pytest.raises(Parsed) as stopped:
        getattr(script, "parse_args", getattr(script, "main", None))([])
    (parser,) = stopped.value.args
    commands = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    parsers = [parser, *(sub for choices in commands for sub in choices.values())]
    assert not any(parser.allow_abbrev for parser in parsers)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def extras() -> set[str]:
    """The names in setup.py's dictionary of extras, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    names = set()
    for node in assigned:
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id == "extras":
            names |= {key.value for key in node.value.keys}
        elif isinstance(target, ast.Subscript) and target.value.id == "extras":
            names.add(target.slice.value)
    return names


def check_pip(words: list[str]):
    assert words[0] == "install"
    for word in words[1:]:
        for extra in re.findall(r"^\.\[(.*)\]$", word):
            assert set(extra.split(",")) <= extras(), f"there is no extra {extra}"


def check_pytest(words: list[str]):
    for word in words:
        assert not word.startswith("tests") or (ROOT / word).exists(), f"there is no {word}"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_line_is_understood(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    program, *words = command.words
    try:
        if program == "make":
            targets = [word for word in words if "=" not in word]
            assert set(targets) <= make_targets(), f"there is no target {targets}"
        elif program == "pip":
            check_pip(words)
        elif Path(program).name == "python" and words[:2] == ["-m", "pytest"]:
            check_pytest(words[2:])
        elif Path(program).name == "python":
            check_flags(words[0], words[1:], monkeypatch)
        elif program == "accelerate":
            assert words.pop(0) == "launch"
            launched = launch_command_parser().parse_args(words)  # refuses flags that the launcher does not know
            assert launched.config_file is None or (ROOT / launched.config_file).is_file(), launched.config_file
            check_flags(launched.training_script, launched.training_script_args, monkeypatch)
        else:
            assert program in OF_THE_SYSTEM, f"nothing here knows how to check {program}"
    except SystemExit:
        pytest.fail(f"{command.snippet}: {' '.join(command.words)}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_what_a_command_line_names_in_the_repository_is_there(command):
    for word in command.words:
        if re.match(r"(benchmarks|conversion_scripts|docs|examples|pipelines|tests)/", word):
            assert any(ROOT.glob(word)), f"{command.snippet} names {word}"


def test_targets_named_in_the_text_exist():
    for page in PAGES:
        for target in re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8")):
            assert target in make_targets(), f"{page.name} names `make {target}`"


def test_the_pages_show_the_scripts():
    """That the parsing above finds what is there: each of these has a command line in the documentation."""
    named = {word for command in COMMANDS for word in command.words if word.endswith(".py")}
    for name in (
        "generate",
        "train_rqvae",
        "train_imagenet",
        "train_cc3m",
        "train_lora",
        "evaluate",
        "encode_dataset",
    ):
        assert f"examples/{name}.py" in named
    assert "conversion_scripts/convert_archive.py" in named and "benchmarks/sampling.py" in named
