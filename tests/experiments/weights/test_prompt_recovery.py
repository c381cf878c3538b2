"""Compress, then prompt: a run at the smallest scale, what is small and what is learned, claims on the right rows."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from experiments.lab import figures
from experiments.lab.claims import judge
from experiments.weights import compressed_models as models
from experiments.weights import prompt_recovery, prompt_recovery_cells
from experiments.weights.prompt_recovery_cells import AWAY, FULL, HOME, Config
from hashml.models.decoder import init_params
from hashml.weights.quantize_model import dequantize_params
from hashml.weights.quantized import preset

EXPERIMENT = "weights.prompt_recovery"
NEEDS = ("wikitext2/valid.txt.gz", "wikitext2/test.txt.gz", "tiny_shakespeare/input.txt.gz")


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    assert np.isfinite(rows["nll"].to_numpy()).all()
    own = rows.filter(pl.col("source").eq(pl.col("model")))
    # 4 rows of 32; adapters of rank 1 beside two kernels of 32 times 32.
    assert set(own["trained_floats"]) == {4 * 32}
    assert set(rows.filter(pl.col("source").is_null())["trained_floats"]) == {0}
    ratios = (rows["diluted"] / rows["nll"] - 15 / (15 + rows["prompt_tokens"])).abs()
    assert float(ratios.to_numpy().max()) < 1e-5  # BOS and 15 bytes
    bits = dict(rows.select("model", "bits_per_weight").unique().iter_rows())
    assert bits[FULL] == 16
    assert bits["prune50"] == 9
    assert 2 < bits["rtn2"] < 3.5  # 24 bits a row of 32 or 86
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == len(prompt_recovery_cells.cells(found.scales["tiny"]))
    assert figures.describe(figures.draw(found.figure, rows))


def test_pruning_takes_the_smallest_half_of_each_layers_kernel_and_rounding_leaves_it():
    config = models.decoder_config(prompt_recovery.SCALES["tiny"].size)
    params = init_params(jax.random.key(0), config)
    pruned = models.pruned(params, config, 0.5)
    rounded = dequantize_params(models.rounded(pruned, config, preset("rtn", 4)))
    for name in models.kernel_names(config):
        before, after = (np.asarray(tree["layers"][name]) for tree in (params, pruned))
        for layer, kept in zip(before, after, strict=True):
            assert (kept == 0).sum() == kept.size // 2
            np.testing.assert_array_equal(kept[kept != 0], layer[kept != 0])
            assert np.abs(layer[kept == 0]).max() <= np.abs(layer[kept != 0]).min()
        np.testing.assert_array_equal(np.asarray(rounded["layers"][name])[after == 0], 0)
    assert rounded["norm"] is params["norm"]


def test_adapters_have_as_many_floats_as_a_prompt():
    config = Config()
    assert prompt_recovery_cells.rank_of(config) == 2  # 32 rows of 128; 4 layers, two kernels of 128 and 128
    with pytest.raises(ValueError, match="prompt_tokens is 20; its 2560 floats must be a multiple of the 2048"):
        prompt_recovery_cells.rank_of(Config(prompt_tokens=20))
    with pytest.raises(ValueError, match="name is 'int3'; allowed are full, rtn3"):
        prompt_recovery_cells.compressed(config, "int3", 0)
    for scale in prompt_recovery.SCALES.values():
        assert scale.steps % scale.search_steps == 0
        context = models.decoder_config(scale.size).context
        assert scale.prompt_tokens + scale.sequence <= context


def made_up() -> pl.DataFrame:
    """Three models f1, and two that are compressed beside the full one; what each thing takes off a loss is known."""
    cost = {FULL: 0.0, "rtn3": 0.2, "rtn2": 1.0, "gptq3": 0.1, "prune50": 0.3, "rtn4+prune50": 0.4}
    own = {FULL: 0.05, "rtn3": 0.1, "rtn2": 0.6, "gptq3": 0.06, "prune50": 0.2, "rtn4+prune50": 0.39}
    rows = []

    def add(model, method, tokens, gained, source=None, text=None, away=0.0):
        for seed in range(3):
            nll = 1.5 + 0.1 * seed + cost[model] - gained * (1 + 0.01 * seed)
            rows.append({"model": model, "method": method, "prompt_tokens": tokens, "source": source,
                         "learned_on": text, "seed": seed, "nll": nll, "away_nll": 3 + cost[model] - away,
                         "diluted": nll * 63 / (63 + tokens), "trained_floats": 1, "learning_rate": 0.01,
                         "at_the_edge": False, "bits_per_weight": 3.0})  # fmt: skip

    for model in cost:
        add(model, "none", 0, 0.0)
        add(model, "untrained", 32, -0.02)
        add(model, "hard", 32, 0.01, None, HOME)
        add(model, "adapters", 0, own[model] + (0.01 if model == "rtn3" else -0.01), model, HOME)
        add(model, "prompt", 32, own[model], model, HOME, away=0.1)
        add(model, "prompt", 16, own[model] / 2, model, HOME)
        add(model, "prompt", 32, -0.3, model, AWAY, away=0.5)
        for source in cost:
            if source != model:
                add(model, "prompt", 32, own[model] / 4, source, HOME)
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_claims_read_the_right_rows():
    mean = 1.01  # of the factor 1 + seed / 100
    expected = {
        "recovers": (0.5 * mean, True),
        "control": (0.01 * mean, True),
        "damage": (0.5 * mean, True),
        "eighth": (0.4 - 0.39 * mean, True),
        "three-to-two": (0.25, True),
        "two-to-three": (0.25, True),
        "gptq-to-pruned": (0.25, True),
        "to-shakespeare": (0.1, True),
        "to-wikitext": (-0.3 * mean, False),
        "adapters": (-0.01 * mean, False),
        "hard": (0.05 * mean, True),
        "diluted": (63 / 95 * np.mean([1 + 0.02 * (1 + 0.01 * s) / (1.5 + 0.1 * s) for s in range(3)]), True),
    }
    verdicts = {claim.id: judge(claim, made_up(), scale="default", complete=True) for claim in prompt_recovery.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(value, abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert verdicts["control"].note == "least: gptq3, 3 models"


def test_what_is_missing_is_not_judged():
    rows = made_up().filter(pl.col("model") != "rtn4+prune50")
    (claim,) = (claim for claim in prompt_recovery.CLAIMS if claim.id == "eighth")
    found = judge(claim, rows, scale="default", complete=True).note
    assert found == "no rows of rtn4+prune50 with prompt of rtn4+prune50, learned on wikitext2"
    free = rows.with_columns(pl.when(pl.col("model") == "gptq3").then(1.0).otherwise("nll").alias("nll"))
    assert np.isnan(prompt_recovery.fractions(free, "gptq3")).all()


def test_the_decoder_of_a_hard_prompt_reads_its_bytes():
    """Rows of the embedding: the same as a prefix of these bytes, up to the place of BOS."""
    size = prompt_recovery.SCALES["tiny"].size
    config = models.decoder_config(size)
    params = init_params(jax.random.key(0), config)
    piece = np.array([65, 66, 67], np.int32)
    tokens = np.array([[256, 70, 71, 72]], np.int32)
    behind = prompt_recovery_cells._nll(params["embedding"][piece], params, tokens, config=config)
    whole = models.next_token_nll(params, config, jnp.concatenate([piece[None], tokens], axis=1))
    np.testing.assert_allclose(behind, np.asarray(whole)[:, 3:].mean(axis=1), atol=1e-5)
