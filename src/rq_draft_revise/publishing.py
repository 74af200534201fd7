"""Publishing on the Hub and loading from it, beyond diffusers: cards, our module paths, the upload after training."""

import functools
import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from huggingface_hub import CommitInfo, ModelCard, create_repo, upload_folder
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from .model_card import copy_card, model_card, only_variant


PACKAGE = __name__.rpartition(".")[0]
# Those that `model_index.json` names; an export with its own code (examples/export_for_hub.py) leaves PACKAGE out.
COMPONENT_MODULES = ("contextual_rq_transformer", "rq_transformer", "rqvae", "scheduling_draft_and_revise")

# diffusers' card of a repository that has none, by a sentence of it.
EMPTY_CARD = "This model card has been automatically generated."


class ModelCardMixin:
    """Pushes with a filled-in card. For models and pipelines, before the diffusers class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers; of a local folder that is something else, or has no weights, the error says so.

        Raises:
            `ValueError`: the folder of a pipeline instead of a model, or of another class of this package. `OSError`:
                a configuration without weights, and what diffusers raises.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        check_folder(cls, folder, kwargs)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if not (folder / "config.json").is_file() or any(folder.glob("diffusion_pytorch_model*")):
                raise
            raise OSError(
                f"{folder} is a configuration without weights. The scripts in examples/ train such a model, those in "
                f"conversion_scripts/ convert published weights, {cls.__name__}.from_config makes random ones."
            ) from error

    @functools.wraps(ModelMixin.save_pretrained)  # pipelines look at its signature
    def save_pretrained(self, *args, **kwargs):
        refuse_adapters(self)
        return super().save_pretrained(*args, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        model_card: ModelCard | None = None,
    ) -> CommitInfo:
        """As in diffusers, with a card.

        Args:
            repo_id (`str`): `"user/name"`; created if it does not exist.
            commit_message (`str`, *optional*), private (`bool`, *optional*), token (`str`, *optional*), create_pr
                (`bool`), safe_serialization (`bool`), variant (`str`, *optional*), subfolder (`str`, *optional*): As
                in diffusers.
            model_card (`huggingface_hub.ModelCard`, *optional*): The README.md, for example of
                [`rq_draft_revise.model_card.model_card`]. Without one: the card that the repository already has, else
                that of the folder which this was loaded from (with the files it links to), else one of what is known
                here. A push into a `subfolder` writes none.

        Returns:
            `huggingface_hub.CommitInfo`, a string: the address of the commit.
        """
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            if model_card is not None:
                model_card.save(Path(folder) / "README.md")
            return self._upload_folder(
                folder,
                repo_id,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
                subfolder=subfolder,
            )

    def _upload_folder(self, working_dir, repo_id: str, token=None, subfolder: str | None = None, **kwargs):
        """As in diffusers, whose `save_pretrained(push_to_hub=True)` comes here with its own card in the folder."""
        readme = Path(working_dir) / "README.md"
        if not subfolder and (not readme.is_file() or EMPTY_CARD in readme.read_text(encoding="utf-8")):
            write_card(self, working_dir, repo_id, token)
        return super()._upload_folder(working_dir, repo_id, token=token, subfolder=subfolder, **kwargs)


class HubPipelineMixin(ModelCardMixin):
    """Also loads, from the Hub, components that are classes of this package. For pipelines."""

    @functools.wraps(DiffusionPipeline.save_pretrained)
    def save_pretrained(self, *args, **kwargs):
        for component in self.components.values():
            refuse_adapters(component)
        return super().save_pretrained(*args, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name, **kwargs):
        """As in diffusers, which before a download refuses a component's module unless it is one it loads from.

        (From a folder it takes any that has been imported.)
        """
        for name in COMPONENT_MODULES:
            LOADABLE_CLASSES.setdefault(f"{PACKAGE}.{name}", {})
        return super().download(pretrained_model_name, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file, **kwargs):
        """As in diffusers; of an export with its own code, the package's classes, so that none of that code is run."""
        config = super()._dict_from_json_file(json_file, **kwargs)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]
        for name, value in config.items():
            if isinstance(value, list) and len(value) == 2 and value[0] in COMPONENT_MODULES:
                config[name] = [f"{PACKAGE}.{value[0]}", value[1]]
        return config


