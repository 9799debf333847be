"""`make retrain-demo`: train the bundled tokenizer again, in two stages through papermill, and compare."""
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
CARD = Path("benchmarks/demo-tokenizer")
PROCESSES = 2  # as in the original training: sums over a step's batch then round in the same order


def train_stages(
    folder: Path,
    steps: int | None,  # of each stage, instead of the recipe's
) -> Path:  # the second stage's run
    "Train both stages; resume each from its last checkpoint."
    runs = [folder / "stage1", folder / "stage2"]
    for n, run in enumerate(runs, 1):
        if (run / "tokenizer" / "config.json").exists() and (run / "train.ipynb").exists():
            print(f"stage {n} is already trained: {run}")
            continue
        overrides = {"steps": steps} if steps else {}
        if n == 2:
            overrides["init_from"] = str(runs[0])
        parameters = {"recipe": f"demo_stage{n}", "overrides": overrides, "processes": PROCESSES}
        parameters |= {"images": str(CARD / "photographs"), "folder": str(run)}
        print(f"stage {n}:")
        run_notebook(NOTEBOOKS / "train.ipynb", run / "train.ipynb", **parameters)
    return runs[1]


def same_weights(a: BitVAE, b: BitVAE) -> bool:
    "Return whether two tokenizers have the same configuration and bitwise equal weights."
    weights = b.state_dict()
    return a.config == b.config and all(torch.equal(w, weights[name]) for name, w in a.state_dict().items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "demo-tokenizer")
    parser.add_argument("--steps", type=int, help="of each stage, for a short try without evaluation")
    args = parser.parse_args()
    started, folder = time.monotonic(), args.folder.resolve()
    os.chdir(ROOT)  # records then hold no absolute path
    folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    made = folder / "demo"
    BitVAE.from_pretrained(train_stages(folder, args.steps)).half().save_pretrained(made)
    if not args.steps:
        coder = fit_coder(BitVAE.from_pretrained(made), str(CARD / "photographs"))
        save_coder(coder, made / CODER_FILE)
        metrics = ["psnr", "ssim", "ms_ssim", "efficientnet"]
        parameters = {"tokenizer": str(made), "folder": str(folder), "metrics": metrics}
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
