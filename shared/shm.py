"""The memory through which ranks on one host exchange blocks: its layout, and how it is made.

The coordinator makes one region for each epoch and hands it to the workers as an inherited file
descriptor. It is anonymous: nothing has a name in /dev/shm, so nothing can be left behind, however
the processes end; the kernel frees it with the last descriptor and mapping.

Layout, for `world` ranks:

    offset 0                 one header of HEADER_BYTES for each rank; its first 8 bytes are a
                             little-endian uint64, the number of the last round that the rank has
                             posted (0: none yet), and the rest is padding
    buffer_offset(w, r, p)   BUFFER_BYTES of data that rank r posts in the rounds of parity p

Only rank r writes header r and its two buffers. What is in a buffer is the posting rank's business
and that of its peers: they know its size from the collective they are in.
"""

import os

HEADER_BYTES = 128
"""Two cache lines, because the prefetcher of x86 fetches lines in pairs."""
BUFFER_BYTES = 64 << 20
"""Room for what a whole step exchanges at once; what is not used takes no memory."""
_PAGE_BYTES = 4096


def region_bytes(world: int) -> int:
    """Size of the region for `world` ranks."""
    return buffer_offset(world, world, 0)


def buffer_offset(world: int, rank: int, parity: int) -> int:
    """Where the buffer of `rank` for rounds of `parity` (0 or 1) starts; page-aligned."""
    headers = -(-world * HEADER_BYTES // _PAGE_BYTES) * _PAGE_BYTES
    return headers + (2 * rank + parity) * BUFFER_BYTES


def create_shm_region(world: int) -> int:
    """A new zero-filled region for `world` ranks, as a file descriptor the caller owns.

    Memory is taken page by page as ranks write to it, and kept until the region goes; it counts
    towards the memory limit of the container. The descriptor is closed on exec; pass it to a worker
    explicitly (`subprocess.Popen(..., pass_fds=[fd])`).
    """
    descriptor = os.memfd_create("tpserve-collectives", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, region_bytes(world))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
