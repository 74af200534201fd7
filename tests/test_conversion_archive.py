"""Whole archives and tokenizers; damaged and hostile files, of which comes one clear error and nothing else."""

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import original_models as original
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers.implementations import CharBPETokenizer
from transformers import AutoTokenizer

from rq_draft_revise import RQTransformerPipeline


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "conversion_scripts"
sys.path.insert(0, str(SCRIPTS))

import conversion  # noqa: E402
import convert_archive  # noqa: E402
import convert_rq_tokenizer as tokenizer_script  # noqa: E402
import convert_rq_transformer_to_diffusers as rq_transformer_script  # noqa: E402
import convert_rqvae_to_diffusers as rqvae_script  # noqa: E402
import convert_vqgan_to_diffusers as vqgan_script  # noqa: E402


CAPTIONS = ["a painting of a cat at dusk", "the volcano in the snow", "an owl, at night: it's far away!"]
TEXT = dict(vocab_size_cond=120, block_size_cond=6, data="cc3m", sampling={"temp": 0.9, "top_k": [9], "top_p": [0.7]})
CLASS = dict(vocab_size_cond=7, block_size_cond=1)


def write_stage(folder, config, state_dict):
    folder.mkdir(parents=True)
    torch.save({"epoch": 10, "state_dict": state_dict}, folder / "model.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "model.pt"


def write_stages(folder, **condition):
    """An unpacked archive with random weights."""
    config, rqvae_config = original.rq_transformer_config(**condition), original.rqvae_config()
    write_stage(folder / "stage1", rqvae_config, original.random_rqvae(rqvae_config))
    weights = original.random_weights(original.rq_transformer_shapes(config))
    write_stage(folder / "stage2", config, weights)
    return folder


def write_tokenizer(folder):
    """Vocabulary and merges in the authors' form."""
    tokenizer = CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    tokenizer.train_from_iterator(CAPTIONS, vocab_size=120, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    folder.mkdir()
    tokenizer.save_model(str(folder))
    (folder / "vocab.json").rename(folder / "bpe-16k-vocab.json")
    (folder / "merges.txt").rename(folder / "bpe-16k-merges.txt")
    return folder


def pack(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return archive


def draw(pipe, *arguments, **keywords):
    pipe.set_progress_bar_config(disable=True)
    return pipe(*arguments, **keywords, generator=torch.Generator().manual_seed(0), output_type="pt").images


# ---- Archives ----


def test_archive_becomes_a_pipeline(tmp_path):
    archive = pack(write_stages(tmp_path / "cc3m", **TEXT), tmp_path / "cc3m.tar.gz")
    tokenizer_dir = write_tokenizer(tmp_path / "pretrained")
    output = tmp_path / "pipeline"
    convert_archive.main([str(archive), str(output), "--tokenizer_dir", str(tokenizer_dir)])
    files = ["README.md", "model_index.json", "tokenizer", "transformer", "vae"]
    assert sorted(path.name for path in output.iterdir()) == files

    pipe = RQTransformerPipeline.from_pretrained(output)
    assert (pipe.config.temperature, pipe.config.top_k, pipe.config.top_p) == (0.9, 9, 0.7)
    assert pipe.tokenizer.model_max_length == 6
    image = draw(pipe, CAPTIONS[0])
    assert image.shape == (1, 3, 16, 16)

    # what was written by hand is what diffusers writes
    pipe.save_pretrained(tmp_path / "again")
    indexes = [json.loads((folder / "model_index.json").read_text()) for folder in (output, tmp_path / "again")]
    assert indexes[0] == {key: value for key, value in indexes[1].items() if key != "_name_or_path"}
    assert torch.equal(draw(RQTransformerPipeline.from_pretrained(tmp_path / "again"), CAPTIONS[0]), image)

    card = (output / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc-by-nc-sa-4.0"
    for fact in ("cc3m.tar.gz", "12.33", "4×4×3, codebook of 48", "a text of 6 tokens", "commercial use"):
        assert fact in card


def test_archive_of_classes_from_a_folder_in_half_precision(tmp_path):
    folder = write_stages(tmp_path / "imagenet", **CLASS)
    convert_archive.main([str(folder), str(tmp_path / "pipeline"), "--dtype", "float16"])
    pipe = RQTransformerPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.float16)
    assert pipe.transformer.dtype == torch.float16
    assert pipe.vae.quantizer.codebook.dtype == torch.float32
    assert pipe.config.id2label is None  # 7 classes are not ImageNet's
    assert draw(RQTransformerPipeline.from_pretrained(tmp_path / "pipeline"), class_labels=[3]).isfinite().all()


def test_class_names_are_those_of_imagenet():
    config = original.rq_transformer_config(vocab_size_cond=1000)
    names = convert_archive.class_names(config, 1000)
    assert (len(names), names["980"]) == (1000, "volcano")
    assert convert_archive.class_names(config | {"dataset": {"type": "other"}}, 1000) is None


@pytest.mark.slow
def test_script_runs_by_itself_from_another_folder(tmp_path):
    write_stages(tmp_path / "church", data="LSUN-church")
    command = [sys.executable, str(SCRIPTS / "convert_archive.py"), "church"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*command, "out"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert draw(RQTransformerPipeline.from_pretrained(tmp_path / "out")).shape == (1, 3, 16, 16)

    # a second time there is something in the way: one line, and what was there stays
    again = subprocess.run([*command, "out"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith("convert_archive.py: error: `output_dir` must not exist")
    assert "Traceback" not in again.stderr
    assert (tmp_path / "out" / "model_index.json").is_file()


def hostile_archive(path, **attributes):
    """An archive whose second member has these attributes."""
    with tarfile.open(path, "w:gz") as tar:
        for changes in ({"name": "stage1/model.pt"}, attributes):
            member = tarfile.TarInfo("stage1/other.pt")
            member.size = 4
            for name, value in changes.items():
                setattr(member, name, value)
            tar.addfile(member, io.BytesIO(b"data"))
    return path


@pytest.mark.parametrize(
    "attributes",
    [
        {"name": "../evil.pt"},
        {"name": "../evil.txt"},
        {"name": "stage1/../../evil.pt"},
        {"name": "stage1/evil.pt", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"name": "stage1/evil.pt", "type": tarfile.SYMTYPE, "linkname": "model.pt"},
        {"name": "stage1/evil.pt", "type": tarfile.LNKTYPE, "linkname": "../../evil.pt"},
        {"name": "stage1/evil.pt", "type": tarfile.FIFOTYPE},
    ],
    ids=lambda attributes: "-".join(str(value) for value in attributes.values()),
)
def test_archive_that_reaches_outside_is_refused(tmp_path, attributes):
    (tmp_path / "work").mkdir()
    archive = hostile_archive(tmp_path / "work" / "hostile.tar.gz", **attributes)
    with pytest.raises(ValueError, match="must (stay inside its folder|hold files and folders alone)"):
        convert_archive.main([str(archive), str(tmp_path / "work" / "out")])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["hostile.tar.gz", "work"]


def test_absolute_paths_stay_inside(tmp_path):
    # as tar itself does, the filter takes the leading slash away
    archive = hostile_archive(tmp_path / "a.tar.gz", name=str(tmp_path / "evil.pt"))
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_archive.extract(archive, folder)
    assert not (tmp_path / "evil.pt").exists()
    assert all(folder in path.resolve().parents for path in folder.rglob("*"))


def test_incomplete_archives_are_refused(tmp_path):
    folder = write_stages(tmp_path / "tiny", **CLASS)
    archive = pack(folder, tmp_path / "tiny.tar.gz")
    archive.write_bytes(archive.read_bytes()[:-5000])
    (tmp_path / "text.tar.gz").write_text("no archive")
    (folder / "stage2" / "config.yaml").unlink()
    for source, message in (
        (archive, "must be a complete tar archive"),
        (tmp_path / "text.tar.gz", "must be a complete tar archive"),
        (tmp_path / "absent", "which is neither"),
        (folder / "stage1", "one RQ-VAE and one RQ-Transformer"),
        (folder, "each a .pt with its config.yaml, got stage2/model.pt without one"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_archive.main([str(source), str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.tar.gz", "tiny", "tiny.tar.gz"]


def test_text_archive_asks_for_its_tokenizer_before_the_work(tmp_path):
    folder = write_stages(tmp_path / "cc3m", **TEXT)
    with pytest.raises(ValueError, match="`tokenizer_dir` must be given .*bpe-16k-vocab.json and bpe-16k-merges.txt"):
        convert_archive.main([str(folder), str(tmp_path / "out")])
    with pytest.raises(ValueError, match="lacks"):
        convert_archive.main([str(folder), str(tmp_path / "out"), "--tokenizer_dir", str(folder)])
    assert not (tmp_path / "out.partial").exists()


# ---- The tokenizer ----


def test_tokenizer_makes_the_tokens_of_the_original(tmp_path):
    source = write_tokenizer(tmp_path / "pretrained")
    config = original.rq_transformer_config(**TEXT)
    checkpoint = write_stage(tmp_path / "stage2", config, {"cond_emb.weight": torch.zeros(120, 32)})
    config_path = str(checkpoint.with_name("config.yaml"))
    arguments = ["--config_path", config_path, "--checkpoint_path", str(checkpoint)]
    tokenizer_script.main([*arguments, "--tokenizer_dir", str(source), "--output_dir", str(tmp_path / "tokenizer")])

    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (loaded.pad_token_id, loaded.unk_token_id) == (0, 1)
    plain = CharBPETokenizer.from_file(
        str(source / "bpe-16k-vocab.json"), str(source / "bpe-16k-merges.txt"), unk_token="[UNK]", lowercase=True
    )
    for caption in [*CAPTIONS, "The CAT, dusk & Ω", ""]:
        ids = plain.encode(caption).ids
        assert loaded(caption).input_ids == ids
        padded = loaded(caption, padding="max_length", max_length=6, truncation=True).input_ids
        assert padded == (ids + 6 * [0])[:6]

    arguments = ["--tokenizer_dir", str(tmp_path / "tokenizer"), "--config_path", config_path, "--to_original"]
    tokenizer_script.main([*arguments, "--output_dir", str(tmp_path / "back")])
    for name, form in (("bpe-16k-vocab.json", json.loads), ("bpe-16k-merges.txt", lambda text: text.split("\n")[1:])):
        assert form((tmp_path / "back" / name).read_text()) == form((source / name).read_text())


def test_tokenizer_of_another_model_is_refused(tmp_path):
    source = write_tokenizer(tmp_path / "pretrained")
    for changes, message in (
        ({"vocab_size_cond": 40}, "knows 40 tokens"),
        ({"vocab_size_cond": 60}, "must have 60 rows"),
    ):
        config = original.rq_transformer_config(**(TEXT | changes))
        folder = tmp_path / str(changes["vocab_size_cond"])
        checkpoint = write_stage(folder, config, {"cond_emb.weight": torch.zeros(40, 32)})
        arguments = ["--tokenizer_dir", str(source), "--config_path", str(checkpoint.with_name("config.yaml"))]
        arguments += ["--checkpoint_path", str(checkpoint), "--output_dir", str(tmp_path / "out")]
        with pytest.raises(ValueError, match=message):
            tokenizer_script.main(arguments)
    assert not (tmp_path / "out").exists()


# ---- Damaged and hostile checkpoints ----


class RunsCode:
    """Unpickles by creating a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def edit(checkpoint, change):
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, checkpoint)


def edit_config(checkpoint, change):
    path = checkpoint.with_name("config.yaml")
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


def truncate(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])


def lose_a_block(checkpoint):
    """Zeros inside of the largest tensor, as a disk leaves them: the archive's structure is whole."""
    with zipfile.ZipFile(checkpoint) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    middle = largest.header_offset + largest.file_size // 2
    content = bytearray(checkpoint.read_bytes())
    content[middle : middle + 512] = bytes(512)
    checkpoint.write_bytes(content)


def run_code(checkpoint):
    torch.save({"state_dict": {}, "hook": RunsCode(checkpoint.with_name("evil"))}, checkpoint)


DAMAGES = {
    "would run code": (run_code, "must be a complete PyTorch checkpoint of tensors and plain containers"),
    "truncated": (truncate, "must be a complete PyTorch checkpoint"),
    "a block of zeros": (
        lose_a_block,
        r"must be a complete PyTorch checkpoint, but the checksum of '.*' in it is wrong",
    ),
    "empty": (lambda path: path.write_bytes(b""), "must be a complete PyTorch checkpoint"),
    "text": (lambda path: path.write_text("404 not found"), "must be a complete PyTorch checkpoint"),
    "absent": (lambda path: path.unlink(), "`checkpoint_path` must be a checkpoint's file"),
    "no state dict": (lambda path: edit(path, lambda c: c.pop("state_dict")), "weights under 'state_dict'"),
    "a list": (lambda path: torch.save([torch.ones(1)], path), "weights under 'state_dict'"),
    "no tensor": (lambda path: edit(path, lambda c: c["state_dict"].update(x=1)), "must hold tensors alone"),
    "missing key": (
        lambda path: edit(path, lambda c: c["state_dict"].pop("decoder.up.1.upsample.conv.bias")),
        "Missing: decoder.up.1.upsample.conv.bias",
    ),
    "extra key": (
        lambda path: edit(path, lambda c: c["state_dict"].update({"encoder.extra": torch.ones(1)})),
        "Not known: encoder.extra",
    ),
    "wrong shape": (
        lambda path: edit(path, lambda c: c["state_dict"].update({"quant_conv.bias": torch.ones(3)})),
        r"quant_conv.bias \(3,\), not \(32,\)",
    ),
    "a scalar": (
        lambda path: edit(path, lambda c: c["state_dict"].update({"encoder.mid.attn_1.q.weight": torch.ones(())})),
        r"encoder.mid.attn_1.q.weight \(\), not \(64, 64, 1, 1\)",
    ),
    "unequal copies": (
        lambda path: edit(
            path,
            lambda c: c["state_dict"].update({"quantizer.codebooks.2.embed_ema": torch.ones(48, 32)}),
        ),
        "codebooks in the checkpoint are not equal",
    ),
    "not finite": (
        lambda path: edit(path, lambda c: c["state_dict"]["encoder.conv_in.bias"].fill_(torch.nan)),
        "must be finite in torch.float32, but encoder.conv_in.bias",
    ),
    "no config": (lambda path: path.with_name("config.yaml").unlink(), "`config_path` must be"),
    "config would run code": (
        lambda path: path.with_name("config.yaml").write_text("arch: !!python/object/apply:os.system ['touch evil']"),
        "must be YAML of plain values",
    ),
    "config is no YAML": (
        lambda path: path.with_name("config.yaml").write_text("a: [1"),
        r"stage1/config.yaml must be YAML of plain values: .* line 1, .* expected ',' or '\]'.*$",  # of one line
    ),
    "config is a list": (lambda path: path.with_name("config.yaml").write_text("- 1"), "must be a YAML mapping"),
    "config is binary": (lambda path: path.with_name("config.yaml").write_bytes(b"\xff\xfe\x00"), "must be YAML"),
    "config without a part": (
        lambda path: edit_config(path, lambda c: c["arch"].pop("ddconfig")),
        "must have `arch.ddconfig`",
    ),
    "config with a wrong type": (
        lambda path: edit_config(path, lambda c: c["arch"]["ddconfig"].update(ch_mult=3)),
        "must have the form of the original's configs",
    ),
    "config of the other stage": (
        lambda path: edit_config(path, lambda c: c["arch"].update(type="rq-transformer")),
        "`arch.type` must be 'rq-vae'",
    ),
    "patches of latents": (
        lambda path: edit_config(path, lambda c: c["arch"]["hparams"].update(code_shape=[2, 2, 3])),
        "codes of patches of latents",
    ),
    "config of another size": (
        lambda path: edit_config(path, lambda c: c["arch"]["ddconfig"].update(num_res_blocks=3)),
        "Missing: encoder.down.0.block.2",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_rqvae_is_one_clear_error_and_leaves_nothing(tmp_path, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = original.rqvae_config()
    checkpoint = write_stage(tmp_path / "stage1", config, original.random_rqvae(config))
    change, message = DAMAGES[damage]
    change(checkpoint)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        rqvae_script.main(["--checkpoint_path", str(checkpoint), "--output_dir", str(tmp_path / "out")])
    assert sorted(tmp_path.rglob("*")) == before  # no folder, no file of the code that would have run


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("input_emb_vqvae", False, "`arch.input_emb_vqvae` must be True"),
        ("cumsum_depth_ctx", False, "`arch.cumsum_depth_ctx` must be True"),
        ("shared_cls_emb", False, "`arch.shared_cls_emb` must be True"),
        ("vocab_size", [48, 48, 24], "`arch.vocab_size` must be the same at all depths"),
        ("block_size", [4, 4], "must be height, width and depth"),
        ("body", {"n_layer": 3, "block": {"n_head": 4, "gelu": "v2"}}, "`gelu` must be 'v1'"),
        ("body", {"n_layer": 3, "block": {"n_head": 4, "attn_bias": False}}, "`attn_bias` must be True"),
        ("head", {"n_layer": 2, "block": {"n_head": 8}}, "`n_head` must be the same in body and head"),
        ("embed_dim", 64, r"cond_emb.weight \(7, 32\), not \(7, 64\)"),
    ],
)
def test_transformer_that_has_no_counterpart_is_refused(tmp_path, name, value, message):
    folder = write_stages(tmp_path / "archive", **CLASS)
    edit_config(folder / "stage2" / "model.pt", lambda config: config["arch"].update({name: value}))
    with pytest.raises(ValueError, match=message):
        convert_archive.main([str(folder), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda params: params["transformer_config"]["params"].update(vocab_size=99), "`vocab_size` must be 48"),
        (lambda params: params["transformer_config"]["params"].update(n_unmasked=4), "`n_unmasked` must be 0"),
        (
            lambda params: params["cond_stage_config"].update(target="taming.Other"),
            "must be 'taming.modules.util.Labe",
        ),
        (lambda params: params["first_stage_config"].update(target="taming.GumbelVQ"), "must be 'taming.models.vqgan"),
    ],
)
def test_vqgan_transformer_that_has_no_counterpart_is_refused(tmp_path, change, message):
    config = original.net2net_config(original.vqgan_config())
    checkpoint = write_stage(tmp_path / "cin", config, original.random_net2net(config))
    edit_config(checkpoint, lambda config: change(config["model"]["params"]))
    with pytest.raises(ValueError, match=message):
        vqgan_script.main(["--checkpoint_path", str(checkpoint), "--output_dir", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["cin"]


def test_values_that_half_precision_cannot_hold_are_refused(tmp_path):
    config = original.rqvae_config()
    state_dict = original.random_rqvae(config)
    state_dict["decoder.conv_in.bias"][0] = 1e5
    checkpoint = write_stage(tmp_path / "stage1", config, state_dict)
    arguments = ["--checkpoint_path", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--dtype"]
    with pytest.raises(ValueError, match="finite in torch.float16, but decoder.conv_in.bias"):
        rqvae_script.main([*arguments, "float16"])
    assert not (tmp_path / "out").exists()
    rqvae_script.main([*arguments, "bfloat16"])


@pytest.mark.parametrize("raised", [OSError("No space left on device"), KeyboardInterrupt()])
def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, raised):
    folder = write_stages(tmp_path / "archive", **CLASS)
    save, calls = conversion.save_file, []

    def save_file(*arguments, **keywords):
        calls.append(save(*arguments, **keywords))
        if len(calls) == 3:  # in the middle of the transformer
            raise raised

    monkeypatch.setattr(conversion, "save_file", save_file)
    with pytest.raises(type(raised)):
        convert_archive.convert_archive(folder, tmp_path / "out", max_shard_size="500KB")
    assert len(calls) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_what_was_written_wrong_is_noticed(tmp_path, monkeypatch):
    config = original.rqvae_config()
    checkpoint = write_stage(tmp_path / "stage1", config, original.random_rqvae(config))
    save = conversion.save_file

    def save_file(tensors, path, metadata):
        tensors["quant_conv.bias"] = tensors["quant_conv.bias"] + 1e-7
        save(tensors, path, metadata)

    monkeypatch.setattr(conversion, "save_file", save_file)
    with pytest.raises(ValueError, match="quant_conv.bias differs when it is read again"):
        rqvae_script.main(["--checkpoint_path", str(checkpoint), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_stands_at_the_target_is_kept(tmp_path):
    config = original.rqvae_config()
    checkpoint = write_stage(tmp_path / "stage1", config, original.random_rqvae(config))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="`output_dir` must not exist or be an empty folder"):
        rqvae_script.main(["--checkpoint_path", str(checkpoint), "--output_dir", str(out)])
    assert (out / "mine.txt").read_text() == "mine"
    (out / "mine.txt").unlink()
    rqvae_script.main(["--checkpoint_path", str(checkpoint), "--output_dir", str(out)])
    assert (out / "config.json").is_file()


def test_damaged_folders_are_refused_on_the_way_back(tmp_path):
    folder = write_stages(tmp_path / "archive", **CLASS)
    convert_archive.convert_archive(folder, tmp_path / "pipeline")
    transformer = tmp_path / "pipeline" / "transformer"
    weights = transformer / "diffusion_pytorch_model.safetensors"
    arguments = ["--output_dir", str(tmp_path / "back"), "--to_original", "--checkpoint_path"]
    with pytest.raises(ValueError, match="must be of a RQTransformerModel, got 'RQVAEModel'"):
        rq_transformer_script.main([*arguments, str(tmp_path / "pipeline" / "vae")])
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="complete weights"):
        rq_transformer_script.main([*arguments, str(transformer)])
    weights.unlink()
    with pytest.raises(ValueError, match="complete weights"):
        rq_transformer_script.main([*arguments, str(transformer)])
    assert not (tmp_path / "back").exists()


def test_rqvae_of_the_transformer_must_be_found(tmp_path):
    folder = write_stages(tmp_path / "archive", **CLASS)
    arguments = ["--checkpoint_path", str(folder / "stage2" / "model.pt"), "--output_dir", str(tmp_path / "out")]
    rq_transformer_script.main(arguments)  # ../stage1 by default
    for name in ("config.yaml", "model.pt"):
        (folder / "stage1" / name).unlink()
        with pytest.raises(ValueError, match=rf"`rqvae_path` .*default ../stage1/model.pt, .* no .*stage1/{name}\.$"):
            rq_transformer_script.main([*arguments[:-1], str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("script", [rqvae_script, rq_transformer_script, vqgan_script])
def test_the_checkpoint_is_looked_at_before_what_lies_beside_it(tmp_path, script):
    """A mistyped path is to blame, not a config.yaml or an RQ-VAE beside nothing."""
    (tmp_path / "junk.pt").write_text("404 not found")
    for name, message in (("missing.pt", "`checkpoint_path` must be"), ("junk.pt", "junk.pt must be a complete")):
        with pytest.raises(ValueError, match=message):
            script.main(["--checkpoint_path", str(tmp_path / name), "--output_dir", str(tmp_path / "out")])


def test_rqvae_folder_without_its_codebook_is_one_clear_error(tmp_path):
    folder = write_stages(tmp_path / "archive", **CLASS)
    vae = tmp_path / "vae"
    rqvae_script.main(["--checkpoint_path", str(folder / "stage1" / "model.pt"), "--output_dir", str(vae)])
    weights = vae / "diffusion_pytorch_model.safetensors"
    kept = {key: value for key, value in load_file(weights).items() if key != "quantizer.codebook"}
    save_file(kept, weights, {"format": "pt"})
    arguments = ["--checkpoint_path", str(folder / "stage2" / "model.pt"), "--rqvae_path", str(vae)]
    with pytest.raises(
        ValueError, match="`rqvae_path` must be .* complete weights, got .*without `quantizer.codebook`"
    ):
        rq_transformer_script.main([*arguments, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_classes_of_lightning_are_named_but_not_run(tmp_path, monkeypatch):
    """The checkpoints of taming-transformers have a class of Lightning among the keys of their training state."""
    config = original.vqgan_config()
    checkpoint = write_stage(tmp_path / "vqgan", config, original.random_weights(original.vqgan_shapes(config)))
    module, name = "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"
    modules = {part: type(sys)(part) for part in ("pytorch_lightning", "pytorch_lightning.callbacks", module)}
    lightning = type(name, (), {"__module__": module})
    modules[module].ModelCheckpoint = lightning
    with monkeypatch.context() as patch:
        for part, stub in modules.items():
            patch.setitem(sys.modules, part, stub)
        edit(checkpoint, lambda content: content.update(callbacks={lightning: {"best_model_score": torch.ones(())}}))
    vqgan_script.main(["--checkpoint_path", str(checkpoint), "--output_dir", str(tmp_path / "vae")])
    assert (tmp_path / "vae" / "config.json").is_file()


def test_errors_of_a_script_are_one_line(monkeypatch):
    def main():
        raise ValueError("`x` must be 1, got 2.")

    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
    with pytest.raises(SystemExit, match="script.py: error: `x` must be 1, got 2."):
        conversion.run(main)
