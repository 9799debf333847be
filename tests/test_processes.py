"""Several processes do what one would do, stop together, and do not outlive each other."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from children import ranks, script

from bitvae.run_dir import newest_checkpoint, read_metrics
from bitvae.launch import ProcessesFailed, run_processes, torchrun_command
from bitvae.training import train_arguments

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

WORKER = """
import sys, torch
from dataclasses import replace
from accelerate import Accelerator
import bitvae.training as T
from bitvae.data import CropRule, Plan, batches, image_files
from bitvae.recipes import recipe

torch.set_num_threads(1)
accelerator, out, gan = Accelerator(cpu=True), sys.argv[1], sys.argv[2] == "gan"
P, rank = accelerator.num_processes, accelerator.process_index
config = recipe("smoke", channels=64, batch=8 // P,  # 2 channels per group: gradients above rounding noise
                schedule="dense", drop_rate=0.5, steps=5, lr=0.01, warmup=0.0, start_norm=None, pixels="l1",
                align=0.0,
                discriminator_start=0 if gan else None)
if not gan: T.adamw = lambda module, lr: torch.optim.SGD(module.parameters(), lr)
gradients, plain = [], T.update
def update(optimizer, loss, lr):
    gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
    return plain(optimizer, loss, lr)
T.update = update
t = T.Trainer(config, accelerator, T.start_tokenizer(config))
plan = Plan(config.size, config.batch, 0, rank, P)
data = batches(image_files("bundled"), plan, range(config.steps), CropRule(4.0))
losses = [T.agree(T.train_step(t, [crops.x])[0], accelerator) for crops in data]
weights = list(t.tok.state_dict().values()) + (list(t.judge.state_dict().values()) if gan else [])
torch.save({"losses": losses, "gradients": gradients[0], "weights": weights}, f"{out}.{rank}")
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    (folder / "worker.py").write_text(WORKER)

    def run(processes, kind):
        children = ranks(processes, script, folder / "worker.py", folder / f"{kind}{processes}", kind)
        for done in [child.finish() for child in children]:
            assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(folder / f"{kind}{processes}.{r}") for r in range(processes)]

    return run


