"Where the optional reference material lies, and a data set small enough to train on in seconds"

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared(*parts) -> Path:
    "A file of the reference material, or skip"
    base = Path(os.environ.get("RTDETR_KD_SHARED") or ROOT.parent / "shared")
    path = base.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"reference material {'/'.join(parts)} is not here: set RTDETR_KD_SHARED")
    return path


def scenes(folder: Path, **counts) -> Path:
    "A data set of that many scenes of 64 pixels in each split"
    from rtdetr_kd.data.toy import write_split

    folder.mkdir()
    for split, n in counts.items():
        write_split(folder, split, n, 64, 0)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    "24 training scenes, 8 to select by, 8 to test on"
    return scenes(tmp_path_factory.mktemp("data") / "tiny", train=24, select=8, val=8)


@pytest.fixture(scope="session")
def tiny_odd(tmp_path_factory) -> Path:
    "25 training scenes, 7 to select by, 7 to test on: nothing that two would divide"
    return scenes(tmp_path_factory.mktemp("data") / "odd", train=25, select=7, val=7)
