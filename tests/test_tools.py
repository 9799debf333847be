"""The tools that measure: `benchmarks/measure.py`, and `tools/gpu.py`."""

import json
import runpy
import sys
from types import SimpleNamespace

import torch
from children import ROOT, call
from torch import nn

GPU = ROOT / "tools" / "gpu.py"


def test_peak_memory_is_the_median_of_processes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import measure

    records = iter([{"peak": 5, "seconds": 0.3}, {"peak": 9, "seconds": 0.1}, {"peak": 7, "seconds": 0.2}])

    def run(*_, **__): return SimpleNamespace(returncode=0, stdout=json.dumps(next(records)))

    monkeypatch.setattr(measure.subprocess, "run", run)
    assert measure.peak_memory("", "", "") == {"peak": 7, "seconds": 0.2}
    assert next(records, None) is None


class Add(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x): return x + self.n


def compile_ten_versions(out):
    "Compile one function for ten settings, as many arms do; the exit code is how many stayed eager."
    sys.argv = [str(GPU), "--smoke", "--out", out]
    free, compiled = runpy.run_path(str(GPU))["free"], []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for n in range(10):
        torch.compile(Add(n), backend=backend)(torch.zeros(1))
        free()
    return 10 - len(compiled)


def test_every_arm_of_a_comparison_is_compiled(tmp_path):
    run = call(compile_ten_versions, str(tmp_path))
    assert run.returncode == 0, run.stderr
