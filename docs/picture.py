"""Draw README's picture from the main job's results: `python docs/picture.py [runs/digits]` writes docs/digits.png."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from flowfast.experiments import JobResult


def main() -> None:
    """One row per sampler, one column per starting point."""
    result = JobResult.load(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits"))
    arrays = result.arrays()
    rows = {f"exact flow\n{result.teacher.evaluations:.0f} evaluations": arrays["teacher"]}
    for grid in sorted(result.grids, key=lambda grid: grid.composed):
        label = f"{grid.kind} grid, {len(grid.segments)} evaluations\nrelative error {grid.composed:.3f}"
        rows[label] = arrays[f"student_{grid.kind}"]
    figure, axes = pyplot.subplots(len(rows), 12, figsize=(9, 0.62 * len(rows)), squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.reshape(8, 8).clamp(-1, 1), cmap="gray_r", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_linewidth(0.4)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.subplots_adjust(left=0.22, right=0.995, top=0.98, bottom=0.02, wspace=0.06, hspace=0.08)
    figure.savefig(Path(__file__).with_name("digits.png"), dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
