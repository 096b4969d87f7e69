"""The peers' own virtual environments, each made once in a folder that git ignores."""

import subprocess
import sys
from pathlib import Path

from common import ROOT

TRL = "1.16.0"
STABLE_BASELINES = "2.9.2"


def trl_python() -> Path:
    """The interpreter of an environment with `trl` and the locked torch and transformers; made where it is missing."""
    return _peer_python(f"trl-{TRL}", f"trl=={TRL}", locked=True)


def stable_baselines_python() -> Path:
    """The interpreter of an environment with Stable-Baselines3 and the locked torch; made where it is missing."""
    # It may ask for another gymnasium than ours, so only torch is locked.
    return _peer_python(f"stable-baselines3-{STABLE_BASELINES}", f"stable-baselines3=={STABLE_BASELINES}", locked=False)


def _peer_python(name: str, requirement: str, *, locked: bool) -> Path:
    folder = ROOT / "benchmarks" / ".peers" / name
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists():
        print(f"making {folder.relative_to(ROOT)}", flush=True)
        constraints = ROOT / "constraints.txt"
        torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for wanted in (torch, requirement):
            call = [str(python), "-m", "pip", "install", "--quiet", "--quiet", wanted]
            call += ["-c", str(constraints)] if locked or wanted == torch else [torch]
            subprocess.run(call, check=True)
        stamp.touch()
    return python
