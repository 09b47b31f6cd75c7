"""LLM: the Python API, with vLLM's names and meanings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypedDict, get_args

import torch

from hetero.checkpoint import Checkpoint
from hetero.engine import Engine, StepResult
from hetero.errors import MemoryBudgetError, ModelFolderError, RequestError, UsageError
from hetero.measure.memory_limit import available_memory_bytes
from hetero.measure.store import default_cache_dir
from hetero.model.decoder import Decoder
from hetero.model.families import expected_tensors
from hetero.model_lookup import default_hub_cache, find_model, read_model_spec
from hetero.outputs import Measured, RequestOutput, measured, output_of, workload_of
from hetero.planning import (
    base_profile,
    check_plan,
    default_workload,
    make_plan,
    usable_hardware,
)
from hetero.runtime.devices import Accelerator, CudaAccelerator, EmulatedAccelerator
from hetero.runtime.weights import load_weights
from hetero.sampler import SamplingParams
from hetero.tokenizer import Tokenizer, read_eos_token_ids
from planner.estimate import estimate
from planner.hardware import AcceleratorName, HardwareProfile, Resources
from planner.memory import KV_BLOCK_TOKENS, kv_block_capacity, needs, num_kv_blocks
from planner.model_spec import Dtype, ModelSpec
from planner.placement import Device
from planner.plan import Estimate, Plan
from planner.timeline import Timeline
from planner.workload import Workload

DEFAULT_MAX_NUM_SEQS = 16


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]


Prompt = str | TokensPrompt
ChatMessage = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStep:
    """A step of a running `generate`, for whoever watches; texts in the order of the prompts."""

    result: StepResult
    texts: tuple[str, ...]
    num_finished: int
    num_requests: int


class LLM:
    """A model loaded under a plan.

    Parameters
    ----------
    model : str, optional
        Folder in Hugging Face layout, `org/name` in the local hub cache, or None for the small
        model that ships with hetero.
    plan : Plan or path, optional
        Where everything runs; None searches for `workload`.
    accelerator : {'auto', 'none', 'cuda', 'emulated'}
        What to use beside the CPU.
    dtype : {'auto', 'float32', 'bfloat16', 'float16'}
        'auto' is the checkpoint's own; float16 becomes float32 where the CPU does all the work,
        which has no float16 arithmetic of any speed.
    strategy : str, optional
        Force a named placement: 'gpu', 'cpu', 'offload', 'split', 'experts-on-cpu'.
    workload : Workload, optional
        What the plan is made for; prompts of other lengths run too, within the KV cache.
    gpu_mem_gb, cpu_mem_gb : float, optional
        Budgets in units of 1e9 bytes.
    link_gb_per_s : float, optional
        Rate of the emulated accelerator's link.
    max_model_len, max_num_seqs : int, optional
        Most tokens of a sequence (default: the model's context); most sequences in a step.
    profile : HardwareProfile or str, optional
        The machine; None takes the stored profile, or measures one (10 s).
    overlap : bool
        False runs one op at a time, the reference for the overlapped run.
    progress : callable, optional
        Called with a line of text while measuring and loading.

    Examples
    --------
    >>> from hetero import LLM, SamplingParams
    >>> with LLM(accelerator="none") as llm:  # doctest: +SKIP
    ...     out, = llm.generate("Once upon a time", SamplingParams(max_tokens=8, temperature=0.0))
    ...     out.outputs[0].text
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        plan: Plan | str | Path | None = None,
        accelerator: AcceleratorName = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        strategy: str | None = None,
        workload: Workload | None = None,
        gpu_mem_gb: float | None = None,
        cpu_mem_gb: float | None = None,
        link_gb_per_s: float | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
        profile: HardwareProfile | str | None = None,
        overlap: bool = True,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        say = progress or _ignore
        _check_choice("accelerator", accelerator, get_args(AcceleratorName))
        _check_choice("dtype", dtype, ("auto", *get_args(Dtype)))
        source = find_model(
            None if model is None else str(model), hub_cache=default_hub_cache(os.environ)
        )
        if source.folder is None:
            raise ModelFolderError(
                f"{source.name} is known by its shapes only, which is enough for hetero plan; to "
                "run it give a folder with its weights"
            )
        if isinstance(plan, str | Path):
            plan = Plan.load(Path(plan))
        resources = _resources(plan, accelerator, gpu_mem_gb, cpu_mem_gb, link_gb_per_s)
        if not isinstance(profile, HardwareProfile):
            profile = base_profile(profile, default_cache_dir(os.environ), progress)
        self.hardware = usable_hardware(profile, resources)
        self.spec = _spec_with_dtype(read_model_spec(source), dtype, self.hardware, say)
        self.tokenizer = Tokenizer.load(source.folder)
        self._max_model_len = _context(self.spec, max_model_len)
        with Checkpoint.open(source.folder) as checkpoint:
            expected = expected_tensors(self.spec)
            checkpoint.check_tensors(expected)
            if plan is None:
                plan = make_plan(
                    self.spec,
                    self.hardware,
                    workload or default_workload(self._max_model_len),
                    strategy=strategy,
                )
            elif strategy is not None:
                raise UsageError("give a plan or a strategy, not both: a plan already has one")
            check_plan(plan, self.spec, self.hardware)
            self.plan = plan
            _check_host_memory(plan, self.spec, self.hardware)
            self._accelerator = _make_accelerator(plan, self.hardware)
            try:
                self._engine = self._load(checkpoint, max_num_seqs, overlap, say)
            except BaseException:
                self._close_accelerator()
                raise
        self.measured: Measured | None = None
        self.predicted: Estimate | None = None
        self._num_requests = 0

    def _load(
        self, checkpoint: Checkpoint, max_num_seqs: int, overlap: bool, say: Callable[[str], None]
    ) -> Engine:
        """Read the weights to where the plan wants them and make the engine."""
        total = needs_text(self.plan)
        say(f"loading {self.spec.name} as {self.plan.placement.name}: {total}")
        # The thread count is the measured one of the profile; torch keeps it per thread.
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self.hardware.cpu.num_threads)
        weights = load_weights(self.spec, checkpoint, self.plan.placement, self._accelerator)
        decoder = Decoder.create(
            self.spec, weights, self._accelerator, num_threads=self.hardware.cpu.num_threads
        )
        capacity = kv_block_capacity(
            self.spec, self.plan.placement, self.plan.workload, self.hardware
        )
        wanted = max_num_seqs * -(-self._max_model_len // KV_BLOCK_TOKENS)
        planned = min(num_kv_blocks(self.plan.workload), capacity)
        return Engine(
            decoder=decoder,
            placement=self.plan.placement,
            hardware=self.hardware,
            accelerator=self._accelerator,
            tokenizer=self.tokenizer,
            eos_token_ids=(
                self.tokenizer.eos_token_ids
                if self.tokenizer is not None
                else read_eos_token_ids(checkpoint.folder)
            ),
            num_kv_blocks=max(planned, min(wanted, capacity)),
            max_num_seqs=max(max_num_seqs, self.plan.estimate.num_concurrent_seqs),
            max_model_len=self._max_model_len,
            overlap=overlap,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the lanes and give back the accelerator; the object cannot generate afterwards."""
        self._close_accelerator()
        torch.set_num_threads(self._threads_before)

    def _close_accelerator(self) -> None:
        if self._accelerator is not None:
            self._accelerator.close()
            self._accelerator = None

    @property
    def timeline(self) -> Timeline | None:
        """The measured Timeline of the last step."""
        step = self._engine.last_step
        return None if step is None else step.timeline

    @property
    def predicted_timeline(self) -> Timeline | None:
        """The last step as the planner prices it."""
        return self._engine.predicted_timeline()

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    def device_bytes(self) -> dict[Device, int]:
        """Bytes that weights, KV cache and staging buffers take on the accelerator now."""
        return {} if self._accelerator is None else {"gpu": self._accelerator.used_bytes}

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises
        ------
        RequestError
            Text without a tokenizer, an empty prompt, a prompt of another type.
        """
        return encode_prompt(prompt, self.tokenizer)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        observe: Callable[[GenerationStep], None] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts; outputs are in the order of the prompts.

        Parameters
        ----------
        prompts
            One prompt or many: text, or `{"prompt_token_ids": [...]}`.
        sampling_params
            One for all or one for each; the defaults are vLLM's (16 tokens, temperature 1).
        observe
            Called after each step.

        Raises
        ------
        RequestError
            A prompt is empty, too long, or not text or token ids; nothing has run then.
        """
        many = [prompts] if isinstance(prompts, str | dict) else list(prompts)
        token_ids = [self.encode(prompt) for prompt in many]
        texts = [prompt if isinstance(prompt, str) else None for prompt in many]
        return self._run(texts, token_ids, sampling_params, observe)

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        observe: Callable[[GenerationStep], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template.

        Raises
        ------
        RequestError
            The model has no tokenizer or no chat template, or the template refuses the messages.
        """
        if self.tokenizer is None:
            raise RequestError("chat needs a tokenizer and the model folder has no tokenizer.json")
        several = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        texts: list[str | None] = []
        token_ids = []
        for rendered in self.tokenizer.apply_chat_template_to_all(
            several,  # type: ignore[arg-type]
            add_generation_prompt,
        ):
            if not isinstance(rendered, str):
                raise rendered
            texts.append(rendered)
            token_ids.append(self.tokenizer.encode(rendered, add_special_tokens=False))
        return self._run(texts, token_ids, sampling_params, observe)

    def _run(
        self,
        texts: list[str | None],
        token_ids: list[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        observe: Callable[[GenerationStep], None] | None,
    ) -> list[RequestOutput]:
        if self._accelerator is None and self.plan.placement.uses("gpu"):
            raise UsageError("this LLM was closed; make a new one")
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(token_ids)
        else:
            params = list(sampling_params)
            if len(params) != len(token_ids):
                raise RequestError(
                    f"there are {len(token_ids)} prompts but {len(params)} sampling parameters; "
                    "give one for all or one for each"
                )
        engine = self._engine
        before = {phase: (t.num_tokens, t.seconds) for phase, t in engine.stats.phases.items()}
        try:
            running = []
            for ids, each in zip(token_ids, params, strict=True):
                self._num_requests += 1
                running.append(engine.add_request(str(self._num_requests), ids, each))
            while (result := engine.step()) is not None:
                if observe is not None:
                    observe(
                        GenerationStep(
                            result=result,
                            texts=tuple(engine.text(sequence) for sequence in running),
                            num_finished=sum(sequence.is_finished for sequence in running),
                            num_requests=len(running),
                        )
                    )
            outputs = [
                output_of(sequence, text, engine.text(sequence))
                for sequence, text in zip(running, texts, strict=True)
            ]
        finally:
            engine.abort_all()
        if running:
            self.measured = measured(engine.stats, outputs, before)
            self.predicted = estimate(
                self.spec, self.plan.placement, self.hardware, workload_of(outputs)
            )
        return outputs


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids of a prompt; see `LLM.encode`."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError(
                "the prompt is text but the model folder has no tokenizer.json; give "
                '{"prompt_token_ids": [...]}'
            )
        token_ids = tokenizer.encode(prompt)
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one character of text")
        return token_ids
    if not isinstance(prompt, dict) or set(prompt) != {"prompt_token_ids"}:
        raise RequestError('a prompt is text or {"prompt_token_ids": [...]}')
    ids = prompt["prompt_token_ids"]
    if not isinstance(ids, list | tuple) or not all(type(token_id) is int for token_id in ids):
        raise RequestError("prompt_token_ids must be a list of whole numbers")
    if not ids:
        raise RequestError("prompt_token_ids is empty; give at least one token")
    return list(ids)


def needs_text(plan: Plan) -> str:
    """Planned bytes of each device, as `0.02 GB on the cpu`."""
    parts = [f"{size / 1e9:.2f} GB on the {d}" for d, size in plan.estimate.bytes_by_device.items()]
    return ", ".join(parts)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r} but must be one of {', '.join(choices)}")


def _resources(
    plan: Plan | None,
    accelerator: AcceleratorName,
    gpu_mem_gb: float | None,
    cpu_mem_gb: float | None,
    link_gb_per_s: float | None,
) -> Resources:
    """What may be used: as asked, or as the plan says where nothing was asked."""
    asked = Resources(
        accelerator=accelerator,
        gpu_bytes=gigabytes("gpu_mem_gb", gpu_mem_gb),
        cpu_bytes=gigabytes("cpu_mem_gb", cpu_mem_gb),
        link_bytes_per_s=gigabytes("link_gb_per_s", link_gb_per_s),
    )
    if plan is None:
        return asked
    if accelerator not in ("auto", plan.resources.accelerator):
        raise UsageError(
            f"accelerator is {accelerator!r} but the plan is for {plan.resources.accelerator!r}; "
            "leave it out or plan again"
        )
    if asked != Resources(accelerator=accelerator):
        raise UsageError("memory budgets and link rate are part of the plan; leave them out")
    return plan.resources


def gigabytes(name: str, value: float | None) -> int | None:
    """Bytes of a budget in units of 1e9 bytes."""
    if value is None:
        return None
    if not 0 < value < 1e9:
        raise UsageError(f"{name} is {value} but must be a positive number of gigabytes")
    return int(value * 1e9)


def _spec_with_dtype(
    spec: ModelSpec, dtype: str, hardware: HardwareProfile, say: Callable[[str], None]
) -> ModelSpec:
    if dtype != "auto":
        chosen: Dtype = next(name for name in get_args(Dtype) if name == dtype)
        return replace(spec, dtype=chosen)
    if spec.dtype == "float16" and hardware.gpu is None:
        say(
            "warning: float16 weights run as float32 on this CPU, in twice the memory; "
            "--dtype bfloat16 keeps the size and loses digits"
        )
        return replace(spec, dtype="float32")
    return spec


def _context(spec: ModelSpec, max_model_len: int | None) -> int:
    if max_model_len is None:
        return spec.max_position_embeddings
    if not 1 <= max_model_len <= spec.max_position_embeddings:
        raise UsageError(
            f"max_model_len is {max_model_len} but {spec.name} has a context of "
            f"{spec.max_position_embeddings}; give 1..{spec.max_position_embeddings}"
        )
    return max_model_len


def _check_host_memory(plan: Plan, spec: ModelSpec, hardware: HardwareProfile) -> None:
    """Refuse before loading what the host has no room for now.

    The plan was checked against the machine's memory; other processes may hold some of it.
    """
    memory = needs(spec, plan.placement, plan.workload, hardware)
    need = sum(
        each.needed_bytes
        for device, each in memory.items()
        if device == "cpu" or plan.resources.accelerator == "emulated"
    )
    free = available_memory_bytes()
    if need > free:
        raise MemoryBudgetError(
            f"{spec.name} needs {need / 1e9:.2f} GB of host memory but {free / 1e9:.2f} GB is free "
            "now; end other processes, or use a smaller model"
        )


def _make_accelerator(plan: Plan, hardware: HardwareProfile) -> Accelerator | None:
    if hardware.gpu is None or hardware.link is None or not plan.placement.uses("gpu"):
        return None
    if hardware.gpu.kind == "emulated":
        return EmulatedAccelerator(
            budget_bytes=hardware.gpu.memory_bytes,
            link_bytes_per_s=hardware.link.h2d_bytes_per_s,
            latency_s=hardware.link.latency_s,
        )
    return CudaAccelerator(budget_bytes=hardware.gpu.memory_bytes - hardware.gpu.reserved_bytes)


def _ignore(line: str) -> None:
    pass
