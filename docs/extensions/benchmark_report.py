"""Sphinx extension: the measured results go into the algorithm's page once ``docs/benchmarks/report.md`` has been made."""

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

REPORT = "benchmarks/report.md"
MARKER = "<!-- benchmark report -->"
WITH_REPORT = f"""```{{include}} {REPORT}
:heading-offset: 2
:relative-images:
```"""
WITHOUT_REPORT = """No report of a finished benchmark comes with this version.
The command below makes one on your machine, and the next build of these pages shows it here."""


def insert_report(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the marker by the report, or by a pointer if there is none yet."""
    if MARKER in source[0]:
        exists = Path(app.srcdir, REPORT).exists()
        source[0] = source[0].replace(MARKER, WITH_REPORT if exists else WITHOUT_REPORT)


def setup(app: Sphinx) -> dict[str, Any]:
    """
    Register with Sphinx.

    :param app: the application
    :return: facts about the extension
    """
    app.connect("source-read", insert_report)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
