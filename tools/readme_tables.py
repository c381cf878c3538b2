"""Writes the tables of README.md that are computed, between their marks.

    python tools/readme_tables.py [--check]

``--check`` writes nothing; it fails where the README says something else than the code.
"""

import sys
from pathlib import Path

from experiments.lab.records import write_atomically
from hashml.kvcache import bytes_per_token, cache_layers
from hashml.kvcache.spec import LayerSpec
from hashml.models.decoder import DecoderConfig

README = Path(__file__).resolve().parent.parent / "README.md"
LLAMA_7B = DecoderConfig(
    vocabulary=32000, features=4096, layers=32, heads=32, kv_heads=32, head_dim=128, hidden=11008
)
TOKENS = 4096
METHODS = (
    "full", "int8", "int4:128", "int4", "kivi:4", "kivi:2", "kvquant:3o1", "kvquant:3o1f1", "coupled:4c8b",
    "coupled:8c8b", "think:0.4", "streaming@0.2", "h2o@0.2", "tova@0.2", "snapkv@0.2", "pyramidkv@0.2", "adakv@0.2",
    "scissorhands@0.2", "keyformer@0.2", "corm@0.2", "scissorhands@0.2+int4", "h2o@0.2+coupled:8c8b",
    "snapkv@0.25+think:0.4",
)  # fmt: skip
MARKS = "<!-- table of caches: tools/readme_tables.py -->\n", "<!-- end of the table of caches -->\n"


def cache_table() -> str:
    """Bytes of each token of a prompt of `TOKENS`, everything that is allocated counted."""
    lines = ["| cache | tokens kept | bytes a token seen | of bfloat16 |", "| --- | ---: | ---: | ---: |"]
    dense = 2 * LLAMA_7B.layers * LLAMA_7B.kv_heads * LLAMA_7B.head_dim * 2
    for name in METHODS:
        layers = cache_layers(name, LLAMA_7B, TOKENS, dtype="bfloat16")
        size = bytes_per_token(layers, TOKENS)
        kept = sum(_kept(layer) for layer in layers) / len(layers)
        lines.append(f"| `{name}` | {min(kept, TOKENS):,.0f} | {size:,.0f} | {size / dense:.1%} |")
    return "\n".join(lines) + "\n"


def _kept(layer: LayerSpec) -> float:
    if layer.pages is None or layer.page_size is None:
        return layer.capacity
    return layer.pages * layer.page_size / layer.kv_heads + layer.window


def written(text: str) -> str:
    """The README with its table as the code has it.

    Raises:
        ValueError: where a mark is missing.
    """
    start, end = MARKS
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md must hold {start.strip()!r} and {end.strip()!r} once each")
    before, rest = text.split(start)
    return before + start + "\n" + cache_table() + "\n" + end + rest.split(end)[1]


def main(arguments: list[str]) -> int:
    """Writes, or checks, and returns the exit status."""
    found = README.read_text()
    expected = written(found)
    if arguments == ["--check"]:
        if found != expected:
            print("README.md has another table of caches; run python tools/readme_tables.py", file=sys.stderr)
        return int(found != expected)
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    write_atomically(README, expected)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
