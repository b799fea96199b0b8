"""Studies: lists of runs that bear out one claim, made and reported by `brc-fast study`.

`study.py` says what a study is, `named.py` has those of the paper, `execute.py` makes the runs, `results.py`
reads them and `picture.py` draws what it found.
"""
