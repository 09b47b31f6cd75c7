"""An effort that measures next to nothing, and models whose shapes it can measure."""

from __future__ import annotations

from hetero.measure.effort import Effort
from planner.model_spec import Dtype, LayerSpec, ModelSpec, Quantization, RopeSpec

MEMORY_BYTES = 16 << 20

TINY = Effort(
    budget_s=0.001,
    settling_s=0.0,
    max_flops=1e9,
    tokens=(1, 4),
    torch_tokens=(1, 4),
    gpu_tokens=(1, 16),
    shapes=((256, 128),),
    torch_shapes=((256, 128),),
    expert_shapes=((128, 128),),
    dense_shapes=((128, 256),),
    expert_tokens=(1, 4),
    heads=((4, 2, 32),),
    contexts=(32,),
    num_seqs=(1, 4),
    prompts=((4, 0), (4, 32)),
    widths=(128,),
    rows=(1, 4),
    vocabularies=(256,),
    copy_bytes=(4096, 1 << 20),
)


def two_layers(dtype: Dtype = "bfloat16", quantization: Quantization | None = None) -> ModelSpec:
    """A model with a layer of experts and a dense one; all columns are whole groups."""
    return ModelSpec(
        name="toy",
        architecture="Qwen3MoeForCausalLM",
        dtype=dtype,
        hidden_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=320,
        max_position_embeddings=512,
        layers=(
            LayerSpec(intermediate_size=128, num_experts=8, num_experts_per_token=2),
            LayerSpec(intermediate_size=256),
        ),
        rope=RopeSpec(theta=1e4),
        is_tied=False,
        quantization=quantization,
    )
