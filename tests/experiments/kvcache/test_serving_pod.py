"""What makes a compiled step fail, on numbers like those of the compilers, which are not needed here."""

import pytest

from experiments.kvcache import serving_pod

LAYERS = serving_pod.LLAMA_7B.layers


def found(layers: int, **changes):
    """A step of ``layers`` layers on one chip: 70 GB of cache in all, 13 of weights, and 0.5 whatever the layers."""
    right = {
        "target": "h200", "layers": layers, "kernels": layers, "chips": 1, "rows": 64, "tokens": 32_768,
        "weight_bytes": 500_000_000 + layers * 400_000_000, "cache_bytes": layers * 2_200_000_000,
        "codebook_bytes": layers * 4_000_000, "temporary_bytes": 30_000_000,
        "bytes_a_chip": 530_000_000 + layers * 2_604_000_000, "dense_cache_bytes": layers * 34_000_000_000,
        "aliased_bytes": layers * 2_200_000_000,
    }  # fmt: skip
    return right | changes


def test_what_all_layers_need_follows_from_some():
    whole = serving_pod.judged(found(4), found(2))
    assert whole == found(LAYERS) | {"compiled_layers": 4}
    assert serving_pod.judged(found(LAYERS)) == found(LAYERS)


@pytest.mark.parametrize(
    ("few", "fewer", "message"),
    [
        ({"kernels": 0}, {}, "0 kernels read the caches of 2 layers"),
        ({}, {"kernels": 0}, "0 kernels read the caches of 1 layers"),
        ({"aliased_bytes": 10**9}, {}, "1000000000 bytes are updated in place"),
        (
            {"temporary_bytes": 34_900_000_000},
            {"temporary_bytes": 34_900_000_000},
            "34900000000 bytes of temporaries",
        ),
        # 0.2 GB a layer are little for two, and 6.4 GB for all.
        ({"temporary_bytes": 400_000_000}, {"temporary_bytes": 200_000_000}, "6400000000 bytes of temporaries"),
        # 9 GB with two layers, 159 with all.
        ({"bytes_a_chip": 9 * 10**9}, {"bytes_a_chip": 4 * 10**9}, "159.00 GB a chip do not fit into 141 GB"),
        ({"dense_cache_bytes": 8 * 10**9}, {"dense_cache_bytes": 4 * 10**9}, "the dense cache would fit as well"),
    ],
)
def test_a_step_fails_for_what_only_all_layers_show(few, fewer, message):
    with pytest.raises(RuntimeError, match=message):
        serving_pod.judged(found(2, **few), found(1, **fewer))


def test_one_layer_shows_no_slope():
    with pytest.raises(ValueError, match="layers is 1; two are needed"):
        serving_pod.compile_step("h200", 1)


def test_kernel_calls_are_those_of_the_op():
    metadata = 'metadata={{op_name="jit(_step)/{op}/pallas_call"}}'
    call = '%x.{n} = f32[8] custom-call(%y), custom_call_target="{target}", ' + metadata
    lines = [
        call.format(n=0, target="tpu_custom_call", op="shard_map/cond/branch_0_fun/cache_decode"),
        call.format(n=1, target="__gpu$xla.gpu.triton", op="cond/branch_0_fun/cache_decode"),
        call.format(n=2, target="tpu_custom_call", op="another"),
        call.format(n=3, target="Sharding", op="cond/cache_decode"),
        '%add.1 = f32[8] add(%x, %y), metadata={op_name="jit(_step)/cache_decode/add"}',
    ]
    assert serving_pod.kernel_calls("\n".join(lines)) == 2
