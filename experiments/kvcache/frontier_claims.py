"""What the papers behind `experiments.kvcache.frontier` claim, and controls that nobody may lose to."""

import functools
from collections.abc import Iterator

import polars as pl

from experiments.lab import (
    Claim,
    Measured,
    NotEnoughRows,
    furthest,
    highest,
    lowest,
    mean_interval,
    paired_difference,
)

SCORED = ("h2o", "keyformer", "corm", "scissorhands", "scissorhands_1")
"""Policies that score by attention; TOVA, which looks at one query alone, is not expected to do well here."""
HALF_TO_QUARTER = (2, 3, 4)
BUDGETS = (2, 4, 8)
CONTROLS = {"random": "random eviction", "window": "a window of the newest tokens"}


def _fractions(budgets: tuple[int, ...]) -> str:
    return ", ".join(f"1/{budget}" for budget in budgets)


def _part(rows: pl.DataFrame, fixture: str, protocol: str, budget: int | None) -> pl.DataFrame:
    same = pl.col("budget").is_null() if budget is None else pl.col("budget").eq(budget)
    return rows.filter(pl.col("fixture").eq(fixture) & pl.col("protocol").eq(protocol) & same)


def _loss(rows: pl.DataFrame, fixture: str, protocol: str, method: str, budget: int | None) -> pl.DataFrame:
    found = _part(rows, fixture, protocol, budget).filter(pl.col("method") == method).sort("seed")
    if found.is_empty():
        raise NotEnoughRows(f"no rows of {fixture} with {method} at budget {budget}")
    return found


def _excess(
    rows: pl.DataFrame,
    a: tuple[str, int | None],
    b: tuple[str, int | None],
    fixture: str = "f1",
    protocol: str = "decode",
) -> Measured:
    """Loss of a over that of b, less 1, over the models, or over samples of stories."""
    first, second = (_loss(rows, fixture, protocol, *each)["nll"].to_numpy() for each in (a, b))
    return mean_interval(first / second - 1, "samples of stories" if fixture == "stories" else "models")


def _compounding(rows: pl.DataFrame, policy: str, codec: str, fixture: str) -> Measured:
    """By how much a codec behind a policy changes its loss, where it does so most."""
    cells = []
    for budget in (2, 4):
        found = _excess(rows, (f"{policy}+{codec}", budget), (policy, budget), fixture)
        cells.append(_noted(found, f"worst: 1/{budget} of the bytes"))
    return furthest(cells)


def _noted(found: Measured, note: str) -> Measured:
    return Measured(found.value, found.low, found.high, note)


def _over(
    rows: pl.DataFrame,
    methods: tuple[str, ...],
    control: str,
    budgets: tuple[int, ...],
    fixture: str = "f1",
    protocol: str = "decode",
) -> Measured:
    """Loss over a control's in equal bytes, less 1, of the method and at the budget where it is most."""
    cells = []
    for budget in budgets:
        for method in methods:
            found = _excess(rows, (method, budget), (control, budget), fixture, protocol)
            cells.append(_noted(found, f"worst: {method} at 1/{budget}"))
    return highest(cells)


def _recall(rows: pl.DataFrame, method: str, budget: int | None) -> Measured:
    found = _part(rows, "recall", "decode", budget).filter(pl.col("method") == method)
    return mean_interval(found["accuracy"], "models")


def _lead(rows: pl.DataFrame, methods: tuple[str, ...], control: str, budgets: tuple[int, ...]) -> Measured:
    """Accuracy of recall of the worst of the methods over the control's, at the budget where it stands worst."""
    cells = []
    for budget in budgets:
        part = _part(rows, "recall", "decode", budget)
        for method in methods:
            found = paired_difference(part, method, control, "accuracy", on=["seed"])
            cells.append(_noted(found, f"worst: {method} at 1/{budget}"))
    return lowest(cells)


def _recall_claim(
    name: str, subject: str, methods: tuple[str, ...], budgets: tuple[int, ...], control: str = "random"
) -> Claim:
    return Claim(
        f"recall-{name}-{control}",
        f"{subject} recalls more than {CONTROLS[control]} in equal bytes, at {_fractions(budgets)}",
        paper="importance persists, so that past attention tells what will be needed",
        measure=functools.partial(_lead, methods=methods, control=control, budgets=budgets),
        holds=lambda measured: measured.low > 0,
    )


