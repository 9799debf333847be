"Files, notebooks, checkpoints and machines that are unusual, as public reports describe them."

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from dataclasses import fields, replace

import pytest
import torch
from children import ROOT, bitvae, call, command_line
from PIL import Image
from safetensors.torch import save_file

from bitvae import Bits, BitVAE, BitVAEConfig, load_image, save_image
from bitvae.cli import COMMANDS
from bitvae.config import SHARD_FORMATS
from bitvae.data import CropPlan, CropRule, DataError, DeviceCrops, image_files, image_labels, write_list
from bitvae.evaluation import evaluate, read_results, save_results
from bitvae.images import ImageError, bundled_photographs
from bitvae.protocols import METRICS, PROTOCOLS, protocol
from bitvae.recipes import TrainConfig, recipe
from bitvae.storage import atomic_write
from bitvae.token_dataset import TokenDataset, add_to_tar, tokenize, verify_dataset

# archives, folders and images


def test_archive_names_and_labels(tmp_path):
    picture = bundled_photographs()[0].read_bytes()

    def tokens(**members):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, content in members.items():
                add_to_tar(tar, name, content)
        folder = tempfile.mkdtemp(dir=tmp_path)
        tokenize(BitVAE.from_pretrained("demo"), tmp_path / "x.tar", folder, size=32)
        return [image.label for image in TokenDataset(folder)]

    assert tokens(**{"./0.jpg": picture, "0.cls": b"5"}) == [5]
    with pytest.raises(DataError, match=r"x\.tar holds 0\.jpg twice"):
        tokens(**{"./0.jpg": picture, "0.jpg": picture})
    for label in ("²", "9" * 20):
        message = rf"x\.tar: the label of 0 is '{label}': class labels are integers"
        with pytest.raises(DataError, match=message):
            tokens(**{"0.jpg": picture, "0.cls": label.encode()})


def test_endings_system_folders_and_label_files(tmp_path):
    for name in ("a/0.mpo", "$RECYCLE.BIN/1.png", "System Volume Information/2.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.zeros(3, 32, 32), file := tmp_path / "set" / name)
    assert image_files(tmp_path / "set") == [tmp_path / "set" / "a" / "0.mpo"]
    (tmp_path / "labels").write_text("²")
    with pytest.raises(DataError, match="labels holds '²': class labels are integers"):
        image_labels([file], tmp_path / "labels")


def test_a_thin_image_stays_small_on_the_device(tmp_path):
    Image.new("RGB", (2, 8000), "red").save(tmp_path / "thin.png")
    crops = DeviceCrops([tmp_path / "thin.png"], CropPlan(256, 1), CropRule(upscale=True))
    assert crops.pixels.shape == (4 * 256**2, 3)


def test_text_in_place_of_a_path():
    with pytest.raises(ImageError, match=r"^'/9j/.{76}'\.\.\. is too long for a file name"):
        load_image("/9j/" * 100_000)


# output goes where it was sent


def test_a_full_disk_is_named():
    with pytest.raises(OSError, match=r"cannot write /dev/full \(No space left on device\): free disk space"):
        with atomic_write("/dev/full") as part:
            part.write_bytes(b"x")


def test_links_devices_modes_and_long_names(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "fifo")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "fifo").read_bytes()), daemon=True)
    reader.start()
    for name in ("link", "fifo", "a" * 255, "é" * 127):
        with atomic_write(tmp_path / name) as part:
            part.write_bytes(b"new")
    reader.join(10)
    with atomic_write(tmp_path / "private") as part:
        save_file({}, part)  # with mode 600
    (tmp_path / "plain").touch()
    assert len({(tmp_path / name).stat().st_mode for name in ("plain", "private")}) == 1
    assert received == [b"new"] and (tmp_path / "fifo").is_fifo()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    with pytest.raises(IsADirectoryError, match="it is a folder"), atomic_write(tmp_path):
        pass
    assert len(list(tmp_path.iterdir())) == 7  # no temporary file


