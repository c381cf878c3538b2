"""Lossless compression of safetensors files, on the command line: tables go to stdout, progress to stderr.

    python -m hashml.compress pack IN.safetensors OUT --codec dfloat11
    python -m hashml.compress unpack OUT BACK.safetensors
    python -m hashml.compress info OUT

BACK is IN, byte for byte. What is written is read back and compared before it gets its name, and IN is only read.
Exit status: 2 for bad input or a failed write, with one line that says what is wrong; 130 when interrupted.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from hashml.accounting import format_bytes
from hashml.weights.container import FileInfo, file_info, pack, unpack
from hashml.weights.dfloat11 import DFLOAT11
from hashml.weights.ecf8 import ECF8
from hashml.weights.lossless import CODER_NAMES

_CODECS = {"dfloat11": (DFLOAT11,), "ecf8": (ECF8,), "auto": (DFLOAT11, ECF8)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"hashml.compress: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What Python still holds for stdout would raise again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"hashml.compress: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m hashml.compress", description="Lossless compression of weights.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add = verbs.add_parser("pack", help="compress a safetensors file", allow_abbrev=False)
    add.add_argument("source", metavar="IN", help="a safetensors file; it is only read")
    add.add_argument("target", metavar="OUT", help="the compressed file; what is there is replaced")
    add.add_argument(
        "--codec",
        default="auto",
        choices=_CODECS,
        help="dfloat11: bfloat16 and float16; ecf8: float8; auto, the default: both. Other tensors are copied",
    )
    add.add_argument("--coder", default="huffman", choices=CODER_NAMES, help="of the exponents; default huffman")
    add = verbs.add_parser("unpack", help="the original file again", allow_abbrev=False)
    add.add_argument("source", metavar="IN", help="a compressed file")
    add.add_argument("target", metavar="OUT", help="the safetensors file; what is there is replaced")
    add = verbs.add_parser("info", help="bytes of a compressed file, by tensor", allow_abbrev=False)
    add.add_argument("source", metavar="IN", help="a compressed file")
    add.add_argument("--verify", action="store_true", help="read all of it and compare every checksum, too")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.verb == "unpack":
        unpack(options.source, options.target, progress=_progress)
    elif options.verb == "info":
        print(summary(file_info(options.source, verify=options.verify)))
    else:
        chosen = [dataclasses.replace(codec, coder=options.coder) for codec in _CODECS[options.codec]]
        codecs = {dtype: codec for codec in chosen for dtype in codec.dtypes}
        info = pack(options.source, options.target, codecs, progress=_progress)
        print(summary(info))
        if all(tensor.coder == "copy" for tensor in info.tensors):
            print(
                f"hashml.compress: nothing to gain, every tensor was copied; --codec is {options.codec}, for "
                f"{', '.join(codecs)}",
                file=sys.stderr,
            )


def summary(info: FileInfo) -> str:
    """A line a tensor, and one for all: bytes, the entropy limit, and bits a number."""
    rows = [("tensor", "dtype", "shape", "coder", "bytes", "stored", "limit", "bits/weight")]
    for name, dtype, shape, coder, original, stored, limit in info.tensors:
        count = max(math.prod(shape), 1)
        sizes = (str(original), str(stored), f"{limit:.0f}", f"{8 * stored / count:.2f}")
        rows.append((name, dtype, "x".join(map(str, shape)) or "scalar", coder, *sizes))
    sums = [sum(column) for column in zip(*(tensor[4:] for tensor in info.tensors), strict=True)] or [0, 0, 0.0]
    count = sum(math.prod(tensor.shape) for tensor in info.tensors)
    bits = f"{8 * sums[1] / max(count, 1):.2f}"
    rows.append(("all", "", "", "", str(sums[0]), str(sums[1]), f"{sums[2]:.0f}", bits))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    share = 100 * info.file_bytes / info.original_bytes
    over = f", {100 * (sums[1] / sums[2] - 1):.2f}% above the entropy limit" if sums[2] else ""
    lines.append(
        f"file: {format_bytes(info.original_bytes)} -> {format_bytes(info.file_bytes)}, {share:.1f}%; tensors{over}"
    )
    return "\n".join(line.rstrip() for line in lines)


def _progress(name: str, done: int, total: int) -> None:
    print(f"{done}/{total} {name}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
