"""ONNX export: the trained codes in MatMulNBits nodes, for onnxruntime-genai and for plain onnxruntime.

`onnx_target.py` has the functions of the target, and chooses between those of decoders that onnxruntime-genai's builder
knows, of other decoders, and of encoders. The modules for the first in the order in which an export goes through them,
then those that read the result:

    onnx_support.py       tell from a model's configuration whether it can be exported
    export_onnx.py        the export: prepare the checkpoint, run the builder, repair the graph, write the configuration
    architecture.py       read rotary tables, embedding scale and fused projections from the Hugging Face model
    olive_checkpoint.py   write codes and scales in the checkpoint format that the builder copies without rounding
    builder.py            run onnxruntime-genai's model builder in a process of its own
    repair.py             correct the builder's graph until it computes the frozen model
    half_steps.py         add the nodes that 2-bit levels -1.5 -0.5 0.5 1.5 need
    unmerged_adapters.py  add inputs for LoRA adapters to the graph, and the nodes that read them
    adapter_format.py     read and write the file with the matrices of an adapter
    graph_file.py         read and write a graph whose tensors are in a separate data file
    names.py              convert between names of modules and names of nodes
    onnx_reader.py        read codes, scales and sizes back from a folder, for `verify`
    onnx_options.py       read the options of the export from the graph and genai_config.json
    genai_config.py       check the keys of genai_config.json against those that an export has
    expected_config.py    compare genai_config.json with what the export of a checkpoint writes
    graph_check.py        find nodes that the exporter does not make
    attention_check.py    compare the numbers of attention nodes with those of the model's code
    adapter_check.py      check the graph's inputs for an adapter, and read the file with its matrices
    folder_check.py       check a folder before a runtime loads it
    matrix_outputs.py     copy a graph with the inputs and outputs of every matrix as outputs, to locate a fault
    onnx_compat.py        every use of internals of onnxruntime-genai and transformers

For decoders that the builder does not know:

    decoder_support.py    tell from a model's configuration whether it can be traced
    export_decoder.py     the export: load the checkpoint, trace it, write the folder
    decoder_graph.py      trace the model of transformers, with attention as onnxruntime's operator over a cache
    decoder_names.py      names of inputs, outputs and metadata
    decoder_signature.py  tell such a graph from one of the builder
    decoder_reader.py     read codes, scales and sizes back from a folder, for `verify`
    decoder_check.py      find nodes that the exporter does not make

For `doctor`, which examines graphs of any tool:

    onnx_diagnosis.py     combine the findings
    foreign_graph.py      read a graph without its tensors
    data_files.py         find tensors that are missing from data files, or outside of the folder
    genai_check.py        compare genai_config.json with the graph
    onnxruntime_probe.py  load a graph in onnxruntime and onnxruntime-genai, in a process of its own

For encoders, which plain onnxruntime runs:

    export_encoder.py     the export: load the checkpoint, trace it, write the folder
    encoder_graph.py      trace the model of transformers
    encoder_names.py      names of inputs, outputs and metadata
    encoder_reader.py     read codes, scales, sizes and options back from a folder, for `verify`
    encoder_check.py      find nodes that the exporter does not make
    encoder_settings.py   compare names, sizes and configuration with what the export of a checkpoint writes
    encoder_session.py    run a folder in onnxruntime

All use olive_checkpoint.py, graph_file.py, folder_check.py and:

    traced_graph.py       frozen layers as single nodes of a traced graph
    traced_names.py       names of these nodes
    onnx_matrices.py      read matrices of codes and scales from the nodes of a graph
"""
