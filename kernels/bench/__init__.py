"""Times every op at the sizes of its ``shapes.py``, beside its bound and beside XLA, on the device at hand.

Needs jax, numpy and this folder, nothing else:

    PYTHONPATH=kernels python -m bench                                     # every op and size
    PYTHONPATH=kernels python -m bench hash_gather --case mlperf --out rows.jsonl

Each implementation must first give the reference's result. A row is written as soon as it is measured.
"""
