"""The command: a file and back, a table on stdout, progress on stderr, one line for what is wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hashml.compress import main

ROOT = Path(__file__).parents[1]
STORIES = Path(os.environ.get("HASHML_DATA", ".")) / "stories260K/stories260K.bin"


def run(capsys, *arguments):
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # of the parser
        status = exit_.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def source(tmp_path):
    generator = np.random.default_rng(0)
    tensors = {
        "weight": generator.standard_normal((100, 64)).astype(ml_dtypes.bfloat16),
        "bias": generator.standard_normal(64).astype(np.float32),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def test_there_and_back(capsys, source, tmp_path):
    before = source.read_bytes()
    status, table, progress = run(capsys, "pack", source, tmp_path / "out", "--codec", "dfloat11")
    assert status == 0
    assert progress.splitlines() == ["1/2 weight", "2/2 bias"]
    lines = table.splitlines()
    assert lines[0].split() == ["tensor", "dtype", "shape", "coder", "bytes", "stored", "limit", "bits/weight"]
    rows = {line.split()[0]: line.split() for line in lines[1:3]}
    assert rows["weight"][1:5] == ["BF16", "100x64", "huffman", "12800"]
    assert rows["bias"][1:] == ["F32", "64", "copy", "256", "256", "256", "32.00"]
    _, _, _, _, _, stored, limit, bits = rows["weight"]
    assert int(limit) < int(stored) < 1.03 * int(limit)
    assert float(bits) == round(8 * int(stored) / 6400, 2)
    assert lines[3].split() == ["all", "13056", str(int(stored) + 256), str(int(limit) + 256), lines[3].split()[-1]]
    share = re.fullmatch(r"file: .* -> .*, ([\d.]+)%; tensors, [\d.]+% above the entropy limit", lines[4])
    assert share is not None
    assert float(share[1]) == round(100 * (tmp_path / "out").stat().st_size / len(before), 1)

    assert run(capsys, "info", tmp_path / "out") == (0, table, "")
    assert run(capsys, "info", tmp_path / "out", "--verify") == (0, table, "")
    assert run(capsys, "unpack", tmp_path / "out", tmp_path / "back")[:2] == (0, "")
    assert (tmp_path / "back").read_bytes() == source.read_bytes() == before


@pytest.mark.parametrize("coder", ["gaps", "fixed_rate", "raw"])
def test_other_coders(capsys, source, tmp_path, coder):
    status, table, messages = run(capsys, "pack", source, tmp_path / "out", "--coder", coder)
    assert status == 0
    assert ("nothing to gain" in messages) == (coder == "raw")
    assert (coder if coder != "raw" else "copy") in table
    assert run(capsys, "unpack", tmp_path / "out", tmp_path / "back")[0] == 0
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_codec_for_other_dtypes_copies_and_says_so(capsys, source, tmp_path):
    status, _, messages = run(capsys, "pack", source, tmp_path / "out", "--codec", "ecf8")
    assert status == 0
    assert "nothing to gain, every tensor was copied; --codec is ecf8, for float8_e4m3fn, float8_e5m2" in messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "{no}", "{out}"], "No such file or directory: '.*no'"),
        (["pack", "{text}", "{out}"], "text is damaged or no safetensors file"),
        (["pack", "{in}", "{in}"], "the source itself"),
        (["pack", "{in}", "{out}", "--codec", "zip"], "argument --codec: invalid choice: 'zip'"),
        (["pack", "{in}"], "the following arguments are required: OUT"),
        (["unpack", "{in}", "{out}"], "in.safetensors has no 'hashml' entry"),
        (["info", "{in}"], "it was not written by pack"),
        (["info", "{folder}"], "is a directory; allowed is a safetensors file"),
        (["squeeze"], "argument VERB: invalid choice: 'squeeze'"),
        ([], "the following arguments are required: VERB"),
    ],
)
def test_bad_input_is_one_line_and_status_two(capsys, source, tmp_path, arguments, message):
    (tmp_path / "text").write_text("a text that is no file of tensors")
    places = {"in": source, "text": tmp_path / "text", "out": tmp_path / "out", "no": tmp_path / "no"}
    before = source.read_bytes()
    status, out, err = run(capsys, *(argument.format(folder=tmp_path, **places) for argument in arguments))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert re.match(f"hashml.compress: .*{message}", err)
    assert source.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "text"]


def test_a_full_device_is_an_error_of_one_line(capsys, source, tmp_path, monkeypatch):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    status, _, err = run(capsys, "pack", source, tmp_path / "out")
    assert status == 2
    assert err.splitlines()[-1] == "hashml.compress: [Errno 28] No space left on device"
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_in_a_process_of_its_own(source, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "LC_ALL": "C"}
    command = [sys.executable, "-m", "hashml.compress", "pack", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "huffman" in done.stdout


@pytest.mark.skipif("HASHML_DATA" not in os.environ, reason="set HASHML_DATA to the folder of data sets")
def test_trained_weights_take_less_than_seven_tenths(capsys, tmp_path):
    """A language model of 260,000 weights, cast to bfloat16: within 1.5% of the limit, header included below 70%."""
    import jax.numpy as jnp

    from hashml.models.decoder_checkpoints import load_decoder, save_decoder
    from hashml.weights.container import file_info

    params, config, _ = load_decoder(STORIES, jnp.bfloat16, tokenizer=False)
    save_decoder(tmp_path / "model", params, config)
    source = tmp_path / "model" / "model.safetensors"
    assert run(capsys, "pack", source, tmp_path / "out", "--codec", "dfloat11")[0] == 0
    info = file_info(tmp_path / "out")
    stored, limit, original = (
        sum(getattr(tensor, field) for tensor in info.tensors)
        for field in ("stored_bytes", "limit_bytes", "original_bytes")
    )
    assert limit < stored < 1.015 * limit
    assert stored < 0.7 * original
    assert info.file_bytes < 0.7 * info.original_bytes
    assert run(capsys, "unpack", tmp_path / "out", tmp_path / "back")[0] == 0
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
