"""Milliseconds an image over the batch size, and the least that the hardware allows.

    python benchmarks/sampling_plot.py sampling.json --output docs/images/benchmark-sampling.png

The JSON is that of `benchmarks/sampling.py`, whose `--plot` does the same; several are drawn into one figure, a later
one in place of what an earlier one has too.
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", nargs="+", help="JSON files of `benchmarks/sampling.py`.")
    parser.add_argument("--output", required=True, help="PNG.")
    return parser.parse_args(argv)


def plot(report: dict, path: str) -> None:
    """A panel a dtype and mode; a colour a pipeline and T_draft; dots as measured, bars (dashes between) the bound."""
    panels = list(dict.fromkeys((row["dtype"], row["mode"]) for row in report["cases"]))
    names = list(dict.fromkeys((row["pipeline"], row["num_inference_steps"]) for row in report["cases"]))
    width = max(8, 1.5 + 3.4 * len(panels))  # the legend needs eight inches
    legend_height = 0.3 + 0.2 * -(-len(names) // 3)
    height = 3.6 + legend_height
    figure, axes = plt.subplots(1, len(panels), figsize=(width, height), sharey=True, squeeze=False)
    colors = plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    for axis, (dtype, mode) in zip(axes[0], panels):
        for color, (pipeline, steps) in zip(colors, names):
            rows = {
                row["batch_size"]: row
                for row in report["cases"]
                if (row["dtype"], row["mode"], row["pipeline"], row["num_inference_steps"])
                == (dtype, mode, pipeline, steps)
            }
            sizes, rows = sorted(rows), [rows[size] for size in sorted(rows)]
            measured = [1e3 * row["seconds_per_image"] for row in rows]
            least = [1e3 * row["least_seconds_per_image"] for row in rows]
            axis.plot(sizes, measured, "o-", color=color, label=f"{pipeline}, T {steps}")
            axis.plot(sizes, least, "_--", color=color, markersize=12)
        axis.set(title=f"{dtype}, {mode}", xlabel="batch size", xscale="log", yscale="log")
        sizes = sorted({row["batch_size"] for row in report["cases"]})
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms an image (bars: hardware limit)")
    handles, labels = axes[0][0].get_legend_handles_labels()  # all panels draw the same
    figure.legend(handles, labels, loc="lower center", ncols=min(3, len(labels)), frameon=False, fontsize="small")
    figure.tight_layout(rect=(0, legend_height / height, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    args = parse_args(argv)
    reports = [json.loads(Path(name).read_text()) for name in args.reports]
    plot({"cases": [row for report in reports for row in report["cases"]]}, args.output)


if __name__ == "__main__":
    main()
