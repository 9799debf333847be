"""`make retrain-demo`: train the tokenizer `demo` again, in its two stages, through papermill, and compare it with the one in the package."""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from bitvae.cli import NotebookError, run_notebook
from bitvae.bitstream import fit_coder
from bitvae.entropy_coding import save_coder
from bitvae.evaluation import results_table
from bitvae.checkpoints import CODER_FILE
from bitvae.tokenizer import BitVAE

ROOT = Path(__file__).parent.parent
NOTEBOOKS, CARD = Path("nbs/experiments"), Path("benchmarks/demo-tokenizer")
PROCESSES = 2  # as it was trained: the batch of a step is theirs together, and sums over them round in this order


def train_stages(
    folder: Path,
    steps: int | None,  # of each stage, instead of the recipe's
) -> Path:  # the second stage's run
    "Both stages, each going on where it was stopped."
    runs = [folder / f"stage{n}" for n in (1, 2)]
    for n, run in enumerate(runs, 1):
        overrides = ({"steps": steps} if steps else {}) | ({"start": str(runs[0])} if n == 2 else {})
        if (run / "tokenizer" / "config.json").exists() and (run / "train.ipynb").exists(): print(f"stage {n} is trained already: {run}"); continue
        print(f"stage {n}:")
        run_notebook(NOTEBOOKS / "train.ipynb", run / "train.ipynb", recipe=f"demo_stage{n}", overrides=overrides,
                     images=str(CARD / "photographs"), folder=str(run), processes=PROCESSES)  # fmt: skip
    return runs[1]


def same_weights(a: BitVAE, b: BitVAE) -> bool:
    "Whether two tokenizers are the same to the last bit."
    weights = [tok.state_dict() for tok in (a, b)]
    return a.config == b.config and all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--folder", type=Path, default=ROOT / "runs" / "demo-tokenizer")
    arguments.add_argument("--steps", type=int, help="of each stage, to try it out, without an evaluation")
    args = arguments.parse_args()
    start, folder = time.monotonic(), args.folder.resolve()
    os.chdir(ROOT)  # so that records hold no path of this machine
    folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    made = folder / "demo"
    BitVAE.from_pretrained(train_stages(folder, args.steps)).half().save_pretrained(made)
    if not args.steps:
        save_coder(fit_coder(BitVAE.from_pretrained(made), str(CARD / "photographs")), made / CODER_FILE)
        run_notebook(NOTEBOOKS / "evaluate.ipynb", folder / "evaluate.ipynb", tokenizer=str(made), folder=str(folder), metrics=["psnr", "ssim", "ms_ssim", "efficientnet"])
        print(f"\n{results_table(json.loads((folder / 'metrics.json').read_text()))}\n")
    same = same_weights(BitVAE.from_pretrained(made), BitVAE.from_pretrained("demo"))
    print(f"in {(time.monotonic() - start) / 60:.1f} minutes: {made}; these weights are {'those' if same else 'not those'} of the package")


if __name__ == "__main__":
    try: main()
    except KeyboardInterrupt: sys.exit("\nstopped; the same command goes on from the last checkpoint")
    except NotebookError as e: sys.exit(f"\n{e}")
