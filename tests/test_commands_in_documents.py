"""Every spqt command that README and docs show can be typed: its flags exist and take such values.

What the commands do is tested with each; README's own steps run in `make run`.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from spqt_cli.cli import main
from tests import ROOT

if not (ROOT / "docs").is_dir():
    pytest.skip("docs/ is not part of a source archive", allow_module_level=True)

DOCUMENTS = sorted([ROOT / "README.md", ROOT / "metal" / "README.md", *(ROOT / "docs").glob("*.md")])
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
GROUP = typer.main.get_command(main.app)
BLOCK = re.compile(r"^```.*?^```$|^(?: {4}.*\n)+", re.MULTILINE | re.DOTALL)
IN_BLOCK = re.compile(r"^(?:    |\$ )?(?:\S*/bin/)?spqt ([^\n`]+)", re.MULTILINE)
IN_SENTENCE = re.compile(r"`(?:SPQT_\w+=\S+ )?spqt ([^`]+)`")
PLACEHOLDERS = re.compile(r"\.\.\.|[\[\]<>…]|^(?:mlx-lm|--\S+)\b")  # what is not to be typed so


def in_blocks(text: str) -> Iterator[str]:
    """The whole commands of a text, without `spqt`, comments, and what a shell does with their output."""
    blocks = "\n".join(BLOCK.findall(text))
    yield from _typed(IN_BLOCK.findall(re.sub(r"\\\n\s*|\n\s+(?=--)", " ", blocks)))


def in_sentences(text: str) -> Iterator[str]:
    """The commands that a text talks of, perhaps without their arguments."""
    yield from _typed(IN_SENTENCE.findall(text))


def _typed(found: list[str]) -> Iterator[str]:
    for one in found:
        line = " ".join(re.split(r"(?:^|\s)#|\s[|>;&]", one)[0].split())
        if line and not PLACEHOLDERS.search(line):
            yield line


def parse(line: str, *, whole: bool = True) -> None:
    """Raise what the command line would, before it does anything. whole: nothing may be missing."""
    name, *arguments = shlex.split(line)
    arguments = [re.sub(r"^[XZ]$|^PCT$", "0.1", one) for one in arguments]
    try:
        GROUP.commands[name].make_context(name, arguments)
    except Exception as error:
        if whole or ("Missing" not in type(error).__name__ and "requires an argument" not in str(error)):
            raise


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_can_be_typed(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for line in in_blocks(text):
        parse(line)
    for line in in_sentences(text):
        parse(line, whole=False)


def test_enough_is_found_and_a_wrong_flag_too() -> None:
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    blocks = [line for text in texts for line in in_blocks(text)]
    assert len(blocks) > 30
    assert sum(len(list(in_sentences(text))) for text in texts) > 30
    assert 'run my-model "Why is the sky blue?"' in blocks
    (line,) = in_sentences("Type `spqt calibrate my-model --sparsty 0.4`.")
    with pytest.raises(Exception, match="--sparsty"):
        parse(line, whole=False)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_name_what_exists(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    typed = [line for step in steps for line in re.findall(r"(?:\S*/)?bin/spqt ([^\n|]+)", step)]
    for line in typed:
        if line.strip() != "--version":
            parse(line)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {name for step in steps for name in re.findall(r"^make ([\w-]+)", step, re.MULTILINE)} <= targets
    assert "Never run by us" in path.read_text()
