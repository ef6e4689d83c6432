"""Measure models and artifacts, for validate and compare.

evaluator         logits, outputs, speed and memory of one model or artifact compared with the FP32 fine-tune
reference         inference of the FP32 fine-tune and of the frozen checkpoint in torch
metrics           KL divergence, perplexity, top-1 agreement and SQNR of logits
prompts           prompts with their expected answers, and those that are too long to be generated
native_runner     the same measurements in a runner binary that the user built
encoders          classifiers and sentence encoders, text by text
devices           connect to devices and run work on them in parallel
results           results of validate as dataclasses, and their JSON file
encoder_results   the same for encoders
deployments       results of compare: the table of deployments
gates             check results against the limits that were set
junit             gates as JUnit XML
"""
