"""The wheel and the source archive hold what users need; README's examples for other libraries run."""

import re
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from children import ROOT, bitvae, call

CONFIG = ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini")
CONFIG = CONFIG["DEFAULT"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "Build both from a copy of the repository's files; return their paths."
    folder = tmp_path_factory.mktemp("distribution")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("needs a git clone")
    for name in listed.stdout.decode().split("\n"):
        if name and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    for command in ("sdist", "bdist_wheel"):
        line = [sys.executable, "setup.py", "--quiet", command, "--dist-dir", folder]
        run = subprocess.run(line, cwd=folder / "source", capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.mark.slow
def test_wheel_holds_code_data_and_experiments(archives):
    names = set(zipfile.ZipFile(archives[0]).namelist())
    for tree, pattern in (("bitvae", "*.py"), ("bitvae/assets", "*.*"), ("bitvae", "py.typed")):
        for file in (ROOT / tree).rglob(pattern):
            assert file.relative_to(ROOT).as_posix() in names
    experiments = {file.name for file in (ROOT / "nbs" / "experiments").glob("*.ipynb")} - {"benchmark.ipynb"}
    assert {Path(name).name for name in names if name.startswith("bitvae/experiments/")} == experiments
    assert {Path(name).parts[0].partition("-")[0] for name in names} == {"bitvae"}


@pytest.mark.slow
def test_metadata(archives):
    wheel = zipfile.ZipFile(archives[0])
    name = next(n for n in wheel.namelist() if n.endswith("METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["License-Expression"].startswith("MIT AND CC-BY")
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert {"all", "dev", "docs", "onnx", "metrics", "viewer"} <= set(metadata.get_all("Provides-Extra"))
    links = re.findall(r"\]\(([^)\s]+)\)", metadata.get_payload(decode=True).decode())
    assert len(links) > 40 and all(link.startswith(("https://", "#")) for link in links)
    for link in links:  # those into the repository name a file of it
        if link.startswith(CONFIG["git_url"]):
            assert (ROOT / link.partition(f"/{CONFIG['branch']}/")[2]).exists(), link


@pytest.mark.slow
def test_source_archive_holds_what_builds_and_tests_it(archives):
    with tarfile.open(archives[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for tree in ("nbs", "tests", "tools", "bitvae", "benchmarks", "examples", "index_files"):
        for file in (ROOT / tree).rglob("*"):
            if file.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(file.parts):
                assert file.relative_to(ROOT).as_posix() in names
    top = "settings.ini setup.py pyproject.toml ruff.toml pytest.ini mkdocs.yml Makefile LICENSE CITATION.cff"
    assert set(top.split()) | {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run"} <= names


def test_extras_are_declared_once():
    extras = {name.removesuffix("_requirements"): CONFIG[name] for name in CONFIG if "_requirements" in name}
    everything = set(re.fullmatch(r"bitvae\[(.*)\]", extras["all"])[1].split(","))
    assert everything == set(extras) - {"all", "dev", "docs"}
    assert extras["dev"].startswith("bitvae[all,docs] ")
    listed = [re.split(r"[<>=\[]", one)[0] for name in everything | {"docs"} for one in extras[name].split()]
    assert not set(listed) & {re.split(r"[<>=\[]", one)[0] for one in extras["dev"].split()}
    for floor in ("scipy>=1.15", "pillow>=10.1", "ipywidgets>=8", "traitlets", "jupyter-client"):
        assert floor in CONFIG["requirements"].split()
    assert "torch-fidelity>=0.4" in extras["metrics"]


def test_default_evaluation_needs_core_packages_only():
    from bitvae.images import held_out_photographs

    assert len(held_out_photographs()) == 6
    assert not [file for file in held_out_photographs() if "sklearn" in file.parts]
    said = (ROOT / "bitvae/assets/held_out/ATTRIBUTION.md").read_text()
    assert all(file.name in said for file in (ROOT / "bitvae/assets/held_out").glob("*.jpg"))


@pytest.mark.slow
def test_experiments_run_by_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = bitvae("run", "train", "--set", "folder=mine")
    assert run.returncode == 0, run.stdout + run.stderr
    assert Path("mine/train.ipynb").exists() and Path("mine/tokenizer/config.json").exists()
    run = bitvae("run", "trian")
    assert run.returncode == 1 and "no notebook trian" in run.stderr


def test_citation_and_colab_cell():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == CONFIG["version"] and cited["cff-version"] == "1.2.0"
    papers = [reference["identifiers"][0]["value"] for reference in cited["references"]]
    assert papers == ["arXiv:2412.04431", "arXiv:2406.07548"]
    assert f'%pip install "bitvae @ git+{CONFIG["git_url"]}"' in (ROOT / "README.md").read_text()


def test_settings_alone_hold_the_address():
    "A placeholder or a real one: every link is derived from it, README's by tools/readme.py."
    files = [*ROOT.glob("*.*"), *(ROOT / "nbs").rglob("*.ipynb"), *(ROOT / "tools").glob("*.py")]
    address = CONFIG["git_url"].encode()
    assert {f.name for f in files if f.is_file() and address in f.read_bytes()} == {"README.md"}


PRELUDE = """
import torch
from datasets import load_dataset
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch.export import Dim, export
from bitvae import BitVAE, Bits
from bitvae.images import held_out_photographs
from bitvae.token_dataset import tokenize
tok, photo = BitVAE.from_pretrained("demo"), Image.open(held_out_photographs()[0])
tokenize(tok, "held-out", "tokens", size=64)
"""


def run_example(text):
    exec(PRELUDE + text, {"__name__": "example"})


@pytest.mark.slow
def test_readme_example_with_other_libraries(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "README.md").read_text().partition("## With other libraries")[2]
    run = call(run_example, re.search(r"(?ms)^```python\n(.*?)^```", section)[1], HF_HUB_OFFLINE="1")
    assert run.returncode == 0, run.stderr[-3000:]
