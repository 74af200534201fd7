"""Write a pipeline as a repository that brings its own code: diffusers alone loads it, without rq_draft_revise.

    python examples/export_for_hub.py pipelines/emoji-scenes outputs/emoji-scenes-hub
    python examples/export_for_hub.py pipelines/emoji-scenes outputs/emoji-scenes-hub --push_to_hub me/emoji-scenes

    DiffusionPipeline.from_pretrained("outputs/emoji-scenes-hub", trust_remote_code=True)

Every component's folder gets one Python file with what the component needs of this package's sources, and the root one
for the pipeline. (One file each: of a component's code, diffusers downloads the file that `model_index.json` names and
no other.) With the package installed, its own classes load the same repository and run none of that code.
"""

import argparse
import ast
import functools
import json
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub import ModelCard, create_repo, snapshot_download, upload_folder

import rq_draft_revise
from rq_draft_revise.model_card import SOURCE_URL, copy_card, model_card, only_variant
from rq_draft_revise.publishing import pipeline_class_of
from rq_draft_revise.whole_files import whole_folder


PACKAGE = rq_draft_revise.__name__
SOURCES = Path(rq_draft_revise.__file__).parent
# Base classes that are left out: they publish, and load what the package saved.
LEFT_OUT = ("HubPipelineMixin", "ModelCardMixin")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", help="Folder or Hub id of a pipeline of this package.")
    parser.add_argument("output_dir", help="Folder to write; it must be new or empty.")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="Upload it there, for example me/emoji-scenes.")
    parser.add_argument("--private", action="store_true", help="Make that repository a private one.")
    args = parser.parse_args(argv)
    output_dir = Path(args.output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` must be a new or an empty folder, got {args.output_dir}.")
    return args


# ------------------------------------------------------------------------------------------------- one file of many


@dataclass(frozen=True)
class Definition:
    """A top-level statement of a module: what it defines, what it reads, and its text with the comments before it."""

    module: str
    line: int
    defines: tuple[str, ...]
    reads: frozenset[str]
    source: str


@dataclass(frozen=True)
class Module:
    """One of the package's modules; each dictionary is by the name that stands in its code."""

    docstring: str
    definitions: dict[str, Definition]
    siblings: dict[str, str]  # modules of this package
    imports: dict[str, str]  # statements that import from others


@functools.cache
def read_module(name: str) -> Module:
    """Raises a `ValueError` where a module does more at its top level than to import and to define."""
    text = (SOURCES / f"{name}.py").read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    module = Module(ast.get_docstring(tree), {}, {}, {})
    end = 0
    for statement in tree.body:
        start, end = end, statement.end_lineno
        if isinstance(statement, ast.ImportFrom) and statement.level:
            for alias in statement.names:
                if alias.asname is not None:
                    raise ValueError(f"{name}.py must import {alias.name} by its own name, got {alias.asname}.")
                module.siblings[alias.name] = statement.module
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            for alias in statement.names:
                text = alias.name + (f" as {alias.asname}" if alias.asname else "")
                origin = f"from {statement.module} " if isinstance(statement, ast.ImportFrom) else ""
                module.imports[alias.asname or alias.name.partition(".")[0]] = f"{origin}import {text}"
        elif defines := names_defined(statement):
            reads = frozenset(node.id for node in ast.walk(statement) if isinstance(node, ast.Name)) - set(LEFT_OUT)
            source = "".join(lines[start:end]).strip("\n")
            for base in LEFT_OUT:
                source = source.replace(f"class {defines[0]}({base}, ", f"class {defines[0]}(", 1)
            definition = Definition(name, statement.lineno, defines, reads, source)
            module.definitions.update(dict.fromkeys(defines, definition))
        elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            raise ValueError(f"{name}.py must only import and define at its top level, got line {statement.lineno}.")
    return module


def names_defined(statement: ast.stmt) -> tuple[str, ...]:
    if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
        return (statement.name,)
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return tuple(node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
    return ()


def modules_below(name: str) -> list[str]:
    """A module and all that it imports of this package, each after those it imports."""
    order = []
    for sibling in dict.fromkeys(read_module(name).siblings.values()):
        order += [module for module in modules_below(sibling) if module not in order]
    return [*order, name]


def single_file(module_name: str, class_name: str, stand_ins: dict[str, str]) -> str:
    """A class and what it needs of all modules of this package, as one file.

    Args:
        module_name (`str`), class_name (`str`): The class.
        stand_ins (`dict[str, str]`): Classes that the file does without -> the class of diffusers in their place. A
            pipeline's file names its components' classes in annotations alone, and each is in its component's file.

    Raises:
        `ValueError`: two modules mean different things by the same name.
    """
    taken: dict[str, Definition] = {}
    imports: dict[str, str] = {}
    replaced: set[str] = set()

    def take(name: str, module_name: str) -> None:
        module = read_module(module_name)
        if name in stand_ins:
            replaced.add(name)
        elif name in module.siblings:
            take(name, module.siblings[name])
        elif name in module.definitions:
            definition = module.definitions[name]
            if taken.setdefault(name, definition).source != definition.source:
                raise ValueError(f"{taken[name].module}.py and {module_name}.py mean different things by {name!r}.")
            if name in seen:
                return
            seen.update(definition.defines)
            for read in sorted(definition.reads):
                take(read, module_name)
        elif name in module.imports and imports.setdefault(name, module.imports[name]) != module.imports[name]:
            raise ValueError(f"{module_name}.py and another module import different things as {name!r}.")

    seen: set[str] = set()
    take(class_name, module_name)
    order = [name for name in modules_below(module_name) if any(found.module == name for found in taken.values())]
    definitions = sorted(set(taken.values()), key=lambda found: (order.index(found.module), found.line))
    origin = (
        f"Made by examples/export_for_hub.py of {PACKAGE} {rq_draft_revise.__version__} ({SOURCE_URL}, Apache-2.0), "
        f"out of {', '.join(f'{name}.py' for name in order)}."
    )
    header = f'"""{read_module(module_name).docstring}\n\n{textwrap.fill(origin, 119)}\n"""\n'
    bases = sorted({stand_ins[name] for name in replaced})
    lines = [header, *sorted(set(imports.values()) | {f"from diffusers import {base}" for base in bases}), ""]
    lines += [
        f"{name} = {stand_ins[name]}  # its own file, in the component's folder, has it" for name in sorted(replaced)
    ]
    return "\n".join(lines) + "\n\n" + "\n\n\n".join(definition.source for definition in definitions) + "\n"


# --------------------------------------------------------------------------------------------------- the repository


def main(argv=None):
    args = parse_args(argv)
    source, folder = find_pipeline(args.pipeline), Path(args.output_dir)
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    pipeline_class = pipeline_class_of(source)
    repo_id = args.push_to_hub or folder.as_posix()
    with whole_folder(folder) as aside:
        write_repository(args, source, index, pipeline_class, aside, repo_id)
    files = [path for path in folder.rglob("*") if path.is_file()]
    print(f"Wrote {folder}: {sum(path.stat().st_size for path in files) / 1e6:.1f} MB in {len(files)} files.")
    if args.push_to_hub:
        create_repo(args.push_to_hub, private=args.private or None, exist_ok=True)
        commit = upload_folder(repo_id=args.push_to_hub, folder_path=folder, commit_message="Pipeline with its code")
        print(f"Pushed: {commit}")


def write_repository(args, source: Path, index: dict, pipeline_class: type, folder: Path, repo_id: str) -> None:
    """Write components, code, index and card into `folder`."""
    # Components are copied as they are: weights keep their bytes, their variants and their shards.
    stand_ins = {}
    for name, value in list(index.items()):
        if not isinstance(value, list) or value[0] is None:
            continue
        shutil.copytree(source / name, folder / name)
        module, class_name = value[0].removeprefix(f"{PACKAGE}."), value[1]
        if module == value[0]:
            continue  # the tokenizer is a class of transformers
        (folder / name / f"{module}.py").write_text(single_file(module, class_name, {}), encoding="utf-8")
        index[name] = [module, class_name]
        component_class = getattr(rq_draft_revise, class_name)
        stand_ins[class_name] = (ModelMixin if issubclass(component_class, ModelMixin) else SchedulerMixin).__name__
    class_name, module = pipeline_class.__name__, pipeline_class.__module__.removeprefix(f"{PACKAGE}.")
    (folder / f"{module}.py").write_text(single_file(module, class_name, stand_ins), encoding="utf-8")
    index["_class_name"] = [module, class_name]
    index.pop("_name_or_path", None)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    card = source_card(args.pipeline, source, pipeline_class, folder, repo_id)
    with_both_ways(card, class_name, repo_id).save(folder / "README.md")


def find_pipeline(name: str) -> Path:
    """The folder of a pipeline, downloaded if it is on the Hub."""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name))
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"`pipeline` must be a pipeline's folder or Hub id, got {name}, without a model_index.json.")
    return folder


def source_card(name: str, source: Path, pipeline_class: type, folder: Path, repo_id: str) -> ModelCard:
    """The card that came with the pipeline, its pictures copied to `folder`, or a new one."""
    if copy_card(source, folder, repo_id, place=None if Path(name).is_dir() else name):
        return ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    variant = only_variant(source)
    return model_card(pipeline_class.from_pretrained(source, variant=variant), repo_id, variant=variant)


def with_both_ways(card: ModelCard, class_name: str, repo_id: str) -> ModelCard:
    """The card with how to load the repository by diffusers alone."""
    card.data.library_name = "diffusers"
    card.text = card.text.rstrip() + (
        "\n\n## Without rq_draft_revise\n\nThe repository holds the code it needs. diffusers loads it with\n\n"
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)\n```\n\n'
        f"which runs the Python files of this repository: read them first. With the package, "
        f"`{class_name}.from_pretrained` loads it and runs none of them.\n"
    )
    return card


if __name__ == "__main__":
    main()
