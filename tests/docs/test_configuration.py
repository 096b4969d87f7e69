"""The configuration reference of the manual is complete: every configuration, every key, each with its meaning."""

import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import plaudit.configs
from plaudit.configs.base import Config, nested_configs
from plaudit.configs.reference import key_references

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "configuration.md"


def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("configuration_hook", ROOT / "docs" / "hooks" / "configuration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def all_configs() -> dict[str, type[Config]]:
    found = {}
    for info in pkgutil.iter_modules(plaudit.configs.__path__):
        module = importlib.import_module(f"plaudit.configs.{info.name}")
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Config) and cls is not Config and cls.__module__ == module.__name__:
                found[f"{module.__name__}:{name}"] = cls
    return found


CONFIGS = all_configs()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_says_what_it_means(name: str) -> None:
    silent = [row.key for row in key_references(CONFIGS[name]) if not row.meaning and "." not in row.key]
    assert not silent
    assert CONFIGS[name].__doc__


def test_the_page_covers_every_configuration() -> None:
    shown = [CONFIGS[name] for name in re.findall(r"<!-- configuration: (\S+) -->", PAGE.read_text(encoding="utf-8"))]
    covered = set(shown)
    while shown:
        cls = shown.pop()
        inside = [nested for info in cls.model_fields.values() for nested in nested_configs(info.annotation)]
        bases = [base for base in cls.__mro__ if base in CONFIGS.values()]
        shown += [other for other in (*inside, *bases) if other not in covered]
        covered |= {*inside, *bases}
    missing = sorted(name for name, cls in CONFIGS.items() if cls not in covered)
    assert not missing, f"add to {PAGE.name}: " + " ".join(f"<!-- configuration: {name} -->" for name in missing)


def test_the_hook_fills_in_every_key() -> None:
    filled = hook().fill(PAGE.read_text(encoding="utf-8"))
    assert "<!-- configuration:" not in filled
    for key in ("model.lora.rank", "optimizer.learning_rate", "held_out_fraction"):
        assert f"| `{key}` |" in filled
    rows = [line for line in filled.splitlines() if line.startswith("| `")]
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert cells == {5}
