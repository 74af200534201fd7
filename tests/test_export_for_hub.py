"""Exports: with the code they need, so that they draw the same where this package is not installed, and without."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import export_for_hub
import export_pipeline
import pytest
import torch
from components import CODE_DEPTH, tiny_pipeline, tiny_rq_pipeline
from diffusers import DiffusionPipeline
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

import rq_draft_revise
from rq_draft_revise import DraftAndReviseInpaintPipeline, DraftAndRevisePipeline


PIPELINES = {
    "text": lambda: tiny_pipeline("text"),
    "class": lambda: tiny_pipeline("class"),
    "none": lambda: tiny_pipeline(None),
    "inpaint": lambda: DraftAndReviseInpaintPipeline(**tiny_pipeline("text").components),
    "autoregressive": lambda: tiny_rq_pipeline("class"),
}

# Runs here, on what was saved, and there, on what was exported.
DRAW = """
def draw(name, pipe):
    import torch
    from PIL import Image
    arguments = {"text": {"prompt": ["a cat", "an owl"]}, "class": {"class_labels": ["class 1", "class 3"]},
                 "none": {"num_images_per_prompt": 2}, "autoregressive": {"class_labels": [1, 3]},
                 "inpaint": {"prompt": ["a cat", "an owl"], "image": Image.linear_gradient("L").convert("RGB"),
                             "mask_image": Image.linear_gradient("L").point(lambda level: 255 * (level > 127))}}
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    arguments = {"generator": generators, "output_type": "pt"} | arguments[name.split("/")[-1]]
    return pipe(**arguments).images
"""

ELSEWHERE = """
import importlib.util, json, sys
import torch
assert importlib.util.find_spec("rq_draft_revise") is None, "the package is installed here"
from diffusers import DiffusionPipeline

folder, *names = sys.argv[1:]
images = {}
for name in names:
    place = name if name.startswith("owner/") else f"{folder}/{name}"
    try:
        DiffusionPipeline.from_pretrained(place)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("foreign code was run without being asked for")
    pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
    images[name] = draw(name, pipe)
    assert not any(module.split(".")[0] == "rq_draft_revise" for module in sys.modules)
    if name == "class":
        assert pipe.tokenizer is None and pipe.get_label_ids("alias 2") == [2]
        assert pipe.components["vae"].encode(torch.rand(1, 3, 8, 8)).codes.shape[-1] == CODE_DEPTH
