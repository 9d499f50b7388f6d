"""Table 3's experiment: does a segmenter that learns from exports do better than one that does not?

    python -m benchmarks.downstream            # writes benchmarks/downstream.md and .json
    python -m benchmarks.downstream --small    # a rehearsal: tiny numbers, into outputs/downstream-small

A small SegFormer with random weights is trained on each set of pictures, and tested on rendered scenes with exact
masks.

pictures.py    rendered scenes, which are the "real" pictures here, and one export asked by names and by tokens
segmenter.py   the network, its training, its test
arms.py        what is compared with what, trained once each, kept, resumed
claims.py      mIoU and its intervals, each claim in words, the report
"""
