"""Train the tokenizer of a text-conditional model on the captions of a data set.

    python examples/train_tokenizer.py --dataset_name data/emoji-scenes --model word --max_text_length 12 \\
        --output_dir pipelines/emoji-scenes/tokenizer

The default is what the parent's CC-3M models read: lower-cased byte-pair encoding of 16,384 tokens with `[PAD]` 0 and
`[UNK]` 1, 32 tokens a caption. `--model word` has one token a word: for captions of few words, where it keeps the
prefix short and an unknown word is one `[UNK]` that can be named.
"""

import argparse
from collections import Counter

from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", help="Hub id, or a local folder that `datasets.load_dataset` reads.")
    parser.add_argument("--data_files", nargs="+", help="Files of the split, in place of those of the data set.")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--model", choices=["bpe", "word"], default="bpe")
    parser.add_argument("--vocab_size", type=int, default=16384, help="At most so many tokens, special ones included.")
    parser.add_argument("--max_text_length", type=int, default=32, help="Tokens a caption is cut or padded to.")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args(argv)
    if args.dataset_name is None:
        raise ValueError("--dataset_name must name a data set with captions, got None.")
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


def main(args):
    dataset = load_dataset(args.dataset_name, data_files=args.data_files, split=args.train_split)
    if args.caption_column not in dataset.column_names:
        raise ValueError(f"--caption_column must be one of {dataset.column_names}, got {args.caption_column!r}.")
    captions = dataset[args.caption_column][:]
    tokenizer = train_tokenizer(captions, args.model, args.vocab_size, args.max_text_length)
    tokenizer.save_pretrained(args.output_dir)
    lengths = sorted(len(ids) for ids in tokenizer(captions[:10_000]).input_ids)
    print(
        f"Saved {len(tokenizer):,} tokens to {args.output_dir}. Of the first {len(lengths):,} captions the median has "
        f"{lengths[len(lengths) // 2]} tokens and the longest {lengths[-1]}; they are cut at {args.max_text_length}."
    )


if __name__ == "__main__":
    main(parse_args())
