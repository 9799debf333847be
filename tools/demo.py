"""`make demo`: train the recipe `quick` and evaluate it, both through papermill, into runs/demo."""
import argparse
import json
import sys
import time
from pathlib import Path

from bitvae.cli import NotebookError, run_notebook
from bitvae.evaluation import table
from bitvae.images import held_out_photographs

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
    print("evaluating on four photographs of scikit-image, which no training saw:")
    run_notebook(NOTEBOOKS / "evaluate.ipynb", folder / "evaluate.ipynb", tokenizer=str(folder / "tokenizer"), images=images, folder=str(folder), size=128)

    results = json.loads((folder / "metrics.json").read_text())
    print(f"\nHeld-out {', '.join(Path(name).stem for name in results['images'])} at 128x128 pixels, in {(time.monotonic() - start) / 60:.1f} minutes:\n")
    print(table(results))
    print(f"\nexecuted notebooks            {show}/train.ipynb, {show}/evaluate.ipynb")
    print(f"metrics                       {show}/metrics.json")
    print(f"tokenizer                     {show}/tokenizer (config.json, model.safetensors)")
    print(f"progressive reconstructions   {show}/progressive.png")


if __name__ == "__main__":
    try: main()
    except KeyboardInterrupt: sys.exit("\nstopped; the same command goes on from the last checkpoint")
    except NotebookError as e: sys.exit(f"\n{e}")
