"""What terminals do, with either Python SDK."""

import re

from e2b import CommandExitException, NotFoundException, PtySize

from checks import araises, equal, true

NOBODY = 4_000_000


async def types_and_sees(box):
    terminal = await box.terminal(
        PtySize(rows=24, cols=80), cwd=box.target.base, envs={"MARK": "ä b", "PS1": "> "}
    )
    await box.pty.send_stdin(terminal.pid, b"stty size; pwd; echo $TERM:$MARK:$((40 + 2))\n")
    await terminal.shown(b"24 80")
    await terminal.shown("xterm-256color:ä b:42".encode())
    await terminal.shown(box.target.base.encode())
    await box.pty.send_stdin(terminal.pid, "echo 漢字-🦀-$((1 + 1))\n".encode())
    await terminal.shown("漢字-🦀-2".encode())
    await box.feed_terminal(terminal.pid, ["echo fed", b"-$((2 + 2))", "\n"])
    await terminal.shown(b"fed-4")
    listed = [entry for entry in await box.commands.list() if entry.pid == terminal.pid]
    equal([list(entry.args) for entry in listed], [["-i", "-l"]], "listed terminals")
    await box.pty.send_stdin(terminal.pid, b"exit 5\n")
    equal((await araises(CommandExitException, terminal.wait())).exit_code, 5, "exit code")
    equal(await box.pty.kill(terminal.pid), False, "kill of what has ended")


async def control_keys(box):
    terminal = await box.terminal(PtySize(rows=24, cols=80))

    async def asked(times):
        """What is typed before the shell asks may be lost to it: that is not the daemon's doing."""
        what = f"prompt {times}"
        await terminal.until(what, lambda: terminal.terminal.count(b"ready> ") >= times)

    await box.pty.send_stdin(terminal.pid, b"PS1='rea''dy> '\n")
    await asked(1)
    # A program speaks when the terminal is its own: before, the shell itself might be interrupted.
    child = b"sh -c 'echo go-$((1 + 1)); exec sleep 600'; echo not-reached\n"
    await box.pty.send_stdin(terminal.pid, child)
    await terminal.shown(b"go-2")
    await box.pty.send_stdin(terminal.pid, b"\x03")
    await asked(2)
    await box.pty.send_stdin(terminal.pid, b"echo reading-$((1 + 1)); cat; echo read-$((1 + 1))\n")
    await terminal.shown(b"reading-2")
    await box.pty.send_stdin(terminal.pid, b"to cat\n\x04")  # its end of input, not the shell's
    await terminal.shown(b"read-2")
    true(b"\nnot-reached" not in terminal.terminal, "the interrupted line went on")
    await asked(3)
    await box.pty.send_stdin(terminal.pid, b"\x04")
    equal((await terminal.wait()).exit_code, 0, "exit code after end of input")


async def resized_while_printing(box):
    """Each new size reaches a program that prints without a pause, and its output stays whole."""
    terminal = await box.terminal(PtySize(rows=24, cols=80))
    loop = 'n=0; while [ ! -e "$STOP" ]; do n=$((n+1)); echo "<$n:$(stty size)>"; done'
    stop = box.path("stop printing")
    line = f"stty -echo; STOP='{stop}'; {loop}; echo last-$n-\n"
    await box.pty.send_stdin(terminal.pid, line.encode())
    sizes = [(30, 100), (1, 1), (500, 500), (24, 80), (50, 132)]
    for rows, cols in sizes:
        await box.pty.resize(terminal.pid, PtySize(rows=rows, cols=cols))
        await terminal.shown(b":%d %d>" % (rows, cols))
    await box.files.write(stop, "")

    def last():
        return re.search(rb"last-(\d+)-", terminal.terminal)

    await terminal.until("the last line", last)
    numbers = [int(n) for n in re.findall(rb"<(\d+):\d+ \d+>", terminal.terminal)]
    equal(numbers, list(range(1, int(last()[1]) + 1)), "lines printed while resizing")
    equal(await box.pty.kill(terminal.pid), True, "kill")
    equal((await araises(CommandExitException, terminal.wait())).exit_code, -1, "exit code")


async def reconnects(box):
    first = await box.terminal(PtySize(rows=24, cols=80))
    second = await box.attach_terminal(first.pid)
    await box.pty.send_stdin(first.pid, b"echo both-$((1 + 1))\n")
    await first.shown(b"both-2")
    await second.shown(b"both-2")
    third = await box.attach_terminal(first.pid, listen=False)
    await third.disconnect()
    await box.pty.send_stdin(first.pid, b"echo still-$((1 + 1))\n")
    await second.shown(b"still-2")
    equal(await second.kill(), True, "kill by the handle")
    for one in (first, second):
        equal((await araises(CommandExitException, one.wait())).exit_code, -1, "exit code")


async def refused(box):
    await araises(NotFoundException, box.attach_terminal(NOBODY))
    await araises(NotFoundException, box.pty.send_stdin(NOBODY, b"x"))
    await araises(NotFoundException, box.pty.resize(NOBODY, PtySize(rows=1, cols=1)))
    await araises(NotFoundException, box.feed_terminal(NOBODY, ["x"]))
    equal(await box.pty.kill(NOBODY), False, "kill of a pid that does not exist")


SCENARIOS = (types_and_sees, control_keys, resized_while_printing, reconnects, refused)
