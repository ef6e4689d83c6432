"""HTML reports: pages rendered from the JSON that `validate`, `compare`, `sensitivity` and `sweep` write.

Every page is one self-contained HTML file: inline CSS and SVG, no script, nothing loaded from elsewhere. Templates
extend `base.html`, share `macros.html` and are styled by `style.css`.

    module              JSON it reads                                           template it fills
    run_page            RUN/reports/*.json, training.json, manifests (collect)  run.html -> RUN/report.html
    encoder_page        RUN/answers.json, training.json, manifests (collect)    encoder.html -> RUN/report.html
    history_page        the same as run_page, of several runs (history)         history.html -> RUN/history.html
    comparison_page     RUN/compare/compare.json                                comparison.html -> compare.html
    sensitivity_page    RUN/sensitivity/sensitivity.json                        sensitivity.html -> sensitivity.html
    sweep_page          SWEEP/sweep.json                                        sweep.html -> SWEEP/report.html

Data behind the pages:

    collect             everything recorded in one run folder, with the reason for each missing part
    history             metrics of several runs, each with its change since the previous and since the first run
    sweep_results       every trial of a sweep, and which differences between them the evaluation rows show
    verdict             sentences computed from the metrics: QAT against the FP32 fine-tune and the best PTQ method
    tables              tables with the exact value behind each cell, and the columns of the main table
    guard_details       what the guard of QAT measured and did
    run_details         options, machine, versions and artifacts as lists of names and values
    glossary            explanations of the terms on each page

Drawing:

    charts              scales, ticks, axes and shapes as SVG elements
    plots               loss curve, accuracy against size, size by part, speed
    waterfall           error budget of one artifact
    trend               one metric over several runs
    formatting          numbers as text, and display names of models and targets
"""
