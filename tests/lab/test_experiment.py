"""Experiments are found, and what is wrong with a module is said."""

import pytest

from experiments.lab.experiment import BrokenExperiment, UnknownExperiment, discover, load


@pytest.fixture
def package(make_package, coin_source):
    return make_package(
        {
            "games/coin.py": coin_source,
            "games/dice.py": "raise RuntimeError('no dice')",
            "games/helper.py": "SIDES = 6",
            "cards/poker.py": coin_source.replace("PAPER =", "_PAPER ="),
            "luck/__init__.py": "import nothing_of_this_name",
            "luck/charm.py": coin_source,
            "lab/statistics.py": coin_source,
            "data/results.py": coin_source,
        }
    )


def test_discovery_finds_the_whole_ones_and_says_what_is_wrong_with_the_others(package):
    found, broken = discover(package)
    assert [experiment.name for experiment in found] == ["games.coin"]
    assert broken.keys() == {"cards.poker", "games.dice", "luck.charm"}
    assert "RuntimeError: no dice (at " in broken["games.dice"]
    assert "dice.py:1)" in broken["games.dice"]
    assert "No module named 'nothing_of_this_name'" in broken["luck.charm"]
    assert broken["cards.poker"] == "cards.poker: PAPER must be the citation, got None"


def test_an_experiment_is_what_its_module_says(package):
    coin = load("games.coin", package)
    assert coin.title == "A biased coin shows more heads than a fair one, at `every` bias in (0.5, 1] & < always >."
    assert (coin.family, coin.system) == ("games", "hashml.sharing")
    assert coin.paper == "Bernoulli | Ars <Conjectandi>, 1713"
    assert list(coin.scales) == ["tiny", "default"]
    assert [claim.id for claim in coin.claims] == ["more", "fewer"]
    assert coin.count is not None
    assert coin.count(coin.scales["default"]) == len(list(coin.run(coin.scales["default"])))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("games.coins", "; did you mean games.coin?"),
        ("coin", "; did you mean games.coin?"),
        ("game.coin", "; did you mean games.coin?"),
        ("games.helper", " ("),
        ("zzzz", " ("),
        ("lab.statistics", " ("),
    ],
)
def test_an_unknown_name_brings_those_spelled_alike(package, name, hint):
    with pytest.raises(UnknownExperiment) as error:
        load(name, package)
    assert str(error.value).startswith(f"no experiment is called {name!r}{hint}")
    assert "python -m experiments list" in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("frozen=True", "frozen=False", "Config must be a frozen dataclass"),
        ('"default": Config()', '"full": Config()', "SCALES must be a dict from 'default'"),
        ('"default": Config()', '"default": 3', "SCALES must be a dict from 'default'"),
        ('Claim("fewer"', 'Claim("more"', "CLAIMS must be a tuple of Claim with unique ids"),
        ("def figure(", "def draw(", "figure must be a function of the rows, got None"),
        ("def count(config):", "count = 3\ndef number(config):", "count must be a function or absent, got 3"),
        ("    throws:", "    scale: int = 1\n    throws:", "a field of Config must not be called scale"),
        ('SYSTEM = "hashml.sharing"', 'SYSTEM = ""', "SYSTEM must be the library module it exercises, got ''"),
        ('"""A biased', '"""" and """A biased', "cannot be imported: SyntaxError"),
    ],
)
def test_a_part_that_is_wrong_is_named(make_package, coin_source, old, new, message):
    assert old in coin_source
    package = make_package({"games/coin.py": coin_source.replace(old, new, 1)})
    with pytest.raises(BrokenExperiment) as error:
        load("games.coin", package)
    assert message in str(error.value)


def test_a_module_without_words_is_told_to_have_a_title(make_package, coin_source):
    package = make_package({"games/coin.py": "import this_file_has_no_docstring_yet\n"})
    with pytest.raises(BrokenExperiment, match="cannot be imported"):
        load("games.coin", package)
    package = make_package({"games/coin.py": "pass\n" + coin_source})
    with pytest.raises(BrokenExperiment, match="needs a docstring; its first line is the title"):
        load("games.coin", package)
