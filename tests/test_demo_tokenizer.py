"""The bundled tokenizer: its size, loading without network, quality on held-out photographs, retraining."""

import hashlib
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
from children import ROOT, call, script
from filelock import FileLock

from bitvae.checkpoints import bundled_dir
from bitvae.evaluation import evaluate, protocol_rows, results_table
from bitvae.images import held_out_photographs, load_image
from bitvae.tokenizer import BitVAE
from bitvae.training import main as train_main
from bitvae.recipes import train_arguments

CARD = ROOT / "benchmarks" / "demo-tokenizer"


@pytest.fixture(scope="module")
def tok():
    return BitVAE.from_pretrained("demo")


@pytest.fixture(scope="module")
def results(tok, tmp_path_factory, worker_id):
    "Evaluate on the held-out photographs, once for all workers of pytest-xdist."
    folder = tmp_path_factory.getbasetemp()
    file = (folder if worker_id == "master" else folder.parent) / "demo-results.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            rates, metrics = (0.13, 0.25), ["psnr", "ssim", "efficientnet"]
            made = evaluate(tok, "held-out", "clamped", metrics, codec_rates=rates)
            file.write_text(json.dumps(made))
    return json.loads(file.read_text())


def scales(results):
    return [r for r in protocol_rows(results).values() if "scales" in r]


def test_is_small_and_loads_without_network():
    assert sum(f.stat().st_size for f in bundled_dir().iterdir()) <= 16_000_000
    code = """
import socket
socket.socket.connect = socket.getaddrinfo = None
from bitvae import BitVAE
print(BitVAE.from_pretrained("demo").config.mode)
"""
    env = os.environ | {"BITVAE_WEIGHTS": "/nowhere"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.stdout.strip() == "dynamic", result.stderr


@pytest.mark.slow
def test_rate_and_quality(results):
    last = scales(results)[-1]
    assert last["bits_per_pixel"] <= 0.26
    assert last["psnr"] > 23.5 and last["ssim"] > 0.65
    assert last["psnr"] > protocol_rows(results)["16x16 thumbnail"]["psnr"]
    assert min(last["per_image"]["psnr"]) > 20


@pytest.mark.slow
def test_every_scale_raises_psnr(results):
    curve = [r["psnr"] for r in scales(results)]
    assert len(curve) >= 7 and all(a < b for a, b in zip(curve, curve[1:], strict=False))


@pytest.mark.slow
def test_coarse_scales_resemble_the_image(results):
    rows = protocol_rows(results)
    assert rows["1 scale"]["psnr"] > rows["mean colour"]["psnr"] - 1
    (prefix,) = [r for r in scales(results) if r["last_scale"] == [8, 8]]
    assert prefix["psnr"] > rows["8x8 thumbnail"]["psnr"] - 1.5


@pytest.mark.slow
def test_feature_distance_beats_jpeg(results):
    jpeg = protocol_rows(results)["JPEG 0.13"]
    assert jpeg["bits_per_pixel"] >= 0.13
    assert scales(results)[-1]["efficientnet"] < jpeg["efficientnet"]


@pytest.mark.slow
def test_every_channel_is_used(results):
    last = results["bits"]["dynamic bicubic-256"]["usage"][-1]
    assert all(0.2 <= fraction <= 0.8 for fraction in last["share_of_ones"])


@pytest.mark.parametrize("file", held_out_photographs(), ids=lambda f: f.stem)
def test_natural_colors_and_no_grid(tok, file):
    x = load_image(file, 256)
    y = tok.decode(tok.encode(x))
    assert (x.mean((2, 3)) - y.mean((2, 3))).abs().max() < 0.12  # of a range of 2; flower's red has 0.09
    error = (y - x).mean((0, 1))  # averaged over tokens below, a grid remains
    grid = error.unflatten(0, (-1, tok.config.stride)).unflatten(2, (-1, tok.config.stride)).mean((0, 2))
    assert grid.std() < 0.02


def test_any_size(tok):
    for size in ((16, 16), (100, 333)):
        assert tok.decode(tok.encode(torch.rand(2, 3, *size) * 2 - 1)).shape == (2, 3, *size)


@pytest.mark.slow
def test_card_describes_these_weights(results):
    card, kept = (CARD / "README.md").read_text(), json.loads((CARD / "metrics.json").read_text())
    assert hashlib.sha256((bundled_dir() / "model.safetensors").read_bytes()).hexdigest() in card
    assert results_table(kept) in card
    for name, row in protocol_rows(results).items():
        assert row["psnr"] == pytest.approx(protocol_rows(kept)[name]["psnr"], abs=0.02)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", card):
        assert (CARD / link).exists(), link


@pytest.mark.slow
def test_readme_shows_these_results(results):
    _, _, table = (ROOT / "README.md").read_text().partition("bits/pixel  PSNR, dB      SSIM\n")
    table = table.partition("\n\n")[0]
    shown = {line[:19].strip(): list(map(float, line.split()[-2:])) for line in table.splitlines()}
    rows = {name.replace("colour", "color"): row for name, row in protocol_rows(results).items()}
    assert shown.keys() == rows.keys()
    for name, row in rows.items():
        assert shown[name][0] == pytest.approx(row["psnr"], abs=0.02), name
        assert shown[name][1] == pytest.approx(row["ssim"], abs=0.002), name


@pytest.mark.slow
def test_retraining_reproduces_the_weights(tmp_path):
    "The tool with its notebook and the command line that it runs give equal weights."
    result = call(script, ROOT / "tools" / "retrain_demo.py", "--folder", tmp_path, "--steps", 3)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "these weights are not those of the package" in result.stdout
    tool = runpy.run_path(str(ROOT / "tools" / "retrain_demo.py"), run_name="tool")
    short, runs = tool["SHORT"] | {"steps": 3}, []
    for stage, more in zip(tool["STAGES"], ({}, tool["SHORT2"]), strict=True):
        overrides = short | more | ({"init_from": str(runs[0])} if runs else {})
        runs.append(tmp_path / "again" / stage)
        again = call(train_main, train_arguments(stage, overrides, "bundled", runs[-1]))
        assert again.returncode == 0, again.stderr[-2000:]
        assert weights_in(runs[-1] / "tokenizer") == weights_in(tmp_path / stage / "tokenizer")
    first, second = map(BitVAE.from_pretrained, runs)
    tool["interpolate"](first, second, tool["SHARE"]).half().save_pretrained(tmp_path / "half")
    assert weights_in(tmp_path / "half") == weights_in(tmp_path / "demo")
    for share, tok in ((0.0, first), (1.0, second)):
        mixed = tool["interpolate"](first, second, share)
        assert all(torch.equal(w, mixed.state_dict()[n]) for n, w in tok.state_dict().items())


def weights_in(folder):
    return (folder / "model.safetensors").read_bytes()
