"""Every wrong input of the family has its message, as users see it: without the annotations' checks of the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PRELUDE = """
import warnings

warnings.simplefilter("error")
import json, sys
import jax, jax.numpy as jnp, numpy as np
from hashml.hashing import Limbs, hash_slots, split64
from hashml.sharing import *
from hashml.sharing.budgets import resolve_budget
import flax.linen as nn

memory, key = np.ones(64, np.float32), jax.random.key(0)
ids, pairs = np.array([1, 2, 3]), np.array([[1, 2], [3, 4]])

def lookup(memory=memory, ids=ids, **how):
    return robe_lookup(memory, ids, **{"features": 16, **how})

def bag(ids=ids, **how):
    return robe_bag(memory, ids, **{"features": 16, **how})

def embed(ids=ids, **how):
    return RobeEmbed(**{"num_embeddings": 10, "features": 4, **how}).init_with_output(key, ids)[0]

def attend(query):
    return RobeEmbed(10, 4, budget=16).init_with_output(key, query, method="attend")[0]

def tables(ids=pairs, kind=RobeTables, **how):
    return kind(**{"num_embeddings": (10, 20), "features": 4, "budget": 40, **how}).init_with_output(key, ids)[0]

def dense(x=np.ones((2, 6), np.float32), **how):
    return HashedDense(**{"features": 4, **how}).init_with_output(key, x)[0]

class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(30)(nn.relu(nn.Dense(40)(x)))

class Nothing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x

features = np.ones((2, 20), np.float32)
mlp = Mlp().init(key, features)

def roast(x=features, features=40, **how):
    return RoastDense(features, **{"tile": (4, 4), **how}).init_with_output(key, x)[0]

def conv(shape=(1, 5, 5, 4), **how):
    images = np.ones(shape, np.float32)
    how = {"kernel_size": (3, 3), "budget": 64, "tile": (4, 4), **how}
    return RoastConv(8, **how).init_with_output(key, images)[0]

def roast_embed(ids=ids, **how):
    return RoastEmbed(10, 8, **{"budget": 16, "tile": (1, 4), **how}).init_with_output(key, ids)[0]

def outcome(call):
    try:
        jax.eval_shape(lambda: eval(call))  # traced: no program is compiled
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", "no error"]

