"""Uploading a trained pipeline to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import create_repo, upload_folder


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
    """Upload `output_dir` without its checkpoints and cached codes; nothing without a `repo_id`."""
    if repo_id is not None:
        upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            token=args.hub_token,
            commit_message="End of training",
            ignore_patterns=["checkpoint-*", "codes*", "runs/*"],
        )
