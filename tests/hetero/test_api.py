"""The Python API: vLLM's names and meanings, order, seeds, stops, chat, and refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from hetero import LLM, RequestOutput, SamplingParams, sampler
from hetero.errors import (
    EnvironmentProblemError,
    MemoryBudgetError,
    ModelFolderError,
    PlanMismatchError,
    RequestError,
    UsageError,
)
from hetero.model_lookup import find_model, read_model_spec
from hetero.planning import usable_hardware
from planner import search
from planner.hardware import HardwareProfile, Resources
from planner.memory import needs
from planner.plan import Plan
from planner.workload import Workload
from tests.machines import toy_cpu, toy_machine
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
SEEDED = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.9, seed=7)
PROMPT = "The old man looked at the sea and"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(profile=toy_machine(), accelerator="none", dtype="float32") as made:
        yield made


def text(out: RequestOutput) -> str:
    return out.outputs[0].text


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["Once", "In the morning the", "def main():", "A"]
    outs = llm.generate(
        prompts, [SamplingParams(max_tokens=n, temperature=0.0) for n in (9, 1, 5, 2)]
    )

    assert [out.prompt for out in outs] == prompts
    assert [len(out.outputs[0].token_ids) for out in outs] == [9, 1, 5, 2]
    assert [out.outputs[0].finish_reason for out in outs] == ["length"] * 4


def test_text_and_its_token_ids_give_the_same_continuation(llm: LLM) -> None:
    assert llm.tokenizer is not None
    (by_text,) = llm.generate(PROMPT, GREEDY)
    (by_ids,) = llm.generate({"prompt_token_ids": llm.tokenizer.encode(PROMPT)}, GREEDY)

    assert by_text.outputs == by_ids.outputs
    assert by_ids.prompt is None
    assert text(by_text) == llm.tokenizer.decode(list(by_text.outputs[0].token_ids))


def test_a_seed_gives_the_same_text_whatever_else_runs(llm: LLM) -> None:
    (alone,) = llm.generate(PROMPT, SEEDED)
    several = llm.generate(["Once", PROMPT, "The"], [GREEDY, SEEDED, GREEDY])

    assert several[1].outputs == alone.outputs
    (other,) = llm.generate(PROMPT, SamplingParams(max_tokens=24, temperature=0.9, seed=8))
    assert other.outputs[0].token_ids != alone.outputs[0].token_ids


def test_a_stop_string_ends_the_text_before_it_or_with_it(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPT, SamplingParams(max_tokens=32, temperature=0.0))
    stop = text(whole)[10:13]
    (cut,) = llm.generate(PROMPT, SamplingParams(max_tokens=32, temperature=0.0, stop=stop))
    (kept,) = llm.generate(
        PROMPT,
        SamplingParams(
            max_tokens=32, temperature=0.0, stop=[stop], include_stop_str_in_output=True
        ),
    )

    assert text(cut) == text(whole)[: text(whole).index(stop)]
    assert text(kept) == text(cut) + stop
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)


def test_a_stop_token_ends_the_sequence_and_is_named(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPT, GREEDY)
    third = whole.outputs[0].token_ids[2]
    first_at = whole.outputs[0].token_ids.index(third)
    params = SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=[third])
    (cut,) = llm.generate(PROMPT, params)

    assert cut.outputs[0].token_ids == whole.outputs[0].token_ids[: first_at + 1]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", third)


def test_logprobs_are_those_of_the_raw_distribution(llm: LLM) -> None:
    """The greedy token has the largest of the five, and none is above 0."""
    (out,) = llm.generate(PROMPT, SamplingParams(max_tokens=4, temperature=0.0, logprobs=5))
    completion = out.outputs[0]

    assert completion.logprobs is not None and len(completion.logprobs) == 4
    for token_id, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(logprobs) == 5
        assert max(logprobs, key=lambda token: logprobs[token]) == token_id
        assert sum(math.exp(value) for value in logprobs.values()) <= 1.0 + 1e-5


def test_logprobs_name_the_sampled_token_also_where_it_is_not_the_likeliest(llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, temperature=1.5, seed=3, logprobs=1)
    (out,) = llm.generate(PROMPT, params)
    completion = out.outputs[0]

    assert completion.logprobs is not None
    assert all(
        token_id in logprobs
        for token_id, logprobs in zip(completion.token_ids, completion.logprobs, strict=True)
    )
    assert max(len(logprobs) for logprobs in completion.logprobs) == 2


def test_a_stop_string_does_not_count_before_min_tokens(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPT, SamplingParams(max_tokens=32, temperature=0.0))
    stop = text(whole)[3:5]
    (out,) = llm.generate(
        PROMPT, SamplingParams(max_tokens=32, min_tokens=20, temperature=0.0, stop=stop)
    )

    assert len(out.outputs[0].token_ids) >= 20
    assert stop in text(out)


def test_a_row_whose_numbers_overflow_fails_alone_and_leaves_no_trace(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages hold NaN when they are freed; the next request reads them as padding."""
    (expected,) = llm.generate(PROMPT, GREEDY)
    engine = llm._open_engine()
    real = sampler.sample

    def poisoned(logits: torch.Tensor, rows: Any) -> Any:
        for kv in (engine._caches.prefill, *engine._caches.decode):
            for layer in kv.layers:
                layer.key.fill_(float("nan"))
                layer.value.fill_(float("nan"))
        return real(torch.full_like(logits, float("nan")), rows)

    monkeypatch.setattr("hetero.engine.sample", poisoned)
    (failed,) = llm.generate(PROMPT, GREEDY)
    monkeypatch.undo()
    (out,) = llm.generate(PROMPT, GREEDY)

    assert failed.outputs[0].finish_reason == "error"
    assert out.outputs == expected.outputs


