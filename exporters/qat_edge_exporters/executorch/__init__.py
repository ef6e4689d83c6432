"""A quantized causal language model as a .pte that ExecuTorch's own LLM runner loads, and back from it.

attention.py   key-value cache in mutable buffers, ExecuTorch's attention operators behind transformers' own seam
tracing.py     frozen weights as the operators XNNPACK knows; the model as one exported program
lowering.py    exported program -> XNNPACK delegates -> .pte
simplify.py    fewer operators in that program
sharing.py     one table in the file for a tied embedding and head
passes.py      the libraries' passes over a graph, in fewer tracings
contract.py    constant methods that the LLM runner reads, and end tokens
export.py      frozen checkpoint -> folder
delegates.py   bytes of a .pte -> which constants each fully connected node uses
reader.py      folder -> codes, scales, metadata, faults

encoder.py     a classifier or sentence encoder as one program without a cache; answering.py asks it in the runtime

backends.py    what a .pte can be lowered to beside XNNPACK: vulkan.py, coreml.py; affine.py has what both start from
other_readers.py  their files -> codes and scales

portable.py    cache and attention in ATen operators only
inspection.py  .pte -> methods, operators, delegates, sizes; probe.py loads it in the installed runtime
runtimes.py    what named runtimes can compute, from runtimes.toml; facts.py has what is found as values
"""
