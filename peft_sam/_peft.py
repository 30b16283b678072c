"""The one door to names that PEFT keeps private, and with `hotswap` the only place that changes PEFT's tables.

Everything else in this package uses what PEFT documents. If a name below moves, the import fails here, with the
range of PEFT versions that is known to work.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

SUPPORTED_PEFT = "peft>=0.21.0,<0.22"

try:
    import peft.mixed_model
    import peft.tuners.mixed
    import peft.tuners.mixed.model as mixed
    from peft import PeftModel, PeftModelForQuestionAnswering, PeftModelForTokenClassification
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners.tuners_utils import (
        BaseTuner,
        BaseTunerLayer,
        check_adapters_to_merge,
        check_target_module_exists,
    )
    from peft.utils import PeftType, hotswap, save_and_load
    from peft.utils.error import NoMatchingPeftModuleError
    from peft.utils.hotswap import (
        _convert_scalings_to_tensor as prepare_swap,
    )
    from peft.utils.hotswap import (
        hotswap_adapter_from_state_dict,
        load_peft_weights,
    )
    from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
    from peft.utils.other import AuxiliaryTrainingWrapper
    from peft.utils.quantization_utils import (
        ForwardOnlyQuantizationBackend,
        QuantizationBackend,
        get_quantization_kwargs,
        resolve_quantization_backend,
    )
except ImportError as error:
    raise ImportError(
        f"peft_sam supports {SUPPORTED_PEFT} and found peft {version('peft')}, which lacks a name that peft_sam "
        f'needs ({error}). Install a supported version: pip install "{SUPPORTED_PEFT}"'
    ) from error

__all__ = [
    "SAM_SPARSE",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "NoMatchingPeftModuleError",
    "QuantizationBackend",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "dare_linear",
    "dare_ties",
    "hotswap",
    "hotswap_adapter_from_state_dict",
    "load_peft_weights",
    "magnitude_prune",
    "pickle_allowed",
    "prepare_swap",
    "quantization_backend",
    "register",
    "task_arithmetic",
    "ties",
]

# A reloaded module finds its own wrappers in place and unwraps them.
_write_plain_card = inspect.unwrap(PeftModel.create_or_update_model_card)
_from_pretrained = inspect.unwrap(PeftModel.from_pretrained.__func__)
_load_adapter = inspect.unwrap(PeftModel.load_adapter)
_save_pretrained = inspect.unwrap(PeftModel.save_pretrained)
_torch_load = inspect.unwrap(save_and_load.torch_load)

# The heads that PEFT trains densely for a task, entered in the config only after the adapter is made.
HEADS = {PeftModelForTokenClassification: ("classifier", "score"), PeftModelForQuestionAnswering: ("qa_outputs",)}

# Whether the file that PEFT is reading may be a pickle.
pickle_allowed: ContextVar[Callable[[], bool]] = ContextVar("pickle_allowed", default=lambda: True)


def _add_member(name: str) -> PeftType:
    """Add a real member `name` to PEFT's closed enum of types, or return the one that is there.

    A plain string in its place would break `.value`; a member entered in the enum's own maps passes lookup by
    value, name and attribute, JSON, deepcopy and pickle.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


SAM_SPARSE = _add_member("SAM_SPARSE")


def quantization_backend(base_layer: nn.Module, tuner: Any) -> QuantizationBackend | None:
    """PEFT's access to the weight of a quantised layer, None if it is not quantised.

    To write torchao's weights PEFT needs the config of the quantisation, which models that transformers has quantised
    carry; others can only run.
    """
    try:
        return resolve_quantization_backend(base_layer, **get_quantization_kwargs(tuner))
    except ValueError:
        return ForwardOnlyQuantizationBackend("torchao, without the config of its quantisation")


