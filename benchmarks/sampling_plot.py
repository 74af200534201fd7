"""Milliseconds an image over the batch size, and the least that the hardware allows.

    python benchmarks/sampling_plot.py sampling.json sampling.png

The JSON is that of `benchmarks/sampling.py`, whose `--plot` does the same.
"""

import json
import sys

import matplotlib


matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt  # noqa: E402


def plot(report: dict, path: str) -> None:
    """A panel a dtype and mode; a colour a pipeline and T_draft, solid as measured, dashed the bound."""
    panels = list(dict.fromkeys((row["dtype"], row["mode"]) for row in report["cases"]))
    names = list(dict.fromkeys((row["pipeline"], row["num_inference_steps"]) for row in report["cases"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(1.5 + 3.4 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (dtype, mode) in zip(axes[0], panels):
        for color, (pipeline, steps) in enumerate(names):
            rows = [
                row
                for row in report["cases"]
                if (row["dtype"], row["mode"], row["pipeline"], row["num_inference_steps"])
                == (dtype, mode, pipeline, steps)
            ]
            sizes = [row["batch_size"] for row in rows]
            measured = [1e3 * row["seconds_per_image"] for row in rows]
            least = [1e3 * row["least_seconds_per_image"] for row in rows]
            axis.plot(sizes, measured, "o-", color=f"C{color}", label=f"{pipeline}, T {steps}")
            axis.plot(sizes, least, "_--", color=f"C{color}", markersize=12)
        axis.set(title=f"{dtype}, {mode}", xlabel="batch size", xscale="log", yscale="log")
        sizes = sorted({row["batch_size"] for row in report["cases"]})
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms an image (dashed: hardware limit)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(3, len(labels)), frameon=False, fontsize="small")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        plot(json.load(file), sys.argv[2])
