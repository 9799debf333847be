"Data sets of bits: killed anywhere, several processes, the command line. BITVAE_TRIALS=100000 kills more often."
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitvae import BitVAE, load_image
from bitvae.images import bundled_photographs, save_image
from bitvae.tokens import TokenDataset, index_of, verify

KILLS = 20 if int(os.environ.get("BITVAE_TRIALS", 1000)) > 1000 else 5
OPTIONS = ["--size", "128", "--per-shard", "7", "--batch", "4"]


def command(*arguments):
    return [sys.executable, "-m", "bitvae.cli", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "A hundred small pictures in two classes."
    folder = tmp_path_factory.mktemp("pictures")
    for n, file in enumerate(bundled_photographs()):
        x = load_image(file, 256)
        for i in range(12):
            (folder / f"class{n % 2}").mkdir(exist_ok=True)
            save_image(x[..., 10 * i : 10 * i + 140, 5 * i : 5 * i + 150], folder / f"class{n % 2}" / f"{n}-{i}.png")
    return folder


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    "What a run that nobody disturbs makes of them."
    folder = tmp_path_factory.mktemp("whole")
    done = run("tokenize", "demo", "--images", pictures, "--folder", folder, *OPTIONS)
    assert done.returncode == 0 and "108 pictures in 16 shards" in done.stdout, done.stderr
    return folder


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if not p.name.startswith(".")}


def test_killed_anywhere_nothing_is_lost_or_doubled(pictures, whole, tmp_path):
    rng, line = random.Random(0), command("tokenize", "demo", "--images", pictures, "--folder", tmp_path, *OPTIONS)
    for _ in range(KILLS):
        there = len(list(tmp_path.glob("shard-*.tar")))
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob("*shard-*"))) <= 2 * there: time.sleep(0.001)  # until it writes
        time.sleep(rng.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "manifest.json").exists(): break
        assert run("verify", tmp_path).returncode == 1
    done = run("tokenize", "demo", "--images", pictures, "--folder", tmp_path, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(whole)
    keys = [key for shard in sorted(tmp_path.glob("shard-*.tar")) for key in index_of(shard)]
    assert keys == [f"{i:09d}" for i in range(108)] and verify(tmp_path)["count"] == 108


def test_several_processes(pictures, whole, tmp_path):
    done = run("tokenize", "demo", "--images", pictures, "--folder", tmp_path, *OPTIONS, "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(whole)


def test_read_back(pictures, whole):
    data, tok = TokenDataset(whole), BitVAE.from_pretrained("demo")
    files = sorted(pictures.rglob("*.png"))
    for i in (0, 53, 107):
        assert data[i].bits == tok.encode(load_image(files[i], 128)) and data[i].label == int(files[i].parent.name[-1])


def test_command_line(pictures, whole, tmp_path):
    done = run("verify", whole)
    assert done.returncode == 0 and "108 pictures in 16 shards, all whole" in done.stdout
    assert run("count", whole).stdout == "108\n"
    for arguments, message in ((("tokenize", "demo", "--images", pictures, "--folder", whole, "--size", "64"), "other size"),
                               (("tokenize", "demo", "--images", tmp_path / "no", "--folder", tmp_path / "x"), "no such images"),
                               (("verify", tmp_path), "not finished")):  # fmt: skip
        failed = run(*arguments)
        assert failed.returncode == 1 and message in failed.stderr and "Traceback" not in failed.stderr, failed.stderr
    shard = whole / "shard-000003.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"!")
    failed = run("verify", whole)
    assert failed.returncode == 1 and "shard-000003.tar is damaged" in failed.stderr
    shard.write_bytes(content)
    assert json.loads((whole / "manifest.json").read_text())["tokenizer"] == BitVAE.from_pretrained("demo").fingerprint
