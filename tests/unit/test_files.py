"""Files that other stages rely on are whole or not there, and one value has one hash."""

from pathlib import Path

import pytest

from reproval import files
from reproval.records import Attempts


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.atomic(path) as stream:
        stream.write("half of the new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


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


def test_one_value_has_one_hash_whatever_the_order_of_its_keys() -> None:
    assert files.sha256_json({"a": 1, "b": [True, None]}) == files.sha256_json({"b": [True, None], "a": 1})
    assert files.sha256_json(["1"]) != files.sha256_json([1])
    with pytest.raises(ValueError, match="Out of range"):
        files.sha256_json(float("nan"))
