"""The command writes the text, and nothing but the text, to stdout."""

import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from hashml.generate import main
from hashml.models.decoder import DecoderConfig, param_shapes
from hashml.models.decoder_checkpoints import save_decoder
from hashml.models.rotary import Rotary

ROOT = Path(__file__).parents[1]
STORIES = Path(os.environ.get("HASHML_DATA", ".")) / "stories260K/stories260K.bin"
needs_stories = pytest.mark.skipif(
    "HASHML_DATA" not in os.environ, reason="set HASHML_DATA to the folder of data sets"
)


def run(capfdbinary, *arguments):
    """Exit status, stdout and stderr of the command, in this process."""
    try:
        status = main(arguments)
    except SystemExit as exit_:  # of the parser
        status = exit_.code
    out, err = capfdbinary.readouterr()
    return status, out.decode(), err.decode()


def command(*arguments, **options):
    """The command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "LC_ALL": "C"}
    return subprocess.Popen(
        [sys.executable, "-m", "hashml.generate", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def write_chatter(folder, context):
    """A llama2.c model whose next token is decided by the last one: it repeats the bytes of two characters for ever.

    Attention and perceptron are zero, the head is the embedding turned from each token to the one before it.
    """
    cycle = [3 + byte for byte in "é🙂".encode()]
    d, vocabulary = 8, 259
    after = {token: cycle[(i + 1) % len(cycle)] for i, token in enumerate(cycle)} | {1: cycle[0]}
    codes = {token: np.eye(d)[i] for i, token in enumerate([1, *cycle])}
    embedding, head = np.zeros((vocabulary, d), "<f4"), np.zeros((vocabulary, d), "<f4")
    for token, following in after.items():
        embedding[token] += codes[token]
        head[following] += codes[token]
    hidden = 4
    ones, kernels = np.ones(d, "<f4"), np.zeros(4 * d * d, "<f4")
    parts = [
        embedding,
        ones,
        kernels,
        ones,
        np.zeros(3 * d * hidden, "<f4"),
        ones,
        np.zeros(context * d, "<f4"),
        head,
    ]
    header = struct.pack("<7i", d, hidden, 1, 1, 1, -vocabulary, context)
    (folder / "model.bin").write_bytes(header + b"".join(part.tobytes() for part in parts))
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256))]
    tokens = b"".join(struct.pack("<fi", 0.0, len(piece)) + piece for piece in pieces)
    (folder / "tok.bin").write_bytes(struct.pack("<i", 6) + tokens)
    return folder / "model.bin"


@pytest.fixture(scope="module")
def chatter(tmp_path_factory):
    return write_chatter(tmp_path_factory.mktemp("chatter"), 64)


@pytest.fixture
def endless(tmp_path):
    """It talks for longer than any test waits, unless it is stopped."""
    return "--model", write_chatter(tmp_path, 60_000), "--temperature", "0", "--tokens", "50000"


def test_text_alone_is_on_stdout(chatter, capfdbinary):
    status, out, err = run(capfdbinary, "--model", str(chatter), "--temperature", "0", "--tokens", "12")
    assert (status, out, err) == (0, "é🙂é🙂", "")


def test_a_character_cut_at_the_end_is_marked(chatter, capfdbinary):
    status, out, _ = run(capfdbinary, "--model", str(chatter), "--temperature", "0", "--tokens", "10")
    assert (status, out) == (0, "é🙂é\ufffd")


def test_the_prompt_begins_the_text_and_the_context_bounds_it(chatter, capfdbinary):
    """ " é" is BOS, the byte of a space and two more: 60 of the context's 64 are left."""
    status, out, _ = run(capfdbinary, "--model", str(chatter), "--temperature", "0", "--prompt", "é")
    assert (status, out) == (0, "é" + "🙂é" * 10)


