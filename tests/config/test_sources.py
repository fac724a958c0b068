"""The files of a folder that are read, and those that are left out, with the reason."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from relora.common.errors import ConfigError
from relora.config.mixture import data_config
from relora.config.sources import LONGEST_FIRST_LINE_BYTES, check_path, kind_of, survey


def write(folder: Path, name: str, size_bytes: int = 100) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"[" + b"x" * (size_bytes - 1))
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"),
        ("A.TXT", "text"),
        ("a.md.gz", "text"),
        ("a.jsonl.zst", "jsonl"),
        ("a.json.xz", "json"),
        ("a.csv", "csv"),
        ("a.parquet", "parquet"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.bin", None),
        ("txt", None),
    ],
)
def test_the_endings_give_the_kind(name: str, kind: str | None) -> None:
    assert kind_of(Path(name)) == kind


def test_nested_folders_are_read_and_hidden_files_are_not(tmp_path: Path) -> None:
    wanted = [write(tmp_path, name) for name in ("a.txt", "b/c/d.jsonl.gz", "b/e.md")]
    for name in (".git/a.txt", "b/.ipynb_checkpoints/x.py", ".hidden.txt"):
        write(tmp_path, name)
    found = survey(tmp_path)
    assert found.read == sorted(wanted)
    assert found.left_out == []


def test_a_runs_dir_below_the_text_is_not_text(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    for name in ("runs/corpora/text-1/meta.json", "runs/corpora/text-1/train.bin", "runs/llama/metrics.jsonl"):
        write(tmp_path, name, 5000)
    assert [file.name for file in check_path(tmp_path).read] == ["a.txt"]
    write(tmp_path, "corpora/b.txt")
    assert [file.name for file in check_path(tmp_path).read] == ["a.txt", "b.txt"]


def test_a_linked_folder_is_read_once_even_in_a_loop(tmp_path: Path) -> None:
    write(tmp_path / "data", "a.txt")
    elsewhere = write(tmp_path / "elsewhere", "b.txt")
    (tmp_path / "data" / "link").symlink_to(elsewhere.parent)
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "nothing.txt").symlink_to(tmp_path / "missing")
    found = survey(tmp_path / "data")
    assert [file.name for file in found.read] == ["a.txt", "b.txt"]
    assert [(each.path.name, each.reason) for each in found.left_out] == [("nothing.txt", "a link to nothing")]


def test_the_card_of_a_dataset_is_not_its_text(tmp_path: Path) -> None:
    write(tmp_path, "README.md")
    write(tmp_path, "LICENSE.txt")
    assert len(survey(tmp_path).read) == 2, "without records, they are the text"
    records = write(tmp_path, "data/train.jsonl.gz", 500)
    found = survey(tmp_path)
    assert found.read == [records]
    assert {each.path.name for each in found.left_out} == {"README.md", "LICENSE.txt"}
    assert found.missed_bytes == 0


def test_settings_in_json_are_no_records(tmp_path: Path) -> None:
    write(tmp_path, "a.json", 300)
    (tmp_path / "b.json").write_text(' {"dataset": 1}')
    (tmp_path / "c.json").write_text('{\n  "dataset": 1\n}')
    (tmp_path / "lines.json").write_text('\ufeff{"text": "a"}\n\n{"text": "b"}\n')
    (tmp_path / "utf16.json").write_text('{"text": "Gr\u00fc\u00dfe"}\n{"text": "b"}\n', encoding="utf-16")
    (tmp_path / "long.json").write_text(json.dumps({"text": "x" * LONGEST_FIRST_LINE_BYTES}) + '\n{"text": "b"}\n')
    found = check_path(tmp_path)
    assert [file.name for file in found.read] == ["a.json", "lines.json", "long.json", "utf16.json"]
    assert "b.json (no JSON records" in found.described()


def test_a_folder_with_mostly_other_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "notes.md", 100)
    write(tmp_path, "book.pdf", 99)
    write(tmp_path, "photo.png", 10_000)
    assert [file.name for file in check_path(tmp_path).read] == ["notes.md"], "pictures hold no text"
    write(tmp_path, "train.bin", 2000)
    with pytest.raises(ConfigError) as raised:
        check_path(tmp_path)
    for part in (
        f"data.path={tmp_path}",
        "100 B",
        "2.0 KiB",
        "train.bin (unknown kind, 2.0 KiB)",
        "move or convert them",
    ):
        assert part in str(raised.value)


def test_a_path_without_text_is_refused_with_the_kinds(tmp_path: Path) -> None:
    write(tmp_path, "a.bin")
    for path in (tmp_path, tmp_path / "a.bin"):
        with pytest.raises(ConfigError, match=r"contains no text; relora reads .*\.parquet.*left out: a\.bin"):
            check_path(path)
    with pytest.raises(ConfigError, match="does not exist"):
        check_path(tmp_path / "missing")


# ----------------------------------------------------------------------------------------------------- permission


@contextmanager
def as_another_user() -> Iterator[None]:
    """Root may read everything, so root becomes another user inside the block."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", [".", "inner"])
def test_a_folder_without_permission_is_named(closed: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write(folder, "texts/inner/a.txt")
        config = data_config({"name": "text", "path": str(folder / "texts")})
        forbidden = folder / "texts" / closed
        forbidden.chmod(0)
        try:
            with as_another_user(), pytest.raises(ConfigError, match="Permission denied") as raised:
                config.check_files()
        finally:
            forbidden.chmod(0o700)
    assert f"data.path={folder / 'texts'}" in str(raised.value)
    assert str(forbidden) in str(raised.value)
