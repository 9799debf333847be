"""Several processes train like one, stop together, and leave no orphans."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from children import ROOT, free_port, ranks, script

from bitvae.launch import RESUME_HINT, ProcessesFailed, run_processes, torchrun_command
from bitvae.run_dir import newest_checkpoint, read_metrics
from bitvae.recipes import train_arguments

pytestmark = pytest.mark.slow

WORKER = """
import sys, torch
from accelerate import Accelerator
from bitvae.data import CropPlan, CropRule, crop_loader, image_files
from bitvae.launch import reduce_mean
from bitvae.recipes import recipe
from bitvae.training import Trainer, init_tokenizer, train_step

torch.set_num_threads(1)
accelerator, out, gan = Accelerator(cpu=True), sys.argv[1], sys.argv[2] == "gan"
processes, rank = accelerator.num_processes, accelerator.process_index
config = recipe(
    "smoke", channels=64, batch=8 // processes,  # 2 channels per group: gradients above rounding noise
    train_mode="dense", drop_rate=0.5, steps=5, lr=0.01, warmup=0.0, init_latent_norm=None, pixel_loss="l1",
    latent_mse_weight=0.0, discriminator_start=0 if gan else None, shared_drops=not gan,
)
t = Trainer(config, accelerator, init_tokenizer(config))
if not gan:
    t.optimizer = torch.optim.SGD(t.tok.parameters(), config.lr)
gradients = []
t.optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in t.tok.parameters()]))
plan = CropPlan(config.size, config.batch, 0, rank, processes)
data = crop_loader(image_files("bundled"), plan, range(config.steps), CropRule(4.0))
losses = [reduce_mean(train_step(t, [crops.x])[0], accelerator) for crops in data]
norm = max(losses[0]["grad_norm"], 1.0)  # the hook sees gradients that are clipped to norm 1
gradients = [norm * g for g in gradients[0]]
weights = list(t.tok.state_dict().values())
if gan:
    weights += list(t.discriminator.state_dict().values())
torch.save({"losses": losses, "gradients": gradients, "weights": weights}, f"{out}.{rank}")
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    (folder / "worker.py").write_text(WORKER)

    def run(processes, kind):
        children = ranks(processes, script, folder / "worker.py", folder / f"{kind}{processes}", kind)
        for result in [child.finish() for child in children]:
            assert result.returncode == 0, result.stderr[-3000:]
        return [torch.load(folder / f"{kind}{processes}.{r}") for r in range(processes)]

    return run


def test_two_processes_with_batch_4_match_one_with_batch_8(worker):
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


def test_with_a_discriminator_all_ranks_have_the_same_weights(worker):
    "Also where every rank drops other scales."
    first, second = worker(2, "gan")
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    for losses in first["losses"]:
        assert "adversarial" in losses and torch.tensor(list(losses.values())).isfinite().all()


STATISTICS = """
import torch
import torch.distributed as dist
from bitvae.losses import latent_mean_loss
from bitvae.quantizer import all_reduce_mean, binary_entropy, bit_entropies

torch.manual_seed(1)
z = (torch.randn(4, 6, 2, 2) + 1).requires_grad_()
mean_loss = latent_mean_loss(z)  # of one process
mean_loss.backward()

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
v = torch.nn.functional.normalize(torch.randn(4, 16, 3, 3), dim=1)
full = v.clone().requires_grad_()
half = v[2 * rank : 2 * rank + 2].clone().requires_grad_()
_, loss = bit_entropies(half)
loss.backward()
p = torch.sigmoid(-4 * 100.0 / 4 * full).mean(dim=(0, 2, 3))  # T = 100, sqrt(d) = 4
reference = binary_entropy(p).sum()
reference.backward()
torch.testing.assert_close(loss, reference)
gradient = full.grad[2 * rank : 2 * rank + 2]
torch.testing.assert_close(half.grad / 2, gradient)  # gradients are averaged over ranks
assert all_reduce_mean(torch.full((2,), float(rank)), present=rank == 1).tolist() == [1, 1]  # rank 0 drops it
latents = z.detach()[2 * rank : 2 * rank + 2].requires_grad_()
loss = latent_mean_loss(latents)
loss.backward()
torch.testing.assert_close(loss, mean_loss.detach())
torch.testing.assert_close(latents.grad / 2, z.grad[2 * rank : 2 * rank + 2])
print("equal")
"""


def test_losses_of_batch_statistics_do_not_depend_on_the_number_of_processes(tmp_path):
    (tmp_path / "worker.py").write_text(STATISTICS)
    for result in [child.finish() for child in ranks(2, script, tmp_path / "worker.py")]:
        assert result.returncode == 0 and result.stdout == "equal\n", result.stderr[-3000:]


# stopping

