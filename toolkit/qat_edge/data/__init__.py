"""Training and evaluation data: files to rows, rows to tokens with labels, tokens to batches.

formats            a file, folder or Hub data set -> rows, which `row_parsing` checks; their classes are in `rows`
conversation       a conversation -> prompts and answers as token ids, for training, generation and artifacts
chat_template      rendering of a model's chat template; `template_limits` bounds it, `template_use` finds what it omits
tokenization       rows for a model that generates text -> token ids and labels; padding
training_examples  the same for every task, encoders included
calibration        tokenized rows -> batches for methods that look at activations
"""
