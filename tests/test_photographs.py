"""tools/photographs.py: archive formats, checksums, resuming; no network."""

import hashlib
import importlib.util
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FILE = Path(__file__).parent.parent / "tools" / "photographs.py"
spec = importlib.util.spec_from_file_location("photographs", FILE)
photographs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(photographs)


def png(width, height):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def test_list():
    rows = photographs.read_list()
    assert len(rows) == len({row["file"] for row in rows}) == 491
    assert all(row["license"] and len(row["sha256"]) == len(row["source_sha256"]) == 64 for row in rows)


def test_list_refuses_photographs_that_are_measured_on(tmp_path):
    for package in ("plasma-workspace-wallpapers", "scikit-image==0.26.0"):
        (tmp_path / "list.tsv").write_text(f"file\tpackage\na.jpg\t{package}\n")
        with pytest.raises(ValueError, match=package.partition("=")[0]):
            photographs.read_list(tmp_path / "list.tsv")


def test_qt_resource():
    "A root with one folder, which holds a plain and a compressed file."
    texts = [b"", b"plain", b"compressed" * 50]
    names, offsets = b"", []
    for name in ("images", "a.txt", "b.txt"):
        offsets.append(len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    packed = struct.pack(">I", len(texts[2])) + zlib.compress(texts[2])
    contents = struct.pack(">I", 5) + texts[1] + struct.pack(">I", len(packed)) + packed
    tree = struct.pack(">IHIIQ", 0, 2, 1, 1, 0) + struct.pack(">IHIIQ", offsets[0], 2, 2, 2, 0)
    tree += struct.pack(">IHIIQ", offsets[1], 0, 0, 0, 0) + struct.pack(">IHIIQ", offsets[2], 1, 0, 9, 0)
    start = 20 + len(tree)
    header = struct.pack(">4s4I", b"qres", 2, 20, start, start + len(contents))
    found = photographs.read_rcc(header + tree + contents + names)
    assert found == {"images/a.txt": texts[1], "images/b.txt": texts[2]}
    with pytest.raises(ValueError, match="no Qt resource"):
        photographs.read_rcc(b"PK" + bytes(30))


def test_enlightenment_theme():
    data, name = b"a picture", b"edje/images/0\0"
    start = 12 + 2 * 24
    entries = struct.pack(">6I", start, len(data), len(data), start + len(data), len(name), 0)
    entries += struct.pack(">6I", start, len(data), 99, start + len(data), len(name), 1)  # compressed
    theme = struct.pack(">3I", 0x1EE70F42, 2, 0) + entries + data + name
    assert photographs.read_edj(theme) == {"edje/images/0": data}
    with pytest.raises(ValueError, match="no Eet archive"):
        photographs.read_edj(bytes(40))


APT_GET = "#!/bin/sh\necho E: Unable to locate package $2 >&2\nexit 100\n"


def write_wheel(file, contents):
    with zipfile.ZipFile(file, "w") as wheel:
        for name, data in contents.items():
            wheel.writestr(name, data)
        wheel.writestr("good-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: good\nVersion: 1\n")
        wheel.writestr("good-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("good-1.dist-info/RECORD", "")


def test_problems_are_named_and_the_rest_is_made(tmp_path, monkeypatch, capsys):
    "With a wheel that pip finds in a folder, and an apt-get that finds nothing."
    sources = {"large.png": png(640, 1000), "small.png": png(60, 50), "changed.png": png(70, 70)}
    jpegs = {name: photographs.to_jpeg(data, name) for name, data in sources.items()}
    sources["changed.png"] = png(71, 71)

    def sha(data):
        return hashlib.sha256(data).hexdigest()

    lines = ["file\tpackage\tpath\tsource_sha256\tsha256"]
    for n in ("large", "small"):
        lines.append(f"{n}.jpg\tgood==1\t{n}.png\t{sha(sources[f'{n}.png'])}\t{sha(jpegs[f'{n}.png'])}")
    lines += [f"{n}.jpg\tgood==1\t{n}.png\t{sha(b'')}\t" for n in ("changed", "gone")]
    lines += ["no.jpg\tmissing\tno.png\t\t"]
    (tmp_path / "list.tsv").write_text("\n".join(lines) + "\n")
    wheel, apt_get = tmp_path / "good-1-py3-none-any.whl", tmp_path / "apt-get"
    write_wheel(wheel, sources)
    apt_get.write_text(APT_GET)
    apt_get.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    def run():
        code = photographs.main(["--out", str(tmp_path / "out"), "--list", str(tmp_path / "list.tsv")])
        return code, capsys.readouterr().err

    code, problems = run()
    assert code == 1 and "package missing: Unable to locate package missing (1 photographs)" in problems
    assert "changed.jpg: another picture in this version" in problems
    assert "gone.jpg: not in this version" in problems and len(problems.splitlines()) == 3
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["large.jpg", "small.jpg"]
    assert Image.open(tmp_path / "out" / "large.jpg").size == (576, 900)
    assert Image.open(tmp_path / "out" / "small.jpg").size == (60, 50)

    (tmp_path / "list.tsv").write_text("\n".join(lines[:3]) + "\n")
    wheel.unlink()  # nothing left to download
    assert run() == (0, "")
