"""The documentation is complete, its links lead somewhere, its code runs, and Sphinx builds it without a warning."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from stable_baselines3 import SAC
from test_wrong_calls import COMBINATIONS

from sb3_agpo import AGPO
from sb3_agpo.agpo.agpo import N_STEPS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "sb3_agpo"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "benchmarks"} & set(path.relative_to(DOCS).parts))
SOURCES = sorted(PACKAGE.rglob("*.py"))

Function = ast.FunctionDef | ast.AsyncFunctionDef

#: put before the blocks of a page: training is cut short, which shows that the code runs and not what it learns
PREAMBLE = """
import warnings
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
_learn = OffPolicyAlgorithm.learn
def _short(self, total_timesteps, *args, **kwargs):
    return _learn(self, min(total_timesteps, 100 * self.n_envs), *args, **kwargs)
OffPolicyAlgorithm.learn = _short
_init = OffPolicyAlgorithm.__init__
def _early(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    self.learning_starts = 20
OffPolicyAlgorithm.__init__ = _early
"""


def module_name(path: Path) -> str:
    """Dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_public(name: str) -> bool:
    """Whether a name is for users."""
    return not name.startswith("_")


def public_definitions(path: Path) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public classes and functions of a module, and public methods of its classes, by their dotted names."""
    prefix = module_name(path)
    pending: list[tuple[str, list[ast.stmt]]] = [(prefix, ast.parse(path.read_text()).body)]
    while pending:
        owner, body = pending.pop()
        for node in body:
            if isinstance(node, ast.ClassDef | Function) and is_public(node.name):
                yield f"{owner}.{node.name}", node
                if isinstance(node, ast.ClassDef):
                    pending.append((f"{owner}.{node.name}", node.body))


def has_decorator(node: Function, *names: str) -> bool:
    """Whether a function is decorated, for example as a property."""
    return any(ast.unparse(decorator).split("(")[0] in names for decorator in node.decorator_list)


def parameters(node: Function, *, method: bool) -> set[str]:
    """Names of a function's parameters, without those that are not documented by custom."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    if method and not has_decorator(node, "staticmethod"):
        arguments = arguments[1:]
    named = [*arguments, *node.args.kwonlyargs]
    return {argument.arg for argument in named if is_public(argument.arg)}


def star_parameters(node: Function) -> set[str]:
    """Names behind ``*`` and ``**``, which may be documented."""
    return {argument.arg for argument in (node.args.vararg, node.args.kwarg) if argument is not None}


def documented(docstring: str) -> set[str]:
    """Names after ``:param``."""
    return set(re.findall(r":param (\w+):", docstring))


# ---------------------------------------------------------------------- docstrings


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_everything_public_has_a_docstring(path: Path) -> None:
    missing = [
        name
        for name, node in public_definitions(path)
        if not ast.get_docstring(node) and not (not isinstance(node, ast.ClassDef) and has_decorator(node, "overload"))
    ]
    source = path.read_text()
    if source.strip() and not ast.get_docstring(ast.parse(source)) and path.name != "__about__.py":
        missing.append(module_name(path))
    assert not missing, f"write docstrings for {missing}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_docstrings_know_their_parameters(path: Path) -> None:
    """Each documented parameter exists; a docstring that documents one documents all."""
    wrong = []
    for name, node in public_definitions(path):
        docstring = ast.get_docstring(node) or ""
        given = documented(docstring)
        if not given:
            continue
        if isinstance(node, ast.ClassDef):
            constructors = [f for f in node.body if isinstance(f, Function) and f.name == "__init__"]
            if not constructors:  # inherited, or made from the fields
                continue
            function, method = constructors[0], True
        else:
            function, method = node, "." in name.removeprefix(f"{module_name(path)}.")
        actual, stars = parameters(function, method=method), star_parameters(function)
        # A class whose constructor passes keywords on may leave them to the class that gets them
        forgotten = set() if function is not node and function.args.kwarg is not None else actual - given
        unknown = {parameter for parameter in given - actual - stars if is_public(parameter)}
        if unknown or forgotten:
            wrong.append(f"{name}: documented but not there {sorted(unknown)}, there but not documented {sorted(forgotten)}")
    assert not wrong, "\n".join(wrong)


def test_the_reference_covers_every_module() -> None:
    pages = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    covered = set(re.findall(r"^```\{package-reference\} (\S+)$", pages, flags=re.MULTILINE))
    modules = {module_name(path) for path in SOURCES if path.name not in ("__main__.py", "__about__.py")} - {"sb3_agpo"}
    left_out = {name for name in modules if not any(f"{name}.".startswith(f"{package}.") for package in covered)}
    assert not left_out, f"add a page for {sorted(left_out)} to docs/api"


# ---------------------------------------------------------------------- links


def without_code(text: str) -> str:
    """A page without its code, where brackets are no links."""
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(path: Path) -> set[str]:
    """Names of a page's headings as GitHub and MyST make them."""
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_internal_links(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if re.match(r"[a-z]+:", target):  # elsewhere
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        if not page.exists():
            broken.append(target)
        elif anchor and page.suffix == ".md" and anchor not in anchors(page):
            broken.append(target)
    assert not broken, f"{path.name} links to nowhere: {broken}"


def test_defaults_beside_sacs_are_those_of_the_code() -> None:
    """The table has every argument of both whose defaults differ, and none else."""
    section = (DOCS / "hyperparameters.md").read_text().split("## Defaults beside SAC's")[1].split("## ")[0]
    told = {name: values for name, *values in re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", section, flags=re.MULTILINE)}
    sac, agpo = (inspect.signature(algorithm).parameters for algorithm in (SAC, AGPO))
    differ = [name for name in sac if name in agpo and sac[name].default != agpo[name].default]
    assert sorted(told) == sorted(differ)
    for name, values in told.items():
        defaults = [parameters[name].default for parameters in (sac, agpo)]
        shown = [f'"{default}"' if isinstance(default, str) else str(default) for default in defaults]
        assert [value.split(":")[0] for value in values] == shown, name
    assert f"None: {N_STEPS}" in told["n_steps"]


def test_refused_combinations_are_those_that_are_tested() -> None:
    """The table of combinations.md has a row for each, with the error that is raised."""
    _, _, section = (DOCS / "combinations.md").read_text().partition("\n## Refused\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")][2:]
    listed = {row[0]: row[1].strip("`") for row in rows}
    raised = {name: error.__name__ for name, (*_, (error, _)) in COMBINATIONS.items() if isinstance(error, type)}
    assert listed == raised


# ---------------------------------------------------------------------- code


def python_blocks(path: Path) -> list[str]:
    """Python code on a page."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if python_blocks(path)], ids=lambda path: path.stem)
def test_code_runs(path: Path, tmp_path: Path) -> None:
    """All Python blocks of a page, one after the other as a reader would enter them, training cut short."""
    needed = {
        module
        for module in ("matplotlib", "optuna", "pandas", "ray", "rl_zoo3", "tensorboard", "wandb")
        if any(re.search(rf"\b{module}\b", block) for block in python_blocks(path))
    }
    for module in sorted(needed):
        pytest.importorskip(module)
    script = tmp_path / "page.py"
    # Behind the usual guard, as worker processes import the script again
    body = textwrap.indent("\n".join(python_blocks(path)), "    ")
    script.write_text(f"{PREAMBLE}\nif __name__ == '__main__':\n{body}")
    environment = {
        "MUJOCO_GL": "egl",  # draws without a screen
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
    }
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    if result.returncode and re.search("OpenGL|EGL", result.stderr):
        pytest.skip("this machine cannot render")
    assert result.returncode == 0, result.stderr[-3000:]


# ---------------------------------------------------------------------- build


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation."""
    for module in ("sphinx", "myst_parser", "furo", "sphinx_copybutton", "linkify_it"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; see the extra 'docs'")
    output = tmp_path_factory.mktemp("docs") / "html"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(output)]
    result = subprocess.run(command, cwd=output.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    return output


@pytest.mark.slow
def test_build_without_warnings(html: Path) -> None:
    assert (html / "index.html").exists()


@pytest.mark.slow
def test_the_built_reference_has_everything_public(html: Path) -> None:
    inventory = (html / "objects.inv").read_bytes()
    text = zlib.decompress(inventory[inventory.index(b"zlib.\n") + len(b"zlib.\n") :]).decode()
    listed = {line.split(" ")[0] for line in text.splitlines() if " py:" in line}
    public = {name for path in SOURCES if path.name != "__main__.py" for name, _ in public_definitions(path)}
    assert public - listed == set()
