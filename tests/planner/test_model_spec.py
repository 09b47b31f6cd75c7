"""ModelSpec and the reading of config.json, against transformers' own classes and by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import ModelSpecError
from planner.model_spec import ARCHITECTURES, LayerSpec, ModelSpec, RopeSpec
from tests.planner.tiny import tiny_spec

DATA = Path(__file__).parents[2].parent / "shared/data/model_configs"

# Shapes that divide by nothing.
TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 60,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
}
QWEN_MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 14}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama window": ("Llama", {"sliding_window": 7}),
    "mistral": ("Mistral", {"head_dim": 14}),
    "mistral no window": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 7, "num_experts_per_tok": 3}),
    "mixtral window": ("Mixtral", {"num_local_experts": 2, "sliding_window": 9}),
    "olmoe": ("Olmoe", {"num_experts": 7, "num_experts_per_tok": 3, "clip_qkv": 8.0}),
    "olmoe biases": ("Olmoe", {"num_experts": 9, "attention_bias": True, "norm_topk_prob": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2 window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {}),
    "qwen3 biases": (
        "Qwen3",
        {"head_dim": 14, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3 layer types": (
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
        },
    ),
    "qwen3 moe": ("Qwen3Moe", {**QWEN_MOE, "head_dim": 14}),
    "qwen3 moe window": (
        "Qwen3Moe",
        {**QWEN_MOE, "use_sliding_window": True, "sliding_window": 7, "norm_topk_prob": True},
    ),
    "qwen3 moe dense layers": (
        "Qwen3Moe",
        {**QWEN_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [1], "attention_bias": True},
    ),
}


def build(family: str, values: dict[str, Any]) -> Any:
    """A transformers model without memory."""
    config = getattr(transformers, f"{family}Config")(**TINY | values)
    with torch.device("meta"):
        return getattr(transformers, f"{family}ForCausalLM")(config)


def from_config(values: object, **arguments: Any) -> ModelSpec:
    return ModelSpec.from_config(values, name="toy", **arguments)  # type: ignore[arg-type]


def config_of(family: str, **values: Any) -> dict[str, Any]:
    return {**TINY, "architectures": [f"{family}ForCausalLM"], **values}


def error_of(values: object) -> str:
    with pytest.raises(ModelSpecError) as caught:
        from_config(values)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400
    return message


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=list(FAMILIES))
def pair(request: pytest.FixtureRequest) -> tuple[Any, ModelSpec]:
    """A transformers model and the spec of what it writes as config.json."""
    family, values = request.param
    model = build(family, values)
    saved = json.loads(model.config.to_json_string())
    return model, from_config(saved | {"architectures": [f"{family}ForCausalLM"]})


# --- against transformers ----------------------------------------------------------------------


def test_weights_are_counted_as_transformers_allocates_them(pair: tuple[Any, ModelSpec]) -> None:
    """Module by module and in total, tied matrices once."""
    model, spec = pair
    total = sum(parameter.numel() for parameter in model.parameters())
    assert spec.total_weight_bytes() == total * spec.dtype_bytes
    for index, layer in enumerate(model.model.layers):
        expected = sum(parameter.numel() for parameter in layer.parameters())
        modules = spec.layers[index].modules
        assert sum(spec.num_params(module, index) for module in modules) == expected
        attention = [*layer.self_attn.parameters(), *layer.input_layernorm.parameters()]
        assert spec.num_params("attention", index) == sum(p.numel() for p in attention)


def test_shapes_and_switches_are_those_of_transformers(pair: tuple[Any, ModelSpec]) -> None:
    """Head sizes, windows, experts, norms and rotary bases of every family."""
    model, spec = pair
    for index, layer in enumerate(model.model.layers):
        attention, this = layer.self_attn, spec.layers[index]
        assert spec.head_dim == attention.head_dim
        assert spec.kv_size == attention.k_proj.out_features
        assert spec.has_qkv_bias == (attention.q_proj.bias is not None)
        assert spec.has_o_bias == (attention.o_proj.bias is not None)
        assert (spec.qk_norm != "none") == hasattr(attention, "q_norm")
        assert this.window == window_of(model, attention)
        router = getattr(layer.mlp, "gate", None)
        assert this.is_moe == (router is not None)
        if router is not None:
            assert (this.num_experts, this.num_experts_per_token) == (
                router.num_experts,
                router.top_k,
            )
            assert spec.norm_topk_prob == getattr(router, "norm_topk_prob", True)
    assert spec.norm_eps == model.model.norm.variance_epsilon
    assert spec.rope.theta == model.config.rope_parameters["rope_theta"]
    assert spec.clip_qkv == getattr(model.config, "clip_qkv", None)
    assert spec.is_tied == model.config.tie_word_embeddings


def window_of(model: Any, attention: Any) -> int | None:
    """The window that transformers' masks apply."""
    if type(model).__name__ in ("LlamaForCausalLM", "OlmoeForCausalLM"):
        return None
    owner = attention if hasattr(attention, "sliding_window") else model.config
    window: int | None = owner.sliding_window
    return window


