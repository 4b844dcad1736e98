"""What file calls do, with either Python SDK: names, sizes, links, owners, and what is refused."""

import asyncio
import hashlib
import io
import time

from e2b import (
    FileNotFoundException,
    FileType,
    InvalidArgumentException,
    SandboxException,
)

from checks import Skip, araises, equal, true
from guest_commands import rate

MIB = 1024 * 1024
NAMES = (
    "with space",
    " leading and trailing ",
    "ünïcödé 漢字 🦀",
    "e\u0301 decomposed",
    "é composed",
    "'single' \"double\"",
    "back\\slash",
    "a+b%20c%2Fd?e#f&g=h;i",
    "-rf",
    "~tilde",
    "new\nline\ttab\r",
    "semi;colon, comma",
    "..dots",
    "n" * 255,
)
# In an upload of several files a name travels in a form field, where the SDK replaces these by
# `%22` and the like, and nobody could tell that from a name which is spelled so.
NOT_IN_FORMS = '"\n\t\r'


async def names(box):
    """Every name survives every call, one at a time and in one upload of them all."""
    folder = box.path("näme s")
    in_forms = [name for name in NAMES if not set(name) & set(NOT_IN_FORMS)]
    entries = [{"path": f"{folder}/{name}", "data": f"<{name}>"} for name in in_forms]
    written = await box.files.write_files(entries)
    equal([entry.name for entry in written], in_forms, "names of one upload")
    equal([entry.path for entry in written], [e["path"] for e in entries], "its paths")
    for name in set(NAMES) - set(in_forms):
        await box.files.write(f"{folder}/{name}", f"<{name}>")
    listed = {entry.name: entry for entry in await box.files.list(folder)}
    equal(sorted(listed), sorted(NAMES), "list")
    on_disk = await box.shell("printf '%s\\0' *; printf '%s' .[!.]* ..?*", cwd=folder)
    for name in NAMES:
        true(name in on_disk, f"{name!r} is not the name on disk")
        path = f"{folder}/{name}"
        equal(listed[name].path, path, "path in the list")
        equal(await box.files.read(path), f"<{name}>", f"content of {name!r}")
        info = await box.files.get_info(path)
        equal((info.name, info.size), (name, len(f"<{name}>".encode())), "info")
        await box.files.write(path, name)
        equal(await box.files.read(path), name, f"content of {name!r}, written alone")
        moved = await box.files.rename(path, f"{folder}/x{name[1:]}")
        equal(moved.name, f"x{name[1:]}", "new name")
        equal(await box.files.exists(path), False, "exists under the old name")
        await box.files.remove(moved.path)
    equal(await box.files.list(folder), [], "list of the emptied folder")
    error = await araises(SandboxException, box.files.write(f"{folder}/{'n' * 256}", "x"))
    true("too long" in str(error).lower(), f"a name of 256 bytes is refused with {error}")


async def contents(box):
    """Every way to write and to read the same bytes."""
    every = bytes(range(256)) * 1000
    path = box.path("contents")
    ways = {
        "bytes": {"data": every},
        "octet stream": {"data": every, "use_octet_stream": True},
        "gzip": {"data": every, "gzip": True},
        "a file": {"data": io.BytesIO(every)},
    }
    for name, options in ways.items():
        await box.files.remove(path)
        written = await box.files.write(path, **options)
        equal((written.name, written.type), ("contents", FileType.FILE), f"written as {name}")
        for reading in ({}, {"gzip": True}):
            found = await box.files.read(path, format="bytes", **reading)
            true(bytes(found) == every, f"{len(found)} bytes came back, written as {name}")
    await box.upload(path, [every, b"", every])
    found = bytearray()
    await box.download(path, found.extend)
    true(bytes(found) == every * 2, f"{len(found)} bytes came back from a streamed upload")
    await box.files.write(path, "short ünd text\r\n")
    equal(await box.files.read(path), "short ünd text\r\n", "after a shorter write")
    await box.files.write(path, io.StringIO("text file"))
    equal(await box.files.read(path), "text file", "from a text file object")


