"""GGUF export: the trained codes in ggml's blocks, for llama.cpp and the programs that are built on it.

gguf_support.py    tell from a model's configuration whether llama.cpp's graphs compute it
export_gguf.py     the export: check the checkpoint, pack it, write the file
gguf_families.py   families of models: names of tensors, order of rows, keys of the architecture
gguf_rope.py       settings and factors of the rotary embedding
vocabulary.py      the tokenizer as metadata
gguf_settings.py   all metadata of a file, computed from a checkpoint; compared with a file for `verify`
gguf_blocks.py     codes and scales in blocks of 32 weights
gguf_file.py       read and write the file
gguf_reader.py     read codes, scales and sizes back, for `verify`
llama_text.py      generate text in llama.cpp, through llama_runner.py in a process of its own
gguf_diagnosis.py  examine a file of any tool, for `doctor`
gguf_scan.py       read the metadata and the table of tensors of such a file, and find damaged tensors
llama_probe.py     load a file in llama.cpp, in a process of its own
"""
