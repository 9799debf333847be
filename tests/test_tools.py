"""The tools that measure: `benchmarks/measure.py`."""

import json
from types import SimpleNamespace

from children import ROOT


def test_peak_memory_is_the_median_of_processes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import measure

    records = iter([{"peak": 5, "seconds": 0.3}, {"peak": 9, "seconds": 0.1}, {"peak": 7, "seconds": 0.2}])

    def run(*_, **__): return SimpleNamespace(returncode=0, stdout=json.dumps(next(records)))

    monkeypatch.setattr(measure.subprocess, "run", run)
    assert measure.peak_memory("", "", "") == {"peak": 7, "seconds": 0.2}
    assert next(records, None) is None
