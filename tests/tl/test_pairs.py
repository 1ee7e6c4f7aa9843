from __future__ import annotations

from importlib.resources import files

import pandas as pd
import pytest


@pytest.fixture(scope="module")
def tool(load_script):
    return load_script("tools/make_ligand_receptor.py")


@pytest.fixture(scope="module")
def pairs() -> pd.DataFrame:
    with files("spatialfm.pp").joinpath("data/ligand_receptor.tsv.gz").open("rb") as file:
        return pd.read_csv(file, sep="\t", compression="gzip", dtype=str, keep_default_na=False)


def resources(pairs: pd.DataFrame) -> pd.DataFrame:
    """The table as liana has it, between resources that are not taken."""
    named = pd.DataFrame(
        {
            "source": "P",
            "target": "Q",
            "source_genesymbol": pairs["ligand"],
            "target_genesymbol": pairs["receptor"],
            "resource": pairs["organism"].map({"human": "consensus", "mouse": "mouseconsensus"}),
        }
    )
    other = named.head(5).assign(resource="hpmr")
    return pd.concat([other, named, other], ignore_index=True)


def test_the_table_is_what_the_tool_makes(tool, pairs, tmp_path):
    resources(pairs).to_csv(tmp_path / "omni_resource.csv")
    target = tmp_path / "pairs.tsv.gz"
    assert tool.make(tmp_path / "omni_resource.csv", target) == {"human": 4620, "mouse": 3989}
    first = target.read_bytes()
    tool.make(tmp_path / "omni_resource.csv", target)
    assert target.read_bytes() == first
    again = pd.read_csv(target, sep="\t", dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(again, pairs)


def test_the_table_holds_names_only_and_its_licence_lies_beside_it(pairs):
    names = pd.concat([pairs["ligand"], pairs["receptor"]])
    assert (names == names.str.strip()).all()
    assert (names != "").all()
    assert "BSD 3-Clause" in files("spatialfm.pp").joinpath("data/ligand_receptor.LICENSE").read_text()


@pytest.mark.parametrize("harm", ["missing", "twice"])
def test_the_tool_refuses_a_file_of_another_kind(tool, pairs, tmp_path, harm):
    table = resources(pairs)
    table = table[table["resource"] != "consensus"] if harm == "missing" else pd.concat([table, table])
    table.to_csv(tmp_path / "omni_resource.csv")
    with pytest.raises(ValueError, match="resource 'consensus' is missing or has a pair twice"):
        tool.make(tmp_path / "omni_resource.csv", tmp_path / "pairs.tsv.gz")
    assert not (tmp_path / "pairs.tsv.gz").exists()