@pytest.mark.parametrize(
    "family", ["Llama", "Mistral", "Mixtral", "Olmoe", "Qwen2", "Qwen3", "Qwen3Moe"]
)
def test_what_a_config_leaves_out_is_what_transformers_fills_in(family: str) -> None:
    """Cache heads, windows, epsilon and rotary base of a config that names only the shapes."""
    required = {"num_experts": 4, "num_experts_per_tok": 2} if family != "Mixtral" else {}
    if family == "Mixtral":
        required = {"num_local_experts": 8, "num_experts_per_tok": 2}
    if family == "Qwen3Moe":
        required |= {"moe_intermediate_size": 768}
    values = {**TINY, **required, "num_attention_heads": 32, "hidden_size": 64}
    del values["num_key_value_heads"]
    if family in ("Qwen2", "Qwen3", "Qwen3Moe"):
        values["use_sliding_window"] = True
    expected = getattr(transformers, f"{family}Config")(**values)
    spec = from_config({**values, "architectures": [f"{family}ForCausalLM"]})
    assert spec.num_kv_heads == expected.num_key_value_heads
    assert spec.norm_eps == expected.rms_norm_eps
    assert spec.rope.theta == expected.rope_parameters["rope_theta"]
    window = None if family in ("Llama", "Olmoe") else expected.sliding_window
    kinds = getattr(expected, "layer_types", None) or ["sliding_attention"] * 5
    assert [layer.window for layer in spec.layers] == [
        window if kind == "sliding_attention" else None for kind in kinds
    ]
    assert spec.is_tied == expected.tie_word_embeddings


