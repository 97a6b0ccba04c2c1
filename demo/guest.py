#!/usr/bin/env python3
"""What the demo asks of its guest and QEMU.

guest.py sh SOCKET COMMAND        run a shell command in the guest by its shell port; output and status are its own
guest.py qmp SOCKET NAME [JSON]   one monitor command; prints what it returns
"""

import json
import os
import shlex
import socket
import sys

TIMEOUT_S = 120


def connect(path):
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(TIMEOUT_S)
    stream.connect(path)
    return stream.makefile("rwb", buffering=0), stream


def sh(path, command):
    file, _stream = connect(path)
    mark = f"@{os.getpid()}"
    line = f"sh -c {shlex.quote(command)} </dev/null >/run/said 2>&1; echo \"{mark} $? $(wc -c </run/said)\"; cat /run/said\n"
    file.write(line.encode())
    # What an earlier client left unread may come first.
    while head := file.readline():
        words = head.decode(errors="replace").split()
        if len(words) == 3 and words[0] == mark:
            status, left = int(words[1]), int(words[2])
            while left and (piece := file.read(left)):
                sys.stdout.buffer.write(piece)
                left -= len(piece)
            sys.stdout.flush()
            return status
    sys.exit("the guest's shell closed")


def qmp(path, name, arguments="{}"):
    file, _stream = connect(path)
    file.readline()
    for execute, given in (("qmp_capabilities", {}), (name, json.loads(arguments))):
        file.write(json.dumps({"execute": execute, "arguments": given}).encode() + b"\n")
        while "event" in (answer := json.loads(file.readline())):
            pass
        if "error" in answer:
            sys.exit(f"{execute}: {answer['error']['desc']}")
    print(json.dumps(answer["return"]))
    return 0


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or [""]
    if what not in ("sh", "qmp"):
        sys.exit(__doc__)
    sys.exit({"sh": sh, "qmp": qmp}[what](*rest))
