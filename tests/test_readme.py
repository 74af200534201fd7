"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def test_readme_has_snippets():
    assert len(SNIPPETS) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, tmp_path, monkeypatch):
    # A folder that looks like the root of a checkout, so that what a snippet saves does not land in the real one.
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[number], f"README.md snippet {number + 1}", "exec"), {"__name__": "__main__"})
    assert any(path.suffix in {".png", ".gif"} for path in tmp_path.iterdir()), "the snippet saved no picture"


def test_relative_links_and_images_of_the_documentation_exist():
    missing = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not missing, missing
