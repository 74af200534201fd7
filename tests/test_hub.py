"""Publishing and loading, by the real client in processes of their own, against a stand-in for the Hub's HTTP API."""

import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from components import random_pixels, tiny_pipeline, tiny_rq_pipeline
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from rq_draft_revise import DraftAndReviseInpaintPipeline
from rq_draft_revise.model_card import NOT_STATED, describe, linked_files, model_card, moved_card, only_variant, usage
from rq_draft_revise.publishing import EMPTY_CARD


ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a cat at dusk", "an owl in the snow"]

# What both sides draw: the codes and the image of two prompts.
DRAW = """
import json, sys, torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

def draw(pipe, **kwargs):
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipe(PROMPTS, generator=generators, guidance_scale=2.0, **kwargs).images

def refusal(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        kind, response = type(error).__name__, None
        while error is not None and response is None:  # diffusers says it in its own words, and keeps the reason
            response, error = getattr(error, "response", None), error.__cause__ or error.__context__
        return [kind, response.status_code]
"""

PUBLISH = """
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model_state_dict
from rq_draft_revise import DraftAndRevisePipeline
from rq_draft_revise.model_card import model_card

folder, with_readme, results = sys.argv[1:]
pipe = DraftAndRevisePipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
facts = ModelCardData(
    license="apache-2.0", language="en", datasets="owner/scenes", model_name="Scenes",
    eval_results=[EvalResult("text-to-image", "owner/scenes", "scenes", "fid", 12.5, dataset_split="test")],
)
card = model_card(pipe, "owner/text", facts, data="Eight drawn scenes.", data_filtering="No people.",
                  training="`train_cc3m.py`, one step")
out = {}
pipe.push_to_hub("owner/text", model_card=card)
api = HfApi()
api.create_tag("owner/text", tag="v1")
pipe.to(torch.float16).push_to_hub("owner/text", variant="fp16", commit_message="Half precision")
pipe.push_to_hub("owner/half", variant="fp16")
pipe = DraftAndRevisePipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
pipe.save_pretrained(with_readme + "-copy", push_to_hub=True, repo_id="owner/saved")
pipe.push_to_hub("owner/secret", private=True)
more = ModelCard(str(card) + "More.")
out["pull request"] = pipe.push_to_hub("owner/text", create_pr=True, model_card=more).pr_url
pipe.vae.push_to_hub("owner/vae")
pipe.transformer.push_to_hub("owner/transformer")
DraftAndRevisePipeline.from_pretrained(with_readme).push_to_hub("owner/with-readme")
out["refused"] = {
    "of another": refusal(pipe.push_to_hub, "owner/text", token="hf_stranger"),
    "in another's name": refusal(pipe.push_to_hub, "owner/new", token="hf_stranger"),
    "read only": refusal(pipe.push_to_hub, "owner/text", token="hf_reader"),
    "invalid": refusal(pipe.push_to_hub, "owner/text", token="hf_nobody"),
    "without": refusal(pipe.push_to_hub, "owner/text", token=False),
}
drawn = {"codes": draw(pipe, output_type="latent"), "image": draw(pipe, output_type="pt")}

pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False))
config = pipe.transformer.peft_config["default"].to_dict()
pipe.save_lora_weights(results, get_peft_model_state_dict(pipe.transformer), transformer_lora_adapter_metadata=config)
model_card(pipe, "owner/lora", base_model="owner/text").save(results + "/README.md")
api.create_repo("owner/lora")
api.upload_folder(repo_id="owner/lora", folder_path=results)
torch.save(drawn | {"adapted": draw(pipe, output_type="latent")}, results + ".pt")
open(results + ".json", "w").write(json.dumps(out))
"""

