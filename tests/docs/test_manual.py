"""The manual builds, strictly and without a network, and its pages have no dead links among themselves."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_manual_builds_strictly_without_a_network(tmp_path: Path) -> None:
    # Proxies that lead nowhere: a fetch during the build would fail, and a failed fetch fails a strict build.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "configuration" / "index.html").read_text(encoding="utf-8")
    assert "optimizer.learning_rate" in page
    assert not (tmp_path / "site" / "hooks").exists()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_outside_the_manual_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    dead = [link for link in links if not (ROOT / link).exists()]
    assert not dead


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_demo_is_the_command_that_the_pages_run_in_its_place() -> None:
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    # Under another make, make adds lines about folders before and after.
    assert any(line.endswith("/plaudit demo") for line in done.stdout.splitlines())