def test_metrics_and_predictions_are_there_after_a_call(llm: LLM) -> None:
    (out,) = llm.generate(PROMPT, GREEDY)

    assert 0 < out.metrics.ttft_s < out.metrics.e2e_s
    assert out.metrics.tpot_s is not None and out.metrics.tpot_s > 0
    assert llm.measured is not None and llm.predicted is not None
    assert llm.measured.ttft_s == out.metrics.ttft_s
    assert llm.predicted.tpot_s > 0
    assert llm.timeline is not None and llm.predicted_timeline is not None


def test_chat_goes_through_the_template(llm: LLM) -> None:
    assert llm.tokenizer is not None
    messages = [{"role": "user", "content": "How many legs have two dogs?"}]
    (out,) = llm.chat(messages, GREEDY)
    rendered = llm.tokenizer.apply_chat_template(messages)

    assert out.prompt == rendered
    assert "How many legs" in rendered and rendered != messages[0]["content"]
    assert list(out.prompt_token_ids) == llm.tokenizer.encode(rendered, add_special_tokens=False)


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ({"prompt_token_ids": []}, "prompt_token_ids is empty"),
        ({"prompt_token_ids": [5, 1 << 20]}, r"token id 1048576 .* 0\.\.4095"),
        ({"prompt_token_ids": ["a"]}, "whole numbers"),
        ({"text": "a"}, "a prompt is text or"),
        ({"prompt_token_ids": [5] * 1024}, "1024 tokens .* 1024"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_rest_of_the_object_is_unharmed(
    llm: LLM, prompt: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(["fine", prompt], GREEDY)

    assert len(llm.generate("fine", GREEDY)) == 1


def test_an_error_in_the_observer_leaves_the_object_usable(llm: LLM) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llm.generate(PROMPT, GREEDY, observe=fail)

    (out,) = llm.generate(PROMPT, GREEDY)
    assert out.finished


def test_more_prompts_than_blocks_give_what_each_gives_alone() -> None:
    """A cache for one and a half sequences: the others wait or are recomputed."""
    prompts = [PROMPT, "Once upon a time there", "It was dark and", "She said that he"]
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    workload = Workload(prompt_len=16, output_len=48)
    with LLM(
        profile=toy_machine(),
        accelerator="none",
        dtype="float32",
        workload=workload,
        max_model_len=96,
        max_num_seqs=1,
    ) as small:
        several = [out.outputs[0].token_ids for out in small.generate(prompts, params)]
        alone = [small.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]

    assert several == alone


@pytest.mark.parametrize("accelerator", ["none", "emulated"])
def test_a_closed_llm_refuses_to_run_and_keeps_what_it_measured(accelerator: Any) -> None:
    llm = LLM(profile=toy_machine(), accelerator=accelerator)
    llm.generate(PROMPT, GREEDY)
    llm.close()

    assert llm.timeline is not None and llm.predicted_timeline is not None
    with pytest.raises(UsageError, match="closed"):
        llm.generate(PROMPT, GREEDY)


def test_cuda_where_there_is_none_is_refused() -> None:
    with pytest.raises(EnvironmentProblemError, match=r"cuda .* has no GPU"):
        LLM(profile=toy_machine(), accelerator="cuda")


def test_an_unknown_accelerator_or_strategy_is_named() -> None:
    with pytest.raises(UsageError, match=r"'tpu' but must be one of auto, none, cuda, emulated"):
        LLM(profile=toy_machine(), accelerator="tpu")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"'magic' is not one of gpu, cpu"):
        LLM(profile=toy_machine(), strategy="magic")


def test_a_budget_that_nothing_fits_is_refused_before_loading() -> None:
    with pytest.raises(MemoryBudgetError, match=r"needs .* GB on the cpu where 0\.0009 GB"):
        LLM(profile=toy_machine(), accelerator="none", cpu_mem_gb=0.001)


def test_a_strategy_that_does_not_fit_its_gpu_budget_is_refused() -> None:
    with pytest.raises(MemoryBudgetError, match=r"GB on the gpu where 0\.00192 GB .*--gpu-mem-gb"):
        LLM(profile=toy_machine(), accelerator="emulated", strategy="gpu", gpu_mem_gb=0.002)


def test_a_plan_for_another_model_or_machine_is_refused(tmp_path: Path) -> None:
    with LLM(profile=toy_machine(), accelerator="none") as llm:
        plan = llm.plan
    path = tmp_path / "plan.json"
    path.write_bytes(plan.to_json())
    other = tmp_path / "other"
    save_tiny_model("llama", other)

    with pytest.raises(PlanMismatchError, match=r"made for model demo .* but this is other"):
        LLM(other, profile=toy_machine(), plan=path)
    elsewhere = replace(
        toy_machine(),
        name="another machine",
        cpu_by_threads=(replace(toy_cpu(), name="another cpu"),),
    )
    with pytest.raises(
        PlanMismatchError, match=r"made for the machine toy machine .* this is another machine"
    ):
        LLM(profile=elsewhere, plan=plan)
    with LLM(profile=toy_machine(), plan=path) as again:
        assert again.plan == Plan.load(path)


def test_a_plan_for_a_machine_with_a_gpu_is_refused_by_its_machine(tmp_path: Path) -> None:
    spec = read_model_spec(find_model(None))
    elsewhere = HardwareProfile.load(ROOT / "profiles" / "machines" / "desktop-rtx4090.json")
    plan = search(spec, elsewhere, Workload(prompt_len=8, output_len=8), strategy="gpu")

    with pytest.raises(PlanMismatchError, match=r"machine desktop-rtx4090 and its GPU .* none"):
        LLM(profile=toy_machine(), plan=plan)
    with pytest.raises(UsageError, match="reference machine"):
        LLM(profile="desktop-rtx4090")


LONG = Workload(prompt_len=1000, output_len=100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num_seqs": 0}, "at least 1"),
        ({"max_model_len": 1}, r"give 2\.\.1024"),
        ({"workload": LONG}, "come to 1100 tokens but demo has a context of 1024"),
        ({"workload": LONG, "max_model_len": 100}, "to 1100 tokens .* max_model_len is 100"),
        ({"gpu_mem_gb": float("nan")}, "--gpu-mem-gb is nan but must be a number"),
        ({"cpu_mem_gb": -1.0}, r"--cpu-mem-gb is -1\.0 but must be a number"),
        ({"gpu_mem_gb": 1.0}, "--gpu-mem-gb is 1 GB but --accelerator is none"),
        ({"link_gb_per_s": 4.0}, "link_gb_per_s is 4 GB/s but --accelerator is none"),
    ],
)
def test_limits_that_allow_nothing_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LLM(profile=toy_machine(), accelerator="none", **arguments)


