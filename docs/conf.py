"""Settings of Sphinx, which builds these pages: ``make docs``."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]

from sb3_agpo import __version__  # noqa: E402

project = "sb3-agpo"
author = "sb3-agpo contributors"
project_copyright = author  # dateless: the same sources give the same pages
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "package_reference",
    "measured_results",
]
exclude_patterns = ["_build"]
suppress_warnings = ["myst.header"]  # tables that the benchmarks write have small headings

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "linkify"]
myst_linkify_fuzzy_links = False  # else "report.md" would be taken for a web address
myst_heading_anchors = 3

# AGPO's page shows classes by the names that users import; followed to their modules, source pages would link back to these
# names, which have no place in the reference.
viewcode_follow_imported_members = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
# Optional libraries that are not there must not keep a page from being built.
OPTIONAL = ("matplotlib", "optuna", "pandas", "ray", "rl_zoo3", "scipy", "tensorboard", "wandb", "yaml")
autodoc_mock_imports = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]

html_theme = "furo"
html_title = f"sb3-agpo {version}"
html_copy_source = False
copybutton_prompt_text = "$ "
