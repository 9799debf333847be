"""`make demo`: train the recipe `quick` and evaluate it, and the tokenizer of the package, through papermill, into runs/demo."""
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


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--folder", type=Path, default=ROOT / "runs" / "demo")
    arguments.add_argument("--recipe", default="quick")
    args = arguments.parse_args()
    folder, start = args.folder.resolve(), time.monotonic()
    show = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder

    if (folder / "tokenizer" / "config.json").exists():
        trained = json.loads((folder / "run.json").read_text())["config"]["name"]
        if trained != args.recipe: sys.exit(f"{show} holds a run of recipe {trained!r}, not {args.recipe!r}: choose another --folder")
        print(f"{show} holds a finished run: it is not trained again, only evaluated. To train anew: rm -r {show}")
    else:
        if (folder / "run.json").exists(): print(f"{show} holds an unfinished run: it goes on where it stopped. To begin anew: rm -r {show}")
        print(f"training {args.recipe} on the bundled photographs, a few minutes on two cores:")
        run_notebook(NOTEBOOKS / "train.ipynb", folder / "train.ipynb", recipe=args.recipe, folder=str(folder), resume=True)
    images = [str(f) for f in held_out_photographs()[:4]]
    made = {"just trained": (folder, str(folder / "tokenizer"), 128), "of the package": (folder / "package", "demo", 256)}
    print("evaluating it, and the tokenizer of the package, on four photographs of scikit-image, which no training saw:")
    for into, tokenizer, size in made.values():
        run_notebook(NOTEBOOKS / "evaluate.ipynb", into / "evaluate.ipynb", tokenizer=tokenizer, images=images, folder=str(into), resolutions=[size])

    rows = [torch.cat([load_image(f, 256) for f in images])]
    for who, (into, tokenizer, size) in made.items():
        results, tok = json.loads((into / "metrics.json").read_text()), BitVAE.from_pretrained(tokenizer)
        rows.append(torch.cat([tok.decode(tok.encode(load_image(f, size))) for f in images]))
        print(f"\nThe tokenizer {who}, on held-out {', '.join(Path(name).stem for name in results['images'])} at {size}x{size} pixels:\n\n{results_table(results)}")
    show_images(rows, ["photograph"] * 4 + ["trained just now"] * 4 + ["of the package"] * 4, columns=4, width=2).savefig(folder / "both.png", dpi=100)

    print(f"\nin {(time.monotonic() - start) / 60:.1f} minutes; in {show}:")
    print("both.png                               photographs, and what comes back from the two tokenizers")
    print("train.ipynb, evaluate.ipynb            the executed notebooks")
    print("tokenizer                              config.json, model.safetensors")
    print("metrics.json, progressive.png          numbers and pictures, scale by scale; in package/ those of the other one")


if __name__ == "__main__":
    try: main()
    except KeyboardInterrupt: sys.exit("\nstopped; the same command goes on from the last checkpoint")
    except NotebookError as e: sys.exit(f"\n{e}")
