"""Figure 1 of the paper in miniature, from the JSON file of `examples/reproduce_tables.py`.

    python examples/plot_tables.py pipelines/cifar10-32/tables.json docs/images/figure-1-cifar10-32.png

Left: Frechet distance on classifier features by the steps of the draft. Right: precision and recall by the number of
revisions. Bars are one standard error.
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
    parser.add_argument("results", help="JSON file by examples/reproduce_tables.py, with the part figure-1.")
    parser.add_argument("output", help="PNG to write.")
    return parser.parse_args(argv)


def curve(cells: dict[str, dict], names: dict[int, str], figure: str) -> dict[str, list[float]]:
    """Places, values and errors of the cells `names`, as `Axes.errorbar` takes them."""
    chosen = [cells[name] for name in names.values()]
    return {"x": list(names), "y": [one[figure] for one in chosen], "yerr": [one[f"{figure}_se"] for one in chosen]}


def main(args):
    try:
        results = dict(json.loads(Path(args.results).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"`results` must be a JSON file, and {args.results} is not one: {error}.") from error
    if "figure-1" not in results.get("arguments", {}).get("parts", []) or "cells" not in results:
        raise ValueError(
            f"`results` must be of reproduce_tables.py with the part figure-1, and {args.results} is not."
        )
    cells, revised = results["cells"], results["paper_sampler"]["num_revisions"]
    steps = sorted(
        int(name.split("-")[1].split(",")[0]) for name in cells if name.startswith("random-") and "M 0" in name
    )
    revisions = sorted(int(name.split("M ")[1]) for name in cells if name.startswith("random-64, "))

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for m, label in ((0, "draft"), (revised, f"after {revised} revisions")):
        left.errorbar(
            **curve(cells, {t: f"random-{t}, M {m}" for t in steps}, "fd"), marker="o", capsize=3, label=label
        )
    left.set_xscale("log", base=2)
    left.set_xticks(steps, [str(t) for t in steps])
    left.set(xlabel="steps of the draft", ylabel="FD, classifier features", ylim=(0, None))
    for name in ("precision", "recall"):
        right.errorbar(
            **curve(cells, {m: f"random-64, M {m}" for m in revisions}, name), marker="o", capsize=3, label=name
        )
    right.set(xlabel="revisions", ylabel="precision, recall", xticks=revisions, ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    name = Path(results["arguments"]["pipeline"]).name
    figure.suptitle(f"{name}: {results['num_images']} images a point, features of {results['network']['name']}")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main(parse_args())
