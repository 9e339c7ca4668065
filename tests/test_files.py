# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys

import pytest

from lightning_safety.files import replace_atomically


def test_the_new_file_replaces_the_old_one(tmp_path):
    target = tmp_path / "folder" / "mask.safetensors"
    with replace_atomically(target) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"
    assert [entry.name for entry in target.parent.iterdir()] == [target.name]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "mask.safetensors"
    target.write_bytes(b"old")

    def fill_the_disk() -> None:
        with replace_atomically(target) as temporary:
            temporary.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_the_disk()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_kill_leaves_the_old_file(tmp_path):
    target = tmp_path / "mask.safetensors"
    target.write_bytes(b"old")
    code = (
        "import os, signal\nfrom lightning_safety.files import replace_atomically\n"
        f"with replace_atomically({str(target)!r}) as temporary:\n"
        "    temporary.write_bytes(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"


def test_permissions_are_the_users_or_as_asked(tmp_path):
    umask = os.umask(0o022)
    try:
        for mode, expected in ((None, 0o644), (0o600, 0o600)):
            with replace_atomically(tmp_path / "file", mode=mode) as temporary:
                assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
            assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == expected
    finally:
        os.umask(umask)
