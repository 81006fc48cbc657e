"""How accurate trained models are: docs/accuracy.md, from training runs to tables, by one command.

    python -m bench.accuracy --list                              # the cells, and which have been run
    python -m bench.accuracy --runs DIR                          # run what is missing, in order; the document follows
    python -m bench.accuracy --runs DIR --only adrec/ml-100k --minutes 20
    python -m bench.accuracy                                     # only the document, from the rows

cells     the table of cells: method, data set, variant, seed; and what others report
rows      results/accuracy.jsonl: one row per cell that was run, appended; the last one of a cell counts
run       a cell: a training run in its own folder, then evaluations; interrupted at any point, it goes on where it was
report    rows -> docs/accuracy.md and its plots
"""
