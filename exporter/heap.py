"""Freed memory goes back to the system, so that the peak of a run is that of its largest block.

glibc raises the size from which memory is mapped apart to that of what was last freed, up to 32 MB. Tensors below it
then come from a heap whose holes stay resident: after the 83 blocks of BLIP-2 2.7B as much as the largest of them has.
"""

import ctypes
import sys

APART = 2**20  # bytes from which memory is mapped, and unmapped when it is freed
_M_MMAP_THRESHOLD = -3  # mallopt(3); to set it is to have it stay


def give_back() -> None:
    """From here on, for this process; where the C library is glibc, and otherwise nothing."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_THRESHOLD, APART)
