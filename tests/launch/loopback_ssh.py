"""A real sshd on a high port of the loopback addresses, with keys and a configuration of its own, for one test.

Nothing of the user's or the machine's is read or changed: `ssh` on the PATH is the real one with this configuration.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lumina_ds.engine.world import free_port

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
MISSING = [name for name in ("ssh", "ssh-keygen", "pdsh") if shutil.which(name) is None] + ([] if SSHD else ["sshd"])
HOSTS = ("127.0.0.1", "127.0.0.2")
SERVER = """
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host
PidFile none
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv {variables}
"""
CLIENT = """
Host *
    Port {port}
    IdentityFile {folder}/user
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
"""


@contextmanager
def sshd(folder: Path, **variables: str) -> Iterator[int]:
    """Its port. `folder` gets a program `ssh`, to be put first on the PATH; `variables` are what logins find."""
    folder.mkdir()
    port = free_port()
    for name in ("host", "user"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", getpass.getuser(), "-f", str(folder / name)]
        subprocess.run(keygen, check=True)
    known = (folder / "host.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"[{host}]:{port} {known}" for host in HOSTS))
    settings = " ".join(f'"{name}={value}"' for name, value in ({"OMP_NUM_THREADS": "1"} | variables).items())
    (folder / "sshd_config").write_text(SERVER.format(port=port, folder=folder, variables=settings))
    (folder / "ssh_config").write_text(CLIENT.format(port=port, folder=folder))
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (folder / "ssh").chmod(0o755)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # made by the service where there is one
    server = subprocess.Popen(
        [str(SSHD), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _wait_for(server, port)
        yield port
    finally:
        server.kill()
        server.communicate()


def client_environment(folder: Path, checkout: Path) -> Mapping[str, str]:
    """For what calls ssh and pdsh, and for the Python that it starts on the other side."""
    return os.environ | {
        "PATH": os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
    }


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    while True:
        try:
            socket.create_connection((HOSTS[0], port), timeout=1).close()
            return
        except OSError:
            if server.poll() is not None:
                raise RuntimeError(server.communicate()[1].decode()) from None
            time.sleep(0.02)
