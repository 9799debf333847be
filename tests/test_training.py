"""Training: memory, losses with a discriminator, other image sources, clusters, trackers."""

import json
import math
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from children import bitvae, call, free_port

from bitvae import BitVAE, load_image
from bitvae.images import bundled_photographs
from bitvae.recipes import recipe
from bitvae.run_dir import read_metrics
from bitvae.training import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

PEAK = """
import re, sys, torch
from importlib.util import find_spec
from pathlib import Path
from accelerate import Accelerator
from bitvae.recipes import recipe
from bitvae.training import Trainer, init_tokenizer, train_step

torch.set_num_threads(1)
config = recipe("d16_stage1", channels=32, discriminator_start=None, perceptual="none",
                activation_checkpointing=sys.argv[1] == "on")
t = Trainer(config, Accelerator(cpu=True), init_tokenizer(config))
x = torch.rand(2, 3, 192, 192) * 2 - 1
def peak():  # of this process; getrusage includes the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
losses = [float(train_step(t, [x])[0]["loss"]) for _ in range(2)]
print(*losses, peak() - before)
"""


def losses_and_peak(checkpointing):
    "Two losses and the peak memory in MiB of a process of its own."
    command = [sys.executable, "-c", PEAK, checkpointing]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    *losses, peak = map(float, run.stdout.split()[-3:])
    return losses, peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_activation_checkpointing_changes_no_loss_and_lowers_the_peak():
    plain, high = losses_and_peak("off")
    checkpointed, low = losses_and_peak("on")
    print(f"peak memory {high:.0f} MiB, with activation checkpointing {low:.0f} MiB")
    assert checkpointed == pytest.approx(plain, rel=1e-6)
    assert low < 0.95 * high


def test_losses_stay_finite_with_discriminator_and_perceptual_distance(tmp_path):
    overrides = {"steps": 40, "size": 32, "checkpoint_every": 20, "discriminator_start": 30}
    config = recipe("quick", perceptual="efficientnet", perceptual_weight=0.02, **overrides)
    train(config, "bundled", tmp_path)
    log = read_metrics(tmp_path / "metrics.jsonl")
    assert all(math.isfinite(v) for line in log for v in line.values() if isinstance(v, float))
    assert {"perceptual", "adversarial", "hinge", "lecam", "grad_norm_discriminator"} <= set(log[-1])
    first, last = (sum(line["pixels"] for line in part) for part in (log[:10], log[20:30]))
    assert last < first  # before the discriminator starts, which dominates for a while
    assert len(log[0]["entropy"]) == 3


def test_published_recipes_name_the_missing_weights_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("BITVAE_WEIGHTS", str(tmp_path / "weights"))
    with pytest.raises(FileNotFoundError, match="vgg16-397923af.pth: run `bitvae fetch-lpips`"):
        train(recipe("d16_stage1"), "bundled", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_any_callable_is_a_perceptual_distance(tmp_path):
    calls = []

    def distance(x, y):
        calls.append(x.shape)
        return (x - y).square().mean((1, 2, 3))

    train(recipe("smoke"), "bundled", tmp_path, perceptual=distance)
    assert (2, 3, 32, 32) in calls
    assert "perceptual" in read_metrics(tmp_path / "metrics.jsonl")[0]


@pytest.mark.skipif(not hasattr(torch.compiler, "set_default_backend"), reason="needs a newer torch")
def test_torch_compile_gives_the_same_losses(tmp_path):
    "With the backend that traces and differentiates but generates no code, which would take minutes here."
    from torch._dynamo.backends.registry import lookup_backend

    inputs = set()

    def without_codegen(graph, tensors):
        inputs.update(tuple(x.shape) for x in tensors if isinstance(x, torch.Tensor))
        return lookup_backend("aot_eager")(graph, tensors)

    def losses(compile):
        run = tmp_path / str(compile)
        train(recipe("smoke", compile=compile), "bundled", run)
        return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]

    plain = losses(False)
    torch.compiler.set_default_backend(without_codegen)
    try:
        compiled = losses(True)
    finally:
        torch.compiler.set_default_backend(None)
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert BitVAE.from_pretrained(tmp_path / "True").config == recipe("smoke").model
    assert {(2, 3, 32, 32), (2, 16, 4, 4)} <= inputs  # of the encoder and the decoder


