"""A part of the benchmark that hangs or falls is reported, and ends with all that it started."""

import json

import pytest

from benchmarks.scale import multi_gpu


@pytest.mark.parametrize(
    ("part", "seconds", "error"), [("restore", 0.1, "not done after"), ("unknown", 60, "ended with status 2")]
)
def test_what_fails_is_reported(tmp_path, part, seconds, error):
    multi_gpu.run_process(part, tmp_path, True, seconds)
    [line] = (tmp_path / "lines.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["part"] == part
    assert error in found["error"]


def test_an_exception_is_reported(tmp_path, monkeypatch):
    def fails(tiny, report):
        report(found=1)
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(multi_gpu, "work", lambda part: fails)
    multi_gpu.within("decode", tmp_path, True)
    first, second = map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines())
    assert first["found"] == 1
    assert "no such GPU" in second["error"]
