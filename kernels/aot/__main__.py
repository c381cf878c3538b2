"""The command line: one process a compiler, since each wants an environment of its own."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from aot import table

_PLATFORMS = ("cuda", "tpu")
_README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="aot", description="Compile the kernels for an H200 and a TPU v5e.")
    parser.add_argument("--platform", choices=_PLATFORMS, action="append", help="default: all")
    parser.add_argument("--op", help="one kernel folder")
    parser.add_argument("--case", help="one size of its shapes.py")
    parser.add_argument("--readme", type=pathlib.Path, default=_README, help="the file with the table")
    parser.add_argument("--check", action="store_true", help="compare with the table, write nothing")
    options = parser.parse_args()
    whole = not (options.platform or options.op or options.case)
    if options.check and not whole:
        parser.error("--check compares the whole table; leave out --platform, --op and --case")

    rows, broken = _compile_all(options.platform or _PLATFORMS, options.op, options.case)
    print("\n".join(table.markdown(rows)))
    failures = broken + [f"{table.title(row)}: {failure}" for row in rows for failure in row["failures"]]
    if options.check and not failures:
        failures = table.differences(rows, options.readme)
    if failures:
        print("\n".join(["", *failures]), file=sys.stderr)
        return 1
    if whole and not options.check:
        table.write(rows, options.readme)
    return 0


def _compile_all(platforms, op: str | None, case: str | None) -> tuple[list[table.Row], list[str]]:
    """Rows of all platforms, and a line for each process that died."""
    chosen = [word for name, value in (("--op", op), ("--case", case)) if value for word in (name, value)]
    rows, broken = [], []
    with tempfile.TemporaryDirectory(prefix="aot-") as folder:
        running = {
            platform: subprocess.Popen(
                [sys.executable, "-m", "aot.compile", platform, f"{folder}/{platform}.jsonl", *chosen],
                env=os.environ | _environment(platform, folder),
                stderr=subprocess.PIPE,
                text=True,
            )
            for platform in platforms
        }
        for platform, process in running.items():
            _, errors = process.communicate()
            if process.returncode:
                broken.append(f"{platform}: the process ended with code {process.returncode}\n{errors[-4000:]}")
            path = pathlib.Path(folder, f"{platform}.jsonl")
            if path.exists():
                rows += [json.loads(line) for line in path.read_text().splitlines()]
    return rows, broken


def _environment(platform: str, folder: str) -> dict[str, str]:
    common = {"JAX_PLATFORMS": "cpu"}
    if platform == "tpu":
        # Look for no metadata server, and compile beside other processes that do: no TPU is held.
        return common | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # The plugin refuses to register without a driver; the dump holds the PTX of each kernel.
    return common | {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}/dump",
        "AOT_DUMP": f"{folder}/dump",
    }


if __name__ == "__main__":
    sys.exit(main())
