"""Every command that README and the documentation print exists, and takes the arguments that it is printed with."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import sb3_agpo.cli
from sb3_agpo.benchmark.__main__ import main as benchmark
from sb3_agpo.zoo.scripts import RAY_SEARCH
from sb3_agpo.zoo.scripts import main as zoo

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:then: +)?(?:\w+=\S+ )*((?:python|sb3-agpo|make|pip) .+)")


def printed_commands(page: Path) -> Iterator[list[str]]:
    """Words of the commands in blocks, and of those in running text that have options, which others there only name."""
    text = page.read_text().replace("\\\n", "")
    block = re.compile(r"^```(\S*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
    lines = [line for language, body in block.findall(text) if language in ("", "bash", "text") for line in body.splitlines()]
    lines += [code for code in re.findall(r"`([^`\n]+)`", block.sub("", text)) if " --" in code]
    for line in lines:
        if command := COMMAND.match(line):
            yield [word for word in shlex.split(command[1], comments=True) if word != "..."]


COMMANDS = [(page.name, words) for page in PAGES for words in printed_commands(page)]
OURS = [(page, words) for page, words in COMMANDS if words[0] in ("python", "sb3-agpo")]


class ParsedError(Exception):
    """Ends a command when its arguments have been read; holds those that were not understood."""


@pytest.fixture
def parsing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands read their arguments and do nothing else."""
    original = argparse.ArgumentParser.parse_known_args

    def parse(parser: argparse.ArgumentParser, *arguments: object, **named: object) -> None:
        raise ParsedError(original(parser, *arguments, **named)[1])  # type: ignore[arg-type]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)


def not_understood(command: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Start a command as far as its arguments, and return those that it does not know."""
    monkeypatch.setattr(sys, "argv", command[1:])
    with pytest.raises(ParsedError) as parsed:
        match command:
            case ["sb3-agpo", *arguments]:
                sb3_agpo.cli.main(arguments)
            case ["python", "-m", "sb3_agpo.benchmark", *arguments]:
                benchmark(arguments)
            case ["python", "-m", "sb3_agpo.zoo", *arguments]:
                zoo(arguments)
            case ["python", "-m", module, *arguments]:
                sys.argv[:] = [module, *arguments]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case ["python", script, *_]:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            case _:
                raise AssertionError(f"what is {command}?")
    unknown: list[str] = parsed.value.args[0]
    if RAY_SEARCH in command and unknown:  # these are for the zoo
        return not_understood(["python", "-m", "sb3_agpo.zoo", "optimize", *unknown], monkeypatch)
    return unknown


@pytest.mark.parametrize("words", [words for _, words in OURS], ids=[f"{page} {' '.join(words)[:60]}" for page, words in OURS])
def test_arguments_are_understood(words: list[str], parsing_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if RAY_SEARCH in words:
        pytest.importorskip("ray")
    assert not_understood([word for word in words if word != "--help"], monkeypatch) == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    printed = {words[1] for _, words in COMMANDS if words[0] == "make"}
    assert printed and printed <= targets


def test_extras_exist() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    asked = "".join(page.read_text() for page in PAGES)
    printed = {name for group in re.findall(r"'(?:\.|sb3-agpo)\[([a-z,]+)\]'", asked) for name in group.split(",")}
    assert printed and printed <= extras
