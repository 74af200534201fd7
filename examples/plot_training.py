"""Draw the curves of a training log.

    python examples/plot_training.py runs/emoji-vae/train_log.jsonl --output curves.png mse:train_mse psnr
    python examples/plot_training.py runs/emoji-transformer/train_log.jsonl --output curves.png image_loss text_loss

One panel a quantity, over the images seen: what was logged while training as a line, validations as marked lines, one
a split.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", help="A train_log.jsonl.")
    parser.add_argument("quantities", nargs="+", help="Names in the log, a panel each; `a:b` draws two in one panel.")
    parser.add_argument("--output", required=True, help="PNG or SVG file.")
    parser.add_argument("--logarithmic", action="store_true", help="Logarithmic vertical axes.")
    return parser.parse_args(argv)


def read_curves(path: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Quantity -> curve's label -> points (images seen, value); lists in the log are left out."""
    curves = defaultdict(lambda: defaultdict(list))
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        label = entry["kind"] + (f", {entry['split']}" if "split" in entry else "")
        for name, value in entry.items():
            if isinstance(value, (int, float)) and name not in ("step", "images", "seconds"):
                curves[name][label].append((entry["images"], value))
    return curves


def main(argv=None):
    args = parse_args(argv)
    curves = read_curves(Path(args.log))
    names = [panel.split(":") for panel in args.quantities]
    unknown = sorted({name for panel in names for name in panel} - set(curves))
    if unknown:
        raise ValueError(f"`quantities` must be among {sorted(curves)}, got {unknown}.")

    figure, panels = plt.subplots(1, len(names), figsize=(5 * len(names), 3.5), squeeze=False, layout="constrained")
    for panel, group in zip(panels[0], names, strict=True):
        for name in group:
            for label, points in sorted(curves[name].items()):
                style = "-" if label == "train" else "o--"
                panel.plot(
                    [images / 1000 for images, _ in points],
                    [value for _, value in points],
                    style,
                    markersize=3,
                    linewidth=1,
                    label=f"{name} ({label})",
                )
        panel.set_xlabel("thousand images seen")
        panel.set_ylabel(", ".join(group))
        panel.grid(alpha=0.3)
        if args.logarithmic:
            panel.set_yscale("log")
        panel.legend(fontsize=7)
    figure.savefig(args.output, dpi=120)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
