"""The command line."""

import argparse
import json
import pathlib
import sys
import warnings

from bench import measure, roofline, table
from hashml_kernels.problem import every_problem


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description="Time the kernels on the device at hand.")
    parser.add_argument("op", nargs="?", help="one kernel folder; default: all")
    parser.add_argument("--case", help="one size of its shapes.py")
    parser.add_argument("--direction", choices=("forward", "backward"), help="default: both")
    parser.add_argument("--samples", type=int, default=30, help="timings of each implementation (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn ids and weights (default: 0)")
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are added to this file")
    options = parser.parse_args()
    if options.samples < 1:
        parser.error(f"--samples is {options.samples}; it must be at least 1")
    # Emitted whenever a Triton kernel is lowered, since jax 0.11.
    warnings.filterwarnings("ignore", message="The Pallas Triton backend", category=DeprecationWarning)
    try:
        problems = list(every_problem(options.op, options.case))
    except ValueError as error:
        parser.error(str(error))

    device = roofline.this_device()
    rows = []
    for problem in problems:
        if options.direction in (None, problem.direction):
            for row in measure.measure(problem, device, samples=options.samples, seed=options.seed):
                rows.append(row)
                print(table.line(row), file=sys.stderr)
                if options.out:
                    with options.out.open("a") as file:
                        print(json.dumps(row), file=file)
    print(table.text(rows))
    return int(any(row["failure"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
