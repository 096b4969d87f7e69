"""`plaudit doctor` tells what it tried, in a table and as JSON."""

import json

import pytest

from plaudit.cli.app import main


def test_json_and_table_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"versions", "machine", "devices", "dtypes", "extras", "attention", "trackers"}
    main(["doctor"])
    out = capsys.readouterr().out
    assert report["versions"]["torch"] in out
    for row in report["dtypes"]:
        assert f"{row['device']} {row['dtype']}" in out
    assert "jsonl" in out