READ = """
from rq_draft_revise import DraftAndRevisePipeline, DraftAndReviseInpaintPipeline, RQVAEModel
from rq_draft_revise import ContextualRQTransformerModel

pixels, results = sys.argv[1:]
load = DraftAndRevisePipeline.from_pretrained
out = {
    "private, without a token": refusal(load, "owner/secret"),
    "private, of another": refusal(load, "owner/secret", token="hf_stranger"),
    "missing": refusal(load, "owner/nothing"),
    "revision": refusal(RQVAEModel.from_pretrained, "owner/vae", revision="v9"),
}
pipe = load("owner/text")
pipe.set_progress_bar_config(disable=True)
assert DraftAndReviseInpaintPipeline.from_pretrained("owner/text").tokenizer is not None
old, half = load("owner/text", revision="v1"), load("owner/text", variant="fp16", dtype=torch.float16)
secret = load("owner/secret", token="hf_reader")  # may read
for other in (old, half, secret):
    other.set_progress_bar_config(disable=True)
out["dtypes"] = [str(pipe.transformer.dtype), str(half.transformer.dtype)]
vae = RQVAEModel.from_pretrained("owner/vae")
transformer = ContextualRQTransformerModel.from_pretrained("owner/transformer", revision="main")
with torch.no_grad():
    encoded = vae.encode(torch.load(pixels, weights_only=True)).codes
torch.save(
    {"codes": draw(pipe, output_type="latent"), "image": draw(pipe, output_type="pt"), "vae codes": encoded,
     "tag": draw(old, output_type="latent"), "private": draw(secret, output_type="latent"),
     "half": draw(half, output_type="pt"), "weight": transformer.depth_transformer.head.weight.detach()},
    results + ".pt",
)
pipe.load_lora_weights("owner/lora")
torch.save(draw(pipe, output_type="latent"), results + "-adapted.pt")
from huggingface_hub import constants
out["cache"] = constants.HF_HUB_CACHE
open(results + ".json", "w").write(json.dumps(out))
"""

SNIPPETS = """
import os, pathlib
for i, path in enumerate(sys.argv[1:]):
    os.makedirs(str(i))
    os.chdir(str(i))
    exec(compile(pathlib.Path(path).read_text(), path, "exec"), {"__name__": "__main__"})
    os.chdir("..")
"""


