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
STAGES = "demo_stage1", "demo_stage2"
SHORT = {"size": 32, "batch": 4}  # a try without a GPU
SHORT2 = {"perceptual": "efficientnet", "discriminator_start": 1}  # and without LPIPS's trunk
SHARE = 0.85  # of the second stage's weights in the bundled ones


def train(run: Path, recipe: str, images: str, overrides: dict) -> None:
    "Train, or resume from the last checkpoint."
    if (run / "tokenizer" / "config.json").exists() and (run / "train.ipynb").exists():
        print(f"already trained: {run}")
        return
    parameters = {"recipe": recipe, "overrides": overrides, "images": images, "folder": str(run)}
    run_notebook(NOTEBOOKS / "train.ipynb", run / "train.ipynb", **parameters)


def interpolate(first: BitVAE, second: BitVAE, share: float) -> BitVAE:
    "Return the weighted average of two tokenizers' weights, `share` of the second (arXiv 1809.00219)."
    weights = second.state_dict()
    mixed = BitVAE(first.config)
    mixed.load_state_dict({n: torch.lerp(w, weights[n], share) for n, w in first.state_dict().items()})
    return mixed


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
    made, runs = folder / "demo", [folder / stage for stage in STAGES]
    short = SHORT | {"steps": args.steps} if args.steps else {}
    train(runs[0], STAGES[0], images, short)
    train(runs[1], STAGES[1], images, {"init_from": str(runs[0])} | short | (SHORT2 if short else {}))
    mixed = interpolate(*map(BitVAE.from_pretrained, runs), SHARE)
    mixed.half().save_pretrained(made)
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