def test_two_processes_of_four_do_what_one_of_eight_does(worker):
    (one,), (two, other) = worker(1, "plain"), worker(2, "plain")
    for a, b in zip(one["gradients"], two["gradients"], strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm()
    for a, b in zip(one["losses"], two["losses"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    for a, b, c in zip(one["weights"], two["weights"], other["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert torch.equal(b, c)


def test_with_the_critic_all_processes_hold_the_same_weights(worker):
    first, second = worker(2, "gan")
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    assert all(
        torch.tensor(list(step.values())).isfinite().all() and "adversarial" in step
        for step in first["losses"]
    )


def test_batch_entropy_does_not_depend_on_the_number_of_processes(tmp_path):
    (tmp_path / "worker.py").write_text(ENTROPY)
    for done in [child.finish() for child in ranks(2, script, tmp_path / "worker.py")]:
        assert done.returncode == 0 and done.stdout == "agreed\n", done.stderr[-3000:]


ENTROPY = """
import torch, torch.distributed as dist
from bitvae.quantizer import binary_entropy, scale_loss
dist.init_process_group("gloo")
r = dist.get_rank()
torch.manual_seed(0)
v = torch.nn.functional.normalize(torch.randn(4, 16, 3, 3), dim=1)
whole = v.clone().requires_grad_(); mine = v[2 * r : 2 * r + 2].clone().requires_grad_()
loss = scale_loss(mine).batch_entropy; loss.backward()
p = torch.sigmoid(-4 * 100.0 / 4 * whole).mean(dim=(0, 2, 3))   # T = 100, sqrt(d) = 4
reference = binary_entropy(p).sum()
reference.backward()
torch.testing.assert_close(loss, reference)
torch.testing.assert_close(mine.grad / 2, whole.grad[2 * r : 2 * r + 2])  # the average of the ranks
print("agreed")
"""


# stopping

LONG = {"steps": 5000, "checkpoint_every": 1000}


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def family(process):
    "Its descendants, once two of them train."
    return [
        p for p in psutil.Process(process.pid).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE
    ]


def training(process):
    return [
        p
        for p in family(process)
        if any("torch.distributed.run" in a for a in p.cmdline()) is False
        and "bitvae.training" in p.cmdline()
    ]


def begin(folder, *command, **settings):
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    )
    wait_for(lambda: process.poll() is not None or len(read_metrics(folder / "metrics.jsonl")) > 3)
    assert process.poll() is None, process.communicate()[0]
    return process, family(process), training(process)


def train_command(folder, **settings):
    return [
        sys.executable,
        "-m",
        "bitvae.cli",
        "train",
        "smoke",
        "--processes",
        "2",
        "--folder",
        folder,
        *[a for k, v in (LONG | settings).items() for a in ("--set", f"{k}={v}")],
    ]


def gone(processes):
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_processes(tmp_path, sent):
    process, relatives, ranks = begin(tmp_path, *train_command(tmp_path))
    assert len(ranks) == 2
    process.send_signal(sent)
    said, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 130
        and f"{sent.name} after step" in said
        and "running the same again goes on" in said
    )
    wait_for(lambda: gone(relatives), 10)
    done = newest_checkpoint(tmp_path / "checkpoints")[1]["step"]
    assert done == len(read_metrics(tmp_path / "metrics.jsonl")) and not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_checkpoint(tmp_path, rank):
    process, relatives, ranks = begin(tmp_path, *train_command(tmp_path))
    next(p for p in ranks if p.environ()["RANK"] == str(rank)).send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "running the same again goes on" in said
    wait_for(lambda: gone(relatives), 10)
    assert newest_checkpoint(tmp_path / "checkpoints")[1]["step"] == len(read_metrics(tmp_path / "metrics.jsonl"))


def test_a_process_that_dies_stops_the_run_and_is_named(tmp_path):
    process, relatives, ranks = begin(tmp_path, *train_command(tmp_path, checkpoint_every=2))
    ranks[1].kill()
    start = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 1
        and "bitvae: rank" in said
        and "ended with exit code -9" in said.splitlines()[-1]
    )
    wait_for(lambda: gone(relatives), 10)
    assert time.monotonic() - start < 60
    assert newest_checkpoint(tmp_path / "checkpoints")[1]["step"] >= 2


@pytest.mark.parametrize("which", ["launcher", "torchrun"])
def test_no_orphans(tmp_path, which):
    process, relatives, ranks = begin(tmp_path, *train_command(tmp_path))
    victim = (
        process
        if which == "launcher"
        else next(p for p in relatives if any("torch.distributed.run" in a for a in p.cmdline()))
    )
    victim.send_signal(signal.SIGKILL)
    wait_for(lambda: gone(relatives), 60)
    process.communicate(timeout=60)
    assert newest_checkpoint(tmp_path / "checkpoints") is not None  # they ended in good order


def test_two_nodes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{s.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "bitvae.cli",
        "train",
        "smoke",
        "--nodes",
        "2",
        "--rendezvous",
        place,
        "--folder",
        tmp_path,
        "--set",
        "steps=4",
    ]
    nodes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert (
        json.loads((tmp_path / "run.json").read_text())["processes"] == 2
        and (tmp_path / "tokenizer" / "model.safetensors").exists()
    )
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_a_mistake_is_said_once(tmp_path):
    with pytest.raises(ProcessesFailed, match="^no such images: nowhere; give a folder"):
        run_processes(torchrun_command(2) + train_arguments("smoke", {}, "nowhere", tmp_path))


# through papermill


def test_a_notebook_over_two_processes_stops_and_goes_on(tmp_path):
    def notebook(**settings):
        set_ = {"recipe": "smoke", "folder": tmp_path, "processes": 2, "overrides": json.dumps(settings)}
        return [
            sys.executable,
            "-m",
            "bitvae.cli",
            "run",
            "nbs/experiments/train.ipynb",
            tmp_path / "train.ipynb",
            *[a for k, v in set_.items() for a in ("--set", f"{k}={v}")],
        ]

    process, relatives, ranks = begin(tmp_path, *notebook(steps=40, checkpoint_every=20))
    assert len(ranks) == 2
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=90)
    assert (
        process.returncode == 130
        and "SIGINT after step" in said
        and (tmp_path / "train.failed.ipynb").exists()
    ), said
    wait_for(lambda: gone(relatives), 20)
    again = subprocess.run(notebook(steps=40, checkpoint_every=20), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "going on from step" in again.stderr + again.stdout, again.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(40))
    assert not (tmp_path / "train.failed.ipynb").exists() and "100%" in again.stderr


def test_interrupted_from_the_launching_process(tmp_path):
    code = f"""
import os, signal, threading, time
from pathlib import Path
from bitvae.run_dir import read_log
from bitvae.training import *
def stop():
    while len(read_log(Path({str(tmp_path)!r}) / "metrics.jsonl")) < 3: time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=stop, daemon=True).start()
settings = dict(steps=5000, checkpoint_every=1000)
try:
    run_processes(torchrun(2) + arguments_for("smoke", settings, "bundled", {str(tmp_path)!r}))
except Interrupted as e:
    print("interrupted:", e)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "interrupted: SIGINT after step" in run.stdout, run.stderr[-2000:]