LONG = {"steps": 5000, "checkpoint_every": 1000}


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "timeout"
        time.sleep(0.05)
    return result


def descendants(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [p for p in children if p.status() != psutil.STATUS_ZOMBIE]


def is_torchrun(process):
    return any("torch.distributed.run" in a for a in process.cmdline())


def start(folder, *command):
    "Start a run, wait for its fourth step; return the launcher, its descendants and the ranks."
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    wait_for(lambda: process.poll() is not None or len(read_metrics(folder / "metrics.jsonl")) > 3)
    assert process.poll() is None, process.communicate()[0]
    running = descendants(process)
    return process, running, [p for p in running if "bitvae.training" in p.cmdline() and not is_torchrun(p)]


def options(values):
    return [a for name, value in values.items() for a in ("--set", f"{name}={value}")]


def train_command(folder, **overrides):
    command = [sys.executable, "-m", "bitvae.cli", "train", "smoke", "--processes", "2", "--folder", folder]
    return [*command, *options(LONG | overrides)]


def gone(processes):
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


def last_step(folder):
    return newest_checkpoint(folder / "checkpoints")[1]["step"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_stops_all_processes(tmp_path, sent):
    process, running, ranks = start(tmp_path, *train_command(tmp_path))
    assert len(ranks) == 2
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and f"{sent.name} after step" in output and RESUME_HINT in output
    assert output.count(f"{sent.name}: stopping; once more stops at once\n") == 1
    wait_for(lambda: gone(running), 10)
    assert last_step(tmp_path) == len(read_metrics(tmp_path / "metrics.jsonl"))
    assert not (tmp_path / "tokenizer").exists()


def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(tmp_path):
    "To the one that does not write the checkpoint."
    process, running, ranks = start(tmp_path, *train_command(tmp_path))
    next(p for p in ranks if p.environ()["RANK"] == "1").send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and RESUME_HINT in output
    wait_for(lambda: gone(running), 10)
    assert last_step(tmp_path) == len(read_metrics(tmp_path / "metrics.jsonl"))


def test_a_rank_that_dies_stops_the_run_and_is_named(tmp_path):
    process, running, ranks = start(tmp_path, *train_command(tmp_path, checkpoint_every=2))
    ranks[1].kill()
    started = time.monotonic()
    output, _ = process.communicate(timeout=60)
    last = output.splitlines()[-1]
    assert process.returncode == 1 and last.startswith("bitvae: rank") and "ended with exit code -9" in last
    wait_for(lambda: gone(running), 10)
    assert time.monotonic() - started < 60
    assert last_step(tmp_path) >= 2


@pytest.mark.parametrize("killed", ["launcher", "torchrun"])
def test_no_orphans(tmp_path, killed):
    process, running, ranks = start(tmp_path, *train_command(tmp_path))
    (process if killed == "launcher" else next(p for p in running if is_torchrun(p))).kill()
    wait_for(lambda: gone(running), 60)
    process.communicate(timeout=60)
    assert last_step(tmp_path) > 0  # the ranks wrote a checkpoint before they stopped


def test_two_nodes(tmp_path):
    place = ["--nodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}", "--folder", tmp_path]
    command = [sys.executable, "-m", "bitvae.cli", "train", "smoke", *place, "--set", "steps=4"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert json.loads((tmp_path / "run.json").read_text())["processes"] == 2
    assert (tmp_path / "tokenizer" / "model.safetensors").exists()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_an_error_of_all_ranks_is_reported_once(tmp_path):
    with pytest.raises(ProcessesFailed, match="^no such images: nowhere; give a folder"):
        run_processes(torchrun_command(2) + train_arguments("smoke", {}, "nowhere", tmp_path))


# notebooks


def test_a_notebook_with_two_processes_stops_and_resumes(tmp_path):
    "With one process, and as many images a step."

    def command(**values):
        overrides = json.dumps({"steps": 40, "checkpoint_every": 20, "batch": 4 // values["processes"]})
        parameters = {"recipe": "smoke", "folder": tmp_path, "overrides": overrides} | values
        notebook = ["nbs/experiments/train.ipynb", tmp_path / "train.ipynb"]
        return [sys.executable, "-m", "bitvae.cli", "run", *notebook, *options(parameters)]

    process, running, ranks = start(tmp_path, *command(processes=2))
    assert len(ranks) == 2
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 130 and "SIGINT after step" in output, output
    assert (tmp_path / "train.failed.ipynb").exists()
    wait_for(lambda: gone(running), 20)
    again = subprocess.run(command(processes=1), cwd=ROOT, capture_output=True, text=True)
    output = again.stdout + again.stderr
    assert again.returncode == 0 and "resuming at step" in output and "step 40 of 40" in output, output
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(40))
    assert not (tmp_path / "train.failed.ipynb").exists()
