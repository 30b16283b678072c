"""Which parameters belong to a module: those that change when the module is adapted."""

from __future__ import annotations

from torch import nn

# Children whose parameters a module reads without calling them: they are candidates of the module itself.
READ_NOT_CALLED: dict[type[nn.Module], tuple[str, ...]] = {nn.MultiheadAttention: ("out_proj",)}


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that `module` owns, by name relative to it, those of READ_NOT_CALLED children included."""
    own = dict(module.named_parameters(recurse=False))
    for child in READ_NOT_CALLED.get(type(module), ()):
        own.update({f"{child}.{name}": p for name, p in module.get_submodule(child).named_parameters(recurse=False)})
    return own
