"""Every command in README.md and docs/ runs, in order, in an empty folder: what a reader copies works.

A fenced `bash` or `python` block is run as it stands. An HTML comment just above the fence may change that; it is
invisible on the page:

    <!-- file: answers.csv -->     the block (of any language) is not run but saved as this file
    <!-- reduced: COMMANDS -->     `make test` runs COMMANDS instead (smaller, same kind)
    <!-- full: COMMANDS -->        `make test-all` runs COMMANDS instead (the block needs a checkout or a network)
    <!-- tested by: PATH::TEST --> the block is run by that test (it needs a checkout, or a network)
    <!-- exit code: 2 -->          the block is meant to fail with this code

Blocks that only call `python studies/…` take hours and data that is not part of the project; they are not run, but
their script has to know every word in them.

And anywhere in a page `<!-- after: PAGE.md -->` runs that page's blocks first, in the same folder. `make test` starts
Python once for all of them (`warm.py`); `make test-all` starts every command as a reader would.
"""

import ast
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from plaudit.cli.app import VERBS, registered_verbs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BASH = ["bash", "-euo", "pipefail", "-c"]
COLD = {"bash": BASH, "python": [sys.executable, "-c"]}
WARM = Path(__file__).with_name("warm.py")
SECONDS_REDUCED, SECONDS_FULL = 240, 36_000

