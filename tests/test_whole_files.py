"""What is being written is not seen before it is whole, and an older one stays until then."""

import pytest

from rq_draft_revise.whole_files import whole_file, whole_folder


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_what_goes_wrong_leaves_things_as_they_were(error, tmp_path):
    (tmp_path / "file").write_text("older")
    (tmp_path / "folder").mkdir()
    for write in (whole_file, whole_folder):
        for name in ("file", "new") if write is whole_file else ("folder", "new"):
            with pytest.raises(type(error)), write(tmp_path / name) as aside:
                (aside if write is whole_file else aside / "inside").write_text("half")
                raise error
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}
    assert (tmp_path / "file").read_text() == "older" and not any((tmp_path / "folder").iterdir())


def test_what_goes_well_gets_its_name_at_the_end(tmp_path):
    (tmp_path / "file").write_text("older")
    with whole_file(tmp_path / "file") as aside:
        aside.write_text("newer")
        assert (tmp_path / "file").read_text() == "older"
    killed = tmp_path / "deep" / "folder.partial"
    killed.mkdir(parents=True)
    (killed / "leftover").touch()
    with whole_folder(tmp_path / "deep" / "folder") as aside:
        (aside / "inside").write_text("whole")
        assert not (tmp_path / "deep" / "folder").exists()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["file", "inside"]
    assert (tmp_path / "file").read_text() == "newer"


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_a_folder_takes_the_place_of_nothing(taken, tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder/inside"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="`output_dir` must not exist or be an empty folder, got .*" + taken):
        with whole_folder(tmp_path / taken):
            raise AssertionError("nothing is begun")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "inside").read_text() == "mine"
