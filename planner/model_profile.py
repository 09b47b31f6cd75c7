"""ModelProfile: the shapes of a model without weights, of any architecture, from a JSON file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from planner.attention_kinds import Attention, Size
from planner.errors import ModelSpecError
from planner.model_spec import ARCHITECTURES, Dtype, LayerSpec, ModelSpec, RopeSpec

Count = Annotated[int, Meta(ge=0, le=1 << 20)]


class LayerKind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `LayerSpec` says of a layer, as a file has it."""

    attention: Attention
    intermediate_size: Count
    num_experts: Count = 0
    num_experts_per_token: Count = 0
    window: Size | None = None
    shared_size: Count = 0
    num_ffn_matrices: Literal[2, 3] = 3

    def __post_init__(self) -> None:
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_token {self.num_experts_per_token} is larger than the "
                f"{self.num_experts} experts"
            )
        if self.num_experts and not (self.num_experts_per_token and self.intermediate_size):
            raise ValueError("experts need num_experts_per_token and intermediate_size")
        if self.shared_size and not self.num_experts:
            raise ValueError(f"shared_size is {self.shared_size} but there are no experts")

    @property
    def layer(self) -> LayerSpec:
        return LayerSpec(**{name: getattr(self, name) for name in self.__struct_fields__})


class ModelProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model that can be planned, and run only if its architecture is of a supported family.

    `kinds` are the different layers under a letter each, `layers` is a letter for every layer.

    Examples
    --------
    >>> profile = read_model_profile({"schema_version": 1, "name": "toy", "source": "nobody/toy",
    ...     "architecture": "ToyForCausalLM", "hidden_size": 8, "vocab_size": 10, "is_tied": False,
    ...     "max_position_embeddings": 32, "layers": "dd", "kinds": {"d": {"intermediate_size": 16,
    ...     "attention": {"kind": "latent", "num_heads": 2, "kv_rank": 4, "nope_dim": 4,
    ...                   "rope_dim": 2, "value_dim": 4}}}})
    >>> profile.spec().kv_bytes_per_token(0)  # (4 latent + 2 rotated) * 2 bytes
    12
    """

    schema_version: Literal[1]
    name: str
    source: str
    architecture: str
    dtype: Dtype = "bfloat16"
    hidden_size: Size
    vocab_size: Annotated[int, Meta(ge=1, le=1 << 24)]
    max_position_embeddings: Annotated[int, Meta(ge=1, le=1 << 26)]
    is_tied: bool
    has_mlp_bias: bool = False
    num_learned_positions: Count = 0
    kinds: dict[Annotated[str, Meta(min_length=1, max_length=1)], LayerKind]
    layers: Annotated[str, Meta(min_length=1, max_length=1024)]

    def __post_init__(self) -> None:
        if set(self.layers) != set(self.kinds):
            raise ValueError(
                f"layers has the letters {''.join(sorted(set(self.layers)))!r} but kinds are "
                f"{''.join(sorted(self.kinds))!r}"
            )
        if self.architecture in ARCHITECTURES:
            raise ValueError(
                f"{self.architecture} is described by the keys of its config.json instead"
            )

    def spec(self, dtype: Dtype | None = None) -> ModelSpec:
        """The planner's description; `dtype` overrides the profile's."""
        kinds = {letter: kind.layer for letter, kind in self.kinds.items()}
        layers = tuple(kinds[letter] for letter in self.layers)
        # The heads of the model are those of the layers that cache most.
        keeper = max(self.kinds.values(), key=lambda kind: kind.attention.kv_elements_per_token)
        num_heads, num_kv_heads, head_dim = keeper.attention.own_heads
        return ModelSpec(
            name=self.name,
            architecture=self.architecture,
            dtype=dtype or self.dtype,
            hidden_size=self.hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            layers=layers,
            rope=RopeSpec(theta=1e4),  # costs the same whatever its base
            is_tied=self.is_tied,
            has_mlp_bias=self.has_mlp_bias,
            num_learned_positions=self.num_learned_positions,
        )


def read_model_profile(values: dict[str, Any]) -> ModelProfile:
    """Check a decoded profile.

    Raises
    ------
    ModelSpecError
        A missing, unknown or impossible value: one sentence that names its place.
    """
    try:
        return msgspec.convert(values, ModelProfile)
    except msgspec.ValidationError as error:
        raise ModelSpecError(str(error)) from None