@pytest.mark.parametrize("kind", ["linear", "llama3"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_scaling_is_read_in_both_spellings(kind: str, key: str) -> None:
    """`rope_scaling` of older configs, with `type`, and `rope_parameters` of newer ones."""
    section: dict[str, Any] = {"factor": 8.0, "rope_type": kind}
    if kind == "llama3":
        section |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        section |= {"original_max_position_embeddings": 32}
    if key == "rope_scaling":
        section["type"] = section.pop("rope_type")
        rope = from_config(config_of("Llama", rope_theta=5e5, rope_scaling=section)).rope
    else:
        rope = from_config(config_of("Llama", rope_parameters=section | {"rope_theta": 5e5})).rope
    expected = RopeSpec(theta=5e5, kind="linear", factor=8.0)
    if kind == "llama3":
        expected = RopeSpec(
            theta=5e5,
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=32,
        )
    assert rope == expected


@pytest.mark.parametrize(
    ("name", "params_in_billions"),
    [
        ("llama-3.1-8b", 8.030),
        ("mixtral", 46.703),
        ("olmoe", 6.919),
        ("qwen3", 30.532),
        ("qwen3-30b-a3b-instruct-2507", 30.532),
    ],
)
def test_real_configs_have_their_known_size(name: str, params_in_billions: float) -> None:
    """config.json files as their makers ship them."""
    spec = from_config(read_real(name))
    actual = spec.total_weight_bytes() / spec.dtype_bytes / 1e9
    assert actual == pytest.approx(params_in_billions, abs=1e-3)


@pytest.mark.parametrize(
    "name", ["deepseek", "jetmoe", "llamamoe", "phi", "powermoe", "qwen", "switch"]
)
def test_real_configs_of_other_families_are_refused(name: str) -> None:
    """The answer lists what is supported."""
    assert "is not supported; supported: LlamaForCausalLM, Mistral" in error_of(read_real(name))


def test_a_fork_that_keeps_the_name_of_a_family_is_refused() -> None:
    """LLaMA-MoE-v2 calls itself Mixtral but scales its experts by four."""
    assert "scale_factor is 4.0, which MixtralForCausalLM does not have" in error_of(
        read_real("llamamoe2")
    )


def read_real(name: str) -> Any:
    path = DATA / f"{name}.config.json"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    return json.loads(path.read_text())


# --- by hand -----------------------------------------------------------------------------------

HAND = ModelSpec(
    name="hand",
    architecture="Qwen3MoeForCausalLM",
    dtype="bfloat16",
    hidden_size=10,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    vocab_size=100,
    max_position_embeddings=64,
    layers=(
        LayerSpec(intermediate_size=7, window=3),
        LayerSpec(intermediate_size=5, num_experts=8, num_experts_per_token=2),
    ),
    rope=RopeSpec(theta=1e4),
    is_tied=False,
    qk_norm="head",
)


def test_bytes_of_a_layer_by_hand() -> None:
    """Two bytes a weight."""
    # q 10*24, k and v 10*12 each, o 24*10, norms 2*6 + 10
    assert HAND.weight_bytes("attention", 0) == 2 * (240 + 120 + 120 + 240 + 12 + 10)
    assert HAND.weight_bytes("dense", 0) == 2 * (3 * 10 * 7 + 10)
    assert HAND.weight_bytes("router", 1) == 2 * (8 * 10 + 10)
    assert HAND.expert_bytes(1) == 2 * 3 * 10 * 5
    assert HAND.weight_bytes("experts", 1) == 8 * 300
    assert HAND.weight_bytes("embedding") == 2 * 1000
    assert HAND.weight_bytes("head") == 2 * (1000 + 10)
    assert HAND.kv_bytes_per_token(0) == 2 * 2 * 6 * 2
    # layer 0: 1484 + 440; layer 1: 1484 + 180 + 2400; embedding and head: 2000 + 2020
    assert HAND.total_weight_bytes() == 10008
    assert replace(HAND, is_tied=True).total_weight_bytes() == 8008


def test_flops_of_a_layer_by_hand() -> None:
    """Two FLOP for a multiply-add."""
    assert HAND.flops("attention", 3, 0) == 2 * 3 * (240 + 120 + 120 + 240)
    assert HAND.flops("dense", 3, 0) == 6 * 3 * 10 * 7
    assert HAND.flops("router", 3, 1) == 2 * 3 * 10 * 8
    assert HAND.flops("experts", 3, 1) == 6 * 3 * 10 * 5 * 2  # two experts a token
    assert HAND.flops("head", 3) == 2 * 3 * 1000
    assert HAND.flops("embedding", 3) == 0


@pytest.mark.parametrize("num_past", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("num_new", [1, 2, 5])
def test_attention_flops_count_the_pairs_that_the_mask_allows(num_new: int, num_past: int) -> None:
    """Scores and values: 4 * 24 FLOP for each query and key it sees, with and without window."""
    for layer, window in ((0, 3), (1, 10**6)):
        pairs = sum(min(window, num_past + i + 1) for i in range(num_new))
        assert HAND.attention_flops(layer, num_new, num_past) == 4 * 24 * pairs


def test_the_fingerprint_ignores_the_name_only() -> None:
    """Plans are matched by shapes and formats."""
    assert replace(HAND, name="other").fingerprint == HAND.fingerprint
    assert replace(HAND, vocab_size=101).fingerprint != HAND.fingerprint
    assert replace(HAND, dtype="float16").fingerprint != HAND.fingerprint


def test_fingerprints_from_before_other_architectures_stay() -> None:
    """Stored plans refer to them; these were written down with version 0.2."""
    assert HAND.fingerprint == "9b0eaea0a2729824"
    assert tiny_spec("dm").fingerprint == "1983bf3007203d3c"
    assert replace(HAND, num_learned_positions=2).fingerprint != HAND.fingerprint
    first, second = HAND.layers
    for changed in (replace(second, shared_size=2), replace(second, num_ffn_matrices=2)):
        assert replace(HAND, layers=(first, changed)).fingerprint != HAND.fingerprint


def test_shared_experts_are_part_of_the_router() -> None:
    """Every token takes them, on the router's device; they are quantised as experts are."""
    layer = replace(HAND.layers[1], shared_size=9)
    spec = replace(HAND, layers=(layer,))
    # 8 experts, shared 3 * 10 * 9, norm
    assert spec.num_params("router", 0) == 8 * 10 + 270 + 10
    assert spec.weight_bytes("router", 0) == 2 * 360
    assert spec.flops("router", 3, 0) == 2 * 3 * (8 * 10 + 270)
    assert spec.num_params("experts", 0) == HAND.num_params("experts", 1)
    assert spec.matrices("router", 0) == [(1, 8, 10), (2, 9, 10), (1, 10, 9)]
    assert replace(HAND, quantization="int4").weight_kind("router") == "bfloat16"
    assert replace(spec, quantization="int4").weight_kind("router") == "int4"


def test_a_feed_forward_without_a_gate_has_two_matrices() -> None:
    """Up and down: two thirds of the weights and FLOPs; its bias is one row shorter."""
    dense, moe = (replace(layer, num_ffn_matrices=2) for layer in HAND.layers)
    spec = replace(HAND, layers=(dense, moe))
    assert spec.num_params("dense", 0) == 2 * 10 * 7 + 10
    assert spec.flops("dense", 3, 0) == 4 * 3 * 10 * 7
    assert spec.expert_bytes(1) == 2 * 2 * 10 * 5
    assert spec.weight_bytes("experts", 1) == 8 * 200
    assert spec.flops("experts", 3, 1) == 4 * 3 * 10 * 5 * 2
    assert replace(spec, has_mlp_bias=True).num_params("dense", 0) == 150 + 7 + 10
    # A gated one of 14 / 3 has as many weights.
    assert 3 * 10 * spec.gated_size(0) == pytest.approx(2 * 10 * 7)
    assert HAND.gated_size(0) == 7


def test_a_layer_of_width_0_has_an_attention_only() -> None:
    """Its feed-forward is a norm that nothing follows."""
    spec = replace(HAND, layers=(LayerSpec(intermediate_size=0),))
    assert spec.matrices("dense", 0) == []
    assert spec.flops("dense", 3, 0) == 0
    assert spec.weight_bytes("dense", 0) == 2 * 10


def test_learned_positions_are_stored_beside_the_embedding() -> None:
    """A tied head shares the tokens' rows only."""
    spec = replace(HAND, num_learned_positions=32)
    assert spec.weight_bytes("embedding") == 2 * (100 + 32) * 10
    assert spec.total_weight_bytes() == HAND.total_weight_bytes() + 640
    assert replace(spec, is_tied=True).total_weight_bytes() == 8008 + 640
    assert replace(HAND, is_tied=True).tied_bytes == 2000
    assert HAND.tied_bytes == replace(HAND, is_tied=True, quantization="int8").tied_bytes == 0


def test_the_dtype_of_the_config_can_be_overridden() -> None:
    """`dtype` goes before `torch_dtype`, an argument before both."""
    assert from_config(config_of("Llama")).dtype == "float32"
    assert from_config(config_of("Llama", torch_dtype="float16")).dtype == "float16"
    both = config_of("Llama", torch_dtype="float16", dtype="bfloat16")
    assert from_config(both).dtype == "bfloat16"
    assert from_config(both, dtype="float32").dtype == "float32"


# --- hostile values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, "config.json is None but must be an object"),
        ([], "config.json is a list of 0 entries"),
        ({}, "architectures is missing"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM' but must be"),
        ({"architectures": ["\x1b[31m" + "x" * 999]}, "architecture '\\x1b[31mxxx"),
        (config_of("Llama", hidden_size=None), "hidden_size is missing"),
        (config_of("Llama", hidden_size="60"), "hidden_size is '60' but must be a whole number"),
        (config_of("Llama", hidden_size=60.0), "hidden_size is 60.0 but must be a whole number"),
        (config_of("Llama", hidden_size=True), "hidden_size is True but must be a whole number"),
        (config_of("Llama", hidden_size=0), "hidden_size is 0 but must be in 1..1048576"),
        (config_of("Llama", hidden_size=10**5000), "a whole number of 16610 bits"),
        (config_of("Llama", num_hidden_layers=1025), "1025 but must be in 1..1024"),
        (config_of("Llama", vocab_size=1 << 25), "but must be in 1..16777216"),
        (config_of("Llama", hidden_size=61), "hidden_size 61 is not a multiple of num_attention"),
        (config_of("Llama", num_key_value_heads=4), "6 is not a multiple of num_key_value_heads 4"),
        (config_of("Llama", head_dim=15), "head_dim is 15 but rotary needs an even one"),
        (config_of("Olmoe", head_dim=14, num_experts=4, num_experts_per_tok=2), "6 heads of"),
        (config_of("Llama", rms_norm_eps=float("nan")), "rms_norm_eps is nan but must be positive"),
        (config_of("Llama", rms_norm_eps=-1), "rms_norm_eps is -1 but must be positive"),
        (config_of("Llama", rope_theta=10**400), "rope_theta is a whole number of 1329 bits"),
        (config_of("Llama", rope_theta=float("inf")), "rope_theta is inf"),
        (config_of("Llama", rope_scaling=[1]), "rope_scaling is a list of 1 entries"),
        (config_of("Llama", rope_scaling={"type": "yarn"}), "rope type 'yarn' is not supported"),
        (config_of("Llama", rope_scaling={"rope_type": ["x"]}), "rope type a list of 1 entries"),
        (config_of("Llama", rope_scaling={"type": "linear"}), "factor is missing"),
        (
            config_of(
                "Llama",
                rope_scaling={
                    "type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                },
            ),
            "low_freq_factor 4.0 must be below high_freq_factor 4.0",
        ),
        (config_of("Llama", partial_rotary_factor=0.5), "partial_rotary_factor other than 1"),
        (config_of("Llama", dtype="int8"), "dtype is 'int8'; supported: bfloat16, float16"),
        (config_of("Llama", dtype=["float16"]), "dtype is a list of 1 entries"),
        (config_of("Llama", hidden_act="gelu"), "hidden_act is 'gelu', supported is 'silu'"),
        (config_of("Llama", tie_word_embeddings="yes"), "tie_word_embeddings is 'yes' but must be"),
        (config_of("Llama", quantization_config={}), "quantised checkpoints are not supported"),
        (
            config_of("Mixtral", num_experts_per_tok=2),
            "num_experts or num_local_experts is missing",
        ),
        (
            config_of("Mixtral", num_experts_per_tok=9, num_local_experts=8),
            "num_experts_per_tok 9 is larger than the 8 experts",
        ),
        (
            config_of("Mixtral", num_experts_per_tok=2, num_local_experts=8, num_experts=4),
            "num_experts is 4 but num_local_experts is 8",
        ),
        (config_of("Qwen3Moe", **QWEN_MOE, mlp_only_layers=3), "mlp_only_layers is 3 but must be"),
        (config_of("Qwen3Moe", **QWEN_MOE, mlp_only_layers=[True]), "a list of layer numbers"),
        (
            config_of("Qwen3", use_sliding_window=True, layer_types=["full_attention"]),
            "layer_types has 1 entries for 5 layers",
        ),
        (
            config_of("Qwen3", use_sliding_window=True, layer_types=["linear_attention"] * 5),
            "layer_types has 'linear_attention'; supported: full_attention, sliding_attention",
        ),
        (config_of("Mistral", sliding_window=0), "sliding_window is 0 but must be in"),
    ],
)
def test_a_value_that_cannot_be_is_named(values: object, expected: str) -> None:
    """The key, its value and what it should be, in one printable line."""
    assert expected in error_of(values)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 3, 6, 1 << 70, -1, 10**400])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["llama3", "linear", "default", "float16", "silu", "sliding_attention"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
_KEYS = sorted(
    {*TINY, *QWEN_MOE, "num_local_experts", "head_dim", "attention_bias", "clip_qkv", "dtype",
     "torch_dtype", "hidden_act", "layer_types", "max_window_layers", "mlp_bias", "architectures",
     "mlp_only_layers", "norm_topk_prob", "partial_rotary_factor", "quantization_config",
     "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "scale_factor",
     "sliding_window", "tie_word_embeddings", "use_sliding_window", "decoder_sparse_step"}
)  # fmt: skip
_ROPES = st.fixed_dictionaries(
    {},
    optional={
        key: _JSON
        for key in ("rope_type", "type", "factor", "rope_theta", "low_freq_factor",
                    "high_freq_factor", "original_max_position_embeddings")
    },
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    changes=st.dictionaries(st.sampled_from(_KEYS), _JSON | _ROPES, max_size=5),
    dropped=st.sets(st.sampled_from(sorted(TINY)), max_size=1),
)
def test_no_config_raises_anything_but_a_spec_error(
    architecture: str, changes: dict[str, Any], dropped: set[str]
) -> None:
    """Any JSON under any key: a ModelSpec whose sizes can be computed, or a ModelSpecError."""
    values = config_of("", **QWEN_MOE) | {"architectures": [architecture]} | changes
    for key in dropped:
        del values[key]
    try:
        spec = from_config(values)
    except ModelSpecError as error:
        assert str(error).isprintable()
        return
    assert spec.total_weight_bytes() > 0
    assert spec.attention_flops(0, 5, 3) > 0
    assert len(spec.fingerprint) == 16


@settings(max_examples=50, deadline=None)
@given(values=_JSON)
def test_no_json_document_raises_anything_but_a_spec_error(values: object) -> None:
    """A config.json can hold anything."""
    error_of(values)