def _text_claims(fixture: str) -> Iterator[Claim]:
    """What is claimed of every language model."""
    name, said = ("", "the language model f1") if fixture == "f1" else (f"{fixture}-", "stories260K")
    yield Claim(
        f"{name}scissorhands-half",
        f"At half the bytes Scissorhands raises the loss of {said} by less than 2 %",
        paper="no loss of quality at 2x (13B) to 5x",
        measure=functools.partial(_excess, a=("scissorhands", 2), b=("full", None), fixture=fixture),
        holds=lambda measured: measured.high < 0.02,
    )
    yield Claim(
        f"{name}scissorhands-quarter",
        f"At a quarter of the bytes, too ({said})",
        paper="up to 5x less memory without loss of quality",
        measure=functools.partial(_excess, a=("scissorhands", 4), b=("full", None), fixture=fixture),
        holds=lambda measured: measured.high < 0.02,
    )
    for control in CONTROLS:
        yield Claim(
            f"{name}scissorhands-{control}",
            f"At a quarter of the bytes its loss is below that of {CONTROLS[control]} ({said})",
            paper="pivotal tokens stay pivotal (persistence of importance)",
            measure=functools.partial(_excess, a=("scissorhands", 4), b=(control, 4), fixture=fixture),
            holds=lambda measured: measured.high < 0,
        )
        yield Claim(
            f"{name}scored-{control}",
            "Every policy that scores by attention, TOVA apart, has less loss than "
            f"{CONTROLS[control]} in equal bytes, at {_fractions(BUDGETS)} ({said})",
            paper="past attention tells which tokens matter (H2O, Keyformer, CORM, Scissorhands)",
            measure=functools.partial(_over, methods=SCORED, control=control, budgets=BUDGETS, fixture=fixture),
            holds=lambda measured: measured.high < 0,
            source="trivial control",
        )
    yield Claim(
        f"{name}scissorhands-int4",
        f"INT4 behind Scissorhands changes its loss by less than 1 %: the two do not compound ({said})",
        paper="up to 20x with 4-bit quantisation, without compounding",
        measure=functools.partial(_compounding, policy="scissorhands", codec="int4", fixture=fixture),
        holds=lambda measured: measured.low > -0.01 and measured.high < 0.01,
    )
    yield Claim(
        f"{name}coupled-2c8b",
        f"CQ-2c8b, 4 bits a value, is within 1 % of the exact cache's loss ({said})",
        paper="perplexity 5.70 against 5.68 (LLaMA-7b, WikiText-2)",
        measure=functools.partial(_excess, a=("coupled:2c8b", None), b=("full", None), fixture=fixture),
        holds=lambda measured: measured.high < 0.01,
        source="table of perplexities",
    )
    yield Claim(
        f"{name}coupled-8c8b",
        f"CQ-8c8b, 1 bit a value, has less loss than INT2 in groups ({said})",
        paper="perplexity 8.09 against 11779 (LLaMA-7b, WikiText-2)",
        measure=functools.partial(_excess, a=("coupled:8c8b", None), b=("int2", None), fixture=fixture),
        holds=lambda measured: measured.high < 0,
        source="table of perplexities",
    )
    yield Claim(
        f"{name}h2o-coupled",
        f"CQ-8c8b behind H2O changes its loss by less than 1 % ({said})",
        paper="none; tokens and bits are said to be orthogonal",
        measure=functools.partial(_compounding, policy="h2o", codec="coupled:8c8b", fixture=fixture),
        holds=lambda measured: measured.low > -0.01 and measured.high < 0.01,
        source="composition",
    )
    for method, rival, said_of, paper in (
        (
            "snapkv",
            "random",
            "SnapKV has less loss than random eviction",
            "comparable to the full cache at 1024 tokens",
        ),
        ("snapkv", "window", "SnapKV has less loss than a window", "better than StreamingLLM"),
        ("adakv", "snapkv", "AdaKV has less loss than SnapKV", "better than SnapKV at equal budgets"),
        ("pyramidkv", "snapkv", "PyramidKV has less loss than SnapKV", "better than SnapKV at small budgets"),
    ):
        yield Claim(
            f"{name}prompt-{method}-{rival}",
            f"After a compressed prompt {said_of} in equal bytes, at 1/2 and 1/4 ({said})",
            paper=paper,
            measure=functools.partial(
                _over, methods=(method,), control=rival, budgets=(2, 4), fixture=fixture, protocol="prompt"
            ),
            holds=lambda measured: measured.high < 0,
            source="abstract of the method, from memory",
        )
    yield Claim(
        f"{name}think",
        f"Keys without 40 % of their channels raise the loss after a prompt by less than 2 % ({said})",
        paper="ThinK (arXiv 2407.21018): comparable accuracy at 40 %",
        measure=functools.partial(
            _excess, a=("think:0.4", None), b=("full", None), fixture=fixture, protocol="prompt"
        ),
        holds=lambda measured: measured.high < 0.02,
        source="ThinK's abstract",
    )


