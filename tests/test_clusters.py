"""Tokenizing and evaluating on clusters: the scripts in examples/ with stubs of their scheduler, and Ray.

BITVAE_TRIALS=2000 kills 20 of Ray's nodes and 5 drivers instead of one node.
"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from children import Child, bitvae, command_line, free_port

from bitvae.evaluation import read_results
from bitvae.images import bundled_photographs, held_out_photographs, load_image, save_image
from bitvae.ray_engine import write_shards_ray
from bitvae.token_dataset import verify_dataset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BITVAE = Path(sys.executable).parent / "bitvae"
STUBS = {
    "srun": "while [[ $1 == --* ]]; do shift; done; "
    'for id in 0 1; do SLURM_NODEID=$id "$@" & done; wait -n || exit 1; wait -n',
    "scontrol": "echo 127.0.0.1; echo other",
}


def run_script(command, **variables):
    "Run a cluster's command from the repository root with these environment variables."
    env = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def run_slurm(script, folder, **variables):
    "Run an unchanged script, with stubs of srun and scontrol for two machines; return its output."
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    cluster = {"SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_NODELIST": "two", "PORT": free_port(), "BITVAE": BITVAE}
    path = f"{folder}:{os.environ['PATH']}"
    run = run_script(["bash", f"examples/{script}"], PATH=path, PROCESSES=1, **cluster, **variables)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout


def test_slurm_tokenizes(tmp_path):
    options = {"IMAGES": "held-out bundled", "SHARD": 4, "OPTIONS": "--size 32", "WORKERS": 1}
    out = run_slurm("slurm-tokenize.sh", tmp_path, FOLDER=tmp_path / "shards", **options)
    assert out.count("15 images in 4 shards") == 2 and "waiting for 2 machines" in out
    manifest = verify_dataset(tmp_path / "shards")
    assert (manifest["count"], manifest["size"], manifest["failed"]) == (15, 32, 0)


def test_slurm_evaluates(tmp_path):
    options = {"PROTOCOLS": "clamped published", "OPTIONS": "--resolutions 32 --no-prefixes", "WORKERS": 0}
    out = run_slurm("slurm-evaluate.sh", tmp_path, FOLDER=tmp_path / "results", **options)
    assert out.count("published 32, 6 images") == 2
    results = read_results(tmp_path / "results")
    assert results["images"] == [file.name for file in held_out_photographs()]
    assert not (tmp_path / "results" / "parts").exists()


def test_kubernetes_tokenizes(tmp_path):
    "The container's command with its variables, on one machine."
    service, job = yaml.safe_load_all((ROOT / "examples" / "kubernetes-tokenize.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {v["name"]: v["value"] for v in container["env"]}
    assert int(variables["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert variables["RENDEZVOUS"].startswith(f"{job['metadata']['name']}-0.{pod['subdomain']}:")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(variables["PROCESSES"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    variables |= {"IMAGES": "held-out", "FOLDER": tmp_path, "WORKERS": 1, "PROCESSES": 1, "NODES": 1}
    variables["OPTIONS"] = variables["OPTIONS"].replace("0.25M", "0.06M")
    path = f"{BITVAE.parent}:{os.environ['PATH']}"
    run = run_script([*container["command"], *container["args"]], **variables | {"PATH": path})
    assert run.returncode == 0, run.stderr[-2000:]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["size"] == "aspect ratios, 0.06M" and len(manifest["shards"][0]["files"]) > 1


# Ray

MANY = int(os.environ.get("BITVAE_TRIALS", 1000)) > 1000
KILLS = {"node": 20, "driver": 5}
SHARDS, PER_SHARD = (50, 100) if MANY else (8, 6)
RAY = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    "Small images of several shapes, a broken one among them."
    folder = tmp_path_factory.mktemp("images")
    photographs = [load_image(file, 256) for file in bundled_photographs()]
    for n in range(PER_SHARD * SHARDS - 1):
        x = photographs[n % 9][..., n % 60 : 140 + n % 60, : 100 + n % 140]
        save_image(x, folder / f"{n:04}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def retry(start, *args, **options):
    "Start a part of a cluster; Ray waits only 30 seconds for it, which a busy machine may need."
    for _ in range(4):
        try:
            return start(*args, **options)
        except Exception as e:
            error = e
    raise error


@pytest.fixture(scope="module")
def cluster():
    "A Ray cluster of three nodes on this machine."
    pytest.importorskip("ray", reason="pip install 'bitvae[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY.items():
            patch.setenv(name, value)
        node = {"num_cpus": 1, "object_store_memory": 100 << 20}
        checks = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}  # of 3000 and 5
        head = node | {"num_cpus": 0, "include_dashboard": False, "_system_config": checks}
        cluster = retry(Cluster, initialize_head=True, head_node_args=head)
        cluster.add_worker = partial(retry, cluster.add_node, **node)
        try:
            cluster.workers = [cluster.add_worker() for _ in range(2)]
            yield cluster
        finally:
            cluster.shutdown()


def test_unsuitable_ray_clusters(monkeypatch):
    "A cluster without CPUs, and an address of another cluster than the connected one."
    ray = pytest.importorskip("ray", reason="pip install 'bitvae[ray]'")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    for address in (None, "auto", "10.0.0.1:6379"):
        with pytest.raises(ValueError, match="no CPU"):
            write_shards_ray(None, {}, None, address=address)
    with pytest.raises(ValueError, match="connected to 10.0.0.1:6379, not to 10.0.0.2:6379"):
        write_shards_ray(None, {}, None, address="10.0.0.2:6379")


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_kuberay_tokenizes(images, cluster, tmp_path):
    "The entrypoint with its variables, on the cluster of this machine, while a node is killed."
    job = yaml.safe_load((ROOT / "examples" / "kuberay.yaml").read_text())["spec"]
    variables = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]
    assert {group["replicas"] for group in job["rayClusterSpec"]["workerGroupSpecs"]} == {4, 8}
    variables |= {"OPTIONS": "--size 32", "SHARD": PER_SHARD, "RAY_ADDRESS": cluster.address}
    variables["PATH"] = f"{BITVAE.parent}:{os.environ['PATH']}"
    run = partial(run_script, shlex.split(job["entrypoint"]))
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(run, **variables | {"IMAGES": images, "FOLDER": (folder := tmp_path / "ray")})
        while not (ended.done() or list(folder.glob("shard-*.json"))):
            time.sleep(0.05)
        assert not (folder / "manifest.json").exists()  # in the middle
        cluster.remove_node(cluster.workers.pop(), allow_graceful=False)
        cluster.workers.append(cluster.add_worker())
    assert ended.result().returncode == 0, ended.result().stderr[-2000:]
    command = ["--images", images, "--per-shard", PER_SHARD, "--size", 32, "--folder", tmp_path / "local"]
    assert bitvae("tokenize", "demo", *command).returncode == 0
    assert contents(folder) == contents(tmp_path / "local")
    assert (verify_dataset(folder)["count"], verify_dataset(folder)["failed"]) == (PER_SHARD * SHARDS - 1, 1)


more = pytest.mark.skipif(not MANY, reason="takes minutes: BITVAE_TRIALS=2000 runs it")


@more
def test_ray_names_a_damaged_tar_file(cluster, tmp_path):
    (tmp_path / "cut.tar").write_bytes(b"no tar file" * 100)
    command = ["tokenize", "demo", "--images", tmp_path / "cut.tar", "--folder", tmp_path / "shards"]
    refused = bitvae(*command, "--engine", "ray", "--ray-address", cluster.address)
    assert refused.returncode == 1 and "cut.tar is" in refused.stderr.splitlines()[-1], refused.stderr[-2000:]
    assert not list((tmp_path / "shards").glob("shard-*"))


@more
def test_ray_survives_killed_nodes_and_drivers(images, cluster, tmp_path):
    "Shards and manifest are byte for byte those of the local engine; finished shards are not written again."
    rng = random.Random(0)
    sizes = ["--aspect-ratios", "--budget", "0.06M"]
    command = ["tokenize", "demo", "--images", str(images), "--per-shard", str(PER_SHARD), *sizes, "--folder"]
    assert bitvae(*command, tmp_path / "local").returncode == 0
    command += [str(folder := tmp_path / "ray"), "--engine", "ray", "--ray-address", cluster.address]
    killed, written = {"node": 0, "driver": 0}, {}
    while killed != KILLS or not (folder / "manifest.json").exists():
        driver = Child(command_line, *command)
        while driver.process.is_alive():
            done = sorted(folder.glob("shard-*.json"))
            fresh = len(done) > len(written)
            assert all(written[p] == p.stat().st_mtime_ns for p in written)
            written |= {p: p.stat().st_mtime_ns for p in done}
            if fresh and killed["node"] < KILLS["node"]:
                time.sleep(rng.random())
                cluster.remove_node(cluster.workers.pop(rng.randrange(2)), allow_graceful=False)
                cluster.workers.append(cluster.add_worker())
                killed["node"] += 1
            elif fresh and killed["driver"] < KILLS["driver"]:
                time.sleep(rng.random())
                killed["driver"] += driver.kill() == -signal.SIGKILL
            time.sleep(0.05)
        ended = driver.finish()
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr[-3000:]
        if killed != KILLS and (folder / "manifest.json").exists():  # start over
            written = {}
            for file in folder.iterdir():
                file.unlink()
    assert contents(folder) == contents(tmp_path / "local")
    assert (verify_dataset(folder)["count"], verify_dataset(folder)["failed"]) == (PER_SHARD * SHARDS - 1, 1)
    print(f"{SHARDS} shards, killed {killed}")
