"""Evaluation: independent of batch size, processes and interruptions; reference metrics; bounded memory."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import lpips
import numpy as np
import pytest
import torch
import torchvision
from children import bitvae, ranks, script
from PIL import Image
from pytorch_msssim import ms_ssim as library_ms_ssim
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from bitvae.checkpoints import published_names
from bitvae.evaluation import rank_results, read_results
from bitvae.evaluation import evaluate, main, protocol_rows, SAVE_EVERY
from bitvae.metrics import INCEPTION_FILES, InceptionFeatures
from bitvae.images import held_out_photographs, load_image, save_image
from bitvae.losses import TRUNKS
from bitvae.metrics import crop_image, protocol, PROTOCOLS, to_protocol_bytes
from bitvae.tokenizer import BitVAE, BitVAEConfig

pytestmark = pytest.mark.slow

WORKER = """
import sys, torch, bitvae.evaluation as E
from torch.nn import functional as F

class Colours(torch.nn.Module):  # a stand-in for EfficientNet: a Frechet distance of few features is quick
    dim, takes_bytes = 12, False
    def forward(self, y): return F.adaptive_avg_pool2d(y, 2).flatten(1)

torch.set_num_threads(1)
E.EfficientNetFeatures, E.SAVE_EVERY = Colours, 0.0
sys.exit(E.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITVAE_WEIGHTS", str(tmp_path / "no-cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "37 pictures of many sizes, cut out of the held-out photographs."
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    whole = [Image.open(f).convert("RGB") for f in held_out_photographs()]
    for n in range(37):
        photo = whole[n % 6]
        w, h = rng.integers(70, min(photo.size), 2)
        left, top = rng.integers(photo.width - w + 1), rng.integers(photo.height - h + 1)
        photo.crop((left, top, left + w, top + h)).save(folder / f"{n:02}.png")
    return folder


@pytest.fixture(scope="module")
def worker(tmp_path_factory, pictures):
    file = tmp_path_factory.mktemp("worker") / "worker.py"
    file.write_text(WORKER)

    def start(folder, processes=1, batch=4):
        line = [
            "demo",
            "--images",
            pictures,
            "--resolutions",
            64,
            "--protocols",
            "clamped",
            "published",
            "--metrics",
            "psnr",
            "ssim",
            "frechet_efficientnet",
            "--batch",
            batch,
            "--folder",
            folder,
        ]
        return ranks(processes, script, file, *line, BITVAE_WEIGHTS=str(folder / "weights"))

    return start


def finish(children, folder):
    for done in [child.finish() for child in children]:
        assert done.returncode == 0, done.stderr[-3000:]
    return read_results(folder)


@pytest.fixture(scope="module")
def plain(worker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return finish(worker(folder), folder)


def same(a, b):
    """Compare two evaluations to 1e-6.

    Tolerances for single images are larger: the networks' last digits depend on the batch, so a few values
    round to the next byte, 5e-6 dB each. Unclamped, 255.9999 becomes white and 256 black: a whole
    pixel changes.
    """
    assert a["images"] == b["images"] and a["bits"] == b["bits"] and len(a["images"]) == 37
    for label, entry in a["protocols"].items():
        mean, single = (1e-6, 1e-4) if entry["protocol"]["clamp"] else (1e-3, 1e-2)
        for name, row in protocol_rows(a, label).items():
            other = protocol_rows(b, label)[name]
            assert row.keys() == other.keys() and len(row["per_image"]["psnr"]) == 37
            for key in row:
                if isinstance(row[key], float):
                    assert row[key] == pytest.approx(other[key], rel=1e-6, abs=mean), (label, name, key)
            for metric, values in row["per_image"].items():
                assert values == pytest.approx(other["per_image"][metric], abs=single), (label, name, metric)


def test_two_processes_count_every_picture_once(worker, plain, tmp_path):
    same(plain, finish(worker(tmp_path, processes=2), tmp_path))


@pytest.mark.parametrize("batch", [1, 7])
def test_the_batch_changes_nothing(worker, plain, tmp_path, batch):
    same(plain, finish(worker(tmp_path, batch=batch), tmp_path))


@pytest.mark.parametrize("processes", [(1, 2), (2, 1)])
def test_killed_and_gone_on(worker, plain, tmp_path, processes):
    children, end = worker(tmp_path, processes[0], batch=3), time.monotonic() + 120
    while not (parts := list(tmp_path.glob("parts/*/part-*.pt"))):
        assert all(child.process.is_alive() for child in children) and time.monotonic() < end
        time.sleep(0.01)
    for child in children:
        child.kill()
    assert parts and not (tmp_path / "metrics.json").exists()
    same(plain, finish(worker(tmp_path, processes[1], batch=5), tmp_path))
    assert not (tmp_path / "parts").exists()
    assert SAVE_EVERY == 60


def test_an_unfinished_evaluation_is_not_mixed_with_another(pictures, tmp_path):
    tok = BitVAE.from_pretrained("demo")
    evaluate(tok, pictures, protocol("clamped", size=32), folder=tmp_path)
    with pytest.raises(ValueError, match="unfinished evaluation with other protocols"):
        evaluate(tok, pictures, protocol("published", size=32), folder=tmp_path)
    with pytest.raises(ValueError, match="with other fingerprint"):
        evaluate(tok, "held-out", protocol("clamped", size=32), folder=tmp_path)
    part = next(tmp_path.glob("parts/*/part-*.pt"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"part-0000-0.pt is damaged .*: remove it"):
        evaluate(tok, pictures, protocol("clamped", size=32), folder=tmp_path)


# every metric is its library's


@pytest.fixture(scope="module")
def pair():
    "Photographs, and reconstructions that overshoot."
    x = torch.cat([crop_image(f, protocol("clamped", size=192)) for f in held_out_photographs()[:3]])
    torch.manual_seed(0)
    return x, 1.1 * x + 0.1 * torch.randn_like(x)


class Overshooting(torch.nn.Module):
    "Instead of a tokenizer's decoder."

    def __init__(self, y):
        super().__init__()
        self.y = y

    def forward(self, z):
        return self.y.repeat(-(-len(z) // len(self.y)), 1, 1, 1)[
            : len(z)
        ]  # of several prefixes of a batch, too


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    "Random weights in the files that hold the real ones."
    from pytorch_fid.inception import fid_inception_v3

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    with (
        patch.object(torchvision.models.Inception3, "load_state_dict"),
        patch("pytorch_fid.inception.load_state_dict_from_url"),
    ):
        noise = fid_inception_v3().state_dict()
    noise = {
        name: w * 6**0.5 if w.ndim == 4 else w for name, w in noise.items()
    }  # so that signals neither fade nor grow
    for name in INCEPTION_FILES.values():
        torch.save(noise, folder / name)
    torch.save(torchvision.models.vgg16().state_dict(), folder / TRUNKS["vgg"])
    torch.save(torchvision.models.alexnet().state_dict(), folder / TRUNKS["alex"])
    return folder


def test_every_metric_is_its_librarys(pair, networks, tmp_path, monkeypatch):
    monkeypatch.setenv("BITVAE_WEIGHTS", str(networks))
    monkeypatch.setattr("bitvae.kernels.CHUNK_BYTES", 1 << 40)  # the stand-in knows whole batches
    x, y = pair
    for n, picture in enumerate(x):
        save_image(picture, tmp_path / f"{n}.png")
    tok = BitVAE(
        BitVAEConfig(dim=4, channels=24, multipliers=(1,) * 8, res_blocks=0, stride=128, mode="dynamic")
    ).eval()  # 2x2 tokens: few scales
    tok.decoder.forward = Overshooting(torch.nn.functional.pad(y, (0, 64, 0, 64))).forward
    protocols = [
        protocol(name, size=192, resize="bicubic", antialias=True, halve=False, mode="dynamic")
        for name in PROTOCOLS
    ]
    results = evaluate(tok, tmp_path, protocols, ["psnr", "ssim", "ms_ssim", "lpips"], batch=3)
    trunks = {net: lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval() for net in TRUNKS}
    for net, distance in trunks.items():
        weights = torch.load(networks / TRUNKS[net], weights_only=True)
        for name, p in distance.net.named_parameters():
            p.data.copy_(weights["features." + name.split(".", 1)[1]])
    for p in protocols:
        row = list(protocol_rows(results, str(p)).values())[-1]
        z = y.clamp(-1, 1) if p.clamp else y
        a, b = (
            t.permute(0, 2, 3, 1).numpy().astype(np.float64) / 255
            for t in (to_protocol_bytes(x, p), to_protocol_bytes(y, p))
        )
        window = (
            {"win_size": p.ssim_window}
            if p.ssim_window
            else {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        )
        assert row["per_image"]["psnr"] == pytest.approx(
            [peak_signal_noise_ratio(i, j, data_range=1) for i, j in zip(a, b, strict=True)], abs=1e-6
        )
        assert row["per_image"]["ssim"] == pytest.approx(
            [
                structural_similarity(i, j, channel_axis=-1, data_range=p.ssim_range, **window)
                for i, j in zip(a, b, strict=True)
            ],
            abs=1e-6,
        )
        of_library = library_ms_ssim(
            to_protocol_bytes(x, p).double(), to_protocol_bytes(y, p).double(), data_range=255, size_average=False
        )
        assert row["per_image"]["ms_ssim"] == pytest.approx(of_library.tolist(), abs=1e-6)
        with torch.inference_mode():
            for net in p.lpips:
                assert row["per_image"][f"lpips_{net}"] == pytest.approx(
                    trunks[net](x, z).flatten().tolist(), abs=1e-5
                )
        assert {m for m in row["per_image"] if m.startswith("lpips")} == {f"lpips_{net}" for net in p.lpips}
    assert (
        protocol_rows(results, "clamped, mode=dynamic 192")["1 scale"]["psnr"]
        > protocol_rows(results, "published 192")["1 scale"]["psnr"] + 1
    )  # bytes that wrap around


def test_features_go_through_torch_fidelitys_pipeline(networks, pictures, monkeypatch):
    monkeypatch.setenv("BITVAE_WEIGHTS", str(networks))
    x = torch.cat([crop_image(f, protocol("llamagen", size=64)) for f in sorted(pictures.iterdir())[:4]])
    ours = InceptionFeatures("torch-fidelity")(to_protocol_bytes(x, PROTOCOLS["llamagen"]))
    library = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], str(networks / INCEPTION_FILES["torch-fidelity"])
    )
    assert torch.equal(ours, library(to_protocol_bytes(x, PROTOCOLS["llamagen"]))[0])


def test_fid_of_an_evaluation(networks, tmp_path, monkeypatch):
    "FID from images, against the library on the same features; few images: 2048 features are slow."
    monkeypatch.setenv("BITVAE_WEIGHTS", str(networks))
    for n in range(6):
        save_image(torch.rand(3, 32, 32) * 2 - 1, tmp_path / f"{n}.png")
    tok = BitVAE(
        BitVAEConfig(dim=4, channels=24, multipliers=(1,) * 6, res_blocks=0, stride=32, mode="dynamic")
    ).eval()  # one token: one scale
    with pytest.warns(UserWarning, match="6 pictures are fewer than needed for 2048 features"):
        results = evaluate(tok, tmp_path, protocol("clamped", size=32), ["fid"], batch=4)
    row, net = protocol_rows(results)["1 scale"], InceptionFeatures("pytorch-fid")
    x = torch.cat([load_image(f, 32) for f in sorted(tmp_path.glob("*.png"))])
    with torch.inference_mode():
        features = [net(t).double() for t in (x, tok.decode(tok.encode(x)))]
    library = fid_statistics_to_metric(*map(fid_features_to_statistics, features), verbose=False)[
        "frechet_inception_distance"
    ]
    assert row["fid"] == pytest.approx(library, rel=1e-5)
    assert {"kid", "kid_std", "precision", "recall"} <= row.keys() and "psnr" not in row


# the published layout, and bad input


def test_a_checkpoint_in_the_published_format(tmp_path):
    from safetensors.torch import save_file

    tok = BitVAE(BitVAEConfig(dim=16, channels=24, multipliers=(1, 1, 2), res_blocks=1, stride=4)).eval()
    names = published_names(tok)
    save_file(
        {names.get(name, name): w.contiguous() for name, w in tok.state_dict().items()},
        tmp_path / "vae.safetensors",
    )
    assert (
        main(
            [
                str(tmp_path / "vae.safetensors"),
                "--resolutions",
                "32",
                "--protocols",
                "published",
                "clamped",
                "--folder",
                str(tmp_path),
            ]
        )
        == 0
    )
    results = read_results(tmp_path)
    assert results["tokenizer"]["dim"] == 16 and list(results["protocols"]) == ["published 32", "clamped 32"]
    with pytest.raises(
        ValueError, match="mode dynamic and None, clamp False and True, rounding truncate and round"
    ):
        rank_results({"a": results})


def test_bad_input_is_named(tmp_path, capsys):
    assert main(["demo", "--images", str(tmp_path), "--resolutions", "32"]) == 1
    assert "no images in" in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(b"no picture")
    for workers in ("0", "1"):
        assert main(["demo", "--images", str(tmp_path), "--resolutions", "32", "--workers", workers]) == 1
        assert f"bitvae: {tmp_path / 'a.png'} is not an image that Pillow can read" in capsys.readouterr().err
    assert main(["demo", "--resolutions", "32", "--metrics", "psnr", "beauty"]) == 1
    assert "unknown metric beauty" in capsys.readouterr().err
    assert main(["demo", "--resolutions", "32", "--metrics", "ms_ssim"]) == 1
    assert "above 160 pixels" in capsys.readouterr().err
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "a.png")
    assert (
        main(["demo", "--images", str(tmp_path), "--resolutions", "32", "--metrics", "frechet_efficientnet"])
        == 1
    )
    assert "at least 2 pictures" in capsys.readouterr().err


def test_a_flat_picture_has_an_infinite_psnr_in_any_number_of_processes(tmp_path):
    for n in range(2):
        Image.new("RGB", (64, 64), (10 * n, 20, 30)).save(tmp_path / f"{n}.png")
    said = [
        bitvae(
            "evaluate",
            "demo",
            "--images",
            tmp_path,
            "--resolutions",
            32,
            "--folder",
            tmp_path / f"p{p}",
            "--processes",
            p,
        )
        for p in (1, 2)
    ]
    for done in said:
        assert done.returncode == 0 and re.search(r"mean colour +inf", done.stdout), done.stderr[-2000:]
    assert said[0].stdout.replace("/p1/", "/p2/") == said[1].stdout


def test_references_of_other_pictures_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("BITVAE_WEIGHTS", str(tmp_path / "weights"))

    def draw(seed):
        (tmp_path / "images").mkdir(exist_ok=True)
        for n in range(3):
            save_image(
                torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed + n)) * 2 - 1,
                tmp_path / "images" / f"{n}.bmp",
            )

    class Colours(torch.nn.Module):
        dim, takes_bytes = 12, False

        def forward(self, y):
            return torch.nn.functional.adaptive_avg_pool2d(y, 2).flatten(1)

    monkeypatch.setattr("bitvae.metrics.EfficientNetFeatures", Colours)

    def distance():
        return protocol_rows(
            evaluate(
                BitVAE.from_pretrained("demo"),
                tmp_path / "images",
                protocol("clamped", size=32),
                ["frechet_efficientnet"],
            )
        )["3 scales"]["frechet_efficientnet"]

    draw(0)
    first = distance()
    assert distance() == first and len(list(tmp_path.glob("weights/references/*.pt"))) == 1
    draw(10)
    with pytest.raises(ValueError, match="is about other pictures of the same names and sizes: remove it"):
        distance()
    next(tmp_path.glob("weights/references/*.pt")).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="is damaged .* and made anew"):
        assert distance() != first


