"""examples/generate.py: one prompt, one sheet; one mistake, one line."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import contact_sheet
import numpy as np
import pytest
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "generate.py"
PIPELINE = ROOT / "pipelines" / "emoji-scenes"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sheet(generate, monkeypatch):
    """The arguments of `draw_sheet`, so that a test sees the pictures themselves and not their place on the sheet."""
    seen = []
    draw_sheet = generate.draw_sheet
    monkeypatch.setattr(generate, "draw_sheet", lambda *args: seen.append(args) or draw_sheet(*args))
    return seen


def refuse_to_sample(*args, **kwargs):
    raise AssertionError("the mistake should have been found before any sampling")


def error_line(generate, *argv) -> str:
    """Runs `main` on a mistake and returns its message, which must be a single line that starts with `error: `."""
    with pytest.raises(SystemExit) as exit:
        generate.main([str(argument) for argument in argv])
    message = exit.value.code
    assert isinstance(message, str), f"expected a message, got exit status {message}"
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_stages_are_the_half_draft_the_draft_and_the_last_step_of_each_revision(generate):
    assert generate.stage_captions(64, 2, 3) == {
        31: "32 of 64 draft steps",
        63: "draft",
        65: "revision 1",
        67: "revision 2",
        69: "revision 3",
    }
    assert generate.stage_captions(1, 2, 0) == {0: "draft"}


def test_small_images_are_enlarged_by_a_whole_factor_and_large_ones_left_alone(generate):
    def sheet_of(size):
        images = [Image.new("RGB", size, color) for color in ("red", "blue")]
        return generate.draw_sheet(
            [("a prompt that is much longer than the sheet is wide " * 9, [images])],
            ["draft", "revision 1"],
            ["seed 7"],
        )

    for size, enlarged in (((64, 64), 192), ((50, 50), 150), ((256, 256), 256)):
        pixels = np.asarray(sheet_of(size))
        for color in ((255, 0, 0), (0, 0, 255)):
            assert (pixels == color).all(axis=-1).sum() == enlarged**2


@pytest.mark.parametrize("prompts", [[""], ["a cat", "  "], []])
def test_an_empty_prompt_is_one_line_and_status_2(generate, capsys, prompts):
    with pytest.raises(SystemExit) as exit:
        generate.main(prompts)
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("flags", [["--num-images", "0"], ["--seed", "-1"], ["--dtype", "float8"], ["--seed", "x"]])
def test_a_flag_out_of_range_is_one_line_and_status_2(generate, capsys, flags):
    with pytest.raises(SystemExit) as exit:
        generate.main(["a cat", *flags])
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and flags[0] in captured.err


def test_an_unwritable_output_is_found_before_sampling(generate, monkeypatch, tmp_path):
    monkeypatch.setattr(contact_sheet, "load_pipeline", refuse_to_sample)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder.png").mkdir()
    for output in (tmp_path / "file" / "sheet.png", tmp_path / "folder.png", tmp_path / "sheet.webp"):
        assert str(output) in error_line(generate, "a cat", "--output", output)


def test_a_sheet_that_cannot_be_saved_leaves_the_older_one(monkeypatch, tmp_path):
    path, older = tmp_path / "sheet.png", Image.new("RGB", (8, 8), "red")
    contact_sheet.save_sheet(older, path)
    before = path.read_bytes()

    def disk_is_full(self, file, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_is_full)
    with pytest.raises(SystemExit, match="cannot write .*No space left"):
        contact_sheet.save_sheet(Image.new("RGB", (8, 8), "blue"), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_checking_the_output_leaves_nothing_new_and_nothing_old_changed(tmp_path):
    old = tmp_path / "old.png"
    old.write_bytes(b"an older sheet")
    contact_sheet.prepare_output(old)
    contact_sheet.prepare_output(tmp_path / "new.png")
    assert old.read_bytes() == b"an older sheet" and not (tmp_path / "new.png").exists()


def test_a_missing_folder_and_an_unknown_device_are_one_line(generate, tmp_path):
    output = tmp_path / "sheet.png"
    missing = tmp_path / "no-such-pipeline"
    assert str(missing) in error_line(generate, "a cat", "--pipeline", missing, "--output", output)
    assert "abacus" in error_line(generate, "a cat", "--device", "abacus", "--output", output)
    assert not output.exists()


def truncate_weights(folder):
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])


def remove_weights(folder):
    for weights in (folder / "vae").glob("*.safetensors"):
        weights.unlink()


def truncate_index(folder):
    index = folder / "model_index.json"
    index.write_text(index.read_text()[:40])


def empty_index(folder):
    (folder / "model_index.json").write_text("[]")


def name_unknown_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"][1] = "NoSuchModel"
    (folder / "model_index.json").write_text(json.dumps(index))


def truncate_config(folder):
    (folder / "scheduler" / "scheduler_config.json").write_text("{")


@pytest.mark.parametrize(
    "damage",
    [truncate_weights, remove_weights, truncate_index, empty_index, name_unknown_class, truncate_config],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_folder_is_one_line(generate, tmp_path, damage):
    folder = tmp_path / "pipeline"
    shutil.copytree(PIPELINE, folder)
    damage(folder)
    assert str(folder) in error_line(generate, "a cat", "--pipeline", folder, "--output", tmp_path / "sheet.png")


@pytest.mark.parametrize(
    "flags, names",
    [
        (["--num-inference-steps", "0"], "num_inference_steps"),
        (["--num-inference-steps", "100000"], "num_inference_steps"),
        (["--num-revisions", "-1"], "num_revisions"),
        (["--temperature", "nan"], "temperature"),
        (["--selection", "bottom-c"], "selection"),
    ],
)
def test_what_the_pipeline_refuses_is_one_line_that_names_the_argument(generate, tmp_path, flags, names):
    assert names in error_line(generate, "a cat", *flags, "--output", tmp_path / "sheet.png")


def test_a_sheet_is_written_and_any_of_its_images_can_be_made_again_alone(generate, sheet, tmp_path, capsys):
    few_steps = ["--num-inference-steps", "4", "--num-revise-steps", "2", "--num-revisions", "2"]
    output = tmp_path / "not" / "yet" / "sheet.png"
    prompts = ["a volcano at dusk", "a cat in the snow"]
    generate.main([*prompts, *few_steps, "--seed", "5", "--num-images", "2", "--output", str(output)])

    printed = capsys.readouterr().out
    assert str(output) in printed and "4 images in" in printed and "s each" in printed
    with Image.open(output) as image:
        image.load()
        assert image.format == "PNG"
    sections, captions, labels = sheet[-1]
    assert captions == ["2 of 4 draft steps", "draft", "revision 1", "revision 2"] and labels == [
        f"seed {seed}" for seed in (5, 6, 7, 8)
    ]
    assert [prompt for prompt, _ in sections] == prompts and [len(rows) for _, rows in sections] == [2, 2]

    generate.main([prompts[1], *few_steps, "--seed", "8", "--num-images", "1", "--output", str(output)])
    (_, (alone,)), *_ = sheet[-1][0]
    for picture, again in zip(sections[1][1][1], alone, strict=True):
        # The codes are equal. The decoder's sums run in another order in another batch: one level of 256 may flip.
        assert np.abs(np.asarray(picture, dtype=int) - np.asarray(again, dtype=int)).max() <= 1


def test_an_unknown_word_is_allowed_and_named(generate, tmp_path, capsys):
    few_steps = ["--num-inference-steps", "2", "--num-revisions", "0", "--num-images", "1"]
    output = str(tmp_path / "sheet.png")
    generate.main(["a zyzzyva, at dusk", "a zyzzyva by a qanat", *few_steps, "--output", output])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not in the")]
    assert line.count("'zyzzyva'") == 1 and "qanat" in line and "dusk" not in line
    generate.main(["a volcano at dusk", *few_steps, "--output", output])
    assert "not in the" not in capsys.readouterr().out


@pytest.mark.slow
def test_from_a_shell_a_mistake_is_one_line_on_stderr_and_status_1(tmp_path):
    command = [sys.executable, str(SCRIPT), "a cat", "--pipeline", str(tmp_path / "missing")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: no pipeline at ")
    assert "Traceback" not in result.stderr
