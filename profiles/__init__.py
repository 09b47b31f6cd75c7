"""Data only: shapes of well-known models and datasheet profiles of reference machines.

Models, `models/*.json`
-----------------------
The keys of a Hugging Face `config.json` that `ModelSpec.from_config` reads, and two more: `name`,
what the command line calls the model (the file's name), and `source`, where the shapes are
published. No weights. To add one: copy the numbers of its public config.json, run
`pytest tests/test_profiles.py` after adding the published number of parameters there.

Machines, `machines/*.json`
---------------------------
`planner.HardwareProfile` with `provenance` "datasheet" and no fingerprint: good for asking what a
machine could do, never a promise (a measured profile is: `hetero profile`). SI units: bytes, bytes
per second, FLOP per second, seconds. Written from datasheets and these utilisations, which are
priors of published measurements, not measurements of these machines:

GPU     memory: what the driver reports, less 512 MiB for a CUDA context (768 MiB where it also
        draws a laptop's screen). Plain reads 0.80 of nominal bandwidth (published 0.70 to 0.85),
        matrix times vector 0.69 (gpt-fast, bfloat16 on A100), decode attention 0.55 (published
        decode fractions 0.42 to 0.69). Products 0.70 of the dense peak with float32 accumulation,
        prefill attention 0.50. A small operation 5 us (published 4 to 6 us for a launch). float32
        without TF32.
CPU     reads min(threads * 14 GB/s, 0.80 of nominal bandwidth) (published 8 to 20 GB/s for a core,
        0.80 to 0.87 for all of them), matrix times vector 0.90 of that, decode attention 0.75 of
        it. Peak: cores * base clock * 32 float32 FLOP per cycle (Zen 2 to Zen 4), twice that for
        bfloat16 on Zen 4 (AVX512-BF16), float16 computed as float32; products 0.60 of it, prefill
        attention half of those. A link of a chain of kernels 1 us, an operation of torch 5
        us (measured on a two-core Xeon: 0.4 and 4.2 us). 4 GiB are the system's.
link    pinned copies: PCIe 4.0 x16 25 GB/s, x8 12.5 GB/s, PCIe 5.0 x16 53 GB/s; pageable ones 9, 6
        and 12 GB/s; 8 us to start one (published 5 to 10 us).

The rate of a matrix product of T tokens is min(2 T * bytes per second / bytes of a weight, peak),
sampled at T = 1, 4, 16, 64, 512. Where a source has no row for a part (RTX 4060 Laptop: 256 GB/s,
14.6 float32 and 29.1 bfloat16 TFLOP/s; Ryzen 7 7840HS) the vendor's datasheet is quoted from
memory. To add a machine: fill the same formulas, name the file after `name`.
"""
