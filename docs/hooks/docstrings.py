"""Docstrings in the manner of diffusers, as Markdown for the pages of the API.

Two things in them are not Markdown. A section (`Args:`, `Returns:`, ...) is a title with indented entries, which here
becomes a list. And [`Name`] means the object of that name, looked up from where it stands; a name that nothing has is
a warning, and the strict build fails.
"""

import re

import griffe


SECTIONS = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Raises": "Raises",
    "Returns": "Returns",
    "Yields": "Yields",
}
SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):\n((?: {{4,}}.*(?:\n|$)|\n)+)", re.M)
ENTRY = re.compile(r"^ {4}(?=\S)", re.M)
REFERENCE = re.compile(r"\[`(~?[\w.]+)`\](?![(\[])")

logger = griffe.get_logger("mkdocs.hooks.docstrings")


class DiffusersDocstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        rewrite(pkg)


def rewrite(item: griffe.Object) -> None:
    """The docstrings of `item` and of all that it holds."""
    if item.docstring is not None:
        text = SECTION.sub(section, item.docstring.value)
        item.docstring.value = REFERENCE.sub(lambda match: reference(match.group(1), item), text)
    for member in item.members.values():
        if not member.is_alias:  # another object's, which has its own turn
            rewrite(member)


def section(match: re.Match) -> str:
    title, body = match.groups()
    if title in ("Returns", "Yields") and not re.match(r" {4}\w+ \(", body):
        return f"**{SECTIONS[title]}**\n\n{re.sub('^ {4}', '', body, flags=re.M).strip()}\n\n"
    entries = [" ".join(entry.split()) for entry in ENTRY.split(body) if entry.strip()]
    return f"**{SECTIONS[title]}**\n\n" + "".join(f"- {entry_line(entry)}\n" for entry in entries) + "\n"


def entry_line(entry: str) -> str:
    """`name (type), name (type): text`, with the names as code."""
    head = re.match(r"(\w+(, \w+)*|\w.*?\)(, \w+)*):\s", entry)
    if head is None:  # an error, which is code already
        return entry
    return re.sub(r"(^|, )([A-Za-z_]\w*)(?=,|:| \()", r"\1`\2`", head.group()) + entry[head.end() :]


def reference(name: str, item: griffe.Object) -> str:
    """A link to the object of that name; without one, plain code, where no page describes it."""
    path = find(name.removeprefix("~"), item)
    if path is None:
        logger.warning(f"{item.path}: nothing has the name [`{name}`]")
        return f"`{name}`"
    shown = name.removeprefix("~")
    return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'


def find(name: str, item: griffe.Object) -> str | None:
    """The path of `name`, seen from `item`: its own members first, then those of what it is in, then any module's."""
    first, *rest = name.split(".")
    found, scope = None, item
    while found is None and scope is not None:
        found = scope if scope.is_module and scope.name == first else member(scope, first)
        scope = scope.parent
    modules = item.package.modules.values()
    found = found or next((module.members[first] for module in modules if first in module.members), None)
    for part in rest:
        found = member(found, part) if found is not None else None
    return None if found is None else found.canonical_path


def member(item: griffe.Object | griffe.Alias, name: str) -> griffe.Object | griffe.Alias | None:
    item = item.final_target if item.is_alias else item
    return item.members.get(name) or (item.inherited_members.get(name) if item.is_class else None)