def test_more_sequences_than_memory_holds_are_refused_before_loading() -> None:
    """5000 of 640 tokens, 3072 bytes each, are 9.83 GB of cache alone."""
    with pytest.raises(MemoryBudgetError, match=r"max_num_seqs is 5000, .* where 0\.09 GB may be"):
        LLM(profile=toy_machine(), accelerator="none", cpu_mem_gb=0.1, max_num_seqs=5000)


def test_a_budget_of_none_leaves_the_accelerator_out() -> None:
    with LLM(profile=toy_machine(), gpu_mem_gb=0) as llm:
        assert llm.plan.resources.accelerator == "none"
    with pytest.raises(UsageError, match="--gpu-mem-gb is 0 but --accelerator is emulated"):
        LLM(profile=toy_machine(), accelerator="emulated", gpu_mem_gb=0)


def test_a_throughput_plan_in_waves_stays_within_its_budget() -> None:
    """64 sequences in waves: the cache is sized for a wave and what is left, not for all."""
    spec = read_model_spec(find_model(None))
    resources = Resources(accelerator="emulated", gpu_bytes=90_000_000)
    hardware = usable_hardware(toy_machine(), resources)
    workload = Workload(prompt_len=200, output_len=100, num_seqs=64)
    plan = search(spec, hardware, workload, "throughput", strategy="gpu")
    with LLM(profile=toy_machine(), plan=plan) as llm:
        spare = needs(spec, plan.placement, plan.wave, hardware)["gpu"]
        activation_bytes = spare.needed_bytes - spare.weights_bytes - spare.kv_bytes

        assert plan.wave.num_seqs < 64
        assert llm.device_bytes()["gpu"] + activation_bytes <= spare.available_bytes


