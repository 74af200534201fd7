"""Train the tokenizer of a text-conditional model on the captions of a data set.

    python examples/train_tokenizer.py --dataset_name data/emoji-scenes --model word --max_text_length 12 \\
        --output_dir pipelines/emoji-scenes/tokenizer
    python examples/train_tokenizer.py --dataset_name pixparse/cc3m-wds --caption_column txt --streaming \\
        --output_dir runs/cc3m-tokenizer

The default is what the parent's CC-3M models read: lower-cased byte-pair encoding of 16,384 tokens with `[PAD]` 0 and
`[UNK]` 1, 32 tokens a caption. `--model word` has one token a word: for captions of few words, where it keeps the
prefix short and an unknown word is one `[UNK]` that can be named.
"""

import argparse
from collections import Counter
from itertools import chain, islice

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rq_draft_revise.data import SkippedRows, is_empty, load_split
from rq_draft_revise.flags import FlagHelp, check_sources


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=FlagHelp)
    parser.add_argument("--dataset_name", help="Hub id, or a local folder that `datasets.load_dataset` reads.")
    parser.add_argument("--dataset_config_name", help="Configuration of a data set that has several.")
    parser.add_argument("--train_data_dir", help="Folder of images with a metadata.csv or .jsonl of captions.")
    parser.add_argument("--data_files", nargs="+", help="Files of the split (parquet, csv, json, tar), patterns too.")
    parser.add_argument("--train_split", default="train", help="Captions of this split.")
    parser.add_argument("--caption_column", default="text", help="Column of the captions; empty ones are left out.")
    parser.add_argument("--streaming", action="store_true", help="Read without preparing the data set first.")
    parser.add_argument("--model", choices=["bpe", "word"], default="bpe", help="Parts of words, or whole words.")
    parser.add_argument("--vocab_size", type=int, default=16384, help="At most so many tokens, special ones included.")
    parser.add_argument("--max_text_length", type=int, default=32, help="Tokens a caption is cut or padded to.")
    parser.add_argument("--output_dir", required=True, help="Folder of the tokenizer.")
    args = parser.parse_args(argv)
    if args.dataset_name is None and args.train_data_dir is None and args.data_files is None:
        raise ValueError("Give the captions by --dataset_name, --train_data_dir or --data_files.")
    check_sources(args)
    for name, smallest in (("vocab_size", 3), ("max_text_length", 1)):
        if getattr(args, name) < smallest:
            raise ValueError(f"--{name} must be at least {smallest}, got {getattr(args, name)}.")
    return args


def train_tokenizer(captions, model="bpe", vocab_size=16384, max_text_length=32):
    """Captions, an iterable of strings, to a `PreTrainedTokenizerFast` with `[PAD]` 0 and `[UNK]` 1."""
    special = ["[PAD]", "[UNK]"]
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # words and single marks of punctuation
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
        tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
        )
        tokenizer.train_from_iterator(captions, trainer)
    else:
        counts = Counter()
        for caption in captions:
            counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(caption)))
        # the most frequent, in alphabetical order: ids then depend on the words alone, not on how often each came
        words = sorted(word for word, _ in counts.most_common(vocab_size - len(special)))
        vocabulary = {word: i for i, word in enumerate(special + words)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=max_text_length
    )


def captions_of(dataset, column, skipped):
    """The captions of a data set, streamed or not, without reading the images; empty ones are counted."""
    for row, caption in enumerate(dataset.select_columns([column])):
        if is_empty(caption[column]):
            skipped.add(f"an empty {column!r}", f"row {row}")
        else:
            yield caption[column]


def main(args):
    dataset = load_split(
        args.train_split, None, args.caption_column, args.dataset_name, args.train_data_dir, args.data_files,
        args.train_split, dataset_config_name=args.dataset_config_name, streaming=args.streaming,
        split_argument="train_split",
    )  # fmt: skip
    skipped = SkippedRows(f"split {args.train_split!r}")
    captions = captions_of(dataset, args.caption_column, skipped)
    first = next(captions, None)
    if first is None:
        raise ValueError(
            f"--caption_column must hold captions, got none in {args.caption_column!r} of split {args.train_split!r}; "
            f"skipped: {skipped}."
        )
    tokenizer = train_tokenizer(chain([first], captions), args.model, args.vocab_size, args.max_text_length)
    tokenizer.save_pretrained(args.output_dir)
    some = list(islice(captions_of(dataset, args.caption_column, SkippedRows(shown=0)), 10_000))
    lengths = sorted(len(ids) for ids in tokenizer(some).input_ids)
    print(
        f"Saved {len(tokenizer):,} tokens to {args.output_dir}; skipped: {skipped}. Of the first {len(lengths):,} "
        f"captions the median has {lengths[len(lengths) // 2]} tokens and the longest {lengths[-1]}; they are cut at "
        f"{args.max_text_length}."
    )


if __name__ == "__main__":
    main(parse_args())
