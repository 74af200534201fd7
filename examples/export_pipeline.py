"""Make a trained pipeline ready to publish: cast, in small files, without the paths of the machine that made it.

    python examples/export_pipeline.py runs/emoji-transformer pipelines/emoji-scenes --dtype float16

Where `output_dir` has no README.md yet, the pipeline's own is copied, or one is written of what is known.
"""

import argparse
import json
from pathlib import Path

import torch

from rq_draft_revise.model_card import copy_card, model_card, only_variant
from rq_draft_revise.publishing import pipeline_class_of


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="Folder of the trained pipeline.")
    parser.add_argument("output_dir", help="Folder to write; files of the same names are replaced.")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="Of the weights; the RQ-VAE's codebook stays float32."
    )
    parser.add_argument("--variant", help="Names the files of weights, such as fp16.")
    parser.add_argument("--max_shard_size", default="16MB", help="Of each file of weights.")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    source, folder = Path(args.pipeline), Path(args.output_dir)
    pipe = load_pipeline(source, DTYPES[args.dtype])
    pipe.save_pretrained(folder, max_shard_size=args.max_shard_size, variant=args.variant)
    for path in [folder / "model_index.json", *sorted(folder.glob("*/*config.json"))]:
        content = json.loads(path.read_text(encoding="utf-8"))
        for name in ("_name_or_path", "is_local", "local_files_only"):
            content.pop(name, None)
        if content.get("tokenizer_class") == "TokenizersBackend":
            # transformers 5 renamed the class; 4 and 5 both know the old name
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not (folder / "README.md").exists() and not copy_card(source, folder, folder.as_posix()):
        model_card(pipe, folder.as_posix(), variant=args.variant).save(folder / "README.md")
    files = [path for path in folder.glob("**/*") if path.is_file()]
    print(f"Wrote {folder}: {sum(path.stat().st_size for path in files) / 1e6:.1f} MB in {len(files)} files.")


def load_pipeline(folder: Path, dtype: torch.dtype):
    """A pipeline of whichever class of this package its index names, cast."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"`pipeline` must be the folder of a pipeline, got {folder}, without a model_index.json.")
    return pipeline_class_of(folder).from_pretrained(folder, dtype=dtype, variant=only_variant(folder))


if __name__ == "__main__":
    main()
