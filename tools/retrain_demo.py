"""`make retrain-demo`: train the bundled tokenizer again through papermill, and compare."""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from bitvae.bitstream import fit_coder
from bitvae.checkpoints import CODER_FILE
from bitvae.cli import NotebookError, run_notebook
from bitvae.entropy_coding import save_coder
from bitvae.evaluation import results_table
from bitvae.tokenizer import BitVAE

ROOT = Path(__file__).parent.parent
NOTEBOOKS = Path("nbs/experiments")
SHORT = {"size": 32, "batch": 2}  # a try without a GPU


def train(run: Path, images: str, steps: int | None) -> None:
    "Train, or resume from the last checkpoint; `steps`: a short try on small crops."
    if (run / "tokenizer" / "config.json").exists() and (run / "train.ipynb").exists():
        print(f"already trained: {run}")
        return
    parameters = {"recipe": "demo_stage1", "overrides": SHORT | {"steps": steps} if steps else {}}
    run_notebook(NOTEBOOKS / "train.ipynb", run / "train.ipynb", images=images, folder=str(run), **parameters)


def same_weights(a: BitVAE, b: BitVAE) -> bool:
    "Return whether two tokenizers have the same configuration and bitwise equal weights."
    weights = b.state_dict()
    return a.config == b.config and all(torch.equal(w, weights[name]) for name, w in a.state_dict().items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "demo-tokenizer")
    photographs = Path("runs/photographs")
    parser.add_argument("--images", type=Path, default=photographs, help="from tools/photographs.py")
    parser.add_argument("--steps", type=int, help="for a short try without evaluation")
    args = parser.parse_args()
    started, folder = time.monotonic(), args.folder.resolve()
    os.chdir(ROOT)  # records then hold no absolute path
    if not args.steps and not args.images.is_dir():
        sys.exit(f"{args.images} is missing: python tools/photographs.py --out {args.images}")
    images = "bundled" if args.steps else str(args.images)
    folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    made = folder / "demo"
    train(folder / "train", images, args.steps)
    BitVAE.from_pretrained(folder / "train").half().save_pretrained(made)
    if not args.steps:
        save_coder(fit_coder(BitVAE.from_pretrained(made), images), made / CODER_FILE)
        parameters = {"tokenizer": str(made), "folder": str(folder), "metrics": ["psnr", "ssim", "lpips"]}
        run_notebook(NOTEBOOKS / "evaluate.ipynb", folder / "evaluate.ipynb", **parameters)
        print(f"\n{results_table(json.loads((folder / 'metrics.json').read_text()))}\n")
    same = same_weights(BitVAE.from_pretrained(made), BitVAE.from_pretrained("demo"))
    print(f"in {(time.monotonic() - started) / 60:.1f} minutes: {made}")
    print(f"these weights are {'those' if same else 'not those'} of the package")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; rerun the same command to resume from the last checkpoint")
    except NotebookError as e:
        sys.exit(f"\n{e}")
