"""Disks that are full: a small file system in memory for one run or, where nobody may mount one, a limit on files."""

import os
import shutil
import subprocess
from pathlib import Path

LARGE = "256m"


def make(folder, share, kilobytes):
    """Mount folder/disk for a run whose folder needs about so many kilobytes. Returns the limit of a file in bytes
    instead, where this process may not mount; None where it may.

    With a share below a half the disk is too small from the beginning, otherwise `fill` makes it so.
    """
    place = folder / "disk"
    place.mkdir()
    small = int(60 + 2 * share * 1.2 * kilobytes)
    size = f"{small}k" if share < 0.5 else LARGE
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    return None if done.returncode == 0 else 1024 * small


def fill(folder, share):
    """Let something else take what is free."""
    place = folder / "disk"
    if share < 0.5 or not place.is_mount():
        return
    status = os.statvfs(place)
    file = os.open(place / "something_else", os.O_CREAT | os.O_WRONLY)
    try:
        os.posix_fallocate(file, 0, max(1, status.f_bavail * status.f_frsize - 4096 * int(20 * share)))
    except OSError:
        pass  # the run was faster
    finally:
        os.close(file)


def grow(folder):
    """There is space again."""
    place = folder / "disk"
    if place.is_mount():
        (place / "something_else").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", f"remount,size={LARGE}", str(place)], check=True, capture_output=True)


def release(folder, keep):
    """Unmount; keep: copy what is there before."""
    place = Path(folder) / "disk"
    if place.is_mount():
        if keep:
            shutil.copytree(place, folder / "copy_of_disk", dirs_exist_ok=True)
        subprocess.run(["umount", "--lazy", str(place)], capture_output=True)
