"""ssh, scp and sftp into a real guest without a network and without anything of ssh in it: users, forks, a pause in the middle."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from command_line import CommandLine

pytestmark = pytest.mark.timeout(600)
PATIENCE = 120


def run(*words: str | Path, env: dict[str, str], input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(list(map(str, words)), env=env, input=input, capture_output=True, timeout=PATIENCE)


def test_ssh_into_a_guest(stoker: CommandLine, tmp_path: Path) -> None:
    env = stoker.environment({"XDG_DATA_HOME": str(tmp_path / "share")})
    assert stoker("create", "debian:12", "--name", "box", "--network", "none").code == 0
    done = stoker("ssh", "box", "--", "test ! -e /usr/sbin/sshd; echo $?; id -un; pwd; exit 4", env=env)
    assert (done.code, done.out) == (4, b"0\nroot\n/root\n"), done
    assert stoker("ssh", "-l", "daemon", "box", "id -un", env=env).out == b"daemon\n"
    made = stoker("ssh-config", "-f", env=env)
    config = made.text.strip()
    done = run("ssh", "-F", config, "-tt", "box", env=env, input=b"stty size; tty; exit 3\n")
    assert done.returncode == 3 and b"/dev/pts/" in done.stdout
    # Both ways, with what belongs to a file.
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/data").write_bytes(os.urandom(5 << 20))
    (tmp_path / "tree/data").chmod(0o640)
    done = run("scp", "-q", "-p", "-r", "-F", config, tmp_path / "tree", "box:/srv/", env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    assert stoker("exec", "box", "stat", "-c", "%a %s %U", "/srv/tree/data").out == b"640 5242880 root\n"
    assert run("scp", "-q", "-F", config, "box:/srv/tree/data", tmp_path / "back", env=env).returncode == 0
    assert (tmp_path / "back").read_bytes() == (tmp_path / "tree/data").read_bytes()
    done = run("sftp", "-q", "-b", "-", "-F", config, "daemon@box.stoker", env=env, input=b"cd /srv\nmkdir mine\n")
    assert done.returncode == 1 and b"ermission denied" in done.stderr
    # A copy has a key of its own, and needs no new configuration.
    key = stoker("ssh", "--known-hosts", "x", "box", env=env).out
    assert stoker("fork", "box", "--name", "copy").code == 0
    assert stoker("ssh", "--known-hosts", "x", "copy", env=env).out != key
    assert run("ssh", "-F", config, "copy.stoker", "test -s /srv/tree/data && echo there", env=env).stdout == b"there\n"
    assert stoker("rm", "copy").code == 0
    # A session goes on after a pause, which its own next byte ends.
    pipe = subprocess.PIPE
    with subprocess.Popen(["ssh", "-F", config, "box", "cat; echo over"], env=env, stdin=pipe, stdout=pipe) as session:
        assert session.stdin is not None and session.stdout is not None
        session.stdin.write(b"before\n")
        session.stdin.flush()
        assert session.stdout.readline() == b"before\n"
        assert stoker("pause", "box").code == 0
        assert b"paused" in stoker("ls", "--json").out
        session.stdin.write(b"after\n")
        session.stdin.close()
        assert session.stdout.read() == b"after\nover\n" and session.wait(PATIENCE) == 0
    assert stoker("ssh", "--known-hosts", "x", "box", env=env).out == key
    assert stoker("pause", "box").code == 0
    assert run("ssh", "-F", config, "box", "echo awake", env=env).stdout == b"awake\n"