def test_home_and_names_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    save_image(torch.zeros(3, 32, 32), "~x.png")  # no user has this name
    assert bitvae("encode", "~x.png", "~/x.bits").returncode == 0
    assert Bits.load("~/x.bits").image_size == (32, 32)
    assert BitVAE.from_pretrained(BitVAE.from_pretrained("demo").save_pretrained("~/tok")).config.dim == 6
    save_image(torch.zeros(3, 32, 32), tmp_path / "home" / "images.png")
    tokenize(BitVAE.from_pretrained("demo"), "~/images.png", "~/bits", size=32)
    assert verify_dataset("~/bits")["count"] == len(TokenDataset("~/bits")) == 1
    results = evaluate(BitVAE.from_pretrained("demo"), "~/images.png", protocol("clamped", size=32))
    save_results(results, "~/results")
    assert read_results("~/results")["images"] == ["images.png"]
    (tmp_path / "home" / "labels").write_text("7")
    assert image_labels(image_files("~/images.png"), "~/labels") == ["7"]
    assert write_list("~/bits/..", "~/list.txt") == 1
    assert not (tmp_path / "~").exists()


# papermill


def write_notebook(file, *cells):
    "Write a notebook that names no kernel; its first cell holds the parameters."
    cells = [
        {"cell_type": "code", "source": text, "outputs": [], "execution_count": None, "id": f"c{n}"}
        | {"metadata": {"tags": ["parameters"]} if n == 0 else {}}
        for n, text in enumerate(cells)
    ]
    file.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


def test_run_an_odd_notebook_on_an_odd_machine(tmp_path):
    write_notebook(tmp_path / "a{b}.ipynb", 'x: str | None = "y"', "print(repr(x))")
    (folder := tmp_path / "kernels" / "python3").mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "R"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    (temporary := tmp_path / ("t" * 90)).mkdir()
    env = {"JUPYTER_PATH": str(tmp_path), "TMPDIR": str(temporary), "HOME": "~"}
    output = tmp_path / f"{'o' * 249}.ipynb"
    run = bitvae("run", tmp_path / "a{b}.ipynb", output, "--set", "x=2024", **env)
    assert (run.returncode, run.stderr) == (0, "") and run.stdout.startswith("'2024'\n")


def test_a_killed_kernel(tmp_path):
    write_notebook(tmp_path / "a.ipynb", "x = 1", "import os; os.kill(os.getpid(), 9)")
    run = bitvae("run", tmp_path / "a.ipynb", tmp_path / "out.ipynb")
    assert run.returncode == 1 and "often out of memory" in run.stderr and "Traceback" not in run.stderr
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.ipynb", "out.failed.ipynb"]


# checkpoints and fingerprints


@pytest.mark.slow
def test_a_compiled_encoder_keeps_fingerprint_and_names(tmp_path):
    tok = BitVAE.from_pretrained("demo")
    mark, names = tok.fingerprint, set(tok.state_dict())
    tok.encoder = torch.compile(tok.encoder)
    assert set(tok.state_dict()) != names and tok.fingerprint == mark
    again = BitVAE.from_pretrained(tok.save_pretrained(tmp_path))
    assert again.fingerprint == mark and set(again.state_dict()) == names


def test_fingerprints_tell_rounded_weights_apart():
    tok, rounded = (BitVAE.from_pretrained("demo", dtype=d) for d in (torch.float32, torch.bfloat16))
    bits = tok.encode(load_image(bundled_photographs()[0], 64))
    assert tok.fingerprint != rounded.fingerprint == rounded.float().fingerprint
    assert rounded.decode(bits).shape == (1, 3, 64, 64)  # its decoder is as good
    tok.decode(replace(bits, tokenizer="4c9f54d6055a1fbf"))  # as written by earlier versions
    with pytest.raises(ValueError, match="tokenizer 4c9f54d7055a1fbf made these bits"):
        tok.decode(replace(bits, tokenizer="4c9f54d7055a1fbf"))