def check_folder(cls: type, folder: Path, given: dict) -> None:
    """Refuse, with a `ValueError`, a local folder of another kind of model or pipeline of this package than `cls`.

    A pipeline may load what was saved by another one of the same kind of transformer, and any whose transformer is
    `given`.
    """
    import rq_draft_revise  # here, because the package's models import this module

    if not (folder / cls.config_name).is_file():
        if (folder / "model_index.json").is_file():
            raise ValueError(
                f"{folder} must be of a {cls.__name__}, got a whole pipeline: give its component's folder, such as "
                f"{folder / 'vae'}."
            )
        return
    name = cls.load_config(folder).get("_class_name")
    saved = getattr(rq_draft_revise, str(name), cls)
    theirs, own = (kind.__init__.__annotations__.get("transformer", kind) for kind in (saved, cls))
    if "transformer" not in given and not issubclass(theirs, own) and not issubclass(own, theirs):
        raise ValueError(f"{folder} must be of a {cls.__name__}, got a {name}: load it by {name}.from_pretrained.")


def refuse_adapters(model) -> None:
    """Raise a `ValueError` for a model with LoRA adapters: its layers have other names, by which it would not load."""
    if adapters := getattr(model, "peft_config", None):
        raise ValueError(
            f"{type(model).__name__} must have no LoRA adapters to be saved, got {sorted(adapters)}. Save them by "
            "`save_lora_weights`, or put them into the weights by `fuse_lora` and `unload_lora_weights`."
        )


def pipeline_class_of(pipeline: str | Path) -> type:
    """The class of this package that loads a pipeline, by its `model_index.json`.

    Args:
        pipeline (`str` or `Path`): Folder or Hub id.

    Raises:
        `ValueError`: it is none of this package's, or an export with its own code. `OSError`: it has no
        `model_index.json`.
    """
    import rq_draft_revise  # here, because the package's pipelines import this module

    names = [name for name in rq_draft_revise.__all__ if name.endswith("Pipeline")]
    class_name = DiffusionPipeline.load_config(pipeline).get("_class_name")
    if class_name not in names:
        raise ValueError(f"`pipeline` must be one of {names}, got {class_name!r} in {pipeline}.")
    return getattr(rq_draft_revise, class_name)


def write_card(component, folder: str | Path, repo_id: str, token: str | None = None) -> None:
    """Write the README.md of [`ModelCardMixin.push_to_hub`] into `folder`, which is about to be uploaded."""
    folder = Path(folder)
    published = published_card(repo_id, token)
    if published is not None:
        published.save(folder / "README.md")
        return
    source = getattr(component.config, "_name_or_path", None)
    if source and copy_card(source, folder, repo_id):
        return
    model_card(component, repo_id, variant=only_variant(folder)).save(folder / "README.md")


def published_card(repo_id: str, token: str | None = None) -> ModelCard | None:
    """The card that a repository has, unless it is the empty one."""
    try:
        card = ModelCard.load(repo_id, token=token, ignore_metadata_errors=True)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    return None if EMPTY_CARD in card.content else card


# ------------------------------------------------------------------------------------------- from a training script


def create_repository(args) -> str | None:
    """With `--push_to_hub`, make the repository before the training: what is not allowed is said at once. For one
    process to call.

    Args:
        args: `push_to_hub`, `hub_model_id`, `hub_token`, `hub_private_repo`, `output_dir`.

    Returns:
        The repository's id, None without `--push_to_hub`.
    """
    if not args.push_to_hub:
        return None
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    return create_repo(name, token=args.hub_token, private=args.hub_private_repo or None, exist_ok=True).repo_id


def upload(args, repo_id: str | None) -> None:
    """Upload `output_dir`; nothing without a `repo_id`.

    Without its checkpoints, cached codes, what a kill left half written, and the files of tensorboard, which have the
    paths of this machine in them.
    """
    if repo_id is not None:
        upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            token=args.hub_token,
            commit_message="End of training",
            ignore_patterns=["checkpoint-*", "codes*", "*.partial", "*tfevents*", "*hparams.yml"],
        )
