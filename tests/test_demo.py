"""`make demo`, with the recipe of three steps: what it prints, a second run, an interrupted one."""

import os
import signal
import time

import pytest
from children import ROOT, Child, call, script

from bitvae.evaluation import read_results
from bitvae.evaluation import protocol_rows
from bitvae.run_dir import newest_checkpoint, read_metrics

pytestmark = pytest.mark.slow

DEMO = ROOT / "tools" / "demo.py"


def demo(folder, recipe="smoke"):
    return call(script, DEMO, "--recipe", recipe, "--folder", folder)


def wait_for(child, what):
    end = time.monotonic() + 120
    while not what():
        assert child.process.is_alive() and time.monotonic() < end, child.finish().stderr[-2000:]
        time.sleep(0.1)


def test_demo_and_again(tmp_path):
    first = demo(tmp_path / "demo")
    assert first.returncode == 0, first.stderr[-2000:]
    for line in (
        "mean colour",
        "8x8 thumbnail",
        "7 scales",
        "10 scales",
        "astronaut, chelsea, coffee, rocket at 128x128",
        "at 256x256",
        "metrics.json",
        "progressive.png",
    ):
        assert line in first.stdout
    made = {f.name for f in (tmp_path / "demo").iterdir()}
    assert {
        "train.ipynb",
        "evaluate.ipynb",
        "metrics.json",
        "tokenizer",
        "progressive.png",
        "both.png",
        "package",
    } <= made
    rows = protocol_rows(read_results(tmp_path / "demo"))
    expected = {"mean colour": 14.7, "2x2 thumbnail": 16.1, "4x4 thumbnail": 17.1, "8x8 thumbnail": 18.6}
    assert {name: round(rows[name]["psnr"], 1) for name in expected} == expected

    weights = (tmp_path / "demo" / "tokenizer" / "model.safetensors").stat()
    evaluated = (tmp_path / "demo" / "metrics.json").stat().st_mtime_ns
    second = Child(script, DEMO, "--recipe", "smoke", "--folder", tmp_path / "demo")
    wait_for(
        second, lambda: (tmp_path / "demo" / "evaluate.ipynb").stat().st_mtime_ns > evaluated
    )  # the first of two
    os.kill(second.process.pid, signal.SIGINT)
    second = second.finish()
    assert "holds a finished run: it is not trained again" in second.stdout
    assert (tmp_path / "demo" / "metrics.json").stat().st_mtime_ns > evaluated
    assert (tmp_path / "demo" / "tokenizer" / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns


def test_interrupted_demo_goes_on(tmp_path):
    run = tmp_path / "demo"
    child = Child(script, DEMO, "--recipe", "quick", "--folder", run)
    wait_for(child, lambda: len(read_metrics(run / "metrics.jsonl")) >= 5)
    os.kill(child.process.pid, signal.SIGINT)
    assert child.finish().returncode != 0
    done = len(read_metrics(run / "metrics.jsonl"))
    assert (
        5 <= done < 2000
        and newest_checkpoint(run / "checkpoints") is not None
        and not (run / "tokenizer").exists()
    )
    mixed = demo(run)  # another recipe into the same folder
    assert (
        mixed.returncode != 0
        and "with other values" in mixed.stderr
        and len(read_metrics(run / "metrics.jsonl")) == done
    )
