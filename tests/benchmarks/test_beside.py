"""The decode step beside another tree's: two processes take turns, and one that fails ends both."""

import pytest

from benchmarks.speed import beside


def test_a_tree_beside_itself(capsys):
    beside.main([str(beside.TREE), "--tiny", "--models", "Qwen3-0.6B", "--texts", "1"])
    *_, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["Qwen3-0.6B", "1"]
    assert min(map(float, cells[2:4])) > 0
    assert cells[-1] == "yes"


def test_a_process_that_fails_is_reported():
    with pytest.raises(RuntimeError, match=r"(?s)step of the (other|this) tree failed.*KeyError"):
        beside.main([str(beside.TREE), "--tiny", "--models", "no such model", "--texts", "1"])


def test_what_is_no_checkout_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        beside.main([str(tmp_path)])
    assert "is no checkout" in capsys.readouterr().err


def test_differences_are_of_each_round():
    cases = {"cases": [{"model": "a", "texts": 16}]}
    of_each = {"other": [100.0, 120.0, 140.0], "this": [99.0, 118.0, 137.0]}
    found = {label: {"cases": [{"us": us, "tokens": [[label]]}]} for label, us in of_each.items()}
    row = beside.table(cases, found).splitlines()[-1]
    assert row == "| a | 16 | 120.0 | 118.0 | -2.0 | -3.0 to -1.0 | no |"
