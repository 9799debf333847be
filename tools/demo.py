"""`make demo`: train `quick` into runs/demo through papermill; evaluate it and the bundled tokenizer."""
import argparse
import io
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

from bitvae.cli import NotebookError, run_notebook
from bitvae.evaluation import CODECS, protocol_rows, read_results, thumbnail_bits
from bitvae.images import held_out_photographs, load_image, show_images
from bitvae.tokenizer import BitVAE

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "nbs" / "experiments"
FILES = """\
{shown}/both.png                photographs and both reconstructions: open it first
{shown}/train.ipynb             the executed run: curves, samples, losses
{shown}/evaluate.ipynb          every metric after every scale; in package/ the same of the bundled one
{shown}/tokenizer               config.json, model.safetensors
{shown}/metrics.json            the numbers of the table; progressive.png: images per scale"""
NEXT = """\
bitvae view --tokenizer {shown}     look at its bits in the browser (pip install ".[viewer]")
bitvae train quick --images photographs/ --folder runs/mine --set steps=5000     train on your images"""


def train(folder: Path, recipe: str, shown: Path) -> None:
    "Train into the folder, unless it holds a finished run of the recipe."
    if (folder / "tokenizer" / "config.json").exists():
        trained = json.loads((folder / "run.json").read_text())["config"]["name"]
        if trained != recipe:
            sys.exit(f"{shown} holds a run of recipe {trained!r}, not {recipe!r}: choose another --folder")
        print(f"{shown} holds a finished run: evaluating it. To train again: rm -r {shown}", flush=True)
        return
    if (folder / "run.json").exists():
        print(f"{shown} holds an unfinished run: resuming it. To start again: rm -r {shown}")
    note = "three steps that try the path, not a tokenizer" if recipe == "smoke" else "minutes on two cores"
    print(f"training {recipe} on the bundled photographs, {note}:")
    run_notebook(NOTEBOOKS / "train.ipynb", folder / "train.ipynb", recipe=recipe, folder=str(folder))


def summary(tables: dict[str, dict], files: list[Path]) -> str:  # title: rows of `evaluate`
    "Return one table: bits per pixel, PSNR and SSIM of both tokenizers, side by side with baselines."
    names = ", ".join(file.stem for file in files)
    lines = [f"Means over {names}. The two tokenizers work at different sizes and numbers of bits,",
             "so compare each with the baselines in its own columns, not with the other one.", "",
             " " * 18 + "".join(f"{title:>36}" for title in tables),
             " " * 18 + "".join(f"{'bits/pixel':>20}{'PSNR':>8}{'SSIM':>8}" for _ in tables)]  # fmt: skip
    for row in ("mean colour", "8x8 thumbnail", "half of the scales", "all scales", *CODECS):
        cells = []
        for rows in tables.values():
            scales = [r for r in rows.values() if "scales" in r]
            pixels = scales[-1]["bits"] / scales[-1]["bits_per_pixel"]
            codec = next((r for name, r in rows.items() if name.split()[0] == row), None)
            named = {"half of the scales": scales[len(scales) // 2 - 1], "all scales": scales[-1]}
            r = named.get(row) or codec or rows[row]
            rate = r.get("bits_per_pixel") or thumbnail_bits(row) / pixels
            cells.append(f"{rate:>20.4f}{r['psnr']:>8.2f}{r['ssim']:>8.3f}")
        row = row.replace("colour", "color")
        lines.append(f"{row + ', smallest' if row in CODECS else row:18}{''.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--recipe", default="quick")
    args = parser.parse_args()
    folder, started = args.folder.resolve(), time.monotonic()
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    train(folder, args.recipe, shown)

    few = args.recipe == "smoke"
    files = held_out_photographs()[: 2 if few else 4]
    images = [torch.cat([load_image(file, 256) for file in files])]
    titles, tables = ["photograph, 256x256"] * len(files), {}
    print(f"evaluating it and the bundled tokenizer on {len(files)} held-out photographs of scikit-image:")
    for title, run, tokenizer, size in (
        ("trained now", folder, str(folder / "tokenizer"), 128),
        ("bundled", folder / "package", "demo", 256),
    ):
        parameters = {"tokenizer": tokenizer, "images": list(map(str, files)), "resolutions": [size]}
        parameters |= {"pictures": 1} if few else {}
        with redirect_stdout(io.StringIO()):  # the tables are in the executed notebook
            run_notebook(NOTEBOOKS / "evaluate.ipynb", run / "evaluate.ipynb", folder=str(run), **parameters)
        tok = BitVAE.from_pretrained(tokenizer)
        tables[f"{title}, {size}x{size}"] = protocol_rows(read_results(run))
        images.append(torch.cat([tok.decode(tok.encode(load_image(file, size))) for file in files]))
        bits = tok.encode(load_image(files[0], size)).count
        titles += [f"{title}, {size}x{size}, {bits:,} bits"] * len(files)
    show_images(images, titles, columns=len(files), width=2.4).savefig(folder / "both.png")
    minutes = (time.monotonic() - started) / 60
    print(f"\n{summary(tables, files)}\n\nDone in {minutes:.1f} minutes. Files:\n{FILES.format(shown=shown)}")
    print(f"\nWhat to do next:\n{NEXT.format(shown=shown)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; rerun the same command to resume from the last checkpoint")
    except NotebookError as e:
        sys.exit(f"\n{e}")
