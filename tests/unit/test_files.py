"""Files that appear whole or not at all."""

from pathlib import Path

import pytest

from anomalib_aprilgan.files import write_atomically


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
