"""Files that other stages rely on are whole or not there, and one value has one hash."""

import time
from pathlib import Path

import pytest

from reproval import files
from reproval.records import Attempts


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(error), files.atomic(path) as stream:
        stream.write("half of the new")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_who_write_one_file_at_once_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    with files.atomic(path) as first:
        first.write("first, ")
        with files.atomic(path) as second:
            second.write("second")
        assert path.read_text() == "second"
        first.write("whole")
    assert path.read_text() == "first, whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    plain, written = tmp_path / "plain", tmp_path / "written"
    plain.write_text("")
    with files.atomic(written) as stream:
        stream.write("")
    assert written.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ('{"kind": "attempts", "attempts": []', "(the whole file)"),
        ('{"kind": "attempts", \x80\x81', "(the whole file)"),
        ('{"kind": "attempts", "attempts": [], "version": 2}', "version"),
        ('{"kind": "attempts", "attempts": [], "attemps": []}', "attemps"),
        ('{"kind": "evaluation", "attempts": []}', "kind"),
    ],
)
def test_a_record_that_is_not_one_is_refused_with_file_and_key(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "attempts.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(files.RecordError) as caught:
        files.read_record(path, Attempts)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_a_folder_in_place_of_a_record_is_refused_as_one_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(files.RecordError, match="cannot be read"):
        files.read_record(tmp_path, Attempts)


def test_a_hash_stays_what_it_was() -> None:
    """Results and counts are kept under such hashes. By sha256sum, of {"a":"ä","b":[1.5,null]} in UTF-8."""
    found = files.sha256_json({"b": [1.5, None], "a": "ä"})
    assert found == "257067c9edee6e3eb029b5c8ac603b2003567acdce6ac42441acc551705ffd6f"


def test_where_nothing_can_be_written_there_is_no_file_time(tmp_path: Path) -> None:
    assert files.file_time(tmp_path / "absent") is None
    assert abs((files.file_time(tmp_path) or 0) - time.time()) < 60


def test_one_value_has_one_hash_whatever_the_order_of_its_keys() -> None:
    assert files.sha256_json({"a": 1, "b": [True, None]}) == files.sha256_json({"b": [True, None], "a": 1})
    assert files.sha256_json(["1"]) != files.sha256_json([1])
    with pytest.raises(ValueError, match="Out of range"):
        files.sha256_json(float("nan"))
