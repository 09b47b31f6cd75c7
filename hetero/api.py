"""LLM: the Python API, with vLLM's names and meanings."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

import torch
from msgspec.structs import replace

from hetero.chat_template import Conversation
from hetero.checkpoint import Checkpoint
from hetero.engine import Engine, StepResult
from hetero.errors import (
    EnvironmentProblemError,
    MemoryBudgetError,
    ModelFolderError,
    RequestError,
    UsageError,
)
from hetero.faults import VARIABLE, Faults
from hetero.loading import load_engine, make_accelerator, pageable_costs
from hetero.measure.calibration_log import own_log
from hetero.measure.store import default_cache_dir
from hetero.model.families import expected_tensors
from hetero.model_lookup import default_hub_cache, find_model
from hetero.outputs import Measured, RequestOutput, measured, output_of, workload_of
from hetero.planning import (
    DtypeName,
    base_profile,
    check_own_profile,
    check_plan,
    check_plan_is_for,
    default_workload,
    lacking_memory,
    make_plan,
    naming,
    resources_asked,
    runnable_profile,
    spec_as_run,
    usable_hardware,
)
from hetero.prompts import Prompt, encode_prompt
from hetero.sampler import SamplingParams
from hetero.sequence import Sequence as RunningSequence
from hetero.step_samples import StepSamples, StepTimes
from hetero.step_trace import StepTrace, check_trace_path
from hetero.tokenizer import Tokenizer
from planner.backends import cpu_backends
from planner.calibration import NO_CORRECTIONS
from planner.cost_model import CostModel, predict
from planner.estimate import estimate
from planner.hardware import AcceleratorName, HardwareProfile
from planner.memory import needs
from planner.model_spec import ModelSpec, Quantization
from planner.placement import Device
from planner.plan import Estimate, Plan
from planner.step_graph import StepGraph
from planner.timeline import Timeline
from planner.workload import BatchShape, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStep:
    """A step of a running `generate`, for whoever watches.

    `text` gives the text that a prompt (by position) has so far; call it while being told.
    `finished` are the prompts that ended with this step, `num_finished` how many so far.
    """

    result: StepResult
    text: Callable[[int], str]
    finished: tuple[int, ...]
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
    quantization : {'int8', 'int4'}, optional
        Round the weights while they load, 128 neighbours to a scale; the embedding and routers stay
        as they are, the head becomes int8.
    strategy : str, optional
        Force a named placement: 'gpu', 'cpu', 'offload', 'split', 'experts-on-cpu'.
    workload : Workload, optional
        What the plan is made for; prompts of other lengths run too, within the KV cache.
    gpu_mem_gb, cpu_mem_gb : float, optional
        Budgets in units of 1e9 bytes.
    link_gb_per_s : float, optional
        Rate of the emulated accelerator's link.
    max_model_len, max_num_seqs : int, optional
        Most tokens of a sequence (default: the model's context); most sequences in a step (default:
        as planned, or up to 16 where memory holds them).
    profile : HardwareProfile, str or path, optional
        The machine; None takes the stored profile, or measures one (10 s).
    allow_foreign_profile : bool
        Take a profile that was measured on another machine; otherwise it is refused. One that is
        passed as a value and has no fingerprint is taken for this machine's.
    overlap : bool
        False runs one op at a time, the reference for the overlapped run.
    calibrate : bool
        Append what was predicted and measured of each `generate` to the calibration log, from which
        later predictions are corrected; only where the profile is a measurement of this machine,
        and for the overlapped run. The attribute of the same name can be set between calls.
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
        dtype: DtypeName = "auto",
        quantization: Quantization | None = None,
        strategy: str | None = None,
        workload: Workload | None = None,
        gpu_mem_gb: float | None = None,
        cpu_mem_gb: float | None = None,
        link_gb_per_s: float | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        profile: HardwareProfile | str | Path | None = None,
        allow_foreign_profile: bool = False,
        overlap: bool = True,
        calibrate: bool = True,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        say = progress or _ignore
        _check_choice("accelerator", accelerator, get_args(AcceleratorName))
        _check_choice("dtype", dtype, get_args(DtypeName))
        if quantization is not None:
            _check_choice("quantization", quantization, get_args(Quantization))
        if max_num_seqs is not None and max_num_seqs < 1:
            raise UsageError(f"max_num_seqs is {max_num_seqs} but must be at least 1")
        source = find_model(
            None if model is None else str(model), hub_cache=default_hub_cache(os.environ)
        )
        if source.folder is None:
            raise ModelFolderError(
                f"{source.name} is known by its shapes only, which is enough for hetero plan; to "
                "run it give a folder with its weights"
            )
        plan_path = Path(plan) if isinstance(plan, str | Path) else None
        if plan_path is not None:
            plan = Plan.load(plan_path)
        if plan is not None and strategy is not None:
            raise UsageError("give a plan or a strategy, not both: a plan already has one")
        if plan is not None and not isinstance(plan, Plan):
            raise UsageError(f"plan is {type(plan).__name__}; give a Plan or the path of one")
        resources = resources_asked(plan, accelerator, gpu_mem_gb, cpu_mem_gb, link_gb_per_s)
        if not isinstance(profile, HardwareProfile):
            profile = base_profile(
                None if profile is None else str(profile),
                default_cache_dir(os.environ),
                progress,
                allow_foreign=allow_foreign_profile,
            )
        elif profile.fingerprint is not None and not allow_foreign_profile:
            check_own_profile(profile)
        with naming(plan_path):
            if plan is not None:
                check_plan_is_for(plan, source, profile)
            self.hardware = usable_hardware(
                runnable_profile(profile), resources, is_planned=plan is not None
            )
            self.spec = spec_as_run(source, dtype, self.hardware, say, quantization, plan)
        self.calibrate = calibrate
        self._say = say
        # a run of one op at a time says nothing of ops that slow each other down
        self._log = own_log(profile, os.environ) if overlap else None
        self.corrections = NO_CORRECTIONS
        if self._log is not None:
            self.corrections = self._log.corrections(self.spec, self.hardware, say)
        self._uncorrected_costs = CostModel(self.hardware)
        self._costs = CostModel(self.hardware, corrections=self.corrections)
        self.tokenizer = Tokenizer.load(source.folder)
        self._max_model_len = _context(self.spec, max_model_len)
        if workload is not None and max_model_len is not None:
            _check_lengths(workload, max_model_len)
        with Checkpoint.open(source.folder) as checkpoint:
            _check_tensors(checkpoint, self.spec)
            if plan is None:
                plan = make_plan(
                    self.spec,
                    self.hardware,
                    workload or default_workload(self._max_model_len),
                    strategy=strategy,
                    corrections=self.corrections,
                )
                lacking = lacking_memory(plan, self.spec, self.hardware)
                if lacking is not None:
                    raise MemoryBudgetError(lacking)
            else:
                with naming(plan_path):
                    check_plan(plan, self.spec, self.hardware)
            if max_num_seqs is not None:
                _check_num_seqs(max_num_seqs, plan, self.spec, self.hardware)
            self.plan = plan
            self._backends = cpu_backends(self.spec, self._costs, plan.wave)
            self._threads_before = torch.get_num_threads()
            self._engine: Engine | None = None
            self._last_step: StepResult | None = None
            faults = Faults.parse(os.environ.get(VARIABLE, ""))
            self._accelerator = make_accelerator(plan, self.hardware, faults)
            try:
                self._engine = load_engine(
                    plan,
                    self.spec,
                    self.hardware,
                    checkpoint,
                    self._accelerator,
                    self.tokenizer,
                    backends=self._backends,
                    costs=self._costs,
                    max_num_seqs=max_num_seqs,
                    max_model_len=self._max_model_len,
                    overlap=overlap,
                    say=say,
                    faults=faults,
                )
                if self._accelerator is not None and self._accelerator.unpinned_bytes:
                    self._copy_from_pageable(self._accelerator.unpinned_bytes)
            except BaseException:
                self.close()
                raise
        self.measured: Measured | None = None
        self.predicted: Estimate | None = None
        self._trace: StepTrace | None = None
        self._num_requests = 0

    def _copy_from_pageable(self, num_bytes: int) -> None:
        """Warn once of host memory that could not be pinned, and price copies as they are then."""
        costs = pageable_costs(self._costs)
        # Copies that are slower than the profile's are no facts about the profile.
        self._log = None
        if costs is None:
            known = "the profile has no rate of such copies: predictions are too fast"
        else:
            known = "predictions are corrected by the profile's rate of such copies"
            self._costs = costs
            self.hardware = costs.hardware
            plan = self.plan
            corrected = estimate(
                self.spec,
                plan.placement,
                costs,
                plan.workload,
                needs(self.spec, plan.placement, plan.wave, costs.hardware),
                num_concurrent=plan.estimate.num_concurrent_seqs,
                backends=self._backends,
            )
            self.plan = replace(plan, estimate=corrected)
        warnings.warn(
            f"{num_bytes / 1e9:.4g} GB of host memory cannot be pinned; copies from there are "
            f"slower than planned, and {known}; raise the limit of locked memory (ulimit -l)",
            RuntimeWarning,
            stacklevel=3,
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
        """Give back weights, cache and accelerator; what was measured stays readable."""
        self._engine = None
        if self._accelerator is not None:
            self._accelerator.close()
            self._accelerator = None
        torch.set_num_threads(self._threads_before)

    @property
    def timeline(self) -> Timeline | None:
        """The measured Timeline of the last step."""
        return None if self._last_step is None else self._last_step.timeline

    @property
    def predicted_timeline(self) -> Timeline | None:
        """The last step as the planner prices it."""
        step = self._last_step
        if step is None:
            return None
        return self._predict(step.graph, step.batch.shape)

    def _predict(self, graph: StepGraph, shape: BatchShape) -> Timeline:
        return predict(graph, self.spec, self._costs, shape, self._backends)

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[None]:
        """Write the steps that run inside, predicted beside measured, to a Chrome trace.

        The file is written on the way out, also after an error or an interrupt, if a step has run;
        of a long run it has the first and the last steps. Perfetto opens it.

        Parameters
        ----------
        path
            A JSON file; what is there is replaced.

        Raises
        ------
        UsageError
            There is no such folder, or the path is no plain file; or a trace is being made already.
        EnvironmentProblemError
            The file cannot be written, and nothing else has gone wrong.

        Examples
        --------
        >>> with LLM() as llm, llm.trace("trace.json"):  # doctest: +SKIP
        ...     llm.generate("Once upon a time")
        """
        if self._trace is not None:
            raise UsageError("a trace is being made already; end it before the next one")
        path = Path(path)
        check_trace_path(path)
        trace = self._trace = StepTrace(path)
        try:
            yield
        except BaseException:
            # What went wrong matters more than a trace that cannot be written either.
            try:
                self._write_trace(trace)
            except EnvironmentProblemError as error:
                self._say(f"warning: {error}")
            raise
        else:
            self._write_trace(trace)
        finally:
            self._trace = None

    def _write_trace(self, trace: StepTrace) -> None:
        is_emulated = (
            self.plan.resources.accelerator == "emulated" and self._accelerator is not None
        )
        note = " (emulated)" if is_emulated else ""
        if trace.write(self.spec, self._predict, note=note):
            self._say(f"wrote {trace.path}, {trace.summary}; https://ui.perfetto.dev opens it")

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the KV cache holds of one request; none may need more."""
        return self._open_engine().scheduler.pools.max_num_tokens

    @property
    def prompt_capacity_tokens(self) -> int:
        """Tokens that the KV cache holds of one prompt: fewer where it is computed elsewhere."""
        return self._open_engine().scheduler.pools.max_prompt_tokens

    def device_bytes(self) -> dict[Device, int]:
        """Bytes that weights, KV cache and staging buffers take on the accelerator now."""
        return {} if self._accelerator is None else {"gpu": self._accelerator.used_bytes}

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise UsageError("this LLM was closed; make a new one")
        return self._engine

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, as `generate` feeds them."""
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
        messages: Conversation | Sequence[Conversation],
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
        texts: list[str | None] = []
        token_ids = []
        for rendered in self.tokenizer.apply_chat_template_to_all(
            _conversations(messages), add_generation_prompt
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
        engine = self._open_engine()
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(token_ids)
        else:
            params = list(sampling_params)
            if len(params) != len(token_ids):
                raise RequestError(
                    f"there are {len(token_ids)} prompts but {len(params)} sampling parameters; "
                    "give one for all or one for each"
                )
        before = {phase: (t.num_tokens, t.seconds) for phase, t in engine.stats.phases.items()}
        samples = StepSamples(self.plan)
        try:
            running: list[RunningSequence] = []
            positions: dict[str, int] = {}
            for ids, each in zip(token_ids, params, strict=True):
                self._num_requests += 1
                positions[str(self._num_requests)] = len(running)
                running.append(engine.add_request(str(self._num_requests), ids, each))
            num_finished = 0
            while (result := engine.step()) is not None:
                self._last_step = result
                if self._trace is not None:
                    self._trace.watch(result)
                for event in result.events:
                    self._say(f"warning: {event.text}")
                if not result.is_beside:
                    samples.watch(result.graph, result.batch.shape, result.timeline, result.seconds)
                num_finished += len(result.finished)
                if observe is not None:
                    observe(
                        GenerationStep(
                            result=result,
                            text=lambda position: engine.text(running[position]),
                            finished=tuple(positions[done.seq_id] for done in result.finished),
                            num_finished=num_finished,
                            num_requests=len(running),
                        )
                    )
            outputs = [
                output_of(sequence, text, engine.text(sequence))
                for sequence, text in zip(running, texts, strict=True)
            ]
        finally:
            engine.abort_all()
            self._correct_plan(engine)
        if running:
            self.measured = measured(engine.stats, outputs, before)
            self.predicted = estimate(
                self.spec,
                self.plan.placement,
                self._costs,
                workload_of(outputs),
                num_concurrent=min(len(outputs), engine.scheduler.max_decode_seqs),
                backends=self._backends,
            )
            self._record(samples)
        return outputs

    def _correct_plan(self, engine: Engine) -> None:
        """Say in the plan what prefill steps have become where memory did not suffice."""
        most = engine.scheduler.max_num_batched_tokens
        if most >= self.plan.placement.prefill.max_num_tokens:
            return
        placement = self.plan.placement.with_chunk(most)
        found = estimate(
            self.spec,
            placement,
            self._costs,
            self.plan.workload,
            num_concurrent=self.plan.wave.num_seqs,
            backends=self._backends,
        )
        bytes_by_device = self.plan.estimate.bytes_by_device
        self.plan = replace(
            self.plan,
            placement=placement,
            estimate=replace(found, bytes_by_device=bytes_by_device),
        )

    def _record(self, samples: StepSamples) -> None:
        """Add a run to the calibration log; what cannot be written is said once."""
        if self._log is None or not self.calibrate:
            return
        records = samples.records(self._predict_uncorrected, self._log.rates_fingerprint)
        try:
            self._log.append(records)
        except EnvironmentProblemError as error:
            self._say(f"warning: {error}; runs are not recorded for later predictions")
            self._log = None

    def _predict_uncorrected(self, graph: StepGraph, shape: BatchShape) -> StepTimes:
        costs = self._uncorrected_costs
        return StepTimes(
            timeline=predict(graph, self.spec, costs, shape, self._backends),
            host_s=costs.host_cost(shape).seconds,
        )


def _conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """Several conversations, whichever of the two forms was given."""
    conversations: list[Conversation] = []
    turns: list[Mapping[str, Any]] = []
    for item in messages:
        if isinstance(item, Mapping):
            turns.append(item)
        else:
            conversations.append(item)
    if turns and conversations:
        raise RequestError("messages are one list of turns or a list of such lists, not both")
    return [turns] if turns else conversations


def _check_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Compare the checkpoint with the configuration; a tensor that neither explains is refused.

    A model with more tensors than its architecture has computes something else. Rotary buffers of
    old files and the second copy of a tied head change nothing.
    """
    checkpoint.check_tensors(expected_tensors(spec))
    odd = [
        name
        for name in checkpoint.unexpected_tensors
        if not name.endswith("rotary_emb.inv_freq")
        and not (spec.is_tied and name == "lm_head.weight")
    ]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ModelFolderError(
            f"{checkpoint.folder} has tensors that {spec.architecture} does not have: "
            f"{', '.join(odd[:3])}{more}; it is another model than its config.json says"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r} but must be one of {', '.join(choices)}")


