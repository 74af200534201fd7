"""Makes pages that are written for GitHub work on the site as well.

On GitHub a page links to any file of the repository by a relative path. The site has the files of docs/ alone. So a
link out of docs/ becomes one to the repository's address, and a picture from there is copied into the site.
CONTRIBUTING.md and CHANGELOG.md stay where GitHub looks for them, at the root, and are pages of the site all the same.
"""

import logging
import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[2]
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}  # page of the site -> file at the root
PICTURES = (".png", ".jpg", ".gif", ".svg")

FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.M | re.S)
LINK = re.compile(r"(\]\()([^)\s]+)(?=[)\s])")

# mkdocs counts warnings of its own loggers, and --strict fails at the first.
logger = logging.getLogger("mkdocs.hooks.links")


def on_files(files, config):
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")  # its path in the repository

    def replace(match: re.Match) -> str:
        target = site_target(match.group(2), source, page.file.src_uri, config, files)
        return match.group(1) + target

    # what is between two fences is text, and what is inside a fence stays as it is
    parts, start = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(replace, markdown[start : fence.start()]), fence.group()]
        start = fence.end()
    return "".join([*parts, LINK.sub(replace, markdown[start:])])


def site_target(target: str, source: str, page: str, config, files) -> str:
    """What a link of the file `source` (a path from the root) becomes on the page `page` (a path from docs/)."""
    path, _, anchor = target.partition("#")
    if not path or "://" in target or target.startswith("mailto:"):
        return target
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    anchor = f"#{anchor}" if anchor else ""
    here = {file: name for name, file in PAGES.items()}
    if path.startswith("docs/"):
        return relative(path.removeprefix("docs/"), page) + anchor  # mkdocs says so where there is none
    if path in here:
        return relative(here[path], page) + anchor
    if not (ROOT / path).exists():
        logger.warning("%s links to %s, which is not in the repository", source, target)
        return target
    if path.endswith(PICTURES):
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        return relative(path, page)
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{config.repo_url.rstrip('/')}/{kind}/main/{path}{anchor}"


def relative(path: str, page: str) -> str:
    return Path(os.path.relpath(path, posixpath.dirname(page) or ".")).as_posix()
