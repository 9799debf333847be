"""Evaluation: independent of batch size, processes and interruptions; reference metrics; bounded memory."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torchvision
from children import bitvae, ranks, script
from PIL import Image
from pytorch_msssim import ms_ssim as library_ms_ssim
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from bitvae.checkpoints import published_names
from bitvae.evaluation import PartialResult, evaluate, final_row, main, protocol_rows, rank_results
from bitvae.evaluation import read_results, settle
from bitvae.images import MAX_RESIZED_PIXELS, held_out_photographs, load_image, save_image
from bitvae.losses import TRUNKS
from bitvae.metrics import InceptionFeatures, crop_image, to_protocol_bytes, torchvision_crop
from bitvae.protocols import INCEPTION_FILES, PROTOCOLS, protocol
from bitvae.tokenizer import BitVAE, BitVAEConfig

pytestmark = pytest.mark.slow


class Geometry(Image.Image):
    "An RGB image without pixels that records how it is resized and cropped."

    def __init__(self, width, height, steps=()):
        super().__init__()
        self._size, self._mode, self.steps = (width, height), "RGB", steps

    def convert(self, mode):
        return self

    def resize(self, size, *_, **__):
        return Geometry(*size, (*self.steps, size))

    def crop(self, box):
        return Geometry(box[2] - box[0], box[3] - box[1], (*self.steps, box))


@pytest.mark.parametrize(("name", "size"), [("published", 256), ("published", 512), ("bsq-vit", 256)])
def test_crops_of_all_sizes_are_those_of_torchvision(name, size):
    "The code calls torchvision's functions; compare with its transforms, which the published script uses."
    p = protocol(name, size=size)
    filters = torchvision.transforms.InterpolationMode
    steps = [torchvision.transforms.Resize(size, filters(p.resize)), torchvision.transforms.CenterCrop(size)]
    transform = torchvision.transforms.Compose(steps)
    for width, height in itertools.product(range(1, 701), range(1, 701, 3)):
        if size**2 * max(width, height) / min(width, height) > MAX_RESIZED_PIXELS:
            continue  # of aspect ratio 256 or more at 512 pixels: cut before it is resized
        image = Geometry(width, height)
        found, expected = torchvision_crop(image, p), transform(image)
        assert (found.steps, found.size) == (expected.steps, (size, size)), (width, height)


WORKER = """
import sys, torch
from torch.nn import functional as F
from bitvae.evaluation import evaluate, save_results
from bitvae.protocols import protocol
from bitvae.tokenizer import BitVAE

class MeanColors(torch.nn.Module):  # a stand-in for EfficientNet: a Frechet distance of few features is quick
    dim, takes_bytes = 12, False
    def forward(self, y): return F.adaptive_avg_pool2d(y, 2).flatten(1)

