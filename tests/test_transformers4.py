"""A tokenizer saved under transformers 5 is the same under 4.57, which knows its class by another name."""

import json
import subprocess
import sys
import sysconfig
import venv

import pytest
import torch
import transformers
from components import tiny_pipeline, tiny_tokenizer

from rq_draft_revise import DraftAndRevisePipeline


PROMPTS = ["a cat", "The volcano at dusk on a far planet", ""]
PROGRAM = """
import json, sys, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
folder, class_name, target, *prompts = sys.argv[1:]
tokenizer = getattr(transformers, class_name).from_pretrained(folder)
arguments = dict(padding="max_length", max_length=6, truncation=True)
print(json.dumps([tokenizer(prompts).input_ids, tokenizer(prompts, **arguments).input_ids, tokenizer.vocab_size]))
tokenizer.save_pretrained(target)
"""


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ < "5", reason="this environment has transformers 4 itself")
def test_a_saved_tokenizer_is_the_same_under_transformers_4(tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    # What differs is installed, without its dependencies: they come from this environment. Not diffusers: from 0.40 on
    # it needs a huggingface_hub that 4.57 refuses, so that a pipeline meets 4.57 only through what it saved.
    pinned = ["transformers==4.57.*", "huggingface_hub>=0.34,<1", "tokenizers>=0.22,<0.23"]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-compile", "--retries", "1", "--timeout", "15", *pinned]
    try:
        installed = subprocess.run(install, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        pytest.skip("pip could not install transformers 4.57 in time")
    if installed.returncode != 0:
        pytest.skip(f"pip cannot install transformers 4.57: {installed.stderr.strip().splitlines()[-1]}")
    purelib = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # appended to the path, so that what is installed above comes first
    with open(f"{purelib.stdout.strip()}/shared.pth", "w", encoding="utf-8") as file:
        file.write("\n".join(sorted(shared)))

    saved, again = tmp_path / "saved", tmp_path / "saved-again"
    pipe = tiny_pipeline("text")
    pipe.save_pretrained(saved)
    library, class_name = json.loads((saved / "model_index.json").read_text())["tokenizer"]
    assert library == "transformers"
    result = subprocess.run(
        [str(python), "-I", "-c", PROGRAM, str(saved / "tokenizer"), class_name, str(again), *PROMPTS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    here = tiny_tokenizer()
    padded = here(PROMPTS, padding="max_length", max_length=6, truncation=True).input_ids
    assert json.loads(result.stdout.splitlines()[-1]) == [here(PROMPTS).input_ids, padded, here.vocab_size]

    # and what 4.57 saved gives the same codes here
    def codes(pipe):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return pipe(PROMPTS[:2], guidance_scale=2.0, generator=generators, output_type="latent").images

    tokenizer = getattr(transformers, class_name).from_pretrained(again)
    assert torch.equal(codes(DraftAndRevisePipeline(**pipe.components | dict(tokenizer=tokenizer))), codes(pipe))