def test_identical_pictures_are_told(tmp_path):
    for name in "ab":
        Image.new("RGB", (64, 64), "teal").save(tmp_path / f"{name}.png")
    with pytest.warns(
        UserWarning, match=r"1 of 2 pictures have the pixels of another \(.*b.png those of .*a.png\)"
    ):
        results = evaluate(BitVAE.from_pretrained("demo"), tmp_path, protocol("clamped", size=32))
    assert json.loads(json.dumps(results))["warnings"] and protocol_rows(results)["mean colour"]["psnr"] > 40


# memory

MEMORY = """
import sys, resource, threading, psutil, time, torch
from bitvae.evaluation import evaluate
from bitvae.metrics import protocol
from bitvae.tokenizer import BitVAE
import bitvae.evaluation as E
torch.set_num_threads(1)
E.THUMBNAILS = (1,)
class Colours(torch.nn.Module):
    dim, takes_bytes = 768, False
    def forward(self, y): return torch.nn.functional.adaptive_avg_pool2d(y, 16).flatten(1)
E.EfficientNetFeatures = Colours
E.frechet = lambda a, b: float((a.mean - b.mean).square().sum())  # only the sums can grow
peak, process, over = 0, psutil.Process(), False
def watch():
    global peak
    while not over: peak = max(peak, process.memory_info().rss); time.sleep(0.005)
thread = threading.Thread(target=watch); thread.start()
tok, images = BitVAE.from_pretrained("demo"), [sys.argv[1]] * int(sys.argv[2])
metrics = ["psnr", "frechet_efficientnet"]
try:
    evaluate(tok, images, protocol("clamped", size=16), metrics, batch=16, sample=200)
finally:
    over = True
    thread.join()
print(peak)
"""


def test_memory_does_not_grow_with_the_pictures(pictures, tmp_path):
    peaks = []
    for n in (200, 2000):
        env = os.environ | {
            "BITVAE_WEIGHTS": str(tmp_path / str(n)),
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }  # what is held, not how the heap is fragmented
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEMORY, pictures / "00.png", str(n)],
            capture_output=True,
            text=True,
            env=env,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout))
    assert peaks[1] <= 1.1 * peaks[0], peaks


def test_files_are_where_they_are_said_to_be(tmp_path):
    assert main(["demo", "--resolutions", "32", "--folder", str(tmp_path / "new")]) == 0
    assert sorted(f.name for f in Path(tmp_path, "new").iterdir()) == ["metrics.json"]
