"""What tests of experiments share: a run at scale tiny."""

import os
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from experiments import cli
from experiments.lab import experiment, records
from hashml_kernels import native


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory) -> Iterator[tuple[experiment.Experiment, pl.DataFrame]]:
    """The experiment that the module's ``EXPERIMENT`` names, and the rows of its run at scale tiny.

    The module's ``NEEDS`` are files under ``$HASHML_DATA`` without which it is skipped. The run has a cache of its
    own, whose models can be found while the fixture lives; only native code is shared.
    """
    name, needs = request.module.EXPERIMENT, getattr(request.module, "NEEDS", ())
    folder = os.environ.get("HASHML_DATA")
    for file in needs:
        if not folder or not (Path(folder) / file).is_file():
            pytest.skip(f"needs {file} under $HASHML_DATA, which is {folder or 'not set'}")
    out = tmp_path_factory.mktemp("runs")
    # Libraries of native code are named by what they are made of: those that are there need not be made again.
    compiled = native.cache_folder()
    compiled.mkdir(parents=True, exist_ok=True)
    (out / "cache" / "hashml").mkdir(parents=True)
    (out / "cache" / "hashml" / compiled.name).symlink_to(compiled, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out / "cache"))
        assert cli.main(["run", name, "--scale", "tiny", "--out", str(out)]) == 0
        record = records.read_record(out / name / "tiny")
        assert record is not None
        yield experiment.load(name), record.rows
