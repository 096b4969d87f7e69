"""The doctor tries things and checks the answers."""

import json

import pytest
import torch

from plaudit.training import doctor


def test_float32_works_and_the_report_is_json() -> None:
    report = doctor.diagnose(sizes=32)
    rows = {(row["device"], row["dtype"]): row for row in report["dtypes"]}
    assert rows["cpu", "float32"]["works"]
    assert rows["cpu", "float32"]["relative_error"] < 1e-5
    assert rows["cpu", "float32"]["gigaflops"] > 0
    assert json.loads(json.dumps(report)) == report
    assert report["trackers"]["jsonl"]
    assert {"blocks", "reference"} <= set(report["attention"]["packed_backends"])
    assert "CUDA" in report["attention"]["packed_faults"]["cpu"]["flex"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["memory"] is None or report["machine"]["memory"] > 2**28


def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: honest(a, b) * (1.01 if a.dtype == torch.float32 else 1)
    )
    row = doctor.try_dtype("cpu", torch.float32, 32)
    assert not row["works"]
    # The gradient is made of the wrong product and so is off by the same 1 %, and by 2 % through its own product.
    assert 0.01 < row["relative_error"] < 0.03
    assert "off by" in row["fault"]


def test_a_dtype_that_raises_is_reported_not_raised() -> None:
    row = doctor.try_dtype("cuda:99", torch.float32, 8)
    assert not row["works"]
    assert row["fault"]


def test_extras_come_from_the_package_itself() -> None:
    extras = doctor.find_extras()
    assert "peft" in extras["lora"]
    assert {"lora", "wandb", "docs", "test"} <= set(extras)
    assert all("plaudit" not in packages for packages in extras.values())