# image sources


def test_resuming_on_shards_warns_of_other_images(tmp_path, capsys):
    for n in range(2):
        with tarfile.open(tmp_path / f"{n}.tar", "w") as tar:
            for file in bundled_photographs()[n::2]:
                tar.add(file, file.name)
    config = recipe("smoke", steps=4, checkpoint_every=2, size=(32, 64), batch=(2, 1))
    shards = f"{tmp_path}/{{0..1}}.tar"
    train(config, shards, tmp_path / "run", workers=2)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["images"]["count"] is None
    train(config, shards, tmp_path / "run")
    assert "resuming at step 4 of 4, with other images of the shards" in capsys.readouterr().out


def test_training_on_a_hugging_face_data_set(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"image": [str(file) for file in bundled_photographs()]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "rows")
    train(recipe("smoke"), f"datasets:{tmp_path / 'rows'}", tmp_path / "run", workers=1)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["images"]["count"] == 9
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


# records


def test_progress_lines(tmp_path, capsys):
    "At most twenty lines on standard output, however long the run; nothing on standard error."
    train(recipe("smoke", steps=120, checkpoint_every=120), "bundled", tmp_path)
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert 15 <= len(lines) <= 20
    assert lines[0].startswith("step 1 of 120: loss ")
    assert lines[-1].startswith("step 120 of 120: loss ")
    assert "images per second" in lines[-1] and not err


WANDB = """
import json
from importlib.util import find_spec
from pathlib import Path

class Config(dict):
    def update(self, values, **options): super().update(values)

config = Config()

def init(**settings):
    return Run(Path(settings["dir"], "told.json"), {"settings": settings, "steps": [], "values": []})

def Image(pixels):
    return list(pixels.shape)

class Run:
    def __init__(self, file, told): self.file, self.told = file, told
    def finish(self): self.file.write_text(json.dumps(self.told | {"config": config}))
    def log(self, values, step):
        self.told["steps"].append(step)
        self.told["values"].append(values)
"""


def train_with_wandb(packages, folder):
    "Train in a child that imports wandb from a folder."
    sys.path.insert(0, str(packages))
    from accelerate.tracking import LoggerType, get_available_trackers

    get_available_trackers().append(LoggerType.WANDB)  # Accelerate looked before the folder was there
    train(recipe("smoke"), "bundled", folder, log_with="wandb", project="tokenizers")


def test_weights_and_biases(tmp_path):
    "With a package that writes down what it is told."
    (tmp_path / "wandb.py").write_text(WANDB)
    result = call(train_with_wandb, tmp_path, tmp_path / "run")
    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads((tmp_path / "run" / "told.json").read_text())  # written at the end of the run
    assert told["settings"]["project"] == "tokenizers" and told["settings"]["resume"] == "allow"
    assert told["config"]["name"] == "smoke" and told["config"]["steps"] == 3
    losses = [(step, v["loss"]) for step, v in zip(told["steps"], told["values"], strict=True) if "loss" in v]
    assert [step for step, _ in losses] == [0, 1, 2]
    assert told["steps"] == sorted(told["steps"])  # wandb drops what comes out of order
    assert "entropy/1x1" in told["values"][0]
    images = [v["samples"] for v in told["values"] if "samples" in v]
    assert len(images) == 2 and images[0][0][-1] == 3  # height, width, channels