def _recall_claims() -> Iterator[Claim]:
    yield Claim(
        "recall-half",
        "Recall at half the bytes: Scissorhands, one token at a time, answers more than 85 %",
        paper="none; .94 and .78 at 48 and 32 of 96 tokens in an earlier study",
        measure=functools.partial(_recall, method="scissorhands_1", budget=2),
        holds=lambda measured: measured.low > 0.85,
        source="reproduction",
    )
    yield Claim(
        "recall-third",
        "And at a third of the bytes more than 65 %",
        paper="none; as above",
        measure=functools.partial(_recall, method="scissorhands_1", budget=3),
        holds=lambda measured: measured.low > 0.65,
        source="reproduction",
    )
    yield _recall_claim("scissorhands", "Scissorhands, one token at a time,", ("scissorhands_1",), (2, 3))
    yield _recall_claim("h2o", "H2O", ("h2o",), HALF_TO_QUARTER)
    yield _recall_claim("keyformer", "Keyformer", ("keyformer",), HALF_TO_QUARTER)
    yield _recall_claim("corm", "CORM with a budget", ("corm",), (2,))
    for control in CONTROLS:
        yield _recall_claim(
            "all", "Every policy that scores by attention, TOVA apart,", SCORED, HALF_TO_QUARTER, control
        )
    yield Claim(
        "tova-below-random",
        "TOVA recalls less than random eviction at half the bytes: the last query knows nothing of later ones",
        paper="none; .12 against .67 at 48 of 96 tokens in an earlier study",
        measure=functools.partial(_lead, methods=("tova",), control="random", budgets=(2,)),
        holds=lambda measured: measured.high < 0,
        source="reproduction",
    )
    yield Claim(
        "recall-coupled",
        "Behind CQ-8c8b H2O and Scissorhands, one token at a time, recall more than random eviction behind it, in "
        "equal bytes, at 1/2 and 1/4",
        paper="none; tokens and bits are said to be orthogonal",
        measure=functools.partial(
            _lead,
            methods=("h2o+coupled:8c8b", "scissorhands_1+coupled:8c8b"),
            control="random+coupled:8c8b",
            budgets=(2, 4),
        ),
        holds=lambda measured: measured.low > 0,
        source="composition",
    )


def _grouped_claims() -> Iterator[Claim]:
    """Where query heads share key heads."""
    grouped = functools.partial(_excess, fixture="f1_relu_gqa")
    yield Claim(
        "grouped-kivi",
        "With grouped queries KIVI is within 1 % of the exact cache's loss at 4 bits",
        paper="43.53 against 43.54 at 4 bits, 42.43 at 2 (LongBench, Mistral-7B): use 4 bits",
        measure=functools.partial(grouped, a=("kivi:4", None), b=("full", None)),
        holds=lambda measured: measured.high < 0.01,
        source="KIVI's repository",
    )
    yield Claim(
        "grouped-kivi-bits",
        "And has less loss at 4 bits than at 2",
        paper="43.53 against 42.43 (LongBench, Mistral-7B)",
        measure=functools.partial(grouped, a=("kivi:4", None), b=("kivi:2", None)),
        holds=lambda measured: measured.high < 0,
        source="KIVI's repository",
    )
    yield Claim(
        "grouped-coupled",
        "CQ-2c8b is within 1 % there",
        paper="none at 4 bits; perplexity 5.11 at 2 (Mistral-7b)",
        measure=functools.partial(grouped, a=("coupled:2c8b", None), b=("full", None)),
        holds=lambda measured: measured.high < 0.01,
        source="table of perplexities",
    )
    for control, said in CONTROLS.items():
        yield Claim(
            f"grouped-{control}",
            f"Policies that take the mean over a group have less loss than {said} in equal bytes, at 1/2 and 1/4",
            paper="CORM is compatible with grouped queries",
            measure=functools.partial(
                _over,
                methods=("h2o", "corm", "scissorhands_1"),
                control=control,
                budgets=(2, 4),
                fixture="f1_relu_gqa",
            ),
            holds=lambda measured: measured.high < 0,
            source="trivial control",
        )


CLAIMS = (*_text_claims("f1"), *_recall_claims(), *_text_claims("stories"), *_grouped_claims())
