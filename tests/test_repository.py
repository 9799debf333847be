"""The repository agrees with itself, every notebook runs, and importing is cheap."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from children import ROOT, call, run_cells
from conftest import pytest_configure

NOTEBOOKS = sorted(
    p.relative_to(ROOT).as_posix()
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)

PARAMETERS = {  # smaller than those of the notebook's own pictures
    "nbs/experiments/rate_distortion.ipynb": {"size": 128},
    "nbs/experiments/view.ipynb": {"size": 128},
}


@pytest.mark.slow
def test_package_notebooks_and_readme_agree():
    run = subprocess.run([sys.executable, ROOT / "tools" / "check.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_readme_lists_every_notebook():
    table = (ROOT / "README.md").read_text().partition("| notebook |")[2]
    assert [n for n in NOTEBOOKS if f"({n})" not in table] == ["nbs/index.ipynb"]


@pytest.mark.parametrize("notebook", [n for n in NOTEBOOKS if n != "nbs/experiments/evaluate.ipynb"])
@pytest.mark.slow
def test_notebook_runs(monkeypatch, notebook):  # tests/test_demo.py runs the experiment evaluate, twice
    monkeypatch.chdir(ROOT)
    if "triton" in notebook:  # its interpreter must be chosen before Triton is loaded
        line = [Path(sys.executable).with_name("nbdev_test"), "--path", notebook, "--n_workers", "1"]
        run = subprocess.run(line, env=os.environ | {"MPLBACKEND": "agg"}, capture_output=True, text=True)
    else:
        run = call(run_cells, notebook, PARAMETERS.get(notebook), MPLBACKEND="agg")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_is_fit_to_commit(notebook):
    cells = json.loads((ROOT / notebook).read_text())
    assert "widgets" not in cells["metadata"]
    assert (ROOT / notebook).stat().st_size < 1_000_000
    text = json.dumps([[c["source"], c.get("outputs")] for c in cells["cells"]])
    assert not [place for place in ("/home/", "/root/", "/Users/", str(ROOT)) if place in text]
    assert "stderr" not in [
        o.get("name") for c in cells["cells"] for o in c.get("outputs", [])
    ]  # progress bars and warnings
    if "experiments" in notebook:
        assert sum("parameters" in c["metadata"].get("tags", []) for c in cells["cells"]) == 1


def test_names_have_one_meaning():
    "No name is defined in two modules, except `main`."
    defined = {}
    for file in (ROOT / "bitvae").rglob("[a-z]*.py"):
        for node in ast.parse(file.read_text()).body:
            patched = isinstance(node, ast.FunctionDef) and [a.arg for a in node.args.args[:1]] == ["self"]
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) and not patched else []
            for target in getattr(node, "targets", []) if isinstance(node, ast.Assign) else []:
                names += [target.id] if isinstance(target, ast.Name) and not target.id.startswith("_") else []
            for name in names:
                defined.setdefault(name, set()).add(file.name)
    assert {name: files for name, files in defined.items() if len(files) > 1}.keys() == {"main"}


PROBE = """
import os, time, torch, torchvision, sys
for _ in range(3):
    if os.fork():
        os.wait()
        continue
    start = time.perf_counter()
    from bitvae import BitVAE, load_image
    BitVAE.from_pretrained  # imports what it needs
    print(time.perf_counter() - start, *sorted({name.split('.')[0] for name in sys.modules}), flush=True)
    os._exit(0)
"""


def test_import_is_cheap_and_brings_no_notebook_tooling():
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 3 and min(float(seconds) for seconds, *_ in lines) <= 0.5
    tooling = {
        "nbdev",
        "fastcore",
        "execnb",
        "IPython",
        "ipywidgets",
        "papermill",
        "jupyterlab",
        "matplotlib",
    }
    assert not tooling & set(lines[0][1:])


def test_photographs_carry_their_licence():
    folder = ROOT / "bitvae/assets/photographs"
    said, photographs = (folder / "ATTRIBUTION.md").read_text(), list(folder.glob("*.jpg"))
    assert len(photographs) == 9 and all(p.name in said for p in photographs)
    assert sum(p.stat().st_size for p in photographs) < 2.2e6


@pytest.mark.parametrize("selected", ["", "not slow", "slow and not gpu", "gpu", "gpu and not slow"])
def test_tests_see_a_gpu_only_if_they_need_one(monkeypatch, selected):
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    pytest_configure(SimpleNamespace(option=SimpleNamespace(markexpr=selected)))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("0" if selected.startswith("gpu") else "")


EXECUTED = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "benchmarks").rglob("*.ipynb"))


@pytest.mark.parametrize("notebook", EXECUTED)
def test_executed_notebook_is_fit_to_commit(notebook):
    cells = [c for c in json.loads((ROOT / notebook).read_text())["cells"] if c["cell_type"] == "code"]
    assert (ROOT / notebook).stat().st_size < 1_000_000
    assert any(c["outputs"] for c in cells) and not any(
        o["output_type"] == "error" for c in cells for o in c["outputs"]
    )
    assert not [o for c in cells for o in c["outputs"] if o.get("name") == "stderr"]  # logs and warnings
    text = json.dumps(
        [
            [c["source"], *([o.get("text"), o.get("data", {}).get("text/plain")] for o in c["outputs"])]
            for c in cells
        ]
    )
    assert not [place for place in ("/home/", "/root/", "/Users/", "/tmp/", str(ROOT)) if place in text]


@pytest.mark.slow
def test_git_merges_notebooks_with_the_hooks_of_make_lab(tmp_path):
    "Two branches that add cells in different places merge, also without an activated environment."
    home, clone = tmp_path / "home", tmp_path / "clone"
    home.mkdir()
    clone.mkdir()
    for name in ("Makefile", "settings.ini", ".gitattributes", ".gitignore"):
        shutil.copy(ROOT / name, clone)
    (clone / ".venv").mkdir()
    (clone / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    env = os.environ | {"HOME": str(home), "GIT_CONFIG_GLOBAL": os.devnull}

    def run(*line):
        done = subprocess.run(line, cwd=clone, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def write(*sources, count=None):
        cells = [nbformat.v4.new_code_cell(s, id=f"{i:08x}", execution_count=count) for i, s in sources]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), clone / "a.ipynb")
        run("git", "add", "-A", ".")
        run("git", "-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "--quiet", "-m", "a")

    run("git", "init", "--quiet", "--initial-branch", "main")
    first, last = (1, "x = 1"), (9, "y = 1")
    write(first, last)
    run("make", "hooks")
    run("git", "checkout", "--quiet", "-b", "other")
    write((1, "x = 2"), last, count=3)
    run("git", "checkout", "--quiet", "main")
    write(first, last, (10, "z = 1"), count=4)
    run("git", "-c", "user.name=a", "-c", "user.email=a@example.com", "merge", "--no-edit", "other")
    merged = nbformat.read(clone / "a.ipynb", 4)
    assert [c.source for c in merged.cells] == ["x = 2", "y = 1", "z = 1"]


def test_workflow_and_templates_are_valid():
    for file in [ROOT / ".pre-commit-config.yaml", *(ROOT / ".github").rglob("*.yml")]:
        assert yaml.safe_load(file.read_text()), file
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert "tools/check_wheel.py" in str(workflow["jobs"]["wheel"])
