"""Files that appear whole or not at all."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from anomalib_aprilgan.files import _remove_abandoned, check_writable, fitting_name, temporary_beside, write_atomically


class TestWriteAtomically:
    def test_whole_or_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "file"
        write_atomically(path, lambda file: file.write(b"first"))
        assert path.read_bytes() == b"first"

        def fail(file: object) -> None:
            file.write(b"half")
            msg = "disk full"
            raise OSError(msg)

        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, fail)
        assert path.read_bytes() == b"first"
        assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_written_files_have_the_permissions_of_other_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "ours", lambda file: file.write(b"x"))
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "ours").read_bytes() == b"x"


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".csv")
    write_atomically(path, lambda file: file.write(b"whole"))
    assert path.read_bytes() == b"whole"


def test_what_killed_processes_left_is_removed_by_the_next(tmp_path: Path) -> None:
    with temporary_beside(tmp_path / "kept") as own:
        host, process, token = own.name.strip(".").removesuffix(".part").split("-")
        assert int(process) == os.getpid()
        own.touch()
        gone = subprocess.Popen(["true"])
        gone.wait()
        _remove_abandoned.cache_clear()
        abandoned = tmp_path / f".{host}-{gone.pid}-{token}.part"
        elsewhere = tmp_path / f".00000000-{gone.pid}-{token}.part"
        old = tmp_path / f".00000000-1-{token}.part"
        foreign = tmp_path / ".of-another-program.part"
        for path in (abandoned, elsewhere, old, foreign):
            path.touch()
        os.utime(old, (0, 0))
        write_atomically(tmp_path / "next", lambda file: file.write(b"x"))
        assert {path.name for path in tmp_path.iterdir()} == {own.name, elsewhere.name, foreign.name, "next"}


@pytest.mark.parametrize(("number", "text"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only")])
def test_a_full_or_closed_disk_is_named_with_the_remedy(tmp_path: Path, number: int, text: str) -> None:
    def fail(file: object) -> None:
        raise OSError(number, text)

    with pytest.raises(OSError, match=rf"{tmp_path / 'file'} cannot be written \({text}\). Make room there") as caught:
        write_atomically(tmp_path / "file", fail)
    assert caught.value.errno == number
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"{tmp_path / 'file' / 'new'} cannot be written"):
        check_writable(tmp_path / "file" / "new")
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_long_names_are_cut_and_stay_different() -> None:
    assert fitting_name("a" * 251, ".png") == "a" * 251 + ".png"
    names = {fitting_name("ß" * 130 + end, ".png") for end in "ab"}
    assert len(names) == 2
    assert all(len(os.fsencode(name)) <= 255 and name.startswith("ß" * 100) for name in names)