FENCE = re.compile(
    r"(?P<comments>(?:^ *<!--(?:(?!-->).)*-->\s*\n)*)"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```\s*$",
    re.MULTILINE | re.DOTALL,
)
COMMENT = re.compile(r"<!--\s*(file|reduced|full|tested by|exit code):\s*(.*?)\s*-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, its line on the page, and what the comments above it say."""

    language: str
    text: str
    line: int
    notes: dict[str, str] = field(default_factory=dict)

    def commands(self, *, full: bool) -> str:
        return self.notes.get("full" if full else "reduced", self.text)


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page that are to be run or saved, and those that another test runs."""
    blocks = []
    for found in FENCE.finditer(text):
        notes = dict(COMMENT.findall(found["comments"]))
        if found["language"] in COLD or "file" in notes:
            body = re.sub(f"^{found['indent']}", "", found["body"], flags=re.MULTILINE)
            line = text.count("\n", 0, found.start("body")) + 1
            blocks.append(Block(found["language"], body, line, notes))
    return blocks


def pages_before(page: Path) -> list[Path]:
    names = re.findall(r"<!--\s*after:\s*(\S+)\s*-->", page.read_text(encoding="utf-8"))
    return [ROOT / name if name == "README.md" else ROOT / "docs" / name for name in names]


def study_calls(block: Block) -> list[list[str]]:
    """Script and words of every command of a block that only calls studies; empty for any other block."""
    lines = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
    calls = [words for words in lines if words]
    return (
        [words[1:] for words in calls] if all(" ".join(words).startswith("python studies/") for words in calls) else []
    )


def missing_verbs(text: str) -> list[str]:
    """Verbs that a command uses and that this version does not have."""
    called = {verb for verb in VERBS if re.search(rf"\bplaudit {verb}\b", text)}
    return sorted(called - set(registered_verbs()))


@dataclass(frozen=True)
class Runner:
    """How commands are started: the program before a block of each language, and the folder of `plaudit`."""

    programs: dict[str, list[str]]
    binaries: Path


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "COLUMNS": "100"}


@pytest.fixture(scope="module")
def cold() -> Runner:
    return Runner(COLD, Path(sys.executable).parent)


@pytest.fixture(scope="module")
def warm() -> Iterator[Runner]:
    with tempfile.TemporaryDirectory() as folder:
        address, call = Path(folder) / "socket", [sys.executable, "-IS", str(WARM)]
        server = subprocess.Popen([sys.executable, str(WARM), "serve", str(address)], env=environment())
        try:
            while not address.exists():
                assert server.poll() is None, "the warm server did not start"
                time.sleep(0.1)
            binary = Path(folder) / "bin" / "plaudit"
            binary.parent.mkdir()
            binary.write_text(f'#!/bin/sh\nexec "{call[0]}" -IS "{WARM}" plaudit "{address}" "$@"\n')
            binary.chmod(0o755)
            yield Runner({"bash": BASH, "python": [*call, "code", str(address)]}, binary.parent)
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(scope="module")
def finished() -> dict[Path, Path]:
    """Page to the folder in which it has run at reduced size, for the pages that come after it."""
    return {}


@pytest.fixture(scope="module")
def finished_in_full() -> dict[Path, Path]:
    """The same for full size."""
    return {}


def run_block(block: Block, folder: Path, runner: Runner, *, full: bool) -> None:
    """Run one block in the folder, or save it there; fails with the block's output."""
    if "file" in block.notes:
        target = folder / block.notes["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.text, encoding="utf-8")
        return
    path = os.pathsep.join([str(runner.binaries), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*runner.programs[block.language], block.commands(full=full)],
        cwd=folder,
        env=environment() | {"PATH": path},
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


def run_page(page: Path, folder: Path, runner: Runner, finished: dict[Path, Path], *, full: bool) -> None:
    """Run a page's blocks in the folder, after those of the pages it builds on (once for all pages that do)."""
    for before in pages_before(page):
        if before not in finished:
            finished[before] = folder.with_name(f"{folder.name}-{before.stem}")
            finished[before].mkdir()
            run_page(before, finished[before], runner, finished, full=full)
        shutil.copytree(finished[before], folder, dirs_exist_ok=True)
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if "tested by" not in block.notes and not study_calls(block):
            if absent := missing_verbs(block.commands(full=full)):
                pytest.skip(f"line {block.line}: this version has no `plaudit {absent[0]}`")
            run_block(block, folder, runner, full=full)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_at_reduced_size(page: Path, tmp_path: Path, warm: Runner, finished: dict[Path, Path]) -> None:
    if page in finished:
        return
    run_page(page, tmp_path, warm, finished, full=False)
    finished[page] = tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_full(page: Path, tmp_path: Path, cold: Runner, finished_in_full: dict[Path, Path]) -> None:
    if page in finished_in_full:
        return
    run_page(page, tmp_path, cold, finished_in_full, full=True)
    finished_in_full[page] = tmp_path


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


STUDY_CALLS = [
    (f"{page.stem}:{block.line}", call)
    for page in PAGES
    for block in blocks_of(page.read_text(encoding="utf-8"))
    if block.language == "bash"
    for call in study_calls(block)
]


@pytest.mark.skipif(not STUDY_CALLS, reason="no page calls a study")
def test_studies_know_the_words_of_their_commands(warm: Runner, tmp_path: Path) -> None:
    for script in sorted({call[0] for _, call in STUDY_CALLS}):
        path = ROOT / script
        code = f"import runpy, sys; sys.path.insert(0, {str(path.parent)!r}); sys.argv = ['study', '--help']\n"
        code += f"runpy.run_path({str(path)!r}, run_name='__main__')"
        done = subprocess.run(
            [*warm.programs["python"], code], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        known = set(re.findall(r"[\w-]+", done.stdout))
        for place, (called, *words) in STUDY_CALLS:
            options = [word.partition("=")[0] for word in words if word.startswith("--")]
            plain = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
            unknown = {*options, *plain} - known
            assert called != script or not unknown, f"{place}: {script} does not know {unknown}"


def test_study_calls_are_told_from_other_commands() -> None:
    assert study_calls(Block("bash", "python studies/a.py run \\\n  --fast  # hours\n", 1)) == [
        ["studies/a.py", "run", "--fast"]
    ]
    assert study_calls(Block("bash", "python studies/a.py\nplaudit doctor\n", 1)) == []


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


def test_blocks_are_read_and_run(tmp_path: Path, cold: Runner) -> None:
    blocks = blocks_of(PAGE)
    assert [block.language for block in blocks] == ["csv", "bash", "bash", "bash", "python"]
    assert blocks[1].line == PAGE[: PAGE.index("false")].count("\n") + 1
    assert blocks[2].text == "test -e small\n"
    for block in blocks:
        run_block(block, tmp_path, cold, full=False)
    with pytest.raises(AssertionError, match="exit code 1"):
        run_block(blocks[1], tmp_path, cold, full=True)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(AssertionError, match=r"line 10: exit code"):
        run_block(blocks[1], tmp_path, cold, full=False)


def test_warm_commands_are_like_cold_ones(tmp_path: Path, warm: Runner) -> None:
    (tmp_path / "in").write_text("{}")
    run_block(Block("bash", 'plaudit --version | grep -q "[0-9]" && cat in', 1), tmp_path, warm, full=False)
    run_block(
        Block("python", "import os, sys\nsys.exit(os.path.exists('in') + 1)", 1, {"exit code": "2"}),
        tmp_path,
        warm,
        full=False,
    )
    with pytest.raises(AssertionError, match=r"(?s)exit code 2.*unknown option"):
        run_block(Block("bash", "plaudit reward --modell x", 1), tmp_path, warm, full=False)
    with pytest.raises(AssertionError, match="NameError"):
        run_block(Block("python", "print(missing)", 1), tmp_path, warm, full=False)
