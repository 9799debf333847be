"""The tools that measure: `benchmarks/measure.py`, and `tools/gpu.py` at tiny sizes on a CPU."""

import json
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from children import ROOT, call, script
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


def check_operator(out, factor):
    "Run section b with a wrong operator in place of the kernels."
    import bitvae.triton_norm

    def wrong(x, w, b, groups): return factor * x * w[:, None, None] + b[:, None, None]

    bitvae.triton_norm.fused_group_norm = wrong
    script(GPU, "--smoke", "--out", out, "--sections", "b")


@pytest.mark.parametrize("factor", [1.0, float("nan")])
def test_the_check_fails_for_a_wrong_operator(tmp_path, factor):
    pytest.importorskip("triton", reason="Triton is not installed")
    run = call(check_operator, str(tmp_path), factor)
    assert run.returncode == 1 and "ArithmeticError: " in run.stdout, run.stdout + run.stderr
    assert list(json.loads((tmp_path / "gpu.json").read_text())["errors"]) == ["section b"]


@pytest.mark.slow
def test_the_kernels_pass_the_check(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    line = [sys.executable, GPU, "--smoke", "--out", tmp_path, "--sections", "b"]
    run = subprocess.run(line, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


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
