"""Weights of fewer bits: the configs that diffusers and transformers load them by. The libraries for it are optional."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import MetaLoraError
from .family import Family
from .plan import PACKAGES, Precision, lacking


def configs_for(precision: Precision, dtype: torch.dtype, family: Family) -> dict[str, Any]:
    """What each component of such a base is quantised by, computing in `dtype`; nothing for a precision that quantises nothing.

    Raises MetaLoraError where the library is missing.
    """
    if precision not in PACKAGES:
        return {}
    if lacks := lacking(precision):
        raise MetaLoraError(f"{precision} weights need {lacks}, or choose another plan with --plan.")
    return _fp8() if precision == "fp8" else _four_bit(dtype, family.large_text_encoder)


def _fp8() -> dict[str, Any]:
    """float8 e4m3 weights with a scale for every row. Cards that multiply float8 numbers quantise the input too, row by row; others compute in 16 bits."""
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig, PerRow
    from torchao.quantization.quantize_.common import KernelPreference

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        return {"transformer": TorchAoConfig(Float8WeightOnlyConfig())}
    own = KernelPreference.TORCH  # to choose by itself torchao looks for other packages in every product
    return {"transformer": TorchAoConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), kernel_preference=own))}


def _four_bit(dtype: torch.dtype, text_encoder: str) -> dict[str, Any]:
    """NF4, the scales quantised too (QLoRA, arXiv 2305.14314)."""
    import diffusers
    import transformers

    wanted = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    return {"transformer": diffusers.BitsAndBytesConfig(**wanted), text_encoder: transformers.BitsAndBytesConfig(**wanted)}


def quantise(module: nn.Module, config: Any) -> None:
    """Quantise the linear layers of a module that is in memory already, as diffusers does with that config while it loads one."""
    if hasattr(config, "quant_type"):
        from torchao.quantization import quantize_

        return quantize_(module, config.quant_type)
    import bitsandbytes as bnb

    for name, layer in [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]:
        how = dict(compress_statistics=config.bnb_4bit_use_double_quant, quant_type=config.bnb_4bit_quant_type)
        with torch.device("meta"):
            held = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, config.bnb_4bit_compute_dtype, **how)
        held.weight, held.bias = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, **how), layer.bias
        module.set_submodule(name, held.to(layer.weight.device))  # it is on its way to the device that the weights are quantised
