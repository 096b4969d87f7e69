"""The wheel holds what it needs, and installs and runs in another environment."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import plaudit

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_installs_and_runs_elsewhere(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("plaudit-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "plaudit/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "docs", "configs"))]
    assert {f"plaudit/{path.relative_to(ROOT / 'src' / 'plaudit').as_posix()}" for path in sources()} <= set(names)

    # The dependencies are those of this environment, reached by a path file; Plaudit itself comes from the wheel alone.
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    site = next((environment / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import plaudit; print(plaudit.__file__)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=outside,
    )
    assert Path(where.stdout.strip()).is_relative_to(environment)
    for words, said in (("--help", "Commands"), ("--version", plaudit.__version__), ("doctor", "Devices")):
        done = subprocess.run(
            [environment / "bin" / "plaudit", words],
            check=True,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=outside,
        )
        assert said in done.stdout


def sources() -> list[Path]:
    return sorted((ROOT / "src" / "plaudit").rglob("*.py"))
