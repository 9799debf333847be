"""`make demo`, with the recipe of three steps: what it prints, a second run, an interrupted one."""
import signal
import subprocess
import sys
import time
from pathlib import Path

from bitvae.evaluation import read_results
from bitvae.evaluation import protocol_rows
from bitvae.run_dir import newest_checkpoint, read_metrics

DEMO = [sys.executable, str(Path(__file__).parent.parent / "tools" / "demo.py")]


def demo(folder, recipe="smoke"):
    return subprocess.run([*DEMO, "--recipe", recipe, "--folder", folder], capture_output=True, text=True)


def test_demo_and_again(tmp_path):
    first = demo(tmp_path / "demo")
    assert first.returncode == 0, first.stderr[-2000:]
    for line in ("mean colour", "8x8 thumbnail", "7 scales", "10 scales", "astronaut, chelsea, coffee, rocket at 128x128", "at 256x256", "metrics.json", "progressive.png"):
        assert line in first.stdout
    made = {f.name for f in (tmp_path / "demo").iterdir()}
    assert {"train.ipynb", "evaluate.ipynb", "metrics.json", "tokenizer", "progressive.png", "both.png", "package"} <= made
    rows = protocol_rows(read_results(tmp_path / "demo"))
    expected = {"mean colour": 14.7, "2x2 thumbnail": 16.1, "4x4 thumbnail": 17.1, "8x8 thumbnail": 18.6}
    assert {name: round(rows[name]["psnr"], 1) for name in expected} == expected

    weights = (tmp_path / "demo" / "tokenizer" / "model.safetensors").stat()
    second = demo(tmp_path / "demo")
    assert second.returncode == 0 and "holds a finished run: it is not trained again" in second.stdout
    assert (tmp_path / "demo" / "tokenizer" / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns


def test_interrupted_demo_goes_on(tmp_path):
    run = tmp_path / "demo"
    process = subprocess.Popen([*DEMO, "--recipe", "quick", "--folder", run], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while len(read_metrics(run / "metrics.jsonl")) < 5:
        assert process.poll() is None and time.monotonic() < end, "the run did not get going"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    done = len(read_metrics(run / "metrics.jsonl"))
    assert 5 <= done < 2000 and newest_checkpoint(run / "checkpoints") is not None and not (run / "tokenizer").exists()
    mixed = demo(run)  # another recipe into the same folder
    assert mixed.returncode != 0 and "with other values" in mixed.stderr and len(read_metrics(run / "metrics.jsonl")) == done
