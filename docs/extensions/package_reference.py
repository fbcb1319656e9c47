"""
Sphinx extension for the API reference: a directive that documents all modules of a package, readable record fields, and
links to re-exported names.

````
```{package-reference} sb3_agpo.agpo
```
````
"""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective


def modules_of(package_name: str, recursive: bool = True) -> list[str]:
    """
    Name a package and its modules.

    :param package_name: dotted name of a package or module
    :param recursive: also name the modules inside of its packages
    :return: dotted names, the package first
    """
    package = importlib.import_module(package_name)
    names = [package_name]
    for module in pkgutil.iter_modules(getattr(package, "__path__", ()), f"{package_name}."):
        if module.ispkg and recursive:
            names += modules_of(module.name)
        elif not module.ispkg and not module.name.rpartition(".")[2].startswith("__"):
            names.append(module.name)
    return names


class PackageReference(SphinxDirective):
    """A section for each module of a package, with everything public in it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """
        Expand to one ``automodule`` per module.

        :return: one section per module
        """
        sections: list[nodes.Node] = []
        for name in modules_of(self.arguments[0]):
            section = nodes.section(ids=[nodes.make_id(f"module-reference-{name}")])
            section += nodes.title("", "", nodes.literal("", name))
            options = [":members:", ":undoc-members:", ":show-inheritance:", ":ignore-module-all:"]
            lines = ["```{eval-rst}", f".. automodule:: {name}", *(f"   {option}" for option in options), "```"]
            self.state.nested_parse(StringList(lines, source=name), self.content_offset, section)
            sections.append(section)
        return sections


def field_comments(record: type) -> dict[str, str]:
    """
    Read the comments behind the fields of a named tuple, which Python forgets.

    :param record: the class
    :return: field -> comment
    """
    try:
        source = textwrap.dedent(inspect.getsource(record))
    except (OSError, TypeError):
        return {}
    lines = source.splitlines()
    comments = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above: list[str] = []
        for line in reversed(lines[: node.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line.strip().lstrip("#: "))
        behind = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()  # type: ignore[operator]
        comments[node.target.id] = " ".join([behind] if behind else above)
    return comments


def describe_field(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put a field's comment in place of "Alias for field number 3"."""
    if len(lines) == 0 or not re.fullmatch(r"Alias for field number \d+", lines[0]):
        return
    owner, _, field = name.rpartition(".")
    module, _, class_name = owner.rpartition(".")
    record = getattr(importlib.import_module(module), class_name)
    comment = field_comments(record).get(field, "")
    # What is in backquotes is markup; elsewhere |x|, a * b and names such as next_ are meant as they stand
    parts = re.split(r"((?::\w+)*:?`+[^`]*`+)", comment)
    parts[::2] = [re.sub(r"([|*_\\])", r"\\\1", part) for part in parts[::2]]
    lines[:] = ["".join(parts) or "A field."]


def resolve_reexport(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Element
) -> nodes.reference | None:
    """Link a name that a package re-exports, such as ``sb3_agpo.AGPO``, to where it is defined."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("sb3_agpo."):
        return None
    try:
        module, _, rest = target.rpartition(".")
        found = getattr(importlib.import_module(module), rest)
    except (ImportError, AttributeError):
        return None
    defined = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    if defined == target:
        return None
    domain = env.domains.python_domain
    link = domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], defined, node, content)
    return link if isinstance(link, nodes.reference) else None


def setup(app: Sphinx) -> dict[str, Any]:
    """
    Register with Sphinx.

    :param app: the application
    :return: facts about the extension
    """
    app.add_directive("package-reference", PackageReference)
    app.connect("autodoc-process-docstring", describe_field)
    app.connect("missing-reference", resolve_reexport)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