def test_a_plan_carries_its_resources(tmp_path: Path) -> None:
    """A plan made for an emulated accelerator runs from its file alone."""
    with LLM(
        profile=toy_machine(), accelerator="emulated", gpu_mem_gb=0.05, strategy="split"
    ) as llm:
        plan = llm.plan
        (expected,) = llm.generate(PROMPT, GREEDY)
    with LLM(profile=toy_machine(), plan=plan) as llm:
        (out,) = llm.generate(PROMPT, GREEDY)

        assert llm.plan.placement.name == "split"
        assert out.outputs == expected.outputs
    with pytest.raises(UsageError, match="part of the plan"):
        LLM(profile=toy_machine(), plan=plan, gpu_mem_gb=1.0)


def test_a_folder_without_a_tokenizer_works_with_token_ids_and_empty_text(tmp_path: Path) -> None:
    save_tiny_model("qwen3-moe", tmp_path)
    with LLM(tmp_path, profile=toy_machine(), accelerator="none") as llm:
        (out,) = llm.generate({"prompt_token_ids": [3, 4, 5]}, GREEDY)

        assert (out.prompt, out.outputs[0].text, len(out.outputs[0].token_ids)) == (None, "", 12)
        with pytest.raises(RequestError, match=r"no tokenizer\.json"):
            llm.generate("text", GREEDY)
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.generate({"prompt_token_ids": [3]}, SamplingParams(stop="x"))
        with pytest.raises(RequestError, match="chat needs a tokenizer"):
            llm.chat([{"role": "user", "content": "x"}], GREEDY)


def test_a_folder_whose_config_disagrees_with_its_tensors_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    source = find_model(None).folder
    assert source is not None
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 96}))

    with pytest.raises(ModelFolderError, match=r"config\.json says \[96, 256\]"):
        LLM(folder, profile=toy_machine(), accelerator="none")


def test_a_folder_with_tensors_that_its_architecture_lacks_is_refused(tmp_path: Path) -> None:
    save_tiny_model("qwen3-moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(84)
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(ModelFolderError, match=r"does not have: .*q_proj\.bias"):
        LLM(tmp_path, profile=toy_machine(), accelerator="none")


def test_a_model_known_by_its_shapes_only_cannot_run() -> None:
    with pytest.raises(ModelFolderError, match="shapes only"):
        LLM("qwen3-30b-a3b", profile=toy_machine())
