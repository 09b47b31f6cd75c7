"""Data only: shapes of well-known models and datasheet profiles of reference machines.

Models, `models/*.json`
-----------------------
Shapes without weights, in one of two forms. Both have `name`, what the command line calls the model
(the file's name), and `source`, where the shapes are published.

- Of a family that can be run: the keys of a Hugging Face `config.json` that
  `ModelSpec.from_config` reads.
- Of any other architecture, which can be planned only: `planner.model_profile.ModelProfile`.
  `kinds` has each different layer under a letter (its attention, as in
  `planner/attention_kinds.py`, and its feed-forward, as in `LayerSpec`), `layers` a letter for
  every layer. Unknown keys are errors.

All are described in bfloat16, whatever format a maker ships (FP8 of DeepSeek-V3, MXFP4 of gpt-oss),
and as text models: no vision towers, no layers that predict several tokens at once. Left out as
well, all below 1 % of the weights: biases of LayerNorms and of experts, norms of queries and keys,
attention sinks, the mixing of DeepSeek-V4's four residual streams, the indexers that choose tokens
in GLM-5 and MiniMax-M3. GLM-5's queries see 2048 chosen tokens; MiniMax-M3 is described as if its
queries saw all. Llama 4's chunks of 8192 tokens are windows of as many. MiMo-V2-Flash has the KV
heads of its full layers in all (its windowed ones have twice as many), Gemma 4 the heads of its
windowed layers. Nemotron's blocks, a mixer or experts each, are paired to layers; a mixer that no
experts follow is a layer of width 0.

Switch Base and Large and NLLB-MoE are not here: they have an encoder, which a prompt runs through
once and whose outputs each decoder layer attends to, while the planner's steps run every layer.

To add one: copy the numbers of its public config.json, add its published numbers of parameters to
`tests/test_model_profiles.py`, run that.

Machines, `machines/*.json`
---------------------------
`planner.HardwareProfile` with `provenance` "datasheet", no fingerprint and no samples: good for
asking what a machine could do, never a promise (a measured profile is: `hetero profile`). A file
holds ceilings only; what kernels reach of them, and how far that varies, stands in
`planner/priors.py`. SI units: bytes, bytes per second, FLOP per second, seconds.

GPU     memory: what the driver reports (where the error correction of GDDR6 is on, 15/16 of the
        board's), of which 512 MiB are a CUDA context (768 MiB where it also draws a laptop's
        screen). Nominal bandwidth. Dense peak with float32 accumulation; float32 without TF32;
        weights of int8 and int4 are unpacked to 16 bits and multiplied there. Turing has no
        bfloat16: its bfloat16 is computed in float32. 5 us for a small operation (published 4 to
        6 us for a launch).
CPU     reads min(threads * 20 GB/s, nominal bandwidth) (published 8 to 20 GB/s for a core). Peak:
        threads * base clock * FLOP per cycle of a core. float32: 32 for AVX2 and for Zen 4, whose
        AVX-512 takes two cycles, 64 for AVX-512 elsewhere. bfloat16: twice that with AVX512-BF16,
        1024 with AMX, else float32's. float16: float32's, 1024 with AMX-FP16. int8 and int4
        (rounded tokens times codes): four times float32's with VNNI, twice without, 2048 with AMX.
        A link of a chain of kernels 1 us, an operation of torch 5 us (measured on a two-core Xeon:
        0.4 and 4.2 us). 4 GiB are the system's. Threads are cores: 1, 2, 4, ... and all of them.
link    the slower generation of GPU and CPU, the GPU's lanes. Pinned copies: the line rate (15.75,
        31.5 and 63 GB/s for 16 lanes of PCIe 3.0, 4.0 and 5.0) * 256 / 284, as packets of 256
        bytes carry 28 more: 14.2, 28.4 and 56.8 GB/s (published for copy engines 12 to 13, 25 to
        26 and 50 to 57). Pageable ones pass through a buffer that one core fills: at most 6 GB/s on
        PCIe 3.0 and 12 GB/s on the others, and half of the pinned rate. 8 us to start one
        (published 5 to 10 us).

Where there are two sockets, rates and memory are of both (`notes` says so). From the vendors'
datasheets, quoted from memory: RTX 4060 Laptop (256 GB/s, 14.6 float32 and 29.1 bfloat16
TFLOP/s), Ryzen 7 7840HS (8 cores of 3.8 GHz, DDR5-5600), EPYC 9354 (32 cores of 3.25 GHz, 12 x
DDR5-4800). To add a machine: fill the same formulas, name the file after `name`, add its published
numbers to `tests/test_profiles.py`.
"""
