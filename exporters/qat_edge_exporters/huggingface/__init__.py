"""Hugging Face export: the trained codes as compressed-tensors, for plain transformers with that package installed.

The modules in the order in which an export goes through them, then those that read the result:

    hf_support.py          tell from a model's configuration whether compressed-tensors computes it
    export_hf.py           the export: pack the codes, write the tables in float, the configuration, the tokenizer
    float_tables.py        compute the tables that are written in float, and what they replace
    compressed_config.py   the quantization_config of a scheme, and the groups of one that was read
    hf_settings.py         compute config.json and generation_config.json, compare those of a folder, check a folder
    hf_reader.py           read codes, scales, floats and sizes back from a folder, for `verify`
    hf_text.py             generate text with a folder
    hf_runner.py           the process that does it, with transformers alone
"""
