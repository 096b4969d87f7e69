"""Every command in README.md and docs/ runs, in order, in an empty folder: what a reader copies works.

A fenced `bash` or `python` block is run as it stands. An HTML comment just above the fence may change that; it is
invisible on the page:

    <!-- file: answers.csv -->     the block (of any language) is not run but saved as this file
    <!-- reduced: COMMANDS -->     `make test` runs COMMANDS instead (smaller, same kind); `make test-all` the block
    <!-- tested by: PATH::TEST --> the block is run by that test (it needs a checkout, or a network)
    <!-- exit code: 2 -->          the block is meant to fail with this code

and anywhere in a page `<!-- after: PAGE.md -->` runs that page's blocks first, in the same folder.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from plaudit.cli.app import VERBS, registered_verbs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN_BY = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
SECONDS_REDUCED, SECONDS_FULL = 240, 36_000

FENCE = re.compile(
    r"(?P<comments>(?:^ *<!--(?:(?!-->).)*-->\s*\n)*)"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```\s*$",
    re.MULTILINE | re.DOTALL,
)
COMMENT = re.compile(r"<!--\s*(file|reduced|tested by|exit code):\s*(.*?)\s*-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, its line on the page, and what the comments above it say."""

    language: str
    text: str
    line: int
    notes: dict[str, str] = field(default_factory=dict)

    def commands(self, *, full: bool) -> str:
        return self.text if full else self.notes.get("reduced", self.text)


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page that are to be run or saved, and those that another test runs."""
    blocks = []
    for found in FENCE.finditer(text):
        notes = dict(COMMENT.findall(found["comments"]))
        if found["language"] in RUN_BY or "file" in notes:
            body = re.sub(f"^{found['indent']}", "", found["body"], flags=re.MULTILINE)
            line = text.count("\n", 0, found.start("body")) + 1
            blocks.append(Block(found["language"], body, line, notes))
    return blocks


def pages_before(page: Path) -> list[Path]:
    names = re.findall(r"<!--\s*after:\s*(\S+)\s*-->", page.read_text(encoding="utf-8"))
    return [ROOT / name if name == "README.md" else ROOT / "docs" / name for name in names]


def missing_verbs(text: str) -> list[str]:
    """Verbs that a command uses and that this version does not have."""
    called = {verb for verb in VERBS if re.search(rf"\bplaudit {verb}\b", text)}
    return sorted(called - set(registered_verbs()))


def run_block(block: Block, folder: Path, *, full: bool) -> None:
    """Run one block in the folder, or save it there; fails with the block's output."""
    if "file" in block.notes:
        target = folder / block.notes["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.text, encoding="utf-8")
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*RUN_BY[block.language], block.commands(full=full)],
        cwd=folder,
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS_FULL if full else SECONDS_REDUCED,
        check=False,
    )
    expected = int(block.notes.get("exit code", 0))
    assert done.returncode == expected, (
        f"line {block.line}: exit code {done.returncode}\n{block.commands(full=full)}\n{done.stdout[-3000:]}"
    )


def run_page(page: Path, folder: Path, *, full: bool) -> None:
    for before in pages_before(page):
        run_page(before, folder, full=full)
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if "tested by" not in block.notes:
            if absent := missing_verbs(block.commands(full=full)):
                pytest.skip(f"line {block.line}: this version has no `plaudit {absent[0]}`")
            run_block(block, folder, full=full)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_at_reduced_size(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path, full=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_full(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path, full=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_command_hides(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("```") % 2 == 0, "a fence is left open"
    languages = {found["language"] for found in FENCE.finditer(text)}
    hidden = languages & {"sh", "shell", "console", "zsh", "terminal", "py", "pycon"}
    assert not hidden, f"write commands in `bash` blocks and code in `python` blocks, so that they are run: {hidden}"
    for block in blocks_of(text):
        if "tested by" in block.notes:
            file, _, test = block.notes["tested by"].partition("::")
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert test in names, f"line {block.line}: {file} has no {test}"


PAGE = """Text.

<!-- file: data/answers.csv -->
```csv
a,b
```

<!-- reduced: cat data/answers.csv > small -->
```bash
false
```

1. A step:

   ```bash
   test -e small
   ```

<!-- exit code: 3 -->
```bash
exit 3
```

```text
output
```

```python
print(open("small").read())
```
"""


def test_blocks_are_read_and_run(tmp_path: Path) -> None:
    blocks = blocks_of(PAGE)
    assert [block.language for block in blocks] == ["csv", "bash", "bash", "bash", "python"]
    assert blocks[1].line == PAGE[: PAGE.index("false")].count("\n") + 1
    assert blocks[2].text == "test -e small\n"
    for block in blocks:
        run_block(block, tmp_path, full=False)
    with pytest.raises(AssertionError, match="exit code 1"):
        run_block(blocks[1], tmp_path, full=True)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(AssertionError, match=r"line 10: exit code"):
        run_block(blocks[1], tmp_path, full=False)