def run(program: str, *arguments, hub: HubServer, folder: Path, token: str | None = "hf_owner") -> None:
    """A fresh process in `folder`, with a cache of its own there, that takes `hub` for the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | hub.environment(folder / "home", token)
    environment |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRAW.replace("PROMPTS", repr(PROMPTS)) + program, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """What the publishing process drew and was refused; afterwards the hub holds its repositories."""
    folder = tmp_path_factory.mktemp("publisher")
    pipe = tiny_pipeline("text")
    pipe.save_pretrained(folder / "pipeline")
    pipe.save_pretrained(folder / "with-readme")
    (folder / "with-readme" / "images").mkdir()
    (folder / "with-readme" / "images" / "grid.png").write_bytes(b"\x89PNG\0")
    (folder / "with-readme" / "README.md").write_text(
        "---\nlicense: mit\n---\n\n# Mine\n\n![Grid](images/grid.png)\n\n```python\n"
        "from rq_draft_revise import DraftAndRevisePipeline\n\n"
        'pipe = DraftAndRevisePipeline.from_pretrained("with-readme")\n```\n'
    )
    arguments = folder / "pipeline", folder / "with-readme", folder / "results"
    run(PUBLISH, *arguments, hub=hub, folder=folder / "elsewhere")
    return json.loads((folder / "results.json").read_text()) | torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def read(hub, published, tmp_path_factory):
    """What another process, in another folder, with an empty cache and without a token got of that."""
    folder = tmp_path_factory.mktemp("reader")
    torch.save(random_pixels(), folder / "pixels.pt")
    run(READ, folder / "pixels.pt", folder / "results", hub=hub, folder=folder / "elsewhere", token=None)
    results = json.loads((folder / "results.json").read_text())
    assert Path(results["cache"]).is_relative_to(folder), "the reader must not have the publisher's cache"
    results["adapted"] = torch.load(folder / "results-adapted.pt", weights_only=True)
    return results | torch.load(folder / "results.pt", weights_only=True)


def card_of(hub: HubServer, repo_id: str) -> ModelCard:
    return ModelCard(hub.files(repo_id)["README.md"].decode())


def snippet_of(card: ModelCard) -> str:
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", card.text, re.M | re.S)
    return snippet


# ---------------------------------------------------------------------------------------------------- there and back


@pytest.mark.slow
def test_nothing_is_visible_before_its_commit(hub, published):
    created = {"owner/text", "owner/half", "owner/saved", "owner/secret", "owner/vae", "owner/transformer",
               "owner/with-readme", "owner/lora"}  # fmt: skip
    assert set(hub.repos) == created
    for repo_id in created:
        before = {".gitattributes"}
        for call in hub.calls:
            if repo_id not in call.visible:
                continue  # not created yet
            is_commit = call.path.startswith(f"/api/models/{repo_id}/commit/") and call.status == 200
            if not is_commit:
                assert call.visible[repo_id] == before, f"{call.method} {call.path} changed what is visible"
            before = call.visible[repo_id]
        assert before > {".gitattributes", "README.md"}, "nothing was published, so nothing was shown"


@pytest.mark.slow
def test_the_client_creates_asks_uploads_verifies_and_commits_in_this_order(hub, published):
    uploads = [call for call in hub.calls if call.path.startswith("/large-files/upload/")]
    assert uploads and all(call.user is None for call in uploads), "a token went to the storage's address"
    path = "/api/models/owner/text"
    order = ("/api/repos/create", f"{path}/preupload/main", "/owner/text.git/info/lfs/objects/batch",
             "/large-files/upload/", "/owner/text.git/info/lfs/objects/verify", f"{path}/commit/main")  # fmt: skip
    first = [next(i for i, call in enumerate(hub.calls) if call.path.startswith(step)) for step in order]
    assert first == sorted(first)
    missing = ("/owner/new", "/owner/nothing", "/owner/secret", "v9")  # asked for on purpose
    unknown = [c for c in hub.calls if c.status == 404 and c.path.startswith("/api/")]
    assert all(any(name in c.path for name in missing) for c in unknown), unknown


@pytest.mark.slow
def test_a_published_pipeline_draws_the_same_in_a_fresh_process(published, read):
    assert torch.equal(read["codes"], published["codes"])
    assert torch.equal(read["image"], published["image"])
    assert len(published["codes"].unique()) > 10  # not one code everywhere


@pytest.mark.slow
def test_variant_revision_and_single_models(hub, published, read):
    assert read["dtypes"] == ["torch.float32", "torch.float16"]
    assert read["half"].isfinite().all() and read["half"].shape == published["image"].shape
    at_tag, now = hub.files("owner/text", "v1"), hub.files("owner/text")
    half = {name for name in now if ".fp16." in name}
    assert half and now.keys() - at_tag.keys() == half
    assert torch.equal(read["tag"], published["codes"])

    pipe = tiny_pipeline("text")
    with torch.no_grad():
        assert torch.equal(read["vae codes"], pipe.vae.encode(random_pixels()).codes)
    assert torch.equal(read["weight"], pipe.transformer.depth_transformer.head.weight)


@pytest.mark.slow
def test_an_adapter_comes_back_from_the_hub(published, read):
    assert torch.equal(read["adapted"], published["adapted"])
    assert not torch.equal(read["adapted"], published["codes"])


@pytest.mark.slow
def test_a_private_repository_is_there_for_its_owner_alone(hub, published, read):
    assert hub.repos["owner/secret"].private and not hub.repos["owner/text"].private
    assert torch.equal(read["private"], published["codes"])
    assert read["private, without a token"] == read["missing"], "the answer tells that the repository exists"
    assert read["private, without a token"][1] == 401 and read["private, of another"][1] == 404
    assert read["revision"][1] == 404


@pytest.mark.slow
def test_what_the_hub_refuses_raises_and_leaves_nothing_behind(hub, published):
    refused = published["refused"]
    assert [refused[name][1] for name in ("of another", "in another's name", "read only")] == [403, 403, 403]
    assert [refused[name][1] for name in ("invalid", "without")] == [401, 401]
    assert "owner/new" not in hub.repos


@pytest.mark.slow
def test_a_pull_request_leaves_main_alone(hub, published):
    assert published["pull request"].endswith("/owner/text/discussions/1")
    repo = hub.repos["owner/text"]
    assert repo.parents[repo.pull_requests["refs/pr/1"]] == repo.branches["main"]


# -------------------------------------------------------------------------------------------------------------- cards


@pytest.mark.slow
def test_a_pushed_card_is_filled_in_and_stays(hub, published):
    card = card_of(hub, "owner/text")  # there were two pushes, the second without a card
    data = card.data
    assert (data.library_name, data.license, data.language) == ("rq_draft_revise", "apache-2.0", "en")
    assert data.pipeline_tag == "text-to-image" and data.datasets == "owner/scenes" and data.metrics == ["fid"]
    assert {"rq_draft_revise", "draft-and-revise"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("fid", 12.5, "test")
    for part in ("Eight drawn scenes.", "No people.", "| scenes (test) | fid | 12.5 |", "one step", "apache-2.0."):
        assert part in card.text, part
    assert "## Bias, risks and data filtering" in card.text and NOT_STATED not in card.text


@pytest.mark.slow
@pytest.mark.parametrize("repo_id", ["owner/saved", "owner/half", "owner/vae", "owner/transformer", "owner/secret"])
def test_without_facts_the_card_says_what_is_known_and_what_is_not(hub, published, repo_id):
    card = card_of(hub, repo_id)
    assert card.data.library_name == "rq_draft_revise" and card.data.license is None
    assert EMPTY_CARD not in card.text and card.text.count(NOT_STATED) == 5
    assert "## Bias, risks and data filtering" in card.text and f'from_pretrained("{repo_id}"' in snippet_of(card)


@pytest.mark.slow
def test_the_card_of_the_folder_goes_along_with_its_pictures(hub, published):
    files = hub.files("owner/with-readme")
    assert files["images/grid.png"] == b"\x89PNG\0"
    text = files["README.md"].decode()
    assert 'from_pretrained("owner/with-readme")' in text and "license: mit" in text


@pytest.mark.slow
def test_the_snippets_of_the_cards_run_as_pasted(hub, published, tmp_path):
    paths = []
    for name in ("text", "half", "lora", "vae", "transformer"):
        paths.append(tmp_path / f"{name}.py")
        paths[-1].write_text(snippet_of(card_of(hub, f"owner/{name}")))
    run(SNIPPETS, *paths, hub=hub, folder=tmp_path / "elsewhere", token=None)
    assert [path.name for path in sorted((tmp_path / "elsewhere").glob("*/*.png"))] == ["sample.png"] * 3


def pipelines():
    yield from (tiny_pipeline(condition) for condition in ("class", "text", None))
    yield from (tiny_rq_pipeline(condition) for condition in ("class", None))
    yield DraftAndReviseInpaintPipeline(**tiny_pipeline("text").components)


@pytest.mark.parametrize("pipe", list(pipelines()), ids=lambda pipe: type(pipe).__name__)
def test_the_snippet_of_every_kind_of_pipeline_runs_on_its_folder(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    card = model_card(pipe, str(tmp_path / "pipeline"))
    exec(compile(snippet_of(card), "card", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "sample.png").is_file()
    rows = describe(pipe)
    size = f"{pipe.vae.config.sample_size}×{pipe.vae.config.sample_size}"
    assert rows["images"] == f"{size} pixels" and rows["codes"] == "4×4×3, a codebook of 50"
    for name in ("vae", "transformer"):
        count = sum(parameter.numel() for parameter in getattr(pipe, name).parameters())
        assert f"{count:,} parameters" in card.text


def test_the_card_of_an_adapter_loads_the_base_and_then_the_adapter():
    pipe = tiny_pipeline("text")
    card = model_card(pipe, "me/adapter", ModelCardData(license="mit"), training="4 images", base_model="them/base")
    assert card.data.base_model == "them/base" and "lora" in card.data.tags
    lines = snippet_of(card).splitlines()
    load = lines.index('pipe = DraftAndRevisePipeline.from_pretrained("them/base")')
    assert lines[load + 1] == 'pipe.load_lora_weights("me/adapter")'


@pytest.mark.parametrize(
    "names, variant",
    [
        (["a/w.safetensors", "b/w.safetensors"], None),
        (["a/w.fp16.safetensors", "b/w.fp16.safetensors"], "fp16"),
        (["a/w.fp16-00001-of-00002.safetensors", "b/w.fp16.safetensors"], "fp16"),
        (["a/w-00001-of-00002.safetensors"], None),
        (["a/w.safetensors", "b/w.fp16.safetensors"], None),
        ([], None),
    ],
)
def test_only_a_variant_without_full_weights_enters_the_snippet(names, variant, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert only_variant(tmp_path) == variant
    expected = '"x/y"' if variant is None else '"x/y", variant="fp16", dtype=torch.float16'
    assert f"from_pretrained({expected})" in usage(tiny_pipeline("class"), "x/y", variant)


@pytest.mark.parametrize("named, moved", [("run", True), ("out/run", True), ("out/run/", True), ("un", False),
                                          ("other/run", False), ("runwayml/x", False)])  # fmt: skip
def test_a_card_that_moves_names_its_repository_and_no_other(named, moved):
    text = f'pipe = DraftAndRevisePipeline.from_pretrained("{named}")'
    assert moved_card(text, "/data/out/run", "me/x") == (text.replace(named, "me/x") if moved else text)


def test_only_files_of_the_folder_go_along(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside.png").touch()
    (tmp_path / "inside" / "a b.png").touch()
    (tmp_path / "inside" / "grid.png").touch()
    text = "![](grid.png) [up](../outside.png) [web](https://x.org/grid.png) [gone](gone.png) [part](#top)"
    assert linked_files(text, tmp_path / "inside") == ["grid.png"]


# ----------------------------------------------------------------------------------- the stand-in refuses like the Hub


@pytest.fixture
def api(hub, tmp_path):
    return HfApi(endpoint=hub.endpoint, token="hf_owner")


def status_of(function, *args, **kwargs) -> int:
    with pytest.raises(HfHubHTTPError) as refused:
        function(*args, **kwargs)
    return refused.value.response.status_code


def post(hub: HubServer, path: str, body: bytes, method: str = "POST", token: str = "hf_owner") -> int:
    url = path if path.startswith("http") else hub.endpoint + path
    request = urllib.request.Request(url, body, {"Authorization": f"Bearer {token}"}, method=method)
    try:
        return urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_stand_in_refuses_a_second_creation_and_commits_on_another_parent(hub, api, request):
    repo_id = f"owner/{request.node.name[:30]}"
    api.create_repo(repo_id)
    assert status_of(api.create_repo, repo_id) == 409
    api.create_branch(repo_id, branch="next")
    assert status_of(api.create_branch, repo_id, branch="next") == 409
    before = api.model_info(repo_id).sha
    addition = [CommitOperationAdd("a.txt", b"a")]
    api.create_commit(repo_id, addition, commit_message="one")
    assert status_of(api.create_commit, repo_id, [CommitOperationAdd("b.txt", b"b")], commit_message="two",
                     parent_commit=before) == 412  # fmt: skip
    assert set(hub.files(repo_id)) == {".gitattributes", "a.txt"}
    assert set(hub.files(repo_id, "next")) == {".gitattributes"}
    assert status_of(api.model_info, repo_id, revision="none") == 404
    del hub.repos[repo_id]


def test_the_stand_in_refuses_what_was_not_uploaded_or_is_not_what_its_hash_says(hub, api):
    repo_id = "owner/pointers"
    api.create_repo(repo_id)
    content = b"weights"
    oid = hashlib.sha256(content).hexdigest()
    pointer = {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": oid, "size": len(content)}}
    header = {"key": "header", "value": {"summary": "pointer"}}
    lines = "\n".join(json.dumps(line) for line in (header, pointer)).encode()
    commit = f"/api/models/{repo_id}/commit/main"
    assert post(hub, commit, lines) == 400
    upload = hub.signed("upload", oid)
    assert post(hub, upload, b"others", "PUT", token="hf_stranger") == 400
    assert post(hub, upload.replace("signature=", "signature=0"), content, "PUT") == 403
    assert post(hub, upload, content, "PUT", token="hf_stranger") == 200  # the address is the permission
    assert post(hub, commit, lines) == 400, "not verified yet"
    verify = json.dumps({"oid": oid, "size": len(content)}).encode()
    assert post(hub, f"/{repo_id}.git/info/lfs/objects/verify", verify) == 200
    assert post(hub, commit, lines) == 200 and hub.files(repo_id)["w.bin"] == content
    del hub.repos[repo_id]


def test_invalid_metadata_is_refused_before_anything_is_uploaded(hub, api):
    repo_id = "owner/invalid"
    api.create_repo(repo_id)
    calls = len(hub.calls)
    card = CommitOperationAdd("README.md", b"---\ntags: 3\n---\n")
    with pytest.raises(ValueError, match="tags"):
        api.create_commit(repo_id, [card], commit_message="card")
    assert [call.path for call in hub.calls[calls:]] == ["/api/validate-yaml"]
    del hub.repos[repo_id]


def test_large_files_come_back_through_a_signed_redirect(hub, api, tmp_path, monkeypatch):
    repo_id = "owner/large"
    api.create_repo(repo_id, private=True)
    save_file({"x": torch.arange(10)}, tmp_path / "x.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    api.upload_file(path_or_fileobj=tmp_path / "x.safetensors", path_in_repo="x.safetensors", repo_id=repo_id)
    path = api.hf_hub_download(repo_id, "x.safetensors", cache_dir=tmp_path / "cache")
    assert torch.equal(load_file(path)["x"], torch.arange(10))
    (file,) = api.list_repo_tree(repo_id, path_in_repo="x.safetensors")
    assert file.lfs.size == (tmp_path / "x.safetensors").stat().st_size
    assert any(call.path.startswith("/large-files/download/") for call in hub.calls)
    del hub.repos[repo_id]


def test_the_facts_of_the_caller_are_copied_not_changed():
    facts = ModelCardData(model_name="x", eval_results=[EvalResult("text-to-image", "d", "D", "fid", 1.0)])
    before = facts.to_dict()
    card = model_card(tiny_pipeline("class"), "me/x", facts)
    assert card.data.metrics == ["fid"] and facts.to_dict() == before
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "class-conditional-image-generation" in card.data.tags