async def empty(box):
    ways = {
        "str": lambda path: box.files.write(path, ""),
        "bytes": lambda path: box.files.write(path, b"", use_octet_stream=True),
        "gzip": lambda path: box.files.write(path, b"", gzip=True),
        "stream": lambda path: box.upload(path, []),
    }
    for name, write in ways.items():
        path = box.path(f"empty {name}")
        await write(path)
        equal((await box.files.get_info(path)).size, 0, f"size, written as {name}")
        equal(await box.files.read(path), "", f"text, written as {name}")
        equal(bytes(await box.files.read(path, format="bytes")), b"", f"bytes of {name}")
        came = []
        await box.download(path, came.append)
        equal(b"".join(came), b"", f"stream of {name}")
    equal(await box.files.write_files([]), [], "an upload of no files")


async def big(box):
    """Up and down as a stream, nothing held in memory on either side."""
    path, size = box.path("big"), box.scale.big_file
    block = hashlib.sha256(b"block").digest() * (MIB // 32)
    sent, came, count = hashlib.sha256(), hashlib.sha256(), 0

    def pieces():
        for number in range(size // MIB):
            piece = b"%032d" % number + block[32:]
            sent.update(piece)
            yield piece

    def take(piece):
        nonlocal count
        count += len(piece)
        came.update(piece)

    started = time.monotonic()
    try:
        await box.upload(path, pieces())
        up = rate("upload", size, started)
        equal((await box.files.get_info(path)).size, size, "size")
        started = time.monotonic()
        await box.download(path, take)
        equal(count, size, "bytes that came back")
        equal(came.hexdigest(), sent.hexdigest(), "digest of what came back")
        return f"{up}; {rate('download', size, started)}"
    finally:
        await box.files.remove(path)


async def many_entries(box):
    count, folder = box.scale.entries, box.path("many entries")
    await box.files.make_dir(folder)
    await box.shell(f"seq -f 'entry %.0f' {count} | tr '\\n' '\\0' | xargs -0 touch", cwd=folder)
    started = time.monotonic()
    listed = await box.files.list(folder)
    took = time.monotonic() - started
    equal(len({entry.name for entry in listed}), count, "different names")
    equal({entry.type for entry in listed}, {FileType.FILE}, "types")
    true(all(entry.path == f"{folder}/{entry.name}" for entry in listed), "a path is wrong")
    started = time.monotonic()
    await box.files.remove(folder)
    equal(await box.files.exists(folder), False, "exists after remove")
    return f"{count} entries: listed in {took:.2f} s, removed in {time.monotonic() - started:.2f} s"


async def trees(box):
    folder = box.path("tree")
    equal(await box.files.make_dir(f"{folder}/a/b/c"), True, "make_dir")
    equal(await box.files.make_dir(f"{folder}/a/b"), False, "make_dir of what exists")
    await box.files.write(f"{folder}/a/b/c/d/e/file", "deep")
    for depth, wanted in ((1, ["a"]), (2, ["a", "a/b"]), (3, ["a", "a/b", "a/b/c"])):
        found = await box.files.list(folder, depth=depth)
        equal(sorted(e.path[len(folder) + 1 :] for e in found), wanted, f"depth {depth}")
    equal(len(await box.files.list(folder, depth=100)), 6, "entries of the whole tree")
    equal(len(await box.files.list(folder, depth=None)), 1, "entries without a depth")
    await araises(InvalidArgumentException, box.files.list(folder, depth=0))
    moved = await box.files.rename(f"{folder}/a", f"{folder}/z")
    equal((moved.type, moved.path), (FileType.DIR, f"{folder}/z"), "a moved folder")
    equal(await box.files.read(f"{folder}/z/b/c/d/e/file"), "deep", "a file in it")
    # A path as deep as Linux takes one, and the tree around it goes in one call.
    deep = "/".join(["d" * 50] * ((4000 - len(folder)) // 51))
    await box.files.make_dir(f"{folder}/{deep}")
    await box.files.write(f"{folder}/{deep}/end", "end")
    equal(await box.files.read(f"{folder}/{deep}/end"), "end", "a file 4000 bytes deep")
    await box.files.remove(folder)
    equal(await box.files.exists(folder), False, "exists after remove")
    equal(await box.files.remove(folder), None, "remove of what is gone")


async def links(box):
    folder, count = box.path("links"), 100
    await box.files.write(f"{folder}/target", "pointed at")
    await box.files.write(f"{folder}/real/inside", "inside")
    script = (
        "ln -s target plain; ln -s real/inside across; ln -s real dir; ln -s missing broken; "
        "ln -s loop loop; ln -s b a; ln -s a b; ln -s target 1; "
        "for n in $(seq 2 30); do ln -s $((n-1)) $n; done; "
        f"ln -s target long1; for n in $(seq 2 {count}); do ln -s long$((n-1)) long$n; done"
    )
    await box.shell(script, cwd=folder)
    for name in ("plain", "1", "30"):
        info = await box.files.get_info(f"{folder}/{name}")
        equal((info.name, info.path), (name, f"{folder}/{name}"), "name and path")
        equal(info.symlink_target, f"{folder}/target", f"target of {name}")
        equal(info.type, FileType.SYMLINK, f"type of {name}")
        equal(info.permissions, "Lrwxrwxrwx", f"permissions of {name}")
        equal(await box.files.read(f"{folder}/{name}"), "pointed at", f"read through {name}")
    equal(await box.files.read(f"{folder}/dir/inside"), "inside", "read through a folder's link")
    equal([e.name for e in await box.files.list(f"{folder}/dir")], ["inside"], "list through it")
    for name in ("broken", "loop", "a", f"long{count}"):
        await araises(SandboxException, box.files.read(f"{folder}/{name}"))
        info = await box.files.get_info(f"{folder}/{name}")
        equal((info.name, info.permissions), (name, "Lrwxrwxrwx"), f"info of {name}")
        equal(info.mode, 0, f"mode of {name}, which leads nowhere")
    listed = {entry.name for entry in await box.files.list(folder, depth=3)}
    true({"plain", "dir", "30", "target"} <= listed, f"the list lacks links: {sorted(listed)[:20]}")
    await araises(FileNotFoundException, box.files.read(f"{folder}/broken"))
    await araises(SandboxException, box.files.write(f"{folder}/loop", "x"))
    await box.files.write(f"{folder}/plain", "through")
    equal(await box.files.read(f"{folder}/target"), "through", "a write through a link")
    await box.files.rename(f"{folder}/plain", f"{folder}/renamed")
    equal((await box.files.get_info(f"{folder}/renamed")).type, FileType.SYMLINK, "renamed link")
    for name in ("renamed", "broken", "loop", "dir"):
        await box.files.remove(f"{folder}/{name}")
    equal(await box.files.read(f"{folder}/target"), "through", "the target of a removed link")
    equal(await box.files.read(f"{folder}/real/inside"), "inside", "below a removed link")


async def owners(box):
    """Another user's files: whoever is named owns what is made, and root can read anything."""
    if box.target.native and box.target.user != "root":
        raise Skip("only root can make files for somebody else")
    other = box.target.other_user
    folder = f"/tmp/{box.target.folder}"
    try:
        await box.files.write(f"{folder}/of/other", "theirs", user=other)
        info = await box.files.get_info(f"{folder}/of/other", user=other)
        equal((info.owner, info.permissions), (other, "-rw-r--r--"), "owner and permissions")
        for path in (folder, f"{folder}/of"):
            equal((await box.files.get_info(path)).owner, other, f"owner of {path}")
        await box.files.write(f"{folder}/of/mine", "mine", user=box.target.user)
        mine = await box.files.get_info(f"{folder}/of/mine")
        equal(mine.owner, box.target.user, "owner of a file beside it")
        await box.shell("chmod 000 other; chmod 600 mine; chown root: mine", cwd=f"{folder}/of")
        for name, text in (("other", "theirs"), ("mine", "mine")):
            found = await box.files.read(f"{folder}/of/{name}", user="root")
            equal(found, text, "an unreadable file, read by root")
        info = await box.files.get_info(f"{folder}/of/other", user="root")
        equal((info.permissions, info.mode & 0o777), ("----------", 0), "an unreadable file")
        names = [entry.name for entry in await box.files.list(f"{folder}/of", user=other)]
        equal(sorted(names), ["mine", "other"], "a folder with unreadable files")
        # The command of a user who may not, as opposed to the daemon, is refused by the kernel.
        refused = await box.run(f"cat '{folder}/of/mine' || true", user=unprivileged(box), cwd="/")
        true("Permission denied" in refused.stderr, f"stderr says {refused.stderr!r}")
        # Nor does a link of theirs lend them the daemon's rights.
        link = f"ln -s mine link; chown -h {unprivileged(box)}: link"
        await box.shell(link, cwd=f"{folder}/of")
        sneaky = f"{folder}/of/link"
        for awaited in (box.files.read, lambda p, user: box.files.write(p, "x", user=user)):
            await araises(SandboxException, awaited(sneaky, user=unprivileged(box)))
        equal(await box.files.read(sneaky, user="root"), "mine", "the file the link leads to")
    finally:
        await box.files.remove(folder, user="root")


def unprivileged(box):
    return box.target.other_user if box.target.user == "root" else box.target.user


async def relative(box):
    folder, home = box.target.folder, box.target.home
    await box.files.write(f"{folder}/r", "relative")
    for path in (f"./{folder}/r", f"~/{folder}/r", f"{folder}/x/../r", f"{home}/{folder}//./r"):
        equal(await box.files.read(path), "relative", f"read of {path}")
        equal((await box.files.get_info(path)).path, f"{home}/{folder}/r", f"path of {path}")
    for path in ("~", "", "~/", ".", home):
        names = [entry.name for entry in await box.files.list(path)]
        true(folder in names, f"the suite's folder is not listed below {path!r}")
    await araises(InvalidArgumentException, box.files.read("~nobody/x"))
    await araises(InvalidArgumentException, box.files.read("a\0b"))
    away = await box.files.get_info("/../../tmp/..")
    equal(away.path, "/", "a path that climbs beyond the root")


async def metadata(box):
    path = box.path("marked")
    marks = {"kind": "note", "author": "someone else"}
    written = await box.files.write(path, "x", metadata=marks)
    equal(written.metadata, marks, "metadata of the write")
    equal((await box.files.get_info(path)).metadata, marks, "metadata of the file")
    found = [e.metadata for e in await box.files.list(box.target.base) if e.name == "marked"]
    equal(found, [marks], "metadata in the list")
    moved = await box.files.rename(path, path + " moved")
    equal(moved.metadata, marks, "metadata after a rename")
    await box.files.write(moved.path, "y")
    equal(await box.files.read(moved.path), "y", "content written again")


async def refused(box):
    folder = box.path("refused")
    await box.files.write(f"{folder}/file", "x")
    missing = f"{folder}/missing"
    equal(await box.files.exists(missing), False, "exists")
    for awaited in (
        box.files.read(missing),
        box.files.list(missing),
        box.files.get_info(missing),
        box.files.rename(missing, f"{folder}/other"),
        box.watch(missing),
    ):
        error = await araises(FileNotFoundException, awaited)
        true(missing in str(error), f"the error does not name the path: {error}")
    for awaited in (
        box.files.read(folder),
        box.files.write(folder, "x"),
        box.files.list(f"{folder}/file"),
        box.files.make_dir(f"{folder}/file"),
        box.watch(f"{folder}/file"),
    ):
        await araises(InvalidArgumentException, awaited)
    await araises(SandboxException, box.files.write(f"{folder}/file/below", "x"))
    await araises(SandboxException, box.files.rename(folder, f"{folder}/into/itself"))
    equal(await box.files.read(f"{folder}/file"), "x", "the file after all that")
    await box.files.write(f"{folder}/second", "second")
    await box.files.rename(f"{folder}/second", f"{folder}/file")
    equal(await box.files.read(f"{folder}/file"), "second", "a file renamed over another")


async def refused_uploads(box):
    """The answer arrives, although the daemon need not see the content to refuse it."""
    folder, large = box.path("refused"), b"x" * 300_000
    for _ in range(30):
        await araises(InvalidArgumentException, box.files.write(folder, b"x"))
        await araises(InvalidArgumentException, box.files.write(folder, large))
        await araises(InvalidArgumentException, box.upload(folder, [large]))


async def at_once(box):
    count = min(box.scale.at_once, 50)
    folder = box.path("at once")
    writes = (box.files.write(f"{folder}/{n}", f"{n}" * 1000) for n in range(count))
    await asyncio.gather(*writes)
    found = await asyncio.gather(*(box.files.read(f"{folder}/{n}") for n in range(count)))
    equal(found, [f"{n}" * 1000 for n in range(count)], "contents")


SCENARIOS = (
    names,
    contents,
    empty,
    big,
    many_entries,
    trees,
    links,
    owners,
    relative,
    metadata,
    refused,
    refused_uploads,
    at_once,
)
