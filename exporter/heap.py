"""Freed memory goes back to the system, so that the peak of a run is that of its largest block.

glibc raises the size from which memory is mapped apart to that of what was last freed, up to 32 MB. Tensors below it
then come from heaps whose holes stay resident: after the 83 blocks of BLIP-2 2.7B as much as the largest of them has.
"""

import ctypes
import sys

APART = 4 * 2**20  # bytes from which memory is mapped apart; the slabs that loops work on are smaller
_M_MMAP_THRESHOLD = -3  # mallopt(3); once it is set it stays


def give_back() -> None:
    """What is free now goes back, and from now on what is large as it is freed; with other C libraries, nothing."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_THRESHOLD, APART)
        library.malloc_trim(0)
