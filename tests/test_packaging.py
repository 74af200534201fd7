"""What is installed is what is here: the wheel works from another folder, and the files agree about the version."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import rq_draft_revise


ROOT = Path(__file__).resolve().parents[1]


def run(*command, **kwargs) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=500, **kwargs)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources: a build in place leaves a folder that the next one packs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    # Nothing is downloaded: setuptools, which can build wheels by itself, is taken from this environment.
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_works_in_another_environment_from_another_folder(wheel, tmp_path):
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(environment, with_pip=False)
    python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    installed = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    # The dependencies come from this environment, 3 GB that need no second copy. A path named in a .pth file is
    # appended, and .pth files found there are not read: an editable installation of this package stays invisible.
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (installed / "dependencies.pth").write_text("\n".join(sorted(shared)), encoding="utf-8")

    names = "RQVAEModel, ContextualRQTransformerModel, DraftAndReviseScheduler, DraftAndRevisePipeline"
    program = f"import rq_draft_revise\nfrom rq_draft_revise import {names}\nprint(rq_draft_revise.__file__)"
    imported = run(python, "-I", "-c", program, cwd=elsewhere).splitlines()[-1]
    assert Path(imported).is_relative_to(installed)
    assert f"Version: {rq_draft_revise.__version__}" in run(
        sys.executable, "-m", "pip", "--python", python, "show", "rq_draft_revise"
    )


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_licence_and_nothing_else(wheel):
    names = set(run(sys.executable, "-m", "zipfile", "-l", wheel).split())
    packaged = {name for name in names if name.startswith("rq_draft_revise/")}
    files = [path for pattern in ("*.py", "py.typed") for path in (ROOT / "src").rglob(pattern)]
    assert packaged == {path.relative_to(ROOT / "src").as_posix() for path in files}
    assert any(name.endswith("/LICENSE") for name in names)


def test_version_agrees_everywhere():
    version = re.escape(rq_draft_revise.__version__)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest.group(1) == rq_draft_revise.__version__


def repository_files() -> list[Path]:
    """The files git tracks or would add; of a source archive without git, all that are not caches or builds."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        ignored = {".venv", "build", "dist", "outputs", "data", "__pycache__", ".git"}
        paths = [path for path in ROOT.rglob("*") if not ignored & set(path.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file()]


def test_no_file_names_somebodys_home_directory():
    home = re.compile(r"(?<![\w.])/(home|root|Users)/")
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # weights and images
            continue
        found += [f"{path.relative_to(ROOT)}: {line.strip()[:100]}" for line in text.splitlines() if home.search(line)]
    assert not found, "\n".join(found)
