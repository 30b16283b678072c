"""How transformers loads an adapter by itself (`model.load_adapter`, and auto classes on an adapter's folder).

It fills a model's tensors from the file by name, without a word on those that are not there. Sparse adapters are loaded
as PEFT loads them: checked as a whole, with what the file calls the base's modules renamed as the base's own file is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftConfig, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.loading_report import LoadStateDictInfo

from peft_sam._peft.files import file_follows, reads_sparse
from peft_sam._peft.kind import is_sparse, tuner
from peft_sam._peft.names import BaseTunerLayer, save_and_load

PREFIX = "base_model.model."
OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# A reloaded module finds its own wrapper in place and unwraps it.
_load_adapter = inspect.unwrap(PeftAdapterMixin.load_adapter)


def enter_auto() -> None:
    """Wrap it; adapters of other kinds are loaded as before."""

    @functools.wraps(_load_adapter)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(_load_adapter).bind(self, *args, **kwargs)
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        load_config = given.get("load_config")
        model_id = given.get("peft_model_id") or getattr(load_config, "pretrained_model_name_or_path", None)
        hub = {**(getattr(load_config, "download_kwargs", None) or {}), **(given.get("download_kwargs") or {})}
        hub = {**hub, **(given.get("adapter_kwargs") or {}), **given}
        hub = {name: hub[name] for name in OF_THE_HUB if hub.get(name) is not None}
        name = given.get("adapter_name") or "default"
        config: Any = given.get("peft_config") or _config(model_id, hub)
        taken = self._hf_peft_config_loaded and name in self.peft_config
        if not is_sparse(config) or taken or given.get("hotswap", "auto") is True:
            return _load_adapter(self, *args, **kwargs)
        config.inference_mode = not given.get("is_trainable", False)
        state = given.get("adapter_state_dict")
        if state is None:
            state = _read(model_id, hub)
        mapping = given.get("weight_mapping") or getattr(load_config, "weight_mapping", None) or []
        renamed = _renamed(self, [entry for entry in mapping if isinstance(entry, WeightRenaming)])
        state = {renamed(key.removeprefix(PREFIX)): tensor for key, tensor in state.items()}
        _load(self, name, config, state, renamed, given.get("low_cpu_mem_usage", False))
        return LoadStateDictInfo(set(), set(), set(), [], {}, set())

    PeftAdapterMixin.load_adapter = load_adapter


def _config(model_id: Any, hub: Mapping[str, Any]) -> PeftConfig | None:
    try:
        return PeftConfig.from_pretrained(model_id, **hub)
    except Exception:  # transformers says what is wrong
        return None


def _read(model_id: Any, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    token = reads_sparse.set(lambda: True)
    try:
        found: dict[str, Tensor] = save_and_load.load_peft_weights(model_id, device="cpu", **hub)
    except SafetensorError as error:
        raise ValueError(f"the adapter file of {str(model_id)!r} is truncated or damaged ({error}).") from error
    finally:
        reads_sparse.reset(token)
    return found


def _renamed(model: nn.Module, renamings: list[WeightRenaming]) -> Callable[[str], str]:
    """What the model calls a tensor of a file: by its renamings, if they lead to one of its modules."""
    modules = {name for name, _ in model.named_modules()}

    def renamed(key: str) -> str:
        new: str = rename_source_key(key, renamings, [])[0]
        parts = new.partition(".sam_sparse_")[0].split(".")
        there = any(".".join(parts[:end]) in modules for end in (len(parts), len(parts) - 1) if end)
        return new if there else key

    return renamed


def _load(
    model: Any, name: str, config: Any, state: dict[str, Tensor], renamed: Callable[[str], str], low_cpu_mem_usage: bool
) -> None:
    """Inject the adapter and fill it, or leave the model as it was."""
    loaded, token = model._hf_peft_config_loaded, file_follows.set(renamed)
    try:
        made = tuner()(model, config, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage)
        try:
            set_peft_model_state_dict(model, state, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage)
        except BaseException:
            made.withdraw(name)
            raise
        model._hf_peft_config_loaded = True
    except KeyError as error:
        raise ValueError(f"the adapter file lacks the tensor {error}.") from error
    finally:
        file_follows.reset(token)
        if not model._hf_peft_config_loaded and not loaded:
            vars(model).pop("peft_config", None)
    made.stay_at_hand(name)
    if config.inference_mode:
        model.eval()
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.requires_grad_(False)