def test_an_unusable_checkpoint_says_what_it_holds(tmp_path):
    torch.save({"model": {"fc.weight": torch.ones(1)}, "epoch": 3}, tmp_path / "x.pth")
    run = bitvae("info", tmp_path / "x.pth", HOME="~")
    assert "x.pth: these are not the weights" in run.stderr and "model (dict), epoch (int)" in run.stderr
    run = bitvae("info", "infinity_vae_d16", HOME="~", BITVAE_WEIGHTS="")
    assert run.stderr == "bitvae: this user has no home folder for weights: set BITVAE_WEIGHTS or HOME\n"


# messages


def test_messages_about_files(tmp_path):
    tok = BitVAE.from_pretrained("demo")
    file = tok.encode(load_image(bundled_photographs()[0], 128)).save(tmp_path / "x.BITS")
    assert "7 of 7 scales" in bitvae("info", file).stdout
    file.write_bytes(file.read_bytes()[:150])
    assert "5 of 7 scales: 1x1 2x2 4x4 6x6 8x8\n" in bitvae("info", file).stdout
    run = bitvae("decode", file, tmp_path / "x.png")
    assert run.stderr == "bitvae: warning: the file is cut short: it holds 5 of 7 scales\n"
    assert "out names no image format" in bitvae("decode", file, tmp_path / "out").stderr
    (tmp_path / "images").mkdir()
    for name in (b"a\xe9.png", b"b\xe9.png"):
        (tmp_path / "images" / os.fsdecode(name)).touch()
    run = bitvae("make-list", tmp_path / "images")
    assert run.returncode == 1 and r"a\udce9.png', '" in run.stderr and r"b\udce9.png'" in run.stderr


def info_into_closed_pipe():
    "Run `bitvae info demo` with a standard output without a reader."
    read, write = os.pipe()
    os.close(read)
    sys.stdout = os.fdopen(write, "w")
    return command_line("info", "demo")


def test_a_closed_pipe_ends_quietly():
    run = call(info_into_closed_pipe)
    assert (run.returncode, run.stderr) == (141, "")


INTERRUPTED = """
import sys
from bitvae.cli import main
class Finder:
    def find_spec(self, name, *_):
        if name == "bitvae.launch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
sys.exit(main(["info", "demo"]))
"""


def test_an_interrupt_while_modules_are_imported():
    run = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stderr) == (130, "bitvae: stopped\n")


HELP = """
import sys
from bitvae.cli import main
try:
    main(sys.argv[1:])
except SystemExit as e:
    sys.exit(7 if "torch" in sys.modules else e.code)
"""


LINES = ["--version", "--help", *(f"{name} --help" for name in COMMANDS), "train d16_stage2 --help"]


@pytest.mark.parametrize("line", LINES)
def test_help_needs_no_torch(line):
    "Nor anything else that takes seconds to import; a new process, since the test's own has torch."
    command = [sys.executable, "-c", HELP, *line.split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    if line.startswith("train"):
        values = recipe("d16_stage2") if "stage2" in line else TrainConfig()
        for f in (*fields(TrainConfig), *fields(BitVAEConfig)):
            assert f"  {f.name}=" in result.stdout or f.name in ("name", "model")
        assert f"steps={values.steps} " in result.stdout
        assert "(float, positive, at most 1)" in " ".join(result.stdout.split())


MISTAKES = ["evaluate demo --metrics a", "evaluate demo --protocols b", "tokenize demo --format zip"]


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_in_a_name_needs_no_torch(line):
    "The message lists the names that exist."
    command = [sys.executable, "-c", HELP, *line.split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2, result.stderr
    message = result.stderr.splitlines()[-1]
    names = {"--metrics": METRICS, "--protocols": PROTOCOLS, "--format": SHARD_FORMATS}[line.split()[2]]
    assert "invalid choice" in message and all(name in message for name in names)


def test_modules_load_in_any_order():
    "The methods of `Bits` and `BitVAE` that other modules add need no import of these modules."
    program = (
        "from bitvae.tokenizer import BitVAE; import torch; tok = BitVAE.from_pretrained('demo'); "
        "bits = tok.encode(torch.zeros(1, 3, 64, 64)); from bitvae.bits import Bits; "
        "assert Bits.from_bytes(bits.to_bytes()) == bits; import bitvae; bitvae.plots, bitvae.Bits"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