torch.set_num_threads(1)
images, folder, batch = sys.argv[1:]
protocols = [protocol(name, size=64) for name in ("clamped", "published")]
results = evaluate(
    BitVAE.from_pretrained("demo"), images, protocols, ["psnr", "ssim", "frechet_efficientnet"], int(batch),
    folder=folder, networks={"efficientnet-lite0": MeanColors()}, save_every=0.0,
)
if results: save_results(results, folder + "/metrics.json")
"""


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITVAE_WEIGHTS", str(tmp_path / "no-cache"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    "23 images of many sizes, crops of the held-out photographs."
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    photographs = [Image.open(f).convert("RGB") for f in held_out_photographs()]
    for n in range(23):
        photo = photographs[n % 6]
        w, h = rng.integers(70, min(photo.size), 2)
        left, top = rng.integers(photo.width - w + 1), rng.integers(photo.height - h + 1)
        photo.crop((left, top, left + w, top + h)).save(folder / f"{n:02}.png")
    return folder


@pytest.fixture(scope="module")
def worker(tmp_path_factory, images):
    file = tmp_path_factory.mktemp("worker") / "worker.py"
    file.write_text(WORKER)

    def start(folder, processes=1, batch=4):
        return ranks(processes, script, file, images, folder, batch, BITVAE_WEIGHTS=str(folder / "weights"))

    return start


def finish(children, folder):
    for result in [child.finish() for child in children]:
        assert result.returncode == 0, result.stderr[-3000:]
    return read_results(folder)


@pytest.fixture(scope="module")
def plain(worker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return finish(worker(folder), folder)


def same(a, b):
    """Compare two evaluations to 1e-6.

    Tolerances of single images are larger: the batch size changes the last digits of a network's output, so
    some values round to the next byte, 5e-6 dB each. Without clamping, 255.9999 becomes white and 256 black.
    """
    assert a["images"] == b["images"] and a["bits"] == b["bits"] and len(a["images"]) == 23
    for label, entry in a["protocols"].items():
        mean, single = (1e-6, 1e-4) if entry["protocol"]["clamp"] else (1e-3, 1e-2)
        for name, row in protocol_rows(a, label).items():
            other = protocol_rows(b, label)[name]
            assert row.keys() == other.keys() and len(row["per_image"]["psnr"]) == 23
            for key in row:
                if isinstance(row[key], float):
                    assert row[key] == pytest.approx(other[key], rel=1e-6, abs=mean), (label, name, key)
            for metric, values in row["per_image"].items():
                assert values == pytest.approx(other["per_image"][metric], abs=single), (label, name, metric)


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_count_every_image_once(worker, plain, tmp_path, processes):
    same(plain, finish(worker(tmp_path, processes=processes), tmp_path))


@pytest.mark.parametrize("batch", [1, 7])
def test_batch_size_changes_nothing(worker, plain, tmp_path, batch):
    same(plain, finish(worker(tmp_path, batch=batch), tmp_path))


@pytest.mark.parametrize("processes", [(1, 2), (2, 1)])
def test_killed_evaluation_resumes(worker, plain, tmp_path, processes):
    children, end = worker(tmp_path, processes[0], batch=3), time.monotonic() + 120
    while not (parts := list(tmp_path.glob("parts/*/part-*.pt"))):
        assert all(child.process.is_alive() for child in children) and time.monotonic() < end
        time.sleep(0.01)
    for child in children:
        child.kill()
    assert parts and not (tmp_path / "metrics.json").exists()
    same(plain, finish(worker(tmp_path, processes[1], batch=5), tmp_path))


def test_unfinished_evaluation_is_not_mixed_with_another(images, tmp_path):
    tok = BitVAE.from_pretrained("demo")
    evaluate(tok, images, protocol("clamped", size=32), folder=tmp_path)
    with pytest.raises(ValueError, match="unfinished evaluation with other protocols"):
        evaluate(tok, images, protocol("published", size=32), folder=tmp_path)
    with pytest.raises(ValueError, match="with other fingerprint"):
        evaluate(tok, "held-out", protocol("clamped", size=32), folder=tmp_path)
    part = next(tmp_path.glob("parts/*/part-*.pt"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"part-0000-0.pt is damaged .*: remove it"):
        evaluate(tok, images, protocol("clamped", size=32), folder=tmp_path)


# metrics equal those of their libraries


@pytest.fixture(scope="module")
def pair():
    "Images, and reconstructions outside [-1, 1]."
    x = torch.cat([crop_image(f, protocol("clamped", size=192)) for f in held_out_photographs()[:3]])
    torch.manual_seed(0)
    return x, 1.1 * x + 0.1 * torch.randn_like(x)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    "Random weights in the files of the real ones."
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    options = {"weights": None, "num_classes": 1008, "aux_logits": False, "init_weights": False}
    noise = torchvision.models.inception_v3(**options).state_dict()  # the same names and shapes
    noise = {name: w * 6**0.5 if w.ndim == 4 else w for name, w in noise.items()}  # keeps the signals' scale
    for name in INCEPTION_FILES.values():
        torch.save(noise, folder / name)
    torch.save(torchvision.models.vgg16().state_dict(), folder / TRUNKS["vgg"])
    torch.save(torchvision.models.alexnet().state_dict(), folder / TRUNKS["alex"])
    return folder


class FixedReconstructions(BitVAE):
    "A tokenizer that reconstructs images `y` from any bits."

    def decode(self, bits, clamp):
        assert not clamp
        return self.y


def test_metrics_equal_their_libraries(pair, networks, tmp_path, monkeypatch):
    monkeypatch.setenv("BITVAE_WEIGHTS", str(networks))
    x, y = pair
    for n, image in enumerate(x):
        save_image(image, tmp_path / f"{n}.png")
    config = BitVAEConfig(dim=4, channels=24, multipliers=(1,) * 8, res_blocks=0, stride=128, mode="dynamic")
    tok = FixedReconstructions(config).eval()  # 2x2 tokens: few scales
    tok.y = y
    protocols = [
        protocol(name, size=192, resize="bicubic", antialias=True, halve=False, mode="dynamic")
        for name in PROTOCOLS
    ]
    metrics = ["psnr", "ssim", "ms_ssim", "lpips"]
    results = evaluate(tok, tmp_path, protocols, metrics, batch=3, prefixes=False)
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
        pixels = (to_protocol_bytes(t, p).double() for t in (x, y))
        expected = library_ms_ssim(*pixels, data_range=255, size_average=False)
        assert row["per_image"]["ms_ssim"] == pytest.approx(expected.tolist(), abs=1e-6)
        with torch.inference_mode():
            for net in p.lpips:
                assert row["per_image"][f"lpips_{net}"] == pytest.approx(
                    trunks[net](x, z).flatten().tolist(), abs=1e-5
                )
        assert {m for m in row["per_image"] if m.startswith("lpips")} == {f"lpips_{net}" for net in p.lpips}
    labels = ("clamped, mode=dynamic 192", "published 192")
    clamped, published = (final_row(protocol_rows(results, label))["psnr"] for label in labels)
    assert clamped > published + 1  # unclamped bytes wrap around


def test_features_equal_torch_fidelitys(networks, images, monkeypatch):
    monkeypatch.setenv("BITVAE_WEIGHTS", str(networks))
    x = torch.cat([crop_image(f, protocol("llamagen", size=64)) for f in sorted(images.iterdir())[:4]])
    ours = InceptionFeatures("torch-fidelity")(to_protocol_bytes(x, PROTOCOLS["llamagen"]))
    library = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], str(networks / INCEPTION_FILES["torch-fidelity"])
    )
    assert torch.equal(ours, library(to_protocol_bytes(x, PROTOCOLS["llamagen"]))[0])


def test_fid_of_an_evaluation(networks, tmp_path, monkeypatch):
    "FID equals the library on the same features; few images and scales, because 2048 features are slow."
    monkeypatch.setenv("BITVAE_WEIGHTS", str(networks))
    for n in range(6):
        save_image(torch.rand(3, 32, 32) * 2 - 1, tmp_path / f"{n}.png")
    config = BitVAEConfig(dim=4, channels=24, multipliers=(1,) * 6, res_blocks=0, stride=32, mode="dynamic")
    tok = BitVAE(config).eval()  # one token: one scale
    with pytest.warns(UserWarning, match="6 .* are fewer than needed for 2048 features"):
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


# the published format, and bad input


def test_checkpoint_in_the_published_format(tmp_path):
    from safetensors.torch import save_file

    tok = BitVAE(BitVAEConfig(dim=16, channels=24, multipliers=(1, 1, 2), res_blocks=1, stride=4)).eval()
    names = published_names(tok)
    save_file(
        {names.get(name, name): w.contiguous() for name, w in tok.state_dict().items()},
        tmp_path / "vae.safetensors",
    )
    line = f"{tmp_path}/vae.safetensors --resolutions 32 --protocols published clamped --folder {tmp_path}"
    assert main(line.split()) == 0
    results = read_results(tmp_path)
    assert results["tokenizer"]["dim"] == 16 and list(results["protocols"]) == ["published 32", "clamped 32"]
    with pytest.raises(
        ValueError, match="mode dynamic and None, clamp False and True, rounding truncate and round"
    ):
        rank_results({"a": results})


def test_bad_input_is_named(tmp_path, capsys):
    def fails(message, *options):
        assert main(["demo", "--resolutions", "32", *options]) == 1
        assert message in capsys.readouterr().err

    folder = ("--images", str(tmp_path))
    fails("no images in", *folder)
    (tmp_path / "a.png").write_bytes(b"no image")
    for workers in ("0", "1"):
        message = f"bitvae: {tmp_path / 'a.png'} is not an image that Pillow can read"
        fails(message, *folder, "--workers", workers)
    fails("above 160 pixels", "--metrics", "ms_ssim")
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "a.png")
    fails("a Frechet distance needs", *folder, "--metrics", "frechet_efficientnet")


def test_flat_image_has_an_infinite_psnr_in_any_number_of_processes(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for n in range(2):
        Image.new("RGB", (64, 64), (10 * n, 20, 30)).save(images / f"{n}.png")
    outputs = []
    for p in (1, 2):
        options = ("--resolutions", 32, "--folder", tmp_path / f"p{p}", "--processes", p)
        result = bitvae("evaluate", "demo", "--images", images, *options)
        found = re.search(r"mean color .* inf ", result.stdout)
        assert result.returncode == 0 and found, result.stderr[-2000:]
        outputs.append(result.stdout)
    assert outputs[0].replace("/p1/", "/p2/") == outputs[1]


class MeanColors(torch.nn.Module):
    dim, takes_bytes = 12, False

    def forward(self, y):
        return torch.nn.functional.adaptive_avg_pool2d(y, 2).flatten(1)


def test_cached_features_of_other_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BITVAE_WEIGHTS", str(tmp_path / "weights"))
    folder = tmp_path / "images"
    folder.mkdir()
    tok, metric = BitVAE.from_pretrained("demo"), "frechet_efficientnet"

    def draw(seed):
        for n in range(3):
            generator = torch.Generator().manual_seed(seed + n)
            save_image(torch.rand(3, 32, 32, generator=generator) * 2 - 1, folder / f"{n}.bmp")

    def distance():
        networks = {"efficientnet-lite0": MeanColors()}
        results = evaluate(tok, folder, protocol("clamped", size=32), [metric], networks=networks)
        return protocol_rows(results)["3 scales"][metric]

    draw(0)
    first = distance()
    assert distance() == first and len(list(tmp_path.glob("weights/references/*.pt"))) == 1
    draw(10)
    with pytest.raises(ValueError, match="is about other images of the same names and sizes: remove it"):
        distance()
    next(tmp_path.glob("weights/references/*.pt")).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="is damaged .* and made anew"):
        assert distance() != first


def test_duplicate_images_give_a_warning(tmp_path):
    for name in "ab":
        Image.new("RGB", (64, 64), "teal").save(tmp_path / f"{name}.png")
    with pytest.warns(UserWarning, match=r"1 of 2 images duplicate .* \(.*b.png those of .*a.png\)"):
        results = evaluate(BitVAE.from_pretrained("demo"), tmp_path, protocol("clamped", size=32))
    assert json.loads(json.dumps(results))["warnings"] and protocol_rows(results)["mean colour"]["psnr"] > 40


# memory

MEMORY = """
import sys, threading, psutil, time, torch
from bitvae.evaluation import evaluate
from bitvae.protocols import protocol
from bitvae.tokenizer import BitVAE