def register(
    config_cls: type,
    model_cls: Any,
    layer_cls: type,
    complete_card: Callable[[Any, str, Path], None],
    other_base: type[Warning],
) -> None:
    """Enter the method in PEFT's tables: config, tuner, prefix, mixed model, heads, the text of the card, and files.

    Called again it replaces what it entered before, so that a reloaded module works.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[SAM_SPARSE] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[SAM_SPARSE] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[SAM_SPARSE] = model_cls.prefix
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING[SAM_SPARSE] = model_cls
    _register_mixed(config_cls, model_cls, layer_cls)
    _register_configs(config_cls)
    _register_card(config_cls, complete_card)
    _register_files(config_cls, model_cls, other_base)


def _register_mixed(config_cls: type, model_cls: Any, layer_cls: type) -> None:
    """Put a `MixedModel` in place that knows one method more; PEFT's own has its list written out in code."""

    class MixedModel(mixed.MixedModel):
        def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
            if isinstance(peft_config, config_cls):
                return peft_config
            return super()._prepare_adapter_config(peft_config, model_config)

        def _prepare_model(self, peft_config: Any, model: Any) -> None:
            if isinstance(peft_config, config_cls):
                model_cls._prepare_model(self, peft_config, model)

        def _create_and_replace(self, config: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(config, config_cls):
                model_cls._create_and_replace(self, config, *args, **kwargs)
            else:
                super()._create_and_replace(config, *args, **kwargs)

        def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            if isinstance(self.peft_config[adapter_name], config_cls):
                model_cls.inject(self, super().inject_adapter, model, adapter_name, *args, **kwargs)
            else:
                super().inject_adapter(model, adapter_name, *args, **kwargs)

    if SAM_SPARSE not in mixed.COMPATIBLE_TUNER_TYPES:
        mixed.COMPATIBLE_TUNER_TYPES = (*mixed.COMPATIBLE_TUNER_TYPES, SAM_SPARSE)
        peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = mixed.COMPATIBLE_TUNER_TYPES
        mixed.PREFIXES.append(model_cls.prefix)
    if config_cls not in mixed.Configs.__args__:
        mixed.Configs = mixed.Configs | config_cls
        mixed.Layers = (*mixed.Layers, layer_cls)
    peft.mixed_model.MixedModel = MixedModel


def _register_configs(config_cls: type) -> None:
    """Have PEFT, which takes a config for the adapter's own, go along with adapters that have copies of it.

    The heads of a task are entered before the copy is made. A config that is given to `from_pretrained` becomes the
    adapter's.
    """
    for task, heads in HEADS.items():
        _enter_heads_first(task, heads, config_cls)

    @functools.wraps(_from_pretrained)
    def from_pretrained(
        cls: Any,
        model: Any,
        model_id: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        found = _from_pretrained(cls, model, model_id, adapter_name, is_trainable, config, *args, **kwargs)
        if isinstance(config, config_cls):
            vars(config).update(vars(found.peft_config[adapter_name]))
            found.peft_config[adapter_name] = config
        return found

    PeftModel.from_pretrained = classmethod(from_pretrained)


def _enter_heads_first(task: Any, heads: tuple[str, ...], config_cls: type) -> None:
    plain = inspect.unwrap(task.__init__)

    @functools.wraps(plain)
    def __init__(self: Any, model: Any, peft_config: Any = None, *args: Any, **kwargs: Any) -> None:
        if issubclass(type(peft_config), config_cls):
            peft_config.modules_to_save = list(dict.fromkeys([*(peft_config.modules_to_save or ()), *heads]))
        plain(self, model, peft_config, *args, **kwargs)

    task.__init__ = __init__


def _register_card(config_cls: type, complete_card: Callable[[Any, str, Path], None]) -> None:
    """Have PEFT's model card say what a sparse adapter is, also when `push_to_hub` writes a card of its own.

    Of several sparse adapters the card describes "default", which PEFT saves beside it, or else the first.

    `push_to_hub` saves the adapter, then overwrites its card with an empty template; the card is written once
    more before the upload.
    """

    @functools.wraps(_write_plain_card)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        _write_plain_card(self, output_dir)
        names = [name for name, config in self.peft_config.items() if isinstance(config, config_cls)]
        if names:
            complete_card(self, "default" if "default" in names else names[0], Path(output_dir))

    def _upload_modified_files(self: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(config, config_cls) for config in self.peft_config.values()):
            self.create_or_update_model_card(str(working_dir))
        return super(PeftModel, self)._upload_modified_files(working_dir, *args, **kwargs)

    PeftModel.create_or_update_model_card = create_or_update_model_card
    PeftModel._upload_modified_files = _upload_modified_files


def _register_files(config_cls: type, model_cls: Any, other_base: type[Warning]) -> None:
    """Have a sparse adapter that cannot be loaded taken out again, `strict_base` obeyed, and no file be a pickle.

    PEFT adds an adapter before it reads the file.
    """

    @functools.wraps(_load_adapter)
    def load_adapter(
        self: PeftModel, model_id: str, adapter_name: str, *args: Any, strict_base: bool = False, **kwargs: Any
    ) -> Any:
        def is_ours() -> bool:
            return isinstance(self.peft_config.get(adapter_name), config_cls)

        new = adapter_name not in self.peft_config or (
            is_ours() and model_cls.awaits_file(self.base_model, adapter_name)
        )
        token = pickle_allowed.set(lambda: not is_ours())
        try:
            with warnings.catch_warnings() if strict_base else nullcontext():
                if strict_base:
                    warnings.simplefilter("error", other_base)
                result = _load_adapter(self, model_id, adapter_name, *args, **kwargs)
                if is_ours():
                    model_cls.stay_at_hand(self.base_model, adapter_name)
                return result
        except BaseException as error:
            if isinstance(error, other_base):
                raise ValueError(str(error)) from None
            if not is_ours():
                raise
            if new:
                model_cls.withdraw(self.base_model, adapter_name)
            if isinstance(error, SafetensorError):
                raise ValueError(f"the adapter file of {str(model_id)!r} is truncated or damaged ({error}).") from error
            if isinstance(error, KeyError):
                raise ValueError(f"the adapter file of {str(model_id)!r} lacks the tensor {error}.") from error
            raise
        finally:
            pickle_allowed.reset(token)

    @functools.wraps(_torch_load)
    def torch_load(*args: Any, **kwargs: Any) -> Any:
        if not pickle_allowed.get()():
            raise ValueError(
                "the adapter file is a pickle (adapter_model.bin); SAM sparse adapters are safetensors files only, "
                "which cannot run code: get, or save again, adapter_model.safetensors."
            )
        return _torch_load(*args, **kwargs)

    @functools.wraps(_save_pretrained)
    def save_pretrained(
        self: PeftModel,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        chosen = self.peft_config if selected_adapters is None else selected_adapters
        if not safe_serialization and any(isinstance(self.peft_config.get(name), config_cls) for name in chosen):
            raise ValueError(
                "safe_serialization=False writes a pickle; SAM sparse adapters are safetensors files only."
            )
        return _save_pretrained(self, save_directory, safe_serialization, selected_adapters, *args, **kwargs)

    PeftModel.load_adapter, PeftModel.save_pretrained = load_adapter, save_pretrained
    save_and_load.torch_load = torch_load
