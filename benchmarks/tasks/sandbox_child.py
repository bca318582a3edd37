"""The process that runs a program of a model: `sandbox.py` starts it and writes a token and the program to its input.

It limits itself before it runs anything: processor time, memory, files, no core dumps, no network where the system lets
it, and an audit hook that refuses to write files, start processes and open sockets. It prints the token when the
program has ended without an exception, so that a program that only ends is no success. The limits stop programs that a
language model writes by mistake; they are no jail for programs that attack.
"""

import builtins
import ctypes
import os
import resource
import sys

MIB = 2**20
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # of unshare(2)
_REFUSED = (
    "socket.", "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.kill", "os.remove",
    "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate", "os.putenv",
    "shutil.", "ctypes.", "pty.", "signal.pthread_kill", "urllib.Request", "winreg.",
)  # fmt: skip


def main() -> None:
    """Run the program that stands on standard input, behind the token in its first line."""
    if sys.argv[1:] == ["--isolated"]:
        sys.exit(not _leaves_network())
    seconds, memory_mib = int(sys.argv[1]), int(sys.argv[2])
    token, program = sys.stdin.readline().strip(), sys.stdin.read()
    _leaves_network()  # where the system forbids it, the hook remains
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory_mib * MIB), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 16), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (limit, limit))
    output = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    for name in ("exit", "quit", "input", "breakpoint"):
        if hasattr(builtins, name):
            delattr(builtins, name)
    compiled = compile(program, "program", "exec")
    sys.addaudithook(_refuse)
    exec(compiled, {"__name__": "program"})
    os.write(output, token.encode())


def _leaves_network() -> bool:
    """Leave the network behind; False where the system forbids it."""
    return sys.platform == "linux" and ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NETWORK) == 0


def _refuse(event: str, arguments: tuple) -> None:
    if event.startswith(_REFUSED):
        raise PermissionError(f"{event} is refused")
    if event == "open" and len(arguments) > 2:
        mode, flags = arguments[1], arguments[2] or 0
        if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(f"{arguments[0]!r} is opened to be written")


if __name__ == "__main__":
    main()
