"""Export a model as a .pte for ExecuTorch's own LLM runner, and read it back.

The modules, in the order in which `export_pte.export` uses them:

export_pte.py                    load, prepare, trace, lower, write: checkpoint -> folder
pte_support.py                   whether a model can become a .pte, from its configuration
encoder.py                       a classifier or sentence encoder as one program without a cache
graph/                           model -> exported program -> delegates
    quantized_modules.py         frozen weights as the operators that XNNPACK and ExecuTorch's kernels know
    attention.py                 key-value cache in mutable buffers, and ExecuTorch's attention operators
    portable_attention.py        the same in ATen operators only
    rewrites.py                  calls rewritten, while tracing, into ones that XNNPACK takes
    tracing.py                   a decoder as one exported program
    affine.py                    frozen weights as torchao's operators, for backends other than XNNPACK
    simplify.py                  removes operators that change nothing
    passes.py                    the libraries' graph passes in fewer tracings
    lowering.py                  exported program -> XNNPACK's delegates -> .pte
backends/                        other backends that a .pte can be lowered to
    registry.py                  table of them, with their differences from what was trained
    vulkan.py, coreml.py         one compiler each
pte/                             bytes of a .pte
    runner_contract.py           constant methods that the LLM runner reads
    shared_table.py              stores the table of a tied embedding and head once
    delegates.py                 .pte -> the constants that each matrix product uses
    pte_reader.py                folder -> codes, scales, metadata, faults
    backend_readers.py           the same for Vulkan and CoreML
    program_check.py             methods, operators and delegates that the exporter does not write
    pte_options.py               options of the export, from the program itself
    intermediate_outputs.py      a copy of a .pte that also returns the values between its layers
    inspection.py                .pte -> methods, operators, delegates, sizes
    program_info.py              dataclasses for that

Run or diagnose an artifact:

diagnosis.py                     everything that `qat-edge doctor` reports
known_runtimes.py                operators and backends of named runtimes, from known_runtimes.toml
runner_tokenizer.py              compares the LLM runner's tokenizer with the one of training
runtime_probe.py                 loads a .pte in the installed runtime, in a separate process
generate_text.py                 the text that `qat-edge generate` prints, from llm_runner.py
llm_runner.py                    generates text with ExecuTorch's LLM runner, in a separate process
encoder_runtime.py               runs an encoder's .pte

Private names of the libraries, and functions of theirs that are replaced at run time:

compat.py, compat_runtime.py
"""
