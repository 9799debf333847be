"""Draw the pictures of the bundled tokenizer's model card again, and write its table of results."""
import json
import re
from pathlib import Path

import numpy as np
import torch

from bitvae import BitVAE, load_image, show_images
from bitvae.evaluation import results_table
from bitvae.images import held_out_photographs, new_figure
from bitvae.plots import legend_outside, plot_progressive, plot_quality

CARD = Path(__file__).parent.parent / "benchmarks" / "demo-tokenizer"


def moving_average(log: list[dict], name: str, count: int = 9) -> tuple[np.ndarray, np.ndarray]:
    "Return steps and smoothed values."
    steps, values = (np.array([row[key] for row in log]) for key in ("step", name))
    kernel = np.ones(count) / count
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")


def draw_training(training: dict):  # a matplotlib Figure
    "Plot the losses of both stages."
    panels = {"stage 1, second part": ("stage1", {"pixels": "squared error"}),
              "stage 2": ("stage2", {"pixels": "L1", "perceptual": "LPIPS (VGG)"}),
              "stage 2, discriminator": ("stage2", {"hinge": "hinge loss"})}  # fmt: skip
    fig, axes = new_figure(10, 2.3, 1, 3)
    for ax, (title, (stage, names)) in zip(axes[0], panels.items(), strict=True):
        for name, label in names.items():
            ax.plot(*moving_average(training[stage]["fine"], name), label=label)
        ax.set(title=title, xlabel="step", ylabel=next(iter(names.values())) if len(names) == 1 else "loss")
        if len(names) > 1:
            legend_outside(ax)
    return fig


def main() -> None:
    results = json.loads((CARD / "metrics.json").read_text())
    tok = BitVAE.from_pretrained("demo", optimize=True)
    photos = torch.cat([load_image(file, 256) for file in held_out_photographs()])
    pairs = show_images(torch.cat([photos, tok.decode(tok.encode(photos))]), columns=len(photos), width=2)
    for row, name in enumerate(("original", "reconstruction")):
        pairs.axes[row * len(photos)].set_ylabel(name)
    jpeg = {"pil_kwargs": {"quality": 85, "subsampling": 1}, "dpi": 144}
    pairs.savefig(CARD / "pairs.jpg", **jpeg)
    plot_progressive(tok, photos[[0, 4]], scales=range(1, 11)).savefig(CARD / "progressive.jpg", **jpeg)
    for metric in ("psnr", "lpips_alex", "efficientnet"):
        plot_quality(results, metric).savefig(CARD / f"quality_{metric}.png", dpi=144)
    draw_training(json.loads((CARD / "training.json").read_text())).savefig(CARD / "training.png", dpi=144)

    card, table = (CARD / "README.md").read_text(), results_table(results)
    card = re.sub(r"```\n +last scale.*?\n```", lambda _: f"```\n{table}\n```", card, flags=re.S)
    (CARD / "README.md").write_text(card)


if __name__ == "__main__":
    main()
