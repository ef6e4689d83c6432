"""Training and evaluation data: files to rows, rows to tokens with labels, tokens to batches.

formats            a file, folder or Hub data set -> rows
tokenization       rows for a model that generates text -> token ids and labels; padding
training_examples  the same for every task, encoders included
calibration        tokenized rows -> batches for methods that look at activations
"""
