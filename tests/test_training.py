"""Training: memory, losses with a discriminator, other image sources, clusters, trackers."""

import json
import math
import os
import subprocess
import sys
import tarfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
import yaml

from bitvae import BitVAE, load_image
from bitvae.images import bundled_photographs
from bitvae.recipes import recipe
from bitvae.run_dir import read_metrics
from bitvae.training import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

PEAK = """
import re, sys, torch
from pathlib import Path
from dataclasses import replace
from accelerate import Accelerator
from bitvae.recipes import recipe
from bitvae.training import Trainer, start_tokenizer, train_step

torch.set_num_threads(1)
config = recipe("d16_stage1", channels=32, discriminator_start=None, perceptual="none",
                activation_checkpointing=sys.argv[1] == "on")
t = Trainer(config, Accelerator(cpu=True), start_tokenizer(config))
x = torch.rand(4, 3, 192, 192) * 2 - 1
def peak():  # of this process; getrusage includes the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
losses = [float(train_step(t, [x])[0]["loss"]) for _ in range(2)]
print(losses[0], losses[1], peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_activation_checkpointing_changes_no_loss_and_lowers_the_peak():
    runs = [
        subprocess.run(
            [sys.executable, "-c", PEAK, on], capture_output=True, text=True, check=True
        ).stdout.split()[-3:]
        for on in ("off", "on")
    ]
    (*plain, high), (*again, low) = [[float(v) for v in run] for run in runs]
    print(f"peak above the start: {high:.0f} MiB, with activation checkpointing {low:.0f} MiB")
    assert (
        again == pytest.approx(plain, rel=1e-6) and low < 0.95 * high
    )  # without it little is kept already, see NormSiLUConv


def test_losses_stay_finite_with_critic_and_perceptual_distance(tmp_path):
    train(
        recipe(
            "quick",
            steps=40,
            discriminator_start=30,
            perceptual="efficientnet",
            perceptual_weight=0.02,
            size=32,
            checkpoint_every=20,
        ),
        "bundled",
        tmp_path,
    )
    log = read_metrics(tmp_path / "metrics.jsonl")
    assert all(math.isfinite(v) for line in log for v in line.values() if isinstance(v, float))
    assert {"perceptual", "adversarial", "hinge", "lecam", "gradient_critic"} <= set(log[-1])
    first, last = (
        sum(line["pixels"] for line in part) for part in (log[:10], log[20:30])
    )  # until the critic joins, which takes over for a while
    assert last < first and len(log[0]["entropy"]) == 3


def test_published_recipes_name_the_missing_weights_at_once(tmp_path, monkeypatch):
    from urllib.error import URLError

    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(FileNotFoundError, match="vgg16-397923af.pth on a machine with network and put it at"):
        train(recipe("d16_stage1"), "bundled", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_any_callable_is_a_perceptual_distance(tmp_path):
    calls = []

    def distance(x, y):
        calls.append(x.shape)
        return (x - y).square().mean((1, 2, 3))

    train(recipe("smoke"), "bundled", tmp_path, perceptual=distance)
    assert (2, 3, 32, 32) in calls and "perceptual" in read_metrics(tmp_path / "metrics.jsonl")[0]


def test_torch_compile_gives_the_same_losses(tmp_path, monkeypatch):
    "With the backend that traces and differentiates but generates no code, which would take minutes here."
    plain, compiled = torch.nn.Module.compile, []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compiled.append(self) or plain(self, backend="aot_eager")
    )

    def losses(compile):
        train(recipe("smoke", compile=compile), "bundled", tmp_path / str(compile))
        return [line["loss"] for line in read_metrics(tmp_path / str(compile) / "metrics.jsonl")]

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)
    assert BitVAE.from_pretrained(tmp_path / "True").config == recipe("smoke").model and len(compiled) == 2


# what is trained on


def test_training_on_shards_says_that_a_resume_takes_other_pictures(tmp_path, capsys):
    for n in range(2):
        with tarfile.open(tmp_path / f"{n}.tar", "w") as tar:
            for f in bundled_photographs()[n::2]:
                tar.add(f, f.name)
    config, shards = (
        recipe("smoke", steps=4, checkpoint_every=2, size=(32, 64), batch=(2, 1)),
        f"{tmp_path}/{{0..1}}.tar",
    )
    train(config, shards, tmp_path / "run", workers=2)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["images"]["count"] is None
    train(config, shards, tmp_path / "run")
    assert "going on from step 4 of 4, with other pictures of the shards" in capsys.readouterr().out


def test_training_on_a_hugging_face_data_set(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"image": [str(f) for f in bundled_photographs()]}).cast_column(
        "image", datasets.Image()
    )
    rows.save_to_disk(tmp_path / "rows")
    train(recipe("smoke"), f"datasets:{tmp_path / 'rows'}", tmp_path / "run", workers=1)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["images"]["count"] == 9 and len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


# records


def test_weights_and_biases(tmp_path, monkeypatch):
    said = []

    class Run:
        def log(self, values, step):
            said.append((step, values))

        def finish(self):
            said.append("finished")

    stub = types.ModuleType("wandb")
    stub.__spec__ = ModuleSpec("wandb", None)  # which accelerate looks for when it is first imported
    stub.init = lambda **given: said.append(given) or Run()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    train(recipe("smoke"), "bundled", tmp_path / "run", wandb="tokenizers")
    assert (
        said[0]["project"] == "tokenizers"
        and said[0]["resume"] == "allow"
        and said[0]["config"]["config"]["name"] == "smoke"
    )
    assert (
        [s for s, _ in said[1:-1]] == [0, 1, 2]
        and {"loss", "entropy/1x1"} <= set(said[1][1])
        and said[-1] == "finished"
    )
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        train(recipe("smoke"), "bundled", tmp_path / "other", wandb="tokenizers")


def test_a_run_can_be_looked_at_while_it_is_unfinished(tmp_path):
    train(recipe("smoke", steps=4, ema=0.5), "bundled", tmp_path)
    whole = BitVAE.from_pretrained(tmp_path)
    for f in (tmp_path / "tokenizer").iterdir():
        f.unlink()
    (tmp_path / "tokenizer").rmdir()
    x = load_image(bundled_photographs()[0], 64)
    assert BitVAE.from_pretrained(tmp_path).encode(x) == whole.encode(x)
    assert {f.name for f in (tmp_path / "samples").iterdir()} == {"step-00000002.png", "step-00000004.png"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert len(events.Scalars("loss")) == 4 and "samples" in events.Tags()["images"]


# clusters

STUBS = {
    "srun": "while [[ $1 == --* ]]; do shift; done; "
    'for id in 0 1; do SLURM_NODEID=$id "$@" & done; wait -n || exit 1; wait -n',
    "scontrol": "echo 127.0.0.1; echo other",
}


def test_slurm_script(tmp_path):
    "The script as it is, with srun and scontrol that stand for two machines."
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "two",
        "RECIPE": "smoke",
        "OVERRIDES": '{"steps": 4}',
        "RUN": str(tmp_path / "run"),
        "WORKERS": "0",
        "PROCESSES": "1",
        "BITVAE": str(Path(sys.executable).parent / "bitvae"),
        "PORT": str(free_port()),
    }
    run = subprocess.run(
        ["bash", "examples/slurm.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    assert {"train-node0.ipynb", "train-node1.ipynb", "training.png", "tokenizer"} <= {
        f.name for f in (tmp_path / "run").iterdir()
    }


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_kubernetes_job(tmp_path):
    "The container's command with its variables, on one machine."
    service, job = yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = {v["name"]: v["value"] for v in container["env"]}
    assert int(given["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert (
        given["RENDEZVOUS"].startswith(f"{job['metadata']['name']}-0.{pod['subdomain']}:")
        and pod["subdomain"] == service["metadata"]["name"]
    )
    assert int(given["PROCESSES"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    given |= {
        "RECIPE": "smoke",
        "IMAGES": "bundled",
        "RUN": str(tmp_path),
        "WORKERS": "0",
        "PROCESSES": "1",
        "NODES": "1",
        "JOB_COMPLETION_INDEX": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    run = subprocess.run(
        [*container["command"], *container["args"]],
        cwd=ROOT,
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "train-node0.ipynb").exists() and (tmp_path / "tokenizer").exists()


def test_precision_of_the_quantizer_under_bf16(tmp_path, monkeypatch):
    seen = []
    from bitvae.quantizer import MultiScaleBSQ

    plain = MultiScaleBSQ.forward

    def looking(self, z, keep=None):
        out = plain(self, z, keep)
        seen.append((z.dtype, out.z.dtype, out.losses.dtype))
        return out

    monkeypatch.setattr(MultiScaleBSQ, "forward", looking)
    train(recipe("smoke", precision="bf16", discriminator_start=1), "bundled", tmp_path)
    assert (torch.bfloat16, torch.float32, torch.float32) in seen
    assert all(w.dtype == torch.float32 for w in BitVAE.from_pretrained(tmp_path).state_dict().values())
