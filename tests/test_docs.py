"""The documentation hangs together: pages, links, pictures with their commands, names of the API, the strict build."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import griffe
import pytest
import yaml
from mkdocs.structure.files import File, Files

import rq_draft_revise


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def load_hook(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


links, docstrings = load_hook("links"), load_hook("docstrings")


def entries(nav) -> list[str]:
    """The pages of a navigation, which is a list of titles with pages or with lists of that kind."""
    pages = []
    for item in nav:
        (value,) = item.values()
        pages += [value] if isinstance(value, str) else entries(value)
    return pages


# ---------------------------------------------------------------------------------------------------------------------
# Pages, links, pictures
# ---------------------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation_once():
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES]
    assert sorted(entries(SITE["nav"])) == sorted([*pages, *links.PAGES])
    assert all((ROOT / source).is_file() for source in links.PAGES.values())


def test_relative_links_and_images_of_the_documentation_exist():
    missing = []
    cards = [ROOT / "pipelines" / name / "README.md" for name in ("", "emoji-scenes", "cifar10-32")]
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *cards, *PAGES]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not missing, missing


PICTURES = sorted([*(DOCS / "images").iterdir(), *ROOT.glob("pipelines/*/*.png")])


@pytest.mark.parametrize("image", PICTURES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_picture_is_on_a_page_with_the_command_that_makes_it(image):
    place = image.relative_to(ROOT).as_posix()
    shown = f"{image.parent.name}/{image.name})"
    card = image.parent / "README.md"
    pages = [page for page in PAGES if shown in page.read_text(encoding="utf-8")]
    if card.is_file() and f"]({image.name})" in card.read_text(encoding="utf-8"):
        pages.append(card)
    assert pages, f"no page shows {place}"
    commands = [
        block
        for page in pages
        for block in re.findall(r"^```bash\n(.*?)^```|((?:^ {4}.*\n)+)", page.read_text(encoding="utf-8"), re.M | re.S)
        if place in "".join(block)
    ]
    assert commands, f"{[page.name for page in pages]} shows {place} and no command that writes it"


def lines_of_tables(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("name", ["cifar10-32", "emoji-scenes"])
def test_the_page_of_results_has_the_figures_that_were_measured(name):
    page = lines_of_tables((DOCS / "results.md").read_text(encoding="utf-8"))
    made = lines_of_tables((ROOT / "pipelines" / name / "tables.md").read_text(encoding="utf-8"))
    # the page leaves the word "verdict" out of a heading and adds a column of what was published
    rows = [row for row in made if not row.startswith("| claim |")]
    missing = [row for row in rows if not any(line.startswith(row) for line in page)]
    assert len(rows) > 50 and not missing, missing


def test_the_summary_of_the_claims_has_the_verdicts_of_both_tables():
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    summary = page.partition("| claim | CIFAR-10 | emoji scenes |\n|---|---|---|\n")[2].partition("\n\n")[0]
    verdicts = [
        {
            one["claim"]: one["verdict"]
            for one in json.loads((ROOT / "pipelines" / name / "tables.json").read_text())["claims"]
        }
        for name in ("cifar10-32", "emoji-scenes")
    ]
    assert verdicts[0].keys() == verdicts[1].keys()
    assert summary.splitlines() == [
        f"| {claim} | {one} | {verdicts[1][claim]} |" for claim, one in verdicts[0].items()
    ]


def test_the_repository_has_one_address():
    setup, citation = ((ROOT / name).read_text(encoding="utf-8") for name in ("setup.py", "CITATION.cff"))
    assert f'URL = "{SITE["repo_url"]}"' in setup
    assert f'repository-code: "{SITE["repo_url"]}"' in citation


def test_every_public_name_is_on_a_page_of_the_api():
    described = re.findall(r"^::: rq_draft_revise\.(\S+)$", "\n".join(page.read_text() for page in PAGES), re.M)
    assert len(described) == len(set(described))
    assert set(rq_draft_revise.__all__) <= set(described)


# ---------------------------------------------------------------------------------------------------------------------
# The hooks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_page():
    """Markdown of a page as the site gets it."""

    def on_page(markdown: str, page: str = "training.md") -> str:
        config = SimpleNamespace(repo_url=SITE["repo_url"], site_dir="site", use_directory_urls=True)
        config.plugins = SimpleNamespace(_current_plugin=None)
        on_page.files = Files([File(page, str(DOCS), "site", True)])
        return links.on_page_markdown(
            markdown, SimpleNamespace(file=on_page.files.get_file_from_path(page)), config, on_page.files
        )

    return on_page


def test_links_out_of_the_documentation_lead_to_the_repository(on_page):
    url = SITE["repo_url"]
    assert on_page("[a](../examples/generate.py)") == f"[a]({url}/blob/main/examples/generate.py)"
    assert on_page("[a](../conversion_scripts)") == f"[a]({url}/tree/main/conversion_scripts)"
    assert on_page("[a](../../README.md#limits)", "api/models.md") == f"[a]({url}/blob/main/README.md#limits)"


def test_links_within_the_documentation_and_into_the_world_stay(on_page):
    for link in (
        "[a](sampling.md#seeds)",
        "[a](#stage-1-rq-vae)",
        "[a](https://arxiv.org)",
        "![a](images/cifar10.png)",
    ):
        assert on_page(link) == link


def test_links_between_pages_at_the_root_and_pages_in_docs(on_page):
    assert on_page("[a](docs/design.md) [b](CHANGELOG.md)", "contributing.md") == "[a](design.md) [b](changelog.md)"
    assert on_page("[a](../../CONTRIBUTING.md)", "api/models.md") == "[a](../contributing.md)"


def test_a_picture_from_elsewhere_comes_along(on_page):
    picture = "pipelines/cifar10-32/curves-transformer.png"
    assert on_page(f"![a](../../{picture})", "api/models.md") == f"![a](../{picture})"
    assert on_page(f"![a](../{picture})") == f"![a]({picture})"
    assert on_page.files.get_file_from_path(picture).abs_src_path == str(ROOT / picture)


def test_what_is_code_is_no_link(on_page):
    code = "```python\nx = f(a)[0](../nothing.md)\n```\n"
    assert on_page(code) == code


def test_a_link_to_nothing_is_a_warning(on_page, caplog):
    on_page("[a](../no-such-file.md)")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.records[0].name.startswith("mkdocs.")  # which is what --strict counts


SOURCE = '''
class Model:
    """A model, see [`Model.forward`] and [`rate`].

    Args:
        width (`int`, defaults to 8), depth (`dict[str, int]`): Of shape `(a: b)`, two
            lines of it.
        top_p (`float` in (0, 1], *optional*): A share (of all): yes.
        size (`int`), kwargs: As in `f`.
        one, two: Both.

    Raises:
        `ValueError`: never (or so): we hope.
    """

    def forward(self):
        """See [`nothing_of_this_name`], and `x[0]`, and [`back`](elsewhere.md).

        Returns:
            One thing: that.
        """

    def back(self):
        """Undo [`forward`]."""


def rate():
    """A number."""
'''


def test_docstrings_become_markdown(caplog):
    with griffe.temporary_visited_module(SOURCE, module_name="sample") as module:
        docstrings.rewrite(module)
        text = module["Model"].docstring.value
        assert '<autoref optional identifier="sample.Model.forward"><code>Model.forward</code></autoref>' in text
        assert 'identifier="sample.rate"' in text
        (arguments,) = re.findall(r"\*\*Arguments\*\*\n\n(.*?)\n\n", text, re.S)
        assert arguments.splitlines() == [
            "- `width` (`int`, defaults to 8), `depth` (`dict[str, int]`): Of shape `(a: b)`, two lines of it.",
            "- `top_p` (`float` in (0, 1], *optional*): A share (of all): yes.",
            "- `size` (`int`), `kwargs`: As in `f`.",
            "- `one`, `two`: Both.",
        ]
        assert "**Raises**\n\n- `ValueError`: never (or so): we hope." in text
        assert 'identifier="sample.Model.forward"><code>forward</code>' in module["Model.back"].docstring.value
        text = module["Model.forward"].docstring.value
        assert "See `nothing_of_this_name`, and `x[0]`, and [`back`](elsewhere.md)." in text
        assert "**Returns**\n\nOne thing: that." in text
    assert ["nothing_of_this_name" in record.getMessage() for record in caplog.records] == [True]


# ---------------------------------------------------------------------------------------------------------------------
# The site
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    html = {path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    for page in entries(SITE["nav"]):
        assert page.replace("index.md", "index.html").replace(".md", "/index.html") in html, page
    for name, text in html.items():
        assert "[<code>" not in text and "<autoref" not in text, f"a reference of a docstring is left in {name}"
    # a reference of a docstring from one page to another, and a link of a page that stays at the root
    assert 'href="../models/#rq_draft_revise.RQVAEModel"' in html["api/pipelines/index.html"]
    assert 'href="../design/"' in html["contributing/index.html"]
    assert (tmp_path / "site" / "pipelines" / "cifar10-32" / "curves-transformer.png").is_file()
    assert not list((tmp_path / "site").rglob("*.py"))
