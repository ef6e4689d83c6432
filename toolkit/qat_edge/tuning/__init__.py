"""Search over options of finetune: `qat-edge sweep`.

search_space.py   the options that are searched, from NAME=VALUES as flags give them
trial_store.py    SWEEP/study.db: which values come next, and what became of each trial; shared by several processes
sweep_results.py  the result: score of every trial, and which differences the evaluation rows show
"""
