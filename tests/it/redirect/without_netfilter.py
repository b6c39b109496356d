"""Runs a program for which the kernel has no sockets of its packet filter: as one without CONFIG_NETFILTER_NETLINK answers."""

import ctypes, os, platform, struct, sys

SOCKET = {"x86_64": 41, "aarch64": 198}[platform.machine()]
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 93  # EPROTONOSUPPORT
# struct seccomp_data: nr at 0, args from 16; socket(AF_NETLINK = 16, _, NETLINK_NETFILTER = 12)
steps = [(LOAD, 0, 0, 0), (EQUAL, 0, 5, SOCKET), (LOAD, 0, 0, 16), (EQUAL, 0, 3, 16),
         (LOAD, 0, 0, 32), (EQUAL, 0, 1, 12), (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
filter = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(program)))
if ctypes.CDLL(None, use_errno=True).prctl(22, 2, filter):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    sys.exit("no filter: " + os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])
