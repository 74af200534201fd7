"""The CharBPE tokenizer of the authors' text-conditional RQ-Transformers as a tokenizer of transformers, and back.

Its two files, such as bpe-16k-vocab.json and bpe-16k-merges.txt, are not in the archives but in the authors'
repository, in rqvae/txtimg_datasets/tokenizers/pretrained. Which two, and the length of a text, stage2/config.yaml
says.

python conversion_scripts/convert_rq_tokenizer.py --tokenizer_dir pretrained --config_path stage2/config.yaml \
    --output_dir tokenizer
python conversion_scripts/convert_rq_tokenizer.py --tokenizer_dir tokenizer --config_path stage2/config.yaml \
    --output_dir original --to_original
"""

import argparse
import json
from pathlib import Path

from conversion import derive_config, load_checkpoint, run, setting
from tokenizers.implementations import CharBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rq_draft_revise.whole_files import whole_folder


# The name in the config -> vocabulary and merges.
FILES = {
    "bpe16k_huggingface": ("bpe-16k-vocab.json", "bpe-16k-merges.txt"),
    "bpe30k_huggingface": ("bpe-30k-vocab.json", "bpe-30k-merges.txt"),
}
PAD, UNK = "[PAD]", "[UNK]"
MERGES_VERSION = "#version: 0.2 - Trained by `huggingface/tokenizers`"
# What both tokenizers must turn into the same tokens: cases, accents, punctuation, unknown letters, length.
SPECIMENS = [
    "a painting of a cat with sunglasses in the frame .",
    "The Eiffel Tower, at night -- it's RAINING!",
    "a painting by RENÉ MAGRITTE",
    "富士山 and a volcano 🌋 at dusk",
    "",
    "one word after the other " * 40,
]


def tokenizer_config(original: dict) -> dict:
    """What a `stage2/config.yaml` says of the texts: the files' names, the length, and the size of the vocabulary."""
    name = setting(original, "dataset.txt_tok_name")
    if name not in FILES:
        raise ValueError(f"`dataset.txt_tok_name` must be one of {', '.join(FILES)}, got {name!r}.")
    length = setting(original, "arch.block_size_cond")
    if setting(original, "dataset.context_length", length) != length:
        raise ValueError(
            f"`dataset.context_length` must be `arch.block_size_cond`, {length}, got "
            f"{original['dataset']['context_length']}."
        )
    return dict(files=FILES[name], length=length, vocab_size=setting(original, "arch.vocab_size_cond"))


def original_tokenizer(folder: Path, files: tuple[str, str], length: int) -> CharBPETokenizer:
    """The tokenizer as the authors set it up for sampling; the merges that training leaves out at random all apply.

    Raises:
        `ValueError`: the files are missing or damaged, or without the two special tokens.
    """
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"`tokenizer_dir` must hold {' and '.join(files)}, but {str(folder)!r} lacks {missing}.")
    try:
        tokenizer = CharBPETokenizer.from_file(*(str(folder / file) for file in files), unk_token=UNK, lowercase=True)
    except Exception as error:  # tokenizers raises plain exceptions
        raise ValueError(f"{folder} must hold a vocabulary and its merges: {error}") from error
    if None in (tokenizer.token_to_id(PAD), tokenizer.token_to_id(UNK)):
        raise ValueError(f"{folder / files[0]} must have the tokens {PAD} and {UNK}.")
    tokenizer.add_special_tokens([PAD])
    tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id(PAD), pad_token=PAD)
    tokenizer.enable_truncation(max_length=length)
    return tokenizer


def convert_tokenizer(tokenizer_dir: Path, config_path: Path, folder: Path) -> None:
    """Write the tokenizer into `folder`, load it from there and compare the two on `SPECIMENS`."""
    config = derive_config(tokenizer_config, config_path)
    original = original_tokenizer(tokenizer_dir, config["files"], config["length"])
    if original.get_vocab_size() > config["vocab_size"]:
        raise ValueError(
            f"`tokenizer_dir` must hold the tokenizer of the model, which knows {config['vocab_size']} tokens, got "
            f"one of {original.get_vocab_size()}."
        )
    # a copy without padding and truncation: these are arguments of the call in transformers
    plain = type(original._tokenizer).from_str(original.to_str())
    plain.no_padding()
    plain.no_truncation()
    PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=config["length"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 renamed the class; 4 and 5 both know the old name
    saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    loaded = AutoTokenizer.from_pretrained(folder)
    ids = loaded(SPECIMENS, padding="max_length", max_length=config["length"], truncation=True).input_ids
    if ids != [encoding.ids for encoding in original.encode_batch(SPECIMENS)]:
        raise ValueError(f"{folder} was not written as meant: it makes other tokens when it is loaded again.")
    print(f"{original.get_vocab_size()} tokens written and compared.")


def restore_tokenizer(tokenizer_dir: Path, config_path: Path, folder: Path) -> None:
    """Write vocabulary and merges of the tokenizer in `tokenizer_dir` into `folder`."""
    files = derive_config(tokenizer_config, config_path)["files"]
    try:
        model = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        vocab, merges = model["vocab"], model["merges"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"`tokenizer_dir` must hold a converted tokenizer, got {str(tokenizer_dir)!r}.") from error
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    compact = json.dumps(
        dict(sorted(vocab.items(), key=lambda item: item[1])), ensure_ascii=False, separators=(",", ":")
    )
    (folder / files[0]).write_text(compact, encoding="utf-8")
    (folder / files[1]).write_text("\n".join([MERGES_VERSION, *lines]) + "\n", encoding="utf-8")
    print(f"{len(vocab)} tokens and {len(lines)} merges written.")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer_dir", required=True, help="Folder of the two files; with --to_original the converted folder."
    )
    parser.add_argument("--config_path", required=True, help="The transformer's stage2/config.yaml.")
    parser.add_argument("--checkpoint_path", help="stage2/model.pt, to check that it has a vector for every token.")
    parser.add_argument("--output_dir", required=True, help="Folder to write; must not exist or be empty.")
    parser.add_argument("--to_original", action="store_true", help="The other way: write vocabulary and merges.")
    args = parser.parse_args(argv)
    if args.checkpoint_path:
        table = load_checkpoint(args.checkpoint_path)[0].get("cond_emb.weight")
        expected = derive_config(tokenizer_config, args.config_path)["vocab_size"]
        if table is None or table.shape[0] != expected:
            got = None if table is None else tuple(table.shape)
            raise ValueError(f"{args.checkpoint_path} must have {expected} rows in `cond_emb.weight`, got {got}.")
    with whole_folder(args.output_dir) as folder:
        work = restore_tokenizer if args.to_original else convert_tokenizer
        work(Path(args.tokenizer_dir), Path(args.config_path), folder)
    print(f"Wrote {args.output_dir}")


if __name__ == "__main__":
    run(main)
