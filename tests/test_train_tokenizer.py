"""The tokenizer of a text model: ids that the model can rely on, from any source of captions."""

import datasets
import pytest
import train_tokenizer
from transformers import AutoTokenizer


CAPTIONS = ["A cat at dusk", "an owl in the snow", "the volcano", "a rocket at night, in the SNOW", " "] * 5


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # 5 s after each epoch of a stream


def trained(tmp_path, *flags, captions=CAPTIONS):
    datasets.Dataset.from_dict({"text": captions}).to_parquet(tmp_path / "captions.parquet")
    source = ["--data_files", str(tmp_path / "captions.parquet"), "--output_dir", str(tmp_path / "tokenizer")]
    train_tokenizer.main(train_tokenizer.parse_args([*source, *flags]))
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.mark.parametrize("flags", [(), ("--streaming",), ("--model", "word")])
def test_padding_is_0_unknown_is_1_case_does_not_matter_and_length_is_fixed(flags, tmp_path, capsys):
    tokenizer = trained(tmp_path, *flags)
    assert "5 with an empty 'text'" in capsys.readouterr().out
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1)
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["[PAD]", "[UNK]"]
    padded = tokenizer(["A CAT", "a cat"], padding="max_length", truncation=True).input_ids
    assert padded[0] == padded[1] and len(padded[0]) == 32 and padded[0][-1] == 0
    long = tokenizer("a cat " * 100, truncation=True).input_ids
    assert len(long) == 32
    assert 1 in tokenizer("ж").input_ids
    assert tokenizer.decode(tokenizer("a cat at dusk").input_ids) == "a cat at dusk"


@pytest.mark.parametrize("flags", [(), ("--streaming",), ("--model", "word")])
def test_captions_of_which_all_are_empty_are_refused_before_anything_is_written(flags, tmp_path):
    with pytest.raises(
        ValueError, match="--caption_column .* got none in 'text' of split 'train'; skipped: 3 with an"
    ):
        trained(tmp_path, *flags, captions=["", " ", "\n"])
    assert not (tmp_path / "tokenizer").exists()


def test_no_more_tokens_than_asked_for(tmp_path):
    assert len(trained(tmp_path, "--vocab_size", "30", "--max_text_length", "7")) == 30
    assert train_tokenizer.parse_args(["--dataset_name", "a", "--output_dir", "b"]).vocab_size == 16384
    for flag, value in (("vocab_size", "2"), ("max_text_length", "0")):
        with pytest.raises(ValueError, match=f"--{flag}.*got {value}"):
            trained(tmp_path, f"--{flag}", value)
    for source in ([], ["--dataset_name", "a", "--train_data_dir", "b"]):
        with pytest.raises(ValueError, match="--dataset_name, --train_data_dir"):
            train_tokenizer.parse_args([*source, "--output_dir", "c"])
    with pytest.raises(ValueError, match="caption_column.*'title'"):
        trained(tmp_path, "--caption_column", "title")