torch.save(images, f"{folder}/images.pt")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of saved pipelines, with the names of `PIPELINES`."""
    folder = tmp_path_factory.mktemp("saved")
    for name, make in PIPELINES.items():
        make().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """The same, exported."""
    folder = tmp_path_factory.mktemp("exported")
    for name in PIPELINES:
        export_for_hub.main([str(saved / name), str(folder / name)])
    return folder


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The interpreter of an environment that has everything but this package."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    # .pth files in a folder that is named by one are not read: an editable installation of the package is not seen.
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(purelib) / "dependencies.pth").write_text("\n".join(sorted(shared)), encoding="utf-8")
    return python


def pushed(hub: HubServer, folder: Path) -> None:
    api = HfApi(endpoint=hub.endpoint, token="hf_owner")
    api.create_repo("owner/text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        api.upload_folder(repo_id="owner/text", folder_path=folder)


@pytest.mark.slow
def test_without_the_package_an_export_draws_the_same(saved, exported, bare_python, tmp_path):
    with HubServer() as hub:
        pushed(hub, exported / "text")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= hub.environment(tmp_path / "home", token=None) | {"OMP_NUM_THREADS": "1"}
        names = [*PIPELINES, "owner/text"]
        program = DRAW + ELSEWHERE.replace("CODE_DEPTH", str(CODE_DEPTH))
        command = [bare_python, "-I", "-c", program, exported, *names]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Expected types" not in result.stderr, result.stderr
    images = torch.load(exported / "images.pt", weights_only=True)
    here = {}
    exec(DRAW, here)
    for name in names:
        name_here = name.split("/")[-1]
        pipeline_class = type(PIPELINES[name_here]())
        expected = here["draw"](name_here, pipeline_class.from_pretrained(saved / name_here))
        assert expected.std() > 0.01
        assert torch.equal(images[name], expected), name


@pytest.mark.parametrize("name", PIPELINES)
def test_with_the_package_an_export_needs_no_remote_code(name, saved, exported):
    pipeline_class = type(PIPELINES[name]())
    pipe = pipeline_class.from_pretrained(exported / name)
    for component in (pipe, pipe.vae, pipe.transformer):
        assert type(component) is getattr(rq_draft_revise, type(component).__name__)
    here = {}
    exec(DRAW, here)
    assert torch.equal(here["draw"](name, pipe), here["draw"](name, pipeline_class.from_pretrained(saved / name)))


@pytest.mark.parametrize("name", PIPELINES)
def test_every_component_is_one_file_that_imports_neither_the_package_nor_its_neighbours(name, exported):
    index = json.loads((exported / name / "model_index.json").read_text())
    files = {path.relative_to(exported / name).as_posix() for path in (exported / name).rglob("*.py")}
    own = {key: value for key, value in index.items() if isinstance(value, list) and value[0] in _modules()}
    expected = {f"{key}/{value[0]}.py" for key, value in own.items() if key != "_class_name"}
    assert files == expected | {f"{index['_class_name'][0]}.py"} and len(files) == len(own)
    for file in files:
        source = (exported / name / file).read_text()
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.ImportFrom) or (node.level == 0 and node.module.split(".")[0] in FOREIGN)
            assert not isinstance(node, ast.Import) or all(a.name.split(".")[0] in FOREIGN for a in node.names)
        assert "Apache-2.0" in source and not any(base in source for base in export_for_hub.LEFT_OUT)


FOREIGN = {"torch", "diffusers", "transformers", "huggingface_hub", "numpy", "PIL", "dataclasses", "numbers",
           "collections", "contextlib", "functools", "os", "typing"}  # fmt: skip


def _modules() -> set[str]:
    return {path.stem for path in Path(rq_draft_revise.__file__).parent.glob("*.py")}


def test_weights_and_configs_are_copied_byte_for_byte(saved, tmp_path):
    pipe = tiny_pipeline("text")
    pipe.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="20KB")
    export_for_hub.main([str(tmp_path / "half"), str(tmp_path / "export")])
    originals = [path for path in (tmp_path / "half").glob("*/*") if path.is_file()]
    assert sum(".fp16-" in path.name for path in originals) > 2
    for path in originals:
        assert (tmp_path / "export" / path.relative_to(tmp_path / "half")).read_bytes() == path.read_bytes()
    assert 'variant="fp16"' in (tmp_path / "export" / "README.md").read_text()


def test_the_card_says_both_ways_and_keeps_what_it_said(saved, tmp_path):
    source = tmp_path / "mine"
    tiny_pipeline("class").save_pretrained(source)
    (source / "grid.png").write_bytes(b"PNG")
    text = '---\nlicense: mit\n---\n\n# Mine\n\n![](grid.png)\n\n`DraftAndRevisePipeline.from_pretrained("mine")`\n'
    (source / "README.md").write_text(text)
    export_for_hub.main([str(source), str(tmp_path / "export")])
    card = ModelCard((tmp_path / "export" / "README.md").read_text())
    place = (tmp_path / "export").as_posix()
    assert card.data.license == "mit" and f'DraftAndRevisePipeline.from_pretrained("{place}")' in card.text
    assert f'DiffusionPipeline.from_pretrained("{place}", trust_remote_code=True)' in card.text
    assert (tmp_path / "export" / "grid.png").read_bytes() == b"PNG"


def test_a_folder_with_something_in_it_is_refused_and_left(saved, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="`output_dir` must be a new or an empty folder"):
        export_for_hub.main([str(saved / "class"), str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_export_that_fails_leaves_no_half_of_a_repository(saved, tmp_path, monkeypatch):
    def fails(module, class_name, stand_ins):
        raise RuntimeError("in between")

    monkeypatch.setattr(export_for_hub, "single_file", fails)
    with pytest.raises(RuntimeError, match="in between"):
        export_for_hub.main([str(saved / "class"), str(tmp_path / "export")])
    assert not (tmp_path / "export").exists()
    monkeypatch.undo()
    export_for_hub.main([str(saved / "class"), str(tmp_path / "export")])
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_what_is_no_pipeline_of_this_package_is_refused(exported, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without a model_index.json"):
        export_for_hub.main([str(tmp_path / "empty"), str(tmp_path / "export")])
    with pytest.raises(ValueError, match="`pipeline` must be one of .*DraftAndRevisePipeline.*got"):
        export_for_hub.main([str(exported / "class"), str(tmp_path / "export")])  # exported already
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    "other, message",
    [
        ("def size():\n    return 2\n", "mean different things by 'size'"),
        ("from math import pi as tau\n\n\ndef other():\n    return tau\n", "import different things as 'tau'"),
        ("print('loading')\n", "must only import and define at its top level"),
        (
            "from .first import size as length\n\n\ndef other():\n    return length\n",
            "must import size by its own name",
        ),
    ],
)
def test_modules_that_do_not_fit_into_one_file_are_refused(other, message, tmp_path, monkeypatch):
    names = "size" if "def size" in other else "other"
    (tmp_path / "first.py").write_text(
        f'"""First."""\n\nfrom math import tau\n\nfrom .second import {names}\n\n\n'
        f"def area():\n    return tau * {names}() * more()\n\n\ndef more():\n    return 1\n"
    )
    (tmp_path / "second.py").write_text(f'"""Second."""\n\n{other}')
    if "def size" in other:
        (tmp_path / "third.py").write_text(
            '"""Third."""\n\nfrom .second import size\n\n\ndef third():\n    return 1\n'
        )
        (tmp_path / "first.py").write_text(
            '"""First."""\n\nfrom .fourth import four\n\n\ndef area():\n    return size() + four()\n\n\n'
            "def size():\n    return 1\n"
        )
        (tmp_path / "fourth.py").write_text(
            '"""4."""\n\nfrom .second import size\n\n\ndef four():\n    return size()\n'
        )
    monkeypatch.setattr(export_for_hub, "SOURCES", tmp_path)
    export_for_hub.read_module.cache_clear()
    try:
        with pytest.raises(ValueError, match=message):
            export_for_hub.single_file("first", "area", {})
    finally:
        export_for_hub.read_module.cache_clear()


def test_only_what_is_needed_is_in_the_file_in_an_order_that_runs(tmp_path, monkeypatch):
    (tmp_path / "shapes.py").write_text(
        '"""Shapes."""\n\nimport math\nimport os\n\nfrom .base import Base\n\n\n# how many\nSIDES = 4\n\n\n'
        "class Shape(Base):\n    def area(self):\n        return math.pi + SIDES + self.two()\n\n\n"
        "def unused():\n    return os.sep\n"
    )
    (tmp_path / "base.py").write_text(
        '"""Base."""\n\n\nclass Base:\n    def two(self):\n        return later()\n\n\ndef later():\n    return 2\n'
    )
    monkeypatch.setattr(export_for_hub, "SOURCES", tmp_path)
    export_for_hub.read_module.cache_clear()
    source = export_for_hub.single_file("shapes", "Shape", {})
    export_for_hub.read_module.cache_clear()
    namespace = {}
    exec(source, namespace)
    assert namespace["Shape"]().area() == pytest.approx(3.14159 + 4 + 2, abs=1e-4)
    assert "# how many" in source and "unused" not in source and "import os" not in source
    assert source.index("class Base") < source.index("def later") < source.index("class Shape")


def test_diffusers_itself_asks_before_it_runs_an_exports_code(exported):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(exported / "class")
    assert DraftAndRevisePipeline.from_pretrained(exported / "class").config.id2label[0] == "class 0, alias 0"


# --------------------------------------------------------------------------------------------------- export_pipeline


@pytest.mark.parametrize("name", ["text", "autoregressive"])
def test_a_published_folder_is_small_files_in_half_precision_without_paths_of_this_machine(name, saved, tmp_path):
    out = tmp_path / "out"
    export_pipeline.main([str(saved / name), str(out), "--max_shard_size", "20KB"])
    for path in out.rglob("*.json"):
        assert str(saved) not in path.read_text() and "_name_or_path" not in path.read_text()
    weights = sorted(out.rglob("*.safetensors"))
    assert len(weights) > 3
    for path in weights:
        tensors = load_file(path)
        assert sum(value.nbytes for value in tensors.values()) <= 20e3
        for key, value in tensors.items():
            assert value.dtype == (torch.float32 if key.startswith("quantizer.") else torch.float16), key
    pipeline_class = type(PIPELINES[name]())
    here = {}
    exec(DRAW, here)
    assert here["draw"](name, pipeline_class.from_pretrained(out)).isfinite().all()
    assert f'from_pretrained("{out.as_posix()}")' in (out / "README.md").read_text()


def test_a_card_that_is_there_stays_and_one_of_the_source_comes_along(saved, tmp_path):
    source, out = tmp_path / "run", tmp_path / "out"
    tiny_pipeline("class").save_pretrained(source)
    (source / "curves.png").write_bytes(b"PNG")
    (source / "README.md").write_text('![](curves.png) from_pretrained("run")')
    export_pipeline.main([str(source), str(out), "--variant", "fp16"])
    assert (out / "README.md").read_text() == f'![](curves.png) from_pretrained("{out.as_posix()}")'
    assert (out / "curves.png").read_bytes() == b"PNG" and list(out.glob("vae/*.fp16.safetensors"))
    (out / "README.md").write_text("mine")
    export_pipeline.main([str(source), str(out)])
    assert (out / "README.md").read_text() == "mine"


def weights_of(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name.startswith("diffusion_pytorch_model")
    }


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("sizes", [("20KB", "16MB"), ("16MB", "20KB"), ("20KB", "40KB")], ids="-".join)
def test_a_second_export_is_as_if_it_were_the_first(sizes, variant, saved, tmp_path):
    """Whatever the size of the shards was, and weights of another variant beside them stay."""
    flags = [] if variant is None else ["--variant", variant]
    other = ["--variant", "fp16"] if variant is None else []
    source, out = str(saved / "class"), tmp_path / "out"
    export_pipeline.main([source, str(out), *other, "--max_shard_size", "20KB"])
    others = weights_of(out)
    for size in sizes:
        export_pipeline.main([source, str(out), *flags, "--max_shard_size", size])
    export_pipeline.main([source, str(tmp_path / "once"), *flags, "--max_shard_size", sizes[1]])
    assert weights_of(out) == others | weights_of(tmp_path / "once")
    expected = DraftAndRevisePipeline.from_pretrained(saved / "class", dtype=torch.float16).transformer.state_dict()
    for name in (None, "fp16"):
        pipe = DraftAndRevisePipeline.from_pretrained(out, variant=name, dtype=torch.float16)
        assert all(torch.equal(value, expected[key]) for key, value in pipe.transformer.state_dict().items())


def test_an_export_that_fails_leaves_the_former_one(saved, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_pipeline.main([str(saved / "class"), str(out)])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(tiny_pipeline("class").transformer), "save_config", full)
    with pytest.raises(OSError, match="No space left"):
        export_pipeline.main([str(saved / "class"), str(out), "--max_shard_size", "20KB"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_export_that_was_written_wrong_is_noticed(saved, tmp_path, monkeypatch):
    replace_files = export_pipeline.replace_files

    def with_another_bias(source, folder, variant):
        replace_files(source, folder, variant)
        weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        save_file(tensors | {"quant_conv.bias": tensors["quant_conv.bias"] + 1}, weights, {"format": "pt"})

    monkeypatch.setattr(export_pipeline, "replace_files", with_another_bias)
    with pytest.raises(ValueError, match="vae was not written as meant: quant_conv.bias differs"):
        export_pipeline.main([str(saved / "class"), str(tmp_path / "out")])


def test_only_pipelines_of_this_package_are_published(exported, tmp_path):
    for folder in (tmp_path, exported / "class"):
        with pytest.raises(ValueError, match="`pipeline` must be"):
            export_pipeline.main([str(folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