def _context(spec: ModelSpec, max_model_len: int | None) -> int:
    if max_model_len is None:
        return spec.max_position_embeddings
    if not 2 <= max_model_len <= spec.max_position_embeddings:
        raise UsageError(
            f"max_model_len is {max_model_len} but {spec.name} has a context of "
            f"{spec.max_position_embeddings}; give 2..{spec.max_position_embeddings}"
        )
    return max_model_len


def _check_lengths(workload: Workload, max_model_len: int) -> None:
    if workload.context_len > max_model_len:
        raise UsageError(
            f"workload comes to {workload.context_len} tokens of a sequence but max_model_len is "
            f"{max_model_len}; plan for shorter sequences, or raise max_model_len"
        )


def _check_num_seqs(
    max_num_seqs: int, plan: Plan, spec: ModelSpec, hardware: HardwareProfile
) -> None:
    """Refuse more sequences of a step than memory holds at the planned length.

    Raises
    ------
    MemoryBudgetError
        Names the bytes that they need and those that there are.
    """
    wave = replace(plan.wave, num_seqs=max_num_seqs)
    for device, need in needs(spec, plan.placement, wave, hardware).items():
        if not need.fits:
            raise MemoryBudgetError(
                f"max_num_seqs is {max_num_seqs}, for which {spec.name} as {plan.placement.name} "
                f"needs {need.needed_bytes / 1e9:.4g} GB on the {device} where "
                f"{need.available_bytes / 1e9:.4g} GB may be used; lower it, or leave it out for "
                "as many as fit"
            )


def _ignore(line: str) -> None:
    pass
