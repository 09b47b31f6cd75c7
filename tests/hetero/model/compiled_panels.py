"""The kernels of quantised panels compiled for a GPU that need not be there."""

from __future__ import annotations

from typing import Any

from cpu_kernels.formats import WeightFormat, WeightKind
from hetero.model.triton_panels import SIZES, Tiling

_POINTERS = {
    "x_ptr": "*bf16",
    "words_ptr": "*i32",
    "scales_ptr": "*i16",
    "out_ptr": "*bf16",
    "tile_experts_ptr": "*i32",
    "tile_starts_ptr": "*i32",
    "tile_ends_ptr": "*i32",
}


def assembly(kind: WeightKind, num_tokens: int) -> str:
    """PTX for compute capability 8.0 of experts that have so many tokens each."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    format_ = WeightFormat(kind=kind, group_size=128)
    # eight experts, or one token of one of them
    tiling = Tiling.of(format_, 8 * num_tokens if num_tokens > 1 else 1, 8)
    signature = dict(_POINTERS)
    signature |= dict.fromkeys(SIZES, "i32") | dict.fromkeys(tiling.constants, "constexpr")
    source = ASTSource(
        fn=tiling.kernel,
        signature=signature,
        constexprs=tiling.constants,
        # torch's memory begins at multiples of 16 bytes and more
        attrs={(index,): [["tt.divisibility", 16]] for index in range(len(_POINTERS))},
    )
    found: Any = compile(
        source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": True}
    )
    text: str = found.asm["ptx"]
    return text
