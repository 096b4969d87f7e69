"""What every test needs: no file of the person who runs them is read or written."""

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_runtest_setup() -> None:
    """Numbers drawn without a generator of their own are the same in every order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("PLAUDIT_CACHE")
    os.environ["PLAUDIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("PLAUDIT_CACHE")
    if before is not None:
        os.environ["PLAUDIT_CACHE"] = before
