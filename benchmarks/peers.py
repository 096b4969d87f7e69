"""The peer's own virtual environment, made once in a folder that git ignores."""

import subprocess
import sys
from pathlib import Path

from common import ROOT

TRL = "1.16.0"


def trl_python() -> Path:
    """The interpreter of an environment with `trl` and the locked torch and transformers; made where it is missing."""
    folder = ROOT / "benchmarks" / ".peers" / f"trl-{TRL}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists():
        print(f"making {folder.relative_to(ROOT)}", flush=True)
        constraints = ROOT / "constraints.txt"
        torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for wanted in (torch, f"trl=={TRL}"):
            call = [str(python), "-m", "pip", "install", "--quiet", "--quiet", wanted, "-c", str(constraints)]
            subprocess.run(call, check=True)
        stamp.touch()
    return python
