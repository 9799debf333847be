"""`make demo` with the recipe of three steps: its output, a second run, an interrupted one."""

import os
import signal
import time

import pytest
from children import ROOT, Child, call, script

from bitvae.evaluation import protocol_rows, read_results
from bitvae.run_dir import newest_checkpoint, read_metrics

pytestmark = pytest.mark.slow

DEMO = ROOT / "tools" / "demo.py"


def demo(folder, recipe="smoke"):
    return call(script, DEMO, "--recipe", recipe, "--folder", folder)


def wait_for(child, condition):
    end = time.monotonic() + 120
    while not condition():
        assert child.process.is_alive() and time.monotonic() < end, child.finish().stderr[-2000:]
        time.sleep(0.1)


def test_demo_and_again(tmp_path):
    run = tmp_path / "demo"
    first = demo(run)
    assert first.returncode == 0, first.stderr[-2000:]
    for text in ("mean color", "8x8 thumbnail", "all scales", "JPEG, smallest", "metrics.json", "both.png"):
        assert first.stdout.count(text) == 1
    assert "over astronaut, chelsea." in first.stdout and "at different sizes" in first.stdout
    assert "trained now, 128x128" in first.stdout and "bundled, 256x256" in first.stdout
    assert "What to do next" in first.stdout and "evaluated 2 of 2" not in first.stdout
    made = {file.name for file in run.iterdir()}
    assert {"train.ipynb", "evaluate.ipynb", "metrics.json", "tokenizer", "package"} <= made
    assert {"progressive.png", "both.png"} <= made
    rows = protocol_rows(read_results(run))
    expected = {"mean colour": 14.2, "2x2 thumbnail": 14.9, "4x4 thumbnail": 15.8, "8x8 thumbnail": 17.3}
    assert {name: round(rows[name]["psnr"], 1) for name in expected} == expected

    def written(name):
        return (run / name).stat().st_mtime_ns

    weights = written("tokenizer/model.safetensors")
    second = Child(script, DEMO, "--recipe", "smoke", "--folder", run)
    wait_for(second, lambda: "holds a finished run: evaluating it" in second.files[0].read_text())
    os.kill(second.process.pid, signal.SIGINT)
    assert "rerun the same command" in second.finish().stderr
    assert written("tokenizer/model.safetensors") == weights


def test_interrupted_demo_can_be_resumed(tmp_path):
    run = tmp_path / "demo"
    log = run / "metrics.jsonl"
    child = Child(script, DEMO, "--recipe", "quick", "--folder", run)
    wait_for(child, lambda: len(read_metrics(log)) >= 5)
    os.kill(child.process.pid, signal.SIGINT)
    assert child.finish().returncode != 0
    step = len(read_metrics(log))
    assert 5 <= step < 2000
    assert newest_checkpoint(run / "checkpoints") is not None
    assert not (run / "tokenizer").exists()
    mixed = demo(run)  # another recipe into the same folder
    assert mixed.returncode != 0 and "with other values" in mixed.stderr
    assert len(read_metrics(log)) == step
