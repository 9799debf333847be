"Tokenizing and evaluating on clusters: the scripts in examples/ with stubs of their scheduler."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from children import free_port

from bitvae.evaluation import read_results
from bitvae.images import held_out_photographs
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
