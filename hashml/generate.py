"""Text from a checkpoint, on the command line: the text goes to stdout as it comes, all else to stderr.

    python -m hashml.generate --model stories260K.bin --temperature 0
    python -m hashml.generate --model FOLDER --prompt "Once" --tokens 100 --top-p 0.9 --cache coupled:8c8b --stats

The model is a Hugging Face folder (Llama, Mistral, Qwen2; safetensors) or a llama2.c file. The text is the prompt and
what follows it; without a prompt it starts from BOS, and it ends where the model ends it. Exit status: 2 for bad
input, with one line that says what is allowed; 130 when interrupted; 0 when the reader of stdout has had enough.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from hashml.accounting import format_bytes, stored_bytes
from hashml.models.decoder import DecoderModel, Params, decoder_model
from hashml.models.decoder_checkpoints import load_decoder
from hashml.models.generation import Engine, check_request, full_engine, generate, stream
from hashml.models.sampling import Sampling

_TOKENS = 200
_ROWS, _LENGTH = 16, 512
"""Texts that codecs learn from, and tokens of each."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"hashml.generate: {message}\n")

    def format_help(self) -> str:
        # Only who asks for help waits for the modules that know the names.
        from hashml.kvcache.methods import CODECS, POLICIES

        self.epilog = (
            f"Caches are a policy ({', '.join(POLICIES)}), a codec ({', '.join(CODECS)}), or both joined by +. "
            "@ gives the tokens that a policy keeps, as a number or as a part of all, and : an option of a codec: "
            "h2o@0.2, scissorhands@256+int4, kivi:2, kvquant:3o1, coupled:8c8b, think:0.4."
        )
        return super().format_help()


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
    except (ValueError, OSError, ImportError) as error:
        print(f"hashml.generate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m hashml.generate", description="Generates text from a checkpoint.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="a Hugging Face folder, or a llama2.c file")
    add("--prompt", default="", metavar="TEXT", help="what the text begins with; empty: BOS")
    add("--tokens", type=int, metavar="N", help=f"at most so many new tokens; {_TOKENS}, or what the context leaves")
    add("--temperature", type=float, default=1.0, metavar="T", help="0 takes the likeliest token; default 1")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest that reach probability P")
    add("--seed", type=int, default=0, metavar="N", help="of the draws, 0 to 2^32 - 1; default 0")
    add(
        "--cache",
        default="full",
        metavar="NAME",
        help="how keys and values are kept, such as coupled:8c8b, see below; default full",
    )
    add("--tokenizer", metavar="PATH", help="tokenizer.json or tok*.bin; default: the one beside the model")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of weights and arithmetic")
    add("--stats", action="store_true", help="speed and bytes, on stderr")
    return parser


def _run(options: argparse.Namespace) -> None:
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"seed is {options.seed}; allowed is 0 to 2^32 - 1")
    Sampling(options.temperature, options.top_k, options.top_p)  # refuses before the model is read
    params, config, tokenizer = load_decoder(
        options.model, jnp.dtype(options.dtype), tokenizer=True if options.tokenizer is None else options.tokenizer
    )
    if tokenizer is None:
        raise ValueError(f"model {options.model} has no tokenizer beside it; name one by --tokenizer")
    prompt = tokenizer.encode(options.prompt)
    if not prompt:
        raise ValueError("prompt is empty, and the model names no BOS to start from; give some text")
    model = decoder_model(config)
    tokens = options.tokens
    if tokens is None:
        tokens = max(1, min(_TOKENS, config.context - len(prompt)))
    check_request(config, [prompt], tokens, tokenizer.stops)  # before codebooks are learnt
    engine = _engine(options, model, params, prompt[0], len(prompt) + tokens)
    steps = stream(
        model,
        params,
        [prompt],
        tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        key=jax.random.key(options.seed),
        cache=None if options.cache == "full" else engine,  # the full one is bounded by the model's context
        stops=tokenizer.stops,
    )

    begin, times = time.perf_counter(), []
    writer = tokenizer.stream(prompt)
    _write(options.prompt)
    for step in steps:
        times.append(time.perf_counter())
        _write(writer.push(int(step[0])))
    _write(writer.finish())
    if sys.stdout.isatty():
        _write("\n")
    if options.stats:
        _report(options.cache, engine, params, prompt, begin, times)


def _engine(options: argparse.Namespace, model: DecoderModel, params: Params, start: int, capacity: int) -> Engine:
    if options.cache == "full":
        return full_engine(model, capacity)
    # Only who asks for a compressed cache waits for its modules.
    from hashml.kvcache.engine import engine

    def own_text() -> list[np.ndarray]:
        """What the model itself says: text that its keys and values are at home in, and always at hand."""
        print(f"learning codebooks for {options.cache} from {_ROWS} texts of the model's own", file=sys.stderr)
        length = min(_LENGTH, model.config.context)
        said = generate(model, params, [[start]] * _ROWS, length - 1, key=jax.random.key(options.seed))
        return [np.concatenate([np.full((_ROWS, 1), start), np.asarray(said)], axis=1)]

    return engine(options.cache, model, params, capacity, sequences=own_text, progress=_progress)


def _progress(done: int, total: int) -> None:
    end = "\n" if done == total else "\r"
    print(f"learning: step {done} of {total}", end=end, file=sys.stderr, flush=True)


def _write(text: str) -> None:
    """UTF-8 whatever the locale; bytes of the command line that are none pass as they came."""
    if text:
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.buffer.flush()


def _report(
    cache: str, engine: Engine, params: Params, prompt: list[int], begin: float, times: Sequence[float]
) -> None:
    shape = jax.ShapeDtypeStruct((1, len(prompt)), jnp.int32)
    state = jax.eval_shape(engine.prefill, params, shape, shape)[1]
    lines = [f"prompt: {len(prompt)} tokens; new: {len(times)}"]
    if times:
        lines.append(f"first token after {times[0] - begin:.3f} s, compilation included")
    if len(times) > 1:
        lines.append(f"then {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s")
    lines.append(f"cache {cache}: {format_bytes(stored_bytes(state))}; model: {format_bytes(stored_bytes(params))}")
    print("\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