def test_trackers_on_the_command_line(tmp_path):
    "A tracker without its package stops the command before the run's folder is made; others get the steps."
    missing = next(name for name in ("comet_ml", "aim", "mlflow") if not find_spec(name))
    result = bitvae("train", "smoke", "--folder", tmp_path / "run", "--log-with", "tensorboard", missing)
    assert result.returncode == 1 and f"pip install {missing}" in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "run").exists()
    options = ["--log-with", "tensorboard", "--project", "bits", "--processes", "2"]
    result = bitvae("train", "smoke", "--folder", tmp_path / "run", *options)
    assert result.returncode == 0, result.stderr
    assert [event.step for event in read_events(tmp_path / "run/events/bits").Scalars("loss")] == [0, 1, 2]


def read_events(folder):
    "Read TensorBoard's events of a folder."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_an_unfinished_run_opens(tmp_path):
    train(recipe("smoke", steps=4, ema=0.5), "bundled", tmp_path, log_with="tensorboard")
    finished = BitVAE.from_pretrained(tmp_path)
    for file in (tmp_path / "tokenizer").iterdir():
        file.unlink()
    (tmp_path / "tokenizer").rmdir()
    x = load_image(bundled_photographs()[0], 64)
    assert BitVAE.from_pretrained(tmp_path).encode(x) == finished.encode(x)
    assert {f.name for f in (tmp_path / "samples").iterdir()} == {"step-00000002.png", "step-00000004.png"}
    events = read_events(tmp_path / "events" / "bitvae")
    assert len(events.Scalars("loss")) == 4
    assert "samples" in events.Tags()["images"]


# clusters

STUBS = {
    "srun": "while [[ $1 == --* ]]; do shift; done; "
    'for id in 0 1; do SLURM_NODEID=$id "$@" & done; wait -n || exit 1; wait -n',
    "scontrol": "echo 127.0.0.1; echo other",
}


def run_script(command, **variables):
    "Run a cluster's command from the repository root with these environment variables."
    env = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_slurm_script(tmp_path):
    "The unchanged script, with stubs of srun and scontrol for two machines."
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    run = run_script(
        ["bash", "examples/slurm.sh"],
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_JOB_NUM_NODES=2,
        SLURM_JOB_NODELIST="two",
        RECIPE="smoke",
        OVERRIDES='{"steps": 4}',
        RUN=tmp_path / "run",
        WORKERS=0,
        PROCESSES=1,
        BITVAE=Path(sys.executable).parent / "bitvae",
        PORT=free_port(),
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    made = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"train-node0.ipynb", "train-node1.ipynb", "training.png", "tokenizer"} <= made


def test_kubernetes_job(tmp_path):
    "The container's command with its variables, on one machine."
    service, job = yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {v["name"]: v["value"] for v in container["env"]}
    assert int(variables["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert variables["RENDEZVOUS"].startswith(f"{job['metadata']['name']}-0.{pod['subdomain']}:")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(variables["PROCESSES"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    variables |= {"RECIPE": "smoke", "IMAGES": "bundled", "RUN": tmp_path, "WORKERS": 0, "PROCESSES": 1}
    variables |= {"NODES": 1, "JOB_COMPLETION_INDEX": 0}
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = run_script([*container["command"], *container["args"]], **variables)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "train-node0.ipynb").exists()
    assert (tmp_path / "tokenizer").exists()


def test_precision_of_the_quantizer_under_bf16(tmp_path):
    dtypes = set()

    def record(quantizer, inputs, output):
        dtypes.add((inputs[0].dtype, output.z.dtype, output.losses.dtype))

    def on_step(t, losses):
        if t.step == 1:
            t.tok.quantizer.register_forward_hook(record)

    config = recipe("smoke", precision="bf16", discriminator_start=1)
    train(config, "bundled", tmp_path, on_step=on_step)
    assert dtypes == {(torch.bfloat16, torch.float32, torch.float32)}
    assert all(w.dtype == torch.float32 for w in BitVAE.from_pretrained(tmp_path).state_dict().values())
