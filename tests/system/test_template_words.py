"""Templates by the words of the command line and of the SDK, through the daemon, with real guests."""

from __future__ import annotations

import json
import signal
import time

import pytest

from command_line import CommandLine
from stoker import Client, Conflict, Sandbox, Template

pytestmark = [pytest.mark.timeout(600)]
SERVICE = "while :; do date >> /run/beat; sleep 0.2; done"


def test_built_and_run_by_name(stoker: CommandLine) -> None:
    build = stoker(
        *("template", "build", "py", "debian:12", "--memory", "256M", "--setup", "echo one; mkdir -p /srv/x"),
        *(
            "--setup",
            "printf 'a\\033]0;t\\007b'",
            "--start",
            SERVICE,
            "--ready",
            "test -s /run/beat",
            "--env",
            "WHO=tpl",
            "-w",
            "/srv/x",
        ),
    )
    assert (build.code, build.text) == (0, "py\n"), build.error
    said = build.error.splitlines()
    assert "one" in said and "==> the template py is there" in said and "\033" not in build.error
    done = stoker("run", "py", "--", "sh", "-c", "pwd; echo $WHO; test -s /run/beat")
    assert (done.code, done.text) == (0, "/srv/x\ntpl\n"), done.error
    done = stoker("run", "--env", "WHO=me", "--user", "nobody", "template:py", "--", "sh", "-c", "echo $WHO; id -un; exit 7")
    assert (done.code, done.text) == (7, "me\nnobody\n"), done.error
    refused = stoker("run", "--cpus", "2", "py", "--", "true")
    assert refused.code == 125 and "template_fixed" in refused.error and "--cold" in refused.error
    assert stoker("run", "--cold", "--cpus", "2", "py", "--", "nproc").text == "2\n"
    assert stoker("create", "py", "--name", "web", "--label", "a=b", "-q").text == "web\n"
    [box] = json.loads(stoker("inspect", "web").out)
    assert (box["template"], box["origin"], box["labels"]) == ("py", "template", {"a": "b"})
    assert "start" in stoker("ps", "web").text
    [template] = json.loads(stoker("template", "inspect", "py").out)
    assert template["start"] == SERVICE and template["log"] and template["own"] > 0
    assert template["resources"]["memory"] == 256 << 20
    assert stoker("snapshot", "ls", "-q").text == "" == stoker("snapshot", "prune").text
    failed = stoker("template", "build", "py", "py", "--setup", "echo no >&2; exit 9")
    assert (
        failed.code == 125
        and "template_step_failed" in failed.error
        and "status 9" in failed.error
        and "no" in failed.error.splitlines()
    )
    interrupted = stoker.popen("template", "build", "other", "py", "--setup", "echo now; sleep 100")
    assert interrupted.stderr is not None
    while b"now" not in (line := interrupted.stderr.readline()):
        assert line
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(60) == 130
    interrupted.communicate()
    deadline = time.monotonic() + 20
    while stoker("ls", "-q").text.split() != [box["id"]]:
        assert time.monotonic() < deadline, "the machine of the build is still there"
    assert json.loads(stoker("template", "ls", "--json").out)[0]["id"] == template["id"]
    assert stoker("template", "create", "copy", "web").code == 0
    assert stoker("template", "rm", "py", "copy").text.split() == ["py", "copy"]
    assert stoker("exec", "web", "--", "pwd").text == "/srv/x\n"


def test_from_a_program(stoker: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stoker.env.items():
        monkeypatch.setenv(name, value)
    lines: list[str] = []
    with Client() as here:
        made = Template.build(
            "py",
            image="debian:12",
            memory="256M",
            setup=["echo hello"],
            start=SERVICE,
            ready="test -s /run/beat",
            on_log=lines.append,
            client=here,
        )
        assert made.name == "py" and made.info.log == lines and "hello" in lines
        with Sandbox.create("py", client=here) as box, Sandbox.create("py", env={"A": "b"}, client=here) as other:
            assert box.info.origin == other.info.origin == "template"
            assert other.commands.run("echo $A; test -s /run/beat").stdout == "b\n"
            assert [one.tag for one in box.commands.list()] == ["start"], "and nothing of the build"
            made_anew = Template.create("now", box.id, client=here)
            assert [one.name for one in Template.list(client=here)] == ["now", "py"]
            assert Template.get("now", client=here).id == made_anew.id
        with pytest.raises(Conflict) as failed:
            Template.build("bad", image="py", setup=["echo last words; false"], client=here)
        assert failed.value.code == "template_step_failed" and failed.value.console == ("last words",)
        assert failed.value.details["exit_code"] == 1
        made.remove()
        made_anew.remove()
        assert Template.list(client=here) == []