def test_stats_go_to_stderr(chatter, capfdbinary):
    """A cache of 1 + 12 slots: keys and values of 8 floats, a position; a length and the next slot: 13 x 68 + 8."""
    arguments = ("--model", str(chatter), "--temperature", "0", "--tokens", "12", "--stats")
    status, out, err = run(capfdbinary, *arguments)
    assert (status, out) == (0, "é🙂é🙂")
    assert "prompt: 1 tokens; new: 12" in err
    assert re.search(r"first token after \d+\.\d{3} s", err)
    assert re.search(r"then \d+\.\d tokens/s", err)
    assert "cache full: 892 B; model: " in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --model"),
        (["--model", "MODEL", "--tokens", "x"], "argument --tokens: invalid int value: 'x'"),
        (["--model", "MODEL", "--tokens", "0"], "tokens is 0; at least 1 is generated"),
        (
            ["--model", "MODEL", "--tokens", "64"],
            "tokens is 64; behind a prompt of 1, at most 63 fit the model's context",
        ),
        (["--model", "MODEL", "--prompt", "a" * 80], "prompts has one of 82 tokens; the model's context is 64"),
        (["--model", "MODEL", "--temperature", "-1"], "temperature is -1.0; it is 0 (greedy) or positive"),
        (["--model", "MODEL", "--top-k", "0"], "top_k is 0; it is at least 1"),
        (["--model", "MODEL", "--top-p", "2"], "top_p is 2.0; it is above 0 and at most 1"),
        (["--model", "MODEL", "--seed", "-1"], "seed is -1; allowed is 0 to 2^32 - 1"),
        (["--model", "MODEL", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--model", "MODEL", "--tokenizer", "MODEL"], "is no llama2.c tokenizer"),
        (["--model", "MODEL.absent"], "No such file"),
        (["--model", "FOLDER"], "config.json is not there"),
        (["--model", "MODEL", "--cache", "no such cache"], "no such cache"),
    ],
)
def test_bad_input_is_one_line_and_status_2(chatter, capfdbinary, arguments, message):
    places = {"MODEL": str(chatter), "MODEL.absent": f"{chatter}.absent", "FOLDER": str(chatter.parent)}
    status, out, err = run(capfdbinary, *(places.get(argument, argument) for argument in arguments))
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("hashml.generate: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--tokens", "0"], "tokens is 0; at least 1 is generated"),
        (["--prompt", "a" * 80], "prompts has one of 82 tokens; the model's context is 64"),
    ],
)
def test_bad_input_is_found_before_codebooks_are_learnt(chatter, capfdbinary, arguments, message):
    """Who learns says so on stderr."""
    status, out, err = run(capfdbinary, "--model", str(chatter), "--cache", "coupled:8c8b", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"hashml.generate: {message}")
    assert err.count("\n") == 1


def test_help_names_the_caches(capfdbinary):
    from hashml.kvcache.methods import CODECS, POLICIES

    status, out, _ = run(capfdbinary, "--help")
    assert status == 0
    assert set(POLICIES + CODECS) <= set(re.findall(r"\w+", out))


def test_a_model_without_tokenizer_asks_for_one(tmp_path, capfdbinary):
    config = DecoderConfig(31, 8, 1, 2, 1, 4, 8, rotary=Rotary())
    params = jax.tree.map(
        lambda shape: np.ones(shape, np.float32), param_shapes(config), is_leaf=lambda shape: isinstance(shape, tuple)
    )
    save_decoder(tmp_path / "model", params, config)
    status, _, err = run(capfdbinary, "--model", str(tmp_path / "model"))
    assert status == 2
    assert "has no tokenizer beside it; name one by --tokenizer" in err


@needs_stories
def test_a_real_model_tells_a_story(capfdbinary):
    status, out, _ = run(capfdbinary, "--model", str(STORIES), "--temperature", "0", "--tokens", "60")
    assert status == 0
    assert out.startswith("Once upon a time, there was a little")
    # Drawn text is the seed's.
    drawn = [run(capfdbinary, "--model", str(STORIES), "--seed", seed, "--tokens", "60")[1] for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_closed_pipe_is_quiet(endless):
    with command(*endless) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(6).decode() == "é🙂"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_an_interrupt_is_quiet_and_text_comes_before_the_end(endless):
    with command(*endless, bufsize=0) as process:
        assert process.stdout is not None
        assert process.stdout.read(2).decode() == "é"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        assert (process.returncode, err) == (130, b"")
        assert len(out) < 50_000
