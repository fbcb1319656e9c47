"""
Sphinx extension: files that the benchmarks write into ``docs/benchmarks`` are pages, and parts of others, once they exist.

A page says ``<!-- results: report.md offset 2 -->`` to show one; the headings of the file go down by the offset.
"""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

FOLDER = "benchmarks"
MARKER = re.compile(r"^<!-- results: (\S+) offset (\d) -->$", flags=re.MULTILINE)
#: titles of files that have none of their own
TITLES = {f"{FOLDER}/fidelity": "Fidelity of gradients"}
WITHOUT_FILE = """No results of this kind come with this version. The commands on this page make them on your machine, and the
next build of these pages shows them here."""


def insert_results(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace each marker by what was measured, or by a pointer if there is nothing yet; add titles."""
    if docname in TITLES:
        source[0] = f"# {TITLES[docname]}\n\n{source[0]}"
    here = "../" * docname.count("/")

    def replacement(match: re.Match[str]) -> str:
        file, offset = match.groups()
        if not Path(app.srcdir, FOLDER, file).exists():
            return WITHOUT_FILE
        return f"```{{include}} {here}{FOLDER}/{file}\n:heading-offset: {offset}\n:relative-images:\n```"

    source[0] = MARKER.sub(replacement, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """
    Register with Sphinx.

    :param app: the application
    :return: facts about the extension
    """
    app.connect("source-read", insert_results)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
