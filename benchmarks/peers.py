"""The peers' interpreters: virtual environments of their own, each made once in a folder that git ignores.

Where `PLAUDIT_PEER_PYTHON` names an interpreter (or is `current`, for the one that runs), that one is taken instead:
for machines without a network, on which the peers are installed already.
"""

import os
import subprocess
import sys
from pathlib import Path

from common import ROOT

TRL = "1.16.0"
STABLE_BASELINES = "2.9.2"
PEER_PYTHON = "PLAUDIT_PEER_PYTHON"


def trl_python() -> Path:
    """The interpreter of an environment with `trl` and the locked torch and transformers; made where it is missing."""
    return _given("trl") or _peer_python(f"trl-{TRL}", f"trl=={TRL}", locked=True)


def stable_baselines_python() -> Path:
    """The interpreter of an environment with Stable-Baselines3 and the locked torch; made where it is missing."""
    # It may ask for another gymnasium than ours, so only torch is locked.
    requirement = f"stable-baselines3=={STABLE_BASELINES}"
    return _given("stable_baselines3") or _peer_python(
        f"stable-baselines3-{STABLE_BASELINES}", requirement, locked=False
    )


def trl_version() -> str:
    """The version that takes part, as its own interpreter tells it."""
    command = [str(trl_python()), "-c", "import importlib.metadata as m; print(m.version('trl'))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _given(module: str) -> Path | None:
    """The interpreter that `PLAUDIT_PEER_PYTHON` names, or None.

    Raises:
        SystemExit: if it cannot import the peer.
    """
    name = os.environ.get(PEER_PYTHON)
    if not name:
        return None
    python = Path(sys.executable if name == "current" else name)
    if subprocess.run([str(python), "-c", f"import importlib.util as u; assert u.find_spec('{module}')"]).returncode:
        raise SystemExit(f"{PEER_PYTHON}={name}: {python} has no {module}")
    return python


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
