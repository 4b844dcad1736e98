"""What watches report, with either Python SDK: pushed in the one, polled in the other."""

from e2b import SandboxException

from checks import araises, auntil, equal, true


async def each_kind(box):
    folder = box.path("watched ünïcode")
    await box.files.make_dir(folder)
    watch = await box.watch(folder)
    await box.files.write(f"{folder}/a b", "x")
    await watch.saw("create", "a b")
    await watch.saw("write", "a b")
    await box.shell("chmod 600 'a b'", cwd=folder)
    await watch.saw("chmod", "a b")
    await box.files.rename(f"{folder}/a b", f"{folder}/漢")
    await watch.saw("rename", "a b")
    await watch.saw("create", "漢")
    await box.files.remove(f"{folder}/漢")
    await watch.saw("remove", "漢")
    await box.files.make_dir(f"{folder}/below")
    await watch.saw("create", "below")
    await box.files.write(f"{folder}/below/unseen", "x")
    await box.files.write(f"{folder}/last", "x")
    await watch.saw("create", "last")
    names = {event.name for event in watch.events}
    true(not any("unseen" in name for name in names), "a plain watch saw into a folder")
    await watch.stop()
    await stopped(box, watch, folder)


async def stopped(box, watch, folder):
    """After the stop nothing more is told."""
    count = len(watch.events)
    await box.files.write(f"{folder}/after", "x")
    if box.name == "sync":
        await araises(SandboxException, watch.refresh())
    else:
        equal(watch.exits, [None], "what on_exit was told")
    equal(len(watch.events), count, "events after the stop")


async def recursive(box):
    folder = box.path("recursive")
    await box.files.make_dir(f"{folder}/old")
    watch = await box.watch(folder, recursive=True, include_entry=True)
    await box.files.write(f"{folder}/old/file", "12345")
    await watch.saw("create", "old/file")
    await box.files.make_dir(f"{folder}/new/deep/er")
    await watch.saw("create", "new")
    # A folder made a moment ago is watched too, if perhaps not at once.
    number = 0

    async def seen():
        nonlocal number
        number += 1
        await box.files.write(f"{folder}/new/deep/er/f{number}", "x")
        await watch.refresh()
        return any(event.name.startswith("new/deep/er/f") for event in watch.events)

    await auntil(60, "an event in a new folder", seen)
    entries = [e.entry for e in watch.events if e.name == "old/file" and e.entry]
    true(entries, "no event of the file carries its entry")
    equal(entries[-1].path, f"{folder}/old/file", "path of the entry")
    equal(entries[-1].size, 5, "size of the entry")
    await box.files.rename(f"{folder}/old", f"{folder}/moved")
    await watch.saw("rename", "old")
    await box.files.write(f"{folder}/moved/again", "x")
    await watch.saw("create", "moved/again")
    await watch.stop()


async def burst(box):
    """A great many files at once: every one is reported."""
    folder, count = box.path("burst"), box.scale.burst
    await box.files.make_dir(folder)
    watch = await box.watch(folder, recursive=True)
    await box.shell(f"for n in $(seq {count}); do : > f$n; done", cwd=folder)

    def all_created(events):
        return len({e.name for e in events if e.type.value == "create"}) >= count

    await watch.until(f"all {count} files", all_created)
    await watch.stop()


async def tree_deleted(box):
    """The tree below a watch goes while it is watched; the watch tells, and goes on."""
    folder = box.path("doomed")
    width = 200 if box.target.native else 30
    script = f"for n in $(seq {width}); do mkdir -p d$n/e/f; : > d$n/e/f/g; done"
    await box.files.make_dir(folder)
    await box.shell(script, cwd=folder)
    watch = await box.watch(folder, recursive=True, include_entry=True)
    await box.shell("rm -rf d*", cwd=folder)

    def all_removed(events):
        gone = {e.name for e in events if e.type.value == "remove"}
        return {f"d{n}" for n in range(1, width + 1)} <= gone

    await watch.until(f"the end of all {width} folders", all_removed)
    await box.files.write(f"{folder}/after", "x")
    await watch.saw("create", "after")
    equal(watch.exits, [], "ends of the watch")
    await watch.stop()


async def folder_deleted(box):
    """The watched folder itself goes: no hang, no crash, and the watch can be stopped."""
    folder = box.path("gone")
    await box.files.write(f"{folder}/file", "x")
    watch = await box.watch(folder, recursive=True)
    await box.files.remove(folder)
    await watch.saw("remove", "file")
    await watch.stop()
    equal(await box.is_running(), True, "is_running")
    again = box.path("gone")
    await box.files.make_dir(again)
    second = await box.watch(again)
    await box.files.write(f"{again}/new", "x")
    await second.saw("create", "new")
    await second.stop()


SCENARIOS = (each_kind, recursive, burst, tree_deleted, folder_deleted)
