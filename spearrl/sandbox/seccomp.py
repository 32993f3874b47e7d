"""The system-call filter of a snippet, as a classic BPF program (seccomp(2)). seccomp.toml names what is denied."""

from __future__ import annotations

import errno
import platform
import struct

from spearrl.config.tables import table

# Column of the table, AUDIT_ARCH_*, number of clone.
MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}
CLONE3 = 435
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
X32 = 0x40000000  # x86_64's second table of system calls
LOAD, EQUAL, ABOVE, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, ARCH, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def filter_program(machine: str | None = None) -> bytes:
    """The filter for a machine (None: this one), 8 bytes an instruction; b"" for a machine that the table has not.

    Denied calls fail with EPERM; clone3, whose flags a filter cannot see, with ENOSYS, after which libc uses clone.
    """
    name = machine or platform.machine()
    if name not in MACHINES:
        return b""
    column, arch, clone = MACHINES[name]
    denied = [numbers[column] for numbers in table(__file__, "seccomp.toml").values() if numbers[column] >= 0]
    refuse = (RETURN, 0, 0, DENY | errno.EPERM)
    code = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL)]
    code += [(LOAD, 0, 0, NUMBER), (ABOVE, 0, 1, X32), refuse]
    code += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, DENY | errno.ENOSYS)]
    for number in denied:
        code += [(EQUAL, 0, 1, number), refuse]
    code += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 0, 1, NEW_NAMESPACES), refuse]
    code += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)
