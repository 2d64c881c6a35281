"""A folder for sockets belongs to this user alone; otherwise the message says what is wrong with it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from qbatch.core.errors import StorageUnavailable
from qbatch.core.private_folder import is_private, is_runtime_dir, make_private, why_not_private


def test_a_private_folder_is_created_once_for_its_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "sockets"
    assert (why_not_private(folder), is_private(folder)) == (None, False)
    make_private(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    make_private(folder)
    assert is_private(folder)


def test_a_folder_owned_by_another_user_is_named(tmp_path: Path) -> None:
    if os.getuid():
        assert why_not_private(Path("/")) == "belongs to user root"
    else:
        os.chown(tmp_path, 4_000_000, -1)
        assert why_not_private(tmp_path) == "belongs to user 4000000"


def test_a_link_may_lead_anywhere(tmp_path: Path) -> None:
    make_private(tmp_path / "sockets")
    (tmp_path / "link").symlink_to(tmp_path / "sockets")
    assert why_not_private(tmp_path / "link") == "is not a directory"


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o701])
def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(StorageUnavailable, match=rf"is open to others \(mode 0{mode:o}\).*set XDG_RUNTIME_DIR"):
        make_private(tmp_path)
    assert not is_runtime_dir(tmp_path)


def test_a_runtime_directory_must_leave_room_for_a_sockets_name(runtime_dir: Path) -> None:
    assert is_runtime_dir(runtime_dir)
    longer = runtime_dir / "longer-than-any"
    longer.mkdir(mode=0o700)
    assert not is_runtime_dir(longer)
    assert not is_runtime_dir(None)
