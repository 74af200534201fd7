"""LoRA adapters of the transformer, loaded and saved through the pipeline as in diffusers."""

import os

import torch
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from huggingface_hub.utils import validate_hf_hub_args


class TransformerLoraMixin(LoraBaseMixin):
    """`load_lora_weights`, `save_lora_weights`, `fuse_lora` and the rest for a pipeline's `transformer`.

    Needs `peft`. Adapters live in the transformer, which other pipelines may share.
    """

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    @classmethod
    @validate_hf_hub_args
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor], **kwargs
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict | None]:
        """Weights of an adapter, from safetensors alone.

        Args:
            pretrained_model_name_or_path_or_dict (`str` or `dict`): Hub id, folder, file, or the weights themselves.
            kwargs: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`, `proxies`, and `return_lora_metadata` to get rank, alpha and modules too.
        """
        return_lora_metadata = kwargs.pop("return_lora_metadata", False)
        names = ("weight_name", "subfolder", "revision", "token", "cache_dir", "local_files_only", "proxies")
        options = {name: kwargs.pop(name, None) for name in names} | {
            "force_download": kwargs.pop("force_download", False)
        }
        if kwargs:
            raise ValueError(f"`load_lora_weights` takes {[*options]}, got {sorted(kwargs)}.")
        state_dict, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict=pretrained_model_name_or_path_or_dict,
            use_safetensors=True,
            allow_pickle=False,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            **options,
        )
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs,
    ) -> None:
        """Add an adapter to the transformer and activate it.

        Args:
            pretrained_model_name_or_path_or_dict (`str` or `dict`), kwargs: See [`lora_state_dict`].
            adapter_name (`str`, *optional*): To tell adapters apart; by default `default_0` and so on.
            hotswap (`bool`, defaults to `False`): Replace the weights of the adapter of this name in place.
            low_cpu_mem_usage (`bool`, defaults to `True`): Do not initialise what is about to be loaded.

        Raises:
            `ValueError`: weights that are not a LoRA adapter of a transformer.
        """
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        foreign = [key for key in state_dict if not key.startswith(f"{self.transformer_name}.") or "lora" not in key]
        if foreign or not state_dict:
            raise ValueError(
                "`pretrained_model_name_or_path_or_dict` must hold LoRA weights by names that begin with "
                f"'{self.transformer_name}.', got {foreign[:3] or 'none'}."
            )
        self.transformer.load_lora_adapter(
            state_dict,
            network_alphas=None,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.Tensor],
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function=None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict | None = None,
    ) -> None:
        """Write an adapter, by default to `pytorch_lora_weights.safetensors`.

        Args:
            save_directory (`str` or `os.PathLike`): Made if it is not there.
            transformer_lora_layers (`dict[str, torch.Tensor]`): `peft.get_peft_model_state_dict(pipe.transformer)`.
            transformer_lora_adapter_metadata (`dict`, *optional*): `peft_config["default"].to_dict()` of the
                transformer, without which alpha is taken to equal the rank.
            is_main_process, weight_name, save_function, safe_serialization: As in diffusers.
        """
        if not transformer_lora_layers:
            raise ValueError(f"`transformer_lora_layers` must not be empty, got {transformer_lora_layers!r}.")
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={cls.transformer_name: transformer_lora_layers},
            lora_metadata={cls.transformer_name: transformer_lora_adapter_metadata},
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    def fuse_lora(self, components: list[str] = ["transformer"], **kwargs) -> None:  # noqa: B006  (diffusers')
        """Add the active adapters to the weights, for speed: see `LoraBaseMixin.fuse_lora`."""
        super().fuse_lora(components=components, **kwargs)

    def unfuse_lora(self, components: list[str] = ["transformer"], **kwargs) -> None:  # noqa: B006  (diffusers')
        """Subtract them again, which float32 gives back to the last digits, not to the last bit."""
        super().unfuse_lora(components=components, **kwargs)
