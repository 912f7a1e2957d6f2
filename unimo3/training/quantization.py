"""ZeRO++, which rounds weights and gradients for their way between ranks: what DeepSpeed 0.19 does not refuse itself.

Source: ZeRO++, arXiv 2306.10209; DeepSpeed 0.19, runtime/zero/partition_parameters.py (CUDAQuantizer) and
runtime/comm/coalesced_collectives.py (all_to_all_quant_reduce).
"""

import math
from typing import Any

_KEYS = ("zero_quantized_weights", "zero_quantized_gradients")
# The kernel's vectors.
_MULTIPLE = 8


def quantizes(ds_config: dict[str, Any]) -> list[str]:
    """The keys by which a ds_config has values rounded."""
    return [key for key in _KEYS if ds_config.get("zero_optimization", {}).get(key)]


def quantization_errors(config: dict[str, Any]) -> list[str]:
    """Errors of a ds_config's combinations of keys, one line each."""
    section = config.get("zero_optimization", {})
    errors = []
    if section.get("zero_quantized_nontrainable_weights"):
        errors.append(
            "'zero_optimization.zero_quantized_nontrainable_weights': true: DeepSpeed rounds what is frozen when it "
            "shards, before optim.freeze freezes; remove it"
        )
    keys = quantizes(config)
    if keys and section.get("stage") != 3:
        errors.append(f"'zero_optimization.{keys[0]}': true: only stage 3 quantizes; set stage to 3, or remove it")
    # DeepSpeed's rule for the type in which gradients travel.
    in_fp16 = config.get("fp16", {}).get("enabled") and "communication_data_type" not in config
    if "zero_quantized_gradients" in keys and not in_fp16 and config.get("communication_data_type") != "fp16":
        errors.append(
            "'zero_optimization.zero_quantized_gradients': true: DeepSpeed's kernel reads the bits of every gradient "
            "as fp16, and bf16 or float32 gradients become other numbers; use fp16, or remove it"
        )
    return errors


def part_errors(sizes: dict[str, int], ds_config: dict[str, Any], num_ranks: int) -> list[str]:
    """Return an error if a gathered parameter's part of a rank cannot be quantized, which a step would fail with.

    Args:
        sizes: number of elements of each parameter of the model by its name.
    """
    section = ds_config.get("zero_optimization", {})
    if "zero_quantized_weights" not in quantizes(ds_config):
        return []
    threshold = section.get("stage3_param_persistence_threshold", 100_000)
    groups = {num_ranks, section.get("zero_hpz_partition_size", 1)} - {1}
    odd = {
        name: size
        for name, size in sizes.items()
        if size > threshold and any(math.ceil(size / group) % _MULTIPLE for group in groups)
    }
    if not odd:
        return []
    return [
        f"training.ds_config: 'zero_optimization.zero_quantized_weights': true: on {num_ranks} ranks the parts of "
        f"{', '.join(odd)} are no multiples of {_MULTIPLE} values; use another number of ranks, or set "
        f"stage3_param_persistence_threshold to {max(odd.values())}"
    ]
