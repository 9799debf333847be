"""`make demo`: train `quick` into runs/demo through papermill; evaluate it and the bundled tokenizer."""
import argparse
import json
import sys
import time
from pathlib import Path

import torch

from bitvae.cli import NotebookError, run_notebook
from bitvae.evaluation import results_table
from bitvae.images import held_out_photographs, load_image, show_images
from bitvae.tokenizer import BitVAE

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "nbs" / "experiments"
FILES = """\
both.png                               photographs and the reconstructions of the two tokenizers
train.ipynb, evaluate.ipynb            the executed notebooks
tokenizer                              config.json, model.safetensors
metrics.json, progressive.png          metrics and images per scale; in package/ those of the bundled one"""


def train(folder: Path, recipe: str, shown: Path) -> None:
    "Train into the folder, unless it holds a finished run of the recipe."
    if (folder / "tokenizer" / "config.json").exists():
        trained = json.loads((folder / "run.json").read_text())["config"]["name"]
        if trained != recipe:
            sys.exit(f"{shown} holds a run of recipe {trained!r}, not {recipe!r}: choose another --folder")
        print(f"{shown} holds a finished run: evaluating it. To train again: rm -r {shown}")
        return
    if (folder / "run.json").exists():
        print(f"{shown} holds an unfinished run: resuming it. To start again: rm -r {shown}")
    print(f"training {recipe} on the bundled photographs, a few minutes on two cores:")
    run_notebook(NOTEBOOKS / "train.ipynb", folder / "train.ipynb", recipe=recipe, folder=str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--recipe", default="quick")
    args = parser.parse_args()
    folder, started = args.folder.resolve(), time.monotonic()
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    train(folder, args.recipe, shown)

    files = held_out_photographs()[:4]
    rows = [torch.cat([load_image(file, 256) for file in files])]
    tables = []
    print("evaluating it and the bundled tokenizer on four held-out photographs of scikit-image:")
    for title, run, tokenizer, size in (
        ("trained now", folder, str(folder / "tokenizer"), 128),
        ("bundled", folder / "package", "demo", 256),
    ):
        parameters = {"tokenizer": tokenizer, "images": list(map(str, files)), "resolutions": [size]}
        run_notebook(NOTEBOOKS / "evaluate.ipynb", run / "evaluate.ipynb", folder=str(run), **parameters)
        results, tok = json.loads((run / "metrics.json").read_text()), BitVAE.from_pretrained(tokenizer)
        rows.append(torch.cat([tok.decode(tok.encode(load_image(file, size))) for file in files]))
        names = ", ".join(Path(name).stem for name in results["images"])
        tables.append(f"\nThe tokenizer {title}, on {names} at {size}x{size}:\n\n{results_table(results)}")
    print(*tables, sep="\n")
    titles = ["photograph"] * 4 + ["trained now"] * 4 + ["bundled"] * 4
    show_images(rows, titles, columns=4, width=2).savefig(folder / "both.png", dpi=100)
    print(f"\nin {(time.monotonic() - started) / 60:.1f} minutes; in {shown}:\n{FILES}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; rerun the same command to resume from the last checkpoint")
    except NotebookError as e:
        sys.exit(f"\n{e}")