print(json.dumps([outcome(call) for call in json.load(sys.stdin)]))
"""

REFUSED = [
    # layers in tiles
    ("roast()", ValueError, "give exactly one of budget (got None) and compression (got None)"),
    ("roast(compression=0.5)", ValueError, "compression is 0.5; it must be finite, and at least 1"),
    ("roast(budget=15)", ValueError, "budget is 15; it must hold one tile at least, 4 x 4 = 16 weights"),
    ("roast(compression=80)", ValueError, "budget is 10; it must hold one tile at least, 4 x 4 = 16 weights"),
    ("roast(budget=64, tile=(0, 4))", ValueError, "tile[0] is 0; it must be at least 1"),
    ("roast(budget=64, tile=16)", TypeError, "tile is 16; it must be a pair of ints"),
    ("roast(budget=64, map='square')", ValueError, "map is 'square'; it must be 'tile' or 'fold'"),
    ("roast(budget=64, sign='row')", ValueError, "sign is 'row'; it must be 'none', 'tile' or 'element'"),
    ("roast(budget=64, align=7)", ValueError, "budget is 64; it must be a multiple of 7"),
    ("roast(budget=64, offset=-1)", ValueError, "offset is -1; it must lie in 0"),
    ("roast(budget=64, weight_std=0.0)", ValueError, "weight_std is 0.0; it must be positive and finite"),
    ("roast(budget=64, features=0)", ValueError, "columns is 0; it must be at least 1"),
    ("roast(memory=SharedMemory(64), budget=64)", ValueError, "memory is given, and so is budget (64)"),
    ("roast(memory=SharedMemory(64), map='fold')", ValueError, "offset is None; a fold of a shared memory needs"),
    ("roast(memory=SharedMemory(64, std=-1.0))", ValueError, "std is -1.0; it must be positive and finite"),
    ("conv(feature_group_count=3)", ValueError, "feature_group_count is 3; it must divide the 4 input channels"),
    ("conv(padding='CAUSAL')", ValueError, "padding is 'CAUSAL'; it must be 'SAME', 'VALID', ints or pairs"),
    ("conv(strides=(1, 2, 3))", ValueError, "strides is (1, 2, 3); it must be an int, or one for each of 2"),
    ("conv(shape=(5, 4))", ValueError, "x has shape (5, 4); kernel_size (3, 3) asks for 3 axes at least"),
    ("roast_embed(tile=(2, 4))", ValueError, "tile is (2, 4); an embedding's is (1, Z), a block of one row"),
    ("roast_embed(ids=jnp.ones(3))", TypeError, "ids has dtype float32; it must be an integer type"),
    # whole models
    ("share(Nothing(), {}, compression=2)", ValueError, "there is nothing to share"),
    ("share(Mlp(), mlp, compression=0.5)", ValueError, "compression is 0.5; it must be finite, and at least 1"),
    ("share(Mlp(), mlp)", ValueError, "give exactly one of budget (got None) and compression (got None)"),
    ("share(Mlp(), mlp, budget=16, map='tile')", ValueError, "budget is 16; with map 'tile' it must hold 1024"),
    ("share(Mlp(), mlp, budget=64, map='square')", ValueError, "map is 'square'; it must be 'fold', 'element'"),
    ("share(Mlp(), mlp, compression=1000)", ValueError, "stay dense, so that it must be at most"),
    ("share(Mlp(), mlp, budget=64, init_std=0.0)", ValueError, "init_std is 0.0; it must be positive and finite"),
    # compression and budget
    ("embed(compression=0.5)", ValueError, "compression is 0.5; it must be finite, and at least 1"),
    ("embed(compression='10')", TypeError, "compression is '10'; it must be a number"),
    ("embed()", ValueError, "give exactly one of budget (got None) and compression (got None)"),
    ("embed(budget=16, compression=2)", ValueError, "give exactly one of budget (got 16) and compression (got 2)"),
    ("embed(compression=20)", ValueError, "budget is 2 (compression 20 of 40 weights); it must be at least 8"),
    ("embed(budget=16.0)", TypeError, "budget is 16.0; it must be an int"),
    ("dense(compression=0.99)", ValueError, "compression is 0.99; it must be finite, and at least 1"),
    ("dense(budget=0)", ValueError, "budget is 0; it must be at least 1"),
    ("tables(budget=None, compression=0.1)", ValueError, "compression is 0.1; it must be finite, and at least 1"),
    # a budget smaller than a block
    ("lookup(block_size=65)", ValueError, "budget is 64; it must be at least one block, block_size = 65"),
    ("embed(budget=7)", ValueError, "budget is 7; it must be at least 8"),
    ("tables(budget=7)", ValueError, "budget is 7; it must be at least 8"),
    ("embed(budget=2**31)", ValueError, "budget is 2147483648; a memory holds fewer than 2**31 weights"),
    ("dense(budget=2**31)", ValueError, "budget is 2147483648; a memory holds fewer than 2**31 weights"),
    # sizes of the geometry
    ("lookup(features=0)", ValueError, "features is 0; it must be at least 1"),
    ("lookup(features=4.0)", TypeError, "features is 4.0; it must be an int"),
    ("lookup(block_size=0)", ValueError, "block_size is 0; it must be at least 1"),
    ("lookup(align=7)", ValueError, "align is 7; it must divide budget = 64"),
    ("lookup(align=0)", ValueError, "align is 0; it must be at least 1"),
    ("lookup(seed='a')", TypeError, "seed is 'a'; it must be an int"),
    ("lookup(sign='both')", ValueError, "sign is 'both'; it must be 'none', 'element' or 'block'"),
    ("lookup(wrap='never')", ValueError, "wrap is 'never'; it must be 'circular' or 'none'"),
    ("lookup(num_embeddings=0)", ValueError, "num_embeddings is 0; it must be at least 1"),
    ("lookup(num_embeddings=9.5)", TypeError, "num_embeddings is 9.5; it must be an int"),
    ("embed(budget=16, num_embeddings=0)", ValueError, "num_embeddings is 0; it must be at least 1"),
    ("embed(budget=16, num_embeddings=9.5)", TypeError, "num_embeddings is 9.5; it must be an int"),
    ("embed(budget=16, features=-1)", ValueError, "features is -1; it must be at least 1"),
    ("embed(budget=16, block_size=2.0)", TypeError, "block_size is 2.0; it must be an int"),
    ("embed(budget=16, align=3)", ValueError, "budget is 16; it must be a multiple of 3"),
    ("embed(budget=16, align=0)", ValueError, "align is 0; it must be at least 1"),
    ("embed(budget=16, sign='both')", ValueError, "sign is 'both'; it must be 'none', 'element' or 'block'"),
    ("dense(budget=8, features=0)", ValueError, "features is 0; it must be at least 1"),
    ("dense(budget=8, row_block=0)", ValueError, "row_block is 0; it must be at least 1"),
    ("dense(budget=8, sign='both')", ValueError, "sign is 'both'; it must be 'none', 'element' or 'block'"),
    ("block_map(4, 4, 16, scale=float('inf'))", ValueError, "scale is inf; it must be finite"),
    # ids
    ("lookup(ids=np.array([1.0]))", TypeError, "ids has dtype float64; it must be an integer type"),
    ("lookup(ids=jnp.array([True]))", TypeError, "ids has dtype bool; it must be an integer type"),
    ("bag(ids=jnp.array([1.0]))", TypeError, "ids has dtype float32; it must be an integer type"),
    ("embed(budget=16, ids=jnp.ones(3))", TypeError, "ids has dtype float32; it must be an integer type"),
    ("tables(ids=jnp.ones((3, 2)))", TypeError, "ids has dtype float32; it must be an integer type"),
    ("tables(ids=ids)", ValueError, "ids has shape (3,); its last axis must be 2, one column a table"),
    ("tables(ids=np.int32(1))", ValueError, "ids has shape (); its last axis must be 2, one column a table"),
    ("tables(ids=ids, kind=HashingTrickTables)", ValueError, "ids has shape (3,); its last axis must be 2"),
    ("split64([-1])", ValueError, "x holds -1; 64-bit ids must not be negative"),
    ("hash_slots(np.ones(2), size=4, seed=0)", TypeError, "key has dtype float64; it must be an integer type"),
    ("hash_slots(ids, size=0, seed=0)", ValueError, "size is 0; it must lie in 1..2147483647"),
    # the memory
    ("lookup(memory=np.ones(64, int))", TypeError, "memory has dtype int32; it must be a float type"),
    ("lookup(memory=np.ones((8, 8)))", ValueError, "memory has shape (8, 8); it must be a vector"),
    # bags
    ("bag(mode='max')", ValueError, "mode is 'max'; it must be 'sum' or 'mean'"),
    ("bag(ids=np.int32(3))", ValueError, "ids is a scalar; a bag needs an axis of members, or offsets"),
    ("bag(weights=np.ones(2))", ValueError, "weights has shape (2,); it must be that of ids, (3,)"),
    ("bag(offsets=np.array([0.0]))", TypeError, "offsets has dtype float64; it must be an integer type"),
    ("bag(offsets=[1, 2])", ValueError, "offsets is [1 2]; it must ascend from 0 to at most 3, the ids' number"),
    ("bag(offsets=[0, 2, 1])", ValueError, "offsets is [0 2 1]; it must ascend from 0 to at most 3"),
    ("bag(offsets=np.array([0, 2, 1], np.uint32))", ValueError, "offsets is [0 2 1]; it must ascend from 0"),
    ("bag(offsets=[0, 4])", ValueError, "offsets is [0 4]; it must ascend from 0 to at most 3"),
    ("bag(offsets=np.zeros(0, int))", ValueError, "offsets is empty; it must name the bags of 3 ids"),
    (
        "bag(ids=pairs, offsets=[0])",
        ValueError,
        "ids has shape (2, 2), offsets (1,); with offsets both must be vectors",
    ),
    # several tables
    ("tables(seed=(1, 1))", ValueError, "seed holds [1] more than once; tables of one seed would share every row"),
    ("tables(seed=(1, 2**64 + 1))", ValueError, "seed holds [1, 18446744073709551617] more than once"),
    ("tables(seed=(1,))", ValueError, "seed has 1 entries; there are 2 tables"),
    ("tables(seed=(1, 'a'))", TypeError, "seed is 'a'; it must be an int"),
    ("tables(features=(4,))", ValueError, "features has 1 entries; there are 2 tables"),
    ("tables(features=(4, 0))", ValueError, "features is 0; it must be at least 1"),
    ("tables(num_embeddings=())", ValueError, "num_embeddings is (); it must name one table at least"),
    ("tables(num_embeddings=(10, 0))", ValueError, "num_embeddings is 0; it must be at least 1"),
    ("tables(num_embeddings=(10, 2.5))", TypeError, "num_embeddings is 2.5; it must be an int"),
    ("tables(num_embeddings=10)", TypeError, "num_embeddings is 10; it must be a sequence of ints, one a table"),
    ("tables(block_size=0)", ValueError, "block_size is 0; it must be at least 1"),
    ("tables(align=0)", ValueError, "align is 0; it must be at least 1"),
    # baselines that a budget is too small for
    ("tables(kind=HashingTrickTables, budget=3)", ValueError, "budget is 3; it must be at least 4: 1 x features"),
    (
        "tables(kind=QuotientRemainderTables, budget=7)",
        ValueError,
        "budget is 7; it must be at least 8: 2 x features",
    ),
    ("tables(kind=NarrowTables, budget=33)", ValueError, "budget is 33; width 1 needs 34, with its projection"),
    *(
        (f"tables(kind={kind}, {field})", error, message)
        for kind in ("HashingTrickTables", "QuotientRemainderTables", "NarrowTables")
        for field, error, message in (
            ("budget=40.0", TypeError, "budget is 40.0; it must be an int"),
            ("budget=-3", ValueError, "budget is -3; it must be at least 1"),
            ("features=0", ValueError, "features is 0; it must be at least 1"),
            ("num_embeddings=()", ValueError, "num_embeddings is (); it must name one table at least"),
            ("num_embeddings=(3, 0)", ValueError, "num_embeddings is 0; it must be at least 1"),
        )
    ),
    (
        "tables(kind=NarrowTables, num_embeddings=(2**30, 2**30), budget=2**33)",
        ValueError,
        "num_embeddings has 2147483648 rows in all; a table of every row holds fewer than 2**31",
    ),
    # a product with the wrong number of columns
    ("attend(jnp.ones((2, 5)))", ValueError, "x has shape (2, 5); its last axis must be 4, the map's columns"),
]

ACCEPTED = [
    "lookup(features=13)",  # no multiple of the block size: the last block is cut short
    "lookup(ids=[1, 2])",
    "lookup(ids=3)",
    "lookup(ids=np.array([-1]))",  # rows of NaN; what comes out is tested with the values
    "lookup(ids=np.zeros((0, 3), int))",
    "bag(ids=np.zeros((0, 3), int))",
    "bag(weights=[1.0, 2.0, 3.0])",
    "bag(ids=[-1, 2], padding_id=-1)",
    "bag(ids=np.array([1, 2], np.uint8), padding_id=-1)",
    "embed(budget=np.int64(16))",
    "tables(num_embeddings=np.array([10, 20]).tolist(), features=np.int64(4), seed=np.int64(3))",
    "tables(num_embeddings=tuple(np.array([10, 20])), seed=tuple(np.array([1, 2])))",
    "tables(num_embeddings=tuple(np.array([10, 20])), kind=QuotientRemainderTables)",
    "dense(np.ones((0, 6), np.float32), budget=8)",
]


@pytest.fixture(scope="module")
def outcomes():
    """All calls in one process, which has no import hook."""
    calls = [call for call, _, _ in REFUSED] + ACCEPTED
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE],
        input=json.dumps(calls),
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(calls, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[call for call, _, _ in REFUSED])
def test_is_refused_by_name(outcomes, call, error, message):
    kind, text = outcomes[call]
    assert (kind, message in text) == (error.__name__, True), f"{kind}: {text}"


@pytest.mark.parametrize("call", ACCEPTED)
def test_is_accepted(outcomes, call):
    assert outcomes[call] == ["", "no error"]