torch.set_num_threads(1)
process, over, peak, loop_peak = psutil.Process(), False, 0, 0

class Colors(torch.nn.Module):
    dim, takes_bytes = 768, False
    def forward(self, y):
        global loop_peak
        loop_peak = max(loop_peak, process.memory_info().rss)
        return torch.nn.functional.adaptive_avg_pool2d(y, 16).flatten(1)

def watch():
    global peak
    while not over:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.005)

thread = threading.Thread(target=watch)
thread.start()
images, networks = [sys.argv[1]] * int(sys.argv[2]), {"efficientnet-lite0": Colors()}
metrics, small = ["psnr", "frechet_efficientnet"], protocol("clamped", size=16)
try:
    evaluate(BitVAE.from_pretrained("demo"), images, small, metrics, 16, sample=200, networks=networks)
finally:
    over = True
    thread.join()
print(loop_peak, peak)
"""


def test_memory_does_not_grow_with_the_images(images, tmp_path):
    "Nor during the loop over the images, whose sums the matrices of the Frechet distance would hide."
    peaks = []
    for n in (200, 800):  # the threshold keeps fragmentation of the heap out of the measurement
        env = os.environ | {"BITVAE_WEIGHTS": str(tmp_path / str(n)), "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, "-W", "ignore", "-c", MEMORY, images / "00.png", str(n)]
        result = subprocess.run(command, capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr[-2000:]
        peaks.append([int(peak) for peak in result.stdout.split()[-2:]])
    for few, many in zip(*peaks, strict=True):
        assert many <= 1.1 * few, peaks


def test_finished_evaluation_leaves_only_its_results(tmp_path):
    assert main(["demo", "--resolutions", "32", "--folder", str(tmp_path / "new")]) == 0
    assert sorted(f.name for f in Path(tmp_path, "new").iterdir()) == ["metrics.json"]


def test_results_of_a_gpu_join_those_saved_before():
    "A save moves the scores to the CPU; later ones come from the device."
    with FakeTensorMode():  # checks devices, without one
        scores = [torch.ones(2), torch.ones(3, device="cuda")]
        result = PartialResult(scores={"psnr": scores})
        settle(None, result)
        assert [(values.device.type, len(values)) for values in scores] == [("cpu", 5)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_numbers_of_the_cpu(tmp_path):
    "Every row, thumbnails included, with partial results; bits near zero may flip."
    tok, small = BitVAE.from_pretrained("demo"), protocol("clamped", size=192)
    metrics = ["psnr", "ssim", "ms_ssim"]
    expected = protocol_rows(evaluate(tok, "bundled", small, metrics, codec_rates=[0.5]))
    options = {"codec_rates": [0.5], "batch": 4, "folder": tmp_path, "save_every": 0.0}
    measured = protocol_rows(evaluate(tok.cuda(), "bundled", small, metrics, **options))
    assert measured.keys() == expected.keys()
    for name, row in expected.items():
        assert all(abs(measured[name][m] - row[m]) < (0.01 if m == "psnr" else 1e-3) for m in metrics), name
